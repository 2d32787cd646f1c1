r"""Gauss-Newton: any program's likelihood as a quadratic in the space of its few measured values.

With r(x_0) = Sigma^(-1/2) (y - h(x_0)) the whitened residual of all observed sites, h the mean of the measurement and
Sigma its covariance held where the program is expanded, at x_0 = a,

    log p(y given x_0)  ~  l + g^T d - d^T J d / 2,      d = x_0 - a,   H = -dr/dx_0,   g = H^T r(a),   J = H^T H,

exact where the noise is Gaussian and h is linear. Few rows of H can be written out, and then, of x_0 ~ N(m, C),

    log of the integral     l + |r(a)|^2 / 2 + log N(r(a) - H (m - a); 0, I + H C H^T) + const
    x_0 given y             by Matheron's rule: m + u + C H^T (I + H C H^T)^-1 (r(a) - H (m - a) - H u - e),
                            u ~ N(0, C),  e ~ N(0, I)

for C of any form, all latents together.

References:
    H. Rue, S. Martino, N. Chopin, "Approximate Bayesian inference for latent Gaussian models by using integrated nested
    Laplace approximations" (2009): a Gaussian about the conditioned mode, found by repeated expansion.
    J. Wilson, V. Borovitskiy, A. Terenin, P. Mostowsky, M. Deisenroth, "Pathwise Conditioning of Gaussian Processes"
    (2020), arXiv 2011.04026: draws by Matheron's rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal

from smcdiff.guidance.picture import foretold_variance
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Covariances, Noise, States
from smcdiff.guidance.singular import per_program
from smcdiff.measurement.noise import gaussian_moments, poisson_moments

__all__ = ["FewMeasurements", "check_laws", "few_measurements", "whitened", "whitened_residual"]


@dataclass(frozen=True, eq=False)
class FewMeasurements:
    """The quadratic of any program, with H written out. Its linear algebra is float64.

    Args:
        at: {site: a}, where it is expanded, of the latents that move.
        constant: l + |r(a)|^2 / 2, (m,) of float64.
        residual: r(a), (m, values) of float64.
        rows: {site: H}, (m, values, *shape).
    """

    at: States
    constant: Tensor
    residual: Tensor
    rows: States

    @property
    def expanded_at(self) -> States:
        return self.at

    def condition(self, mean: States, covariance: Covariances) -> _FewConditioned:
        residual, spread = self.residual, {}
        inner = torch.eye(residual.shape[1], dtype=residual.dtype, device=residual.device)
        for name, h in self.rows.items():
            residual = residual - _times(h, mean[name] - self.at[name])
            columns = torch.stack([covariance[name].apply(h[:, i]) for i in range(h.shape[1])], 1)
            spread[name] = _flat(columns)  # C H^T, (m, values, d)
            inner = inner + _flat(h) @ spread[name].mT
        lower = torch.linalg.cholesky_ex(0.5 * (inner + inner.mT))[0]
        return _FewConditioned(mean, covariance, self.constant, residual, self.rows, spread, lower)


@dataclass(frozen=True, eq=False)
class _FewConditioned:
    centre: States  # m
    covariance: Covariances
    constant: Tensor
    residual: Tensor  # r at m
    rows: States
    spread: States
    lower: Tensor  # of I + H C H^T

    def log_integral(self) -> Tensor:
        white = torch.linalg.solve_triangular(self.lower, self.residual[..., None], upper=False)[..., 0]
        return self.constant - 0.5 * white.square().sum(-1) - self.lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def mean(self) -> States:
        return self._moved(self.residual, self.centre)

    def draw(self, noise: Noise) -> States:
        fresh = {name: c.draw(noise(self.centre[name].shape)) for name, c in self.covariance.items()}
        missing = self.residual - noise(self.residual.shape)
        for name, h in self.rows.items():
            missing = missing - _times(h, fresh[name])
        return self._moved(missing, {name: self.centre[name] + fresh[name] for name in fresh})

    def _moved(self, missing: Tensor, states: States) -> States:
        """states + C H^T (I + H C H^T)^-1 missing."""
        weight = torch.cholesky_solve(missing[..., None], self.lower)
        return {
            name: state + (self.spread[name].mT @ weight)[..., 0].reshape(state.shape).to(state.dtype)
            for name, state in states.items()
        }


def few_measurements(program: Program, at: States, held: States) -> FewMeasurements:
    """The quadratic of a program about ``at``, H by one product back per measured value.

    Args:
        at: of the latents that move, {site: (m, *shape)}.
        held: of those that do not.
    """

    def residual_of(moving: States, still: States) -> tuple[Tensor, Tensor]:
        residual = whitened_residual(program, {**moving, **still})
        return residual, residual

    at = {name: value.detach() for name, value in at.items()}
    jacobian, residual = torch.func.vmap(torch.func.jacrev(residual_of, has_aux=True))(at, held)
    constant = program.log_prob({**at, **held}) + 0.5 * residual.double().square().sum(1)
    return FewMeasurements(at, constant, residual.double(), {name: -rows for name, rows in jacobian.items()})


def whitened_residual(program: Program, state: States) -> Tensor:
    """r of one particle, all observed sites in a row; derivatives take Sigma for a constant.

    Args:
        state: {site: (*shape)}, of all latents.
    """
    rows = program.scores(state, whitened).values()
    return torch.cat([(raw * weigh(torch.ones_like(raw)).sqrt()).flatten() for raw, weigh in rows])


@per_program
def check_laws(program: Program, who: str) -> None:
    """Refuse laws without a mean and a variance.

    Raises:
        TypeError: naming the site and the remedy.
    """
    for name, law in program.probe.laws.items():
        value = program.observed[name]
        try:
            finite = bool(torch.isfinite(whitened(name, law, value)).all())
        except (AttributeError, NotImplementedError):
            finite = False
        if not finite:
            raise TypeError(
                f"{who} conditions on a measurement by its mean and variance, and the observed site {name!r} has the "
                f"law {type(law).__name__} without them; use sd.TDS with sd.PointTwist(), which takes any likelihood"
            )


def whitened(name: str, fn: Distribution, value: Tensor) -> Tensor:
    """Sigma^(-1/2) (y - h), of the shape of y; nothing flows back through Sigma.

    Where the variance grows with the mean it is not taken below a quarter of the one that y foretells: far from the
    measurement, where few counts are expected and many were seen, the law's own variance promises far too much.
    """
    if value.numel() == 0:  # a factor: a likelihood that measures nothing
        return value
    if isinstance(fn, Independent):
        return whitened(name, fn.base_dist, value)
    if isinstance(fn, MaskedDistribution):
        seen = torch.as_tensor(fn._mask, device=value.device).expand(fn.batch_shape)
        seen = seen[(..., *(None,) * len(fn.event_shape))]
        return torch.where(seen, whitened(name, fn.base_dist, value), 0.0)
    if isinstance(fn, MultivariateNormal | LowRankMultivariateNormal):
        missing = (value - fn.loc)[..., None]
        return torch.linalg.solve_triangular(fn.scale_tril.detach(), missing, upper=False)[..., 0]
    law: Any = fn
    known = gaussian_moments(fn) or poisson_moments(fn)
    loc, variance = (law.mean, law.variance) if known is None else (known.loc, known.variance)
    if known is not None:
        variance = torch.maximum(variance, _LEAST * foretold_variance(law, value.to(variance.dtype)))
    return (value - loc) * variance.detach().rsqrt()


#: Least share of the variance foretold by y.
_LEAST = 0.25


def _flat(rows: Tensor) -> Tensor:
    """(m, values, *shape) as (m, values, d) of float64."""
    return rows.reshape(*rows.shape[:2], -1).double()


def _times(h: Tensor, x: Tensor) -> Tensor:
    """H x, (m, values)."""
    return (_flat(h) @ x.reshape(len(x), -1, 1).double())[..., 0]
