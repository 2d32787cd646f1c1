r"""A log-likelihood as a quadratic about the denoiser's estimate, and what it does to a normal x_0.

With r(x_0) = Sigma^(-1/2) (y - h(x_0)) the whitened residual of all observed sites, h the mean of the measurement and
Sigma its covariance held at m = x0_hat, Gauss-Newton gives

    log p(y given x_0)  ~  l + g^T d - d^T J d / 2,      d = x_0 - m,   H = -dr/dx_0,   g = H^T r(m),   J = H^T H,

exact where the noise is Gaussian and h is linear. Under x_0 ~ N(m, C) everything that the locally optimal proposal
needs is then in closed form, with P = (C^-1 + J)^-1:

    log of the integral of the quadratic     l + g^T P g / 2 - log det(I + C J) / 2
    x_0 given y                              N(m + P g, P)

Three classes do this: in coordinates where C and J are both diagonal; in the space of few measured values, where
P = C - C H^T (I + H C H^T)^-1 H C; and by conjugate gradients, for pictures whose C and J have no basis in common.

References:
    M. Pitt, N. Shephard, "Filtering via Simulation: Auxiliary Particle Filters" (1999): the fully adapted filter.
    G. Papandreou, A. Yuille, "Gaussian Sampling by Local Perturbations" (2010): draws by perturbing and solving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal

from smcdiff.diffusion.covariance import Covariance, Diagonal
from smcdiff.guidance.program import Program
from smcdiff.measurement.noise import gaussian_moments, poisson_moments
from smcdiff.transforms import Basis

__all__ = [
    "Conditioned",
    "DiagonalInformation",
    "FewMeasurements",
    "Information",
    "few_measurements",
    "whitened_residual",
]

States = dict[str, Tensor]


class Conditioned(Protocol):
    """x_0 ~ N(m, C) of m particles, and what the measurement makes of it."""

    def log_integral(self) -> Tensor:
        """log of the integral of N(x_0; m, C) exp(l + g^T d - d^T J d / 2) over x_0, (m,) of float64."""

    def draw(self, noise: Any) -> States:
        """x_0 given y, {site: (m, *shape)}; ``noise`` makes standard normal numbers of a shape."""


class Information(Protocol):
    """The quadratic of m particles, about their estimates."""

    def condition(self, mean: States, covariance: dict[str, Covariance]) -> Conditioned:
        """The quadratic under N(mean, covariance), where ``mean`` need not be where it was expanded."""


@dataclass(frozen=True, eq=False)
class DiagonalInformation:
    """One latent with C and J diagonal in one basis: everything elementwise.

    Args:
        site: the latent.
        at: m, where the quadratic is expanded, (m, *shape).
        value: l, (m,) of float64.
        gradient: g, (m, *shape).
        precision: J's coordinates, (m or 1, *shape) or broadcastable to it.
        basis: of the coordinates.
    """

    site: str
    at: Tensor
    value: Tensor
    gradient: Tensor
    precision: Tensor
    basis: Basis

    def condition(self, mean: States, covariance: dict[str, Covariance]) -> _DiagonalConditioned:
        c = covariance[self.site]
        assert isinstance(c, Diagonal)
        away = mean[self.site] - self.at
        slope = self.basis.to_spectral(self.gradient)
        d = self.basis.to_spectral(away)
        value = self.value + _dot(slope - 0.5 * self.precision * d, d)
        return _DiagonalConditioned(
            self.site, mean[self.site], c.variance, value, slope - self.precision * d, self.precision, self.basis
        )


@dataclass(frozen=True, eq=False)
class _DiagonalConditioned:
    site: str
    mean: Tensor
    variance: Tensor
    value: Tensor
    slope: Tensor  # g at the mean, in coordinates
    precision: Tensor
    basis: Basis

    @property
    def spread(self) -> Tensor:
        """P = C / (1 + C J), in coordinates."""
        return self.variance / (1 + self.variance * self.precision)

    def log_integral(self) -> Tensor:
        gained = self.slope.square() * self.spread - torch.log1p(self.variance * self.precision)
        return self.value + 0.5 * gained.flatten(1).sum(1, dtype=torch.float64)

    def draw(self, noise: Any) -> States:
        fresh = self.spread.sqrt() * noise(self.mean.shape)
        return {self.site: self.mean + self.basis.from_spectral(self.spread * self.slope + fresh)}


@dataclass(frozen=True, eq=False)
class FewMeasurements:
    """Any number of latents, any covariances, and few enough measured values to write H out.

    Args:
        at: {site: m}, where the quadratic is expanded.
        constant: l + r^T r / 2, (m,) of float64.
        residual: r, (m, values).
        rows: {site: H}, (m, values, *shape).
    """

    at: States
    constant: Tensor
    residual: Tensor
    rows: States

    def condition(self, mean: States, covariance: dict[str, Covariance]) -> _FewConditioned:
        residual = self.residual
        for name, h in self.rows.items():
            residual = residual - (h.flatten(2) @ (mean[name] - self.at[name]).flatten(1)[..., None])[..., 0]
        spread = {}  # C H^T, (m, values, *shape)
        inner = torch.eye(residual.shape[1], dtype=residual.dtype, device=residual.device)
        for name, h in self.rows.items():
            columns = [covariance[name].apply(h[:, i]) for i in range(h.shape[1])]
            spread[name] = torch.stack(columns, 1)
            inner = inner + h.flatten(2) @ spread[name].flatten(2).mT
        lower = torch.linalg.cholesky_ex(0.5 * (inner + inner.mT))[0]
        return _FewConditioned(mean, covariance, self.constant, residual, self.rows, spread, lower)


@dataclass(frozen=True, eq=False)
class _FewConditioned:
    mean: States
    covariance: dict[str, Covariance]
    constant: Tensor
    residual: Tensor
    rows: States
    spread: States
    lower: Tensor  # of I + H C H^T

    def log_integral(self) -> Tensor:
        white = torch.linalg.solve_triangular(self.lower, self.residual[..., None], upper=False)[..., 0].double()
        log_det = self.lower.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        return self.constant - 0.5 * white.square().sum(-1) - log_det

    def draw(self, noise: Any) -> States:
        # Matheron's rule: a draw of x_0 and of y's noise, moved by what they miss of the measurement
        fresh = {name: c.draw(noise(self.mean[name].shape)) for name, c in self.covariance.items()}
        missing = self.residual - noise(self.residual.shape)
        for name, h in self.rows.items():
            missing = missing - (h.flatten(2) @ fresh[name].flatten(1)[..., None])[..., 0]
        weight = torch.cholesky_solve(missing[..., None], self.lower)
        return {
            name: self.mean[name]
            + fresh[name]
            + (self.spread[name].flatten(2).mT @ weight)[..., 0].reshape(fresh[name].shape)
            for name in self.mean
        }


def few_measurements(program: Program, at: States, who: str) -> FewMeasurements:
    """The quadratic of a program about ``at``, with H written out: one product back per measured value."""
    free = {name: value for name, value in at.items() if name not in program.held}
    fixed = {name: value for name, value in at.items() if name in program.held}

    def residual_of(moving: States, still: States, reference: States) -> Tensor:
        return whitened_residual(program, {**moving, **still}, {**reference, **still}, who)

    residual = torch.func.vmap(residual_of)(free, fixed, free)
    jacobian = torch.func.vmap(torch.func.jacrev(residual_of))(free, fixed, free)
    constant = program.log_prob(at) + 0.5 * residual.double().square().sum(1)
    return FewMeasurements(free, constant, residual, {name: -rows for name, rows in jacobian.items()})


def whitened_residual(program: Program, state: States, reference: States, who: str) -> Tensor:
    """r of one particle: Sigma(reference)^(-1/2) (y - h(state)), all observed sites in a row.

    Raises:
        TypeError: for a law without independent entries or a known covariance.
    """

    def moments(name: str, fn: Distribution, value: Tensor) -> Tensor:
        base: Any = fn
        while isinstance(base, Independent):
            base = base.base_dist
        if isinstance(base, MultivariateNormal):
            return base.loc.flatten()
        known = gaussian_moments(fn) or poisson_moments(fn)
        loc = base.mean if known is None else known.loc
        return loc.expand(value.shape).flatten()

    def whiten(name: str, fn: Distribution, value: Tensor) -> Tensor:
        base: Any = fn
        while isinstance(base, Independent):
            base = base.base_dist
        if isinstance(base, MultivariateNormal):
            return base.scale_tril
        known = gaussian_moments(fn) or poisson_moments(fn)
        variance = base.variance if known is None else known.variance
        return variance.expand(value.shape).flatten().rsqrt()

    means = program.scores(state, moments)
    scales = program.scores(reference, whiten)
    rows = []
    for name, (mean, _) in means.items():
        scale, weigh = scales[name]
        missing = program.observed[name].flatten() - mean
        if scale.ndim == 2 and scale.shape[0] == scale.shape[1] == len(missing):
            rows.append(torch.linalg.solve_triangular(scale, missing[:, None], upper=False)[:, 0])
        else:
            rows.append(missing * scale * weigh(torch.ones_like(program.observed[name])).flatten().sqrt())
    return torch.cat(rows)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1, dtype=torch.float64)
