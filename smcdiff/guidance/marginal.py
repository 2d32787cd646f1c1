r"""A picture measured through a few scalar latents, with these integrated out: kernels and noise levels not known.

    y = A(theta) x_0 + noise,      theta = a function of z_0 ~ N(0, I_d), d at most 3.

Model p(x_0 given x_t) as N(x0_hat, C_t); p(z_0 given z_t) = N(m, v I) is known exactly. Given z_0 all is linear and
Gaussian, L_t(z_0) = log of the integral of N(x_0; x0_hat, C_t) p(y given x_0, z_0) in closed form, and what is left is
an integral over the few z_0, taken at nodes about the mode of each particle (:mod:`smcdiff.guidance.marginal_nodes`):

    twist      psi_t   = integral of N(z_0; m, v I) exp L_t(z_0)
    latents    z_s  ~  N(b z_t + c mu, c^2 V + kappa^2 I),  mu and V the moments of z_0 given y under the same integral
    picture    x_s given z_s  ~  sum_j omega_j p(x_s given x_t) exp(L_ts(z_j) - L_t(z_j)),
               omega_j about exp L_t(z_j) N(z_j; m_st, v_st I), at nodes of z_0 given z_t, z_s and y

m_st, v_st and L_ts are m, v and L_t once z_s and x_s are seen as well. A draw of the picture's law: z_j from omega_j,
x_0' from N(x0_hat, C_t) given y and z_j, x_s = b x_t + c x_0' + kappa noise. The weight is exact for any nodes,

    log p - log q  =  log p(z_s given z_t) - log q(z_s) + log sum_j a_j exp L_t(z_j) - log sum_j a_j exp L_ts(z_j),

a_j = w_j N(z_j; m_st, v_st I) over the density that the nodes' rule is for. One forward pass a particle and step.

A linearisation in z_0 and x_0 together, as that of :class:`smcdiff.Adapted`, sees theta and the picture through one
tangent at x0_hat; where x0_hat is still a blur without detail that tangent says little of a kernel's width.

References:
    A. Doucet, N. de Freitas, K. Murphy, S. Russell, "Rao-Blackwellised Particle Filtering for Dynamic Bayesian
    Networks" (2000): what is known in closed form is not sampled.
    H. Rue, S. Martino, N. Chopin, "Approximate Bayesian inference for latent Gaussian models by using integrated nested
    Laplace approximations" (2009): a few parameters by quadrature, the field given them in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance
from smcdiff.diffusion.covariance_models import CovarianceModel
from smcdiff.diffusion.kernels import ReverseStep
from smcdiff.guidance.adapted import Adapted
from smcdiff.guidance.base import IndependentTransition, Prediction, SiteStep
from smcdiff.guidance.full_chains import chain_against_own, foretold
from smcdiff.guidance.given_latents import AtLatents, GivenLatents, given_latents
from smcdiff.guidance.marginal_nodes import GRIDS, Nodes, moments, refined
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Noise, States

__all__ = ["Marginalised"]


@dataclass(frozen=True)
class Marginalised:
    """The locally optimal proposal of a program with a few scalar latents beside its picture, these integrated out.

    As with :class:`smcdiff.Adapted`, the diffusion prior is run with ``variance="full"``.

    Args:
        model: the Pyro program: one diffusion prior, measured linearly with Gaussian noise, and one to three numbers
            that the operator and the noise level may depend on.
        covariance: as for :class:`smcdiff.Adapted`.
        nodes: of the quadrature along each latent axis, at least 2.
        max_measurements: up to so many measured values any linear operator and any covariance is taken; more need an
            operator with a singular basis that the covariance is diagonal in, whatever the latents, and white noise.

    Raises:
        ValueError: for less than two nodes; at the run, for a prior without a covariance.
        TypeError: at the run, for a program that it cannot take, with the remedy.
    """

    model: Callable[..., Any]
    covariance: CovarianceModel | None = None
    nodes: int = 5
    max_measurements: int = 64
    _adapted: Adapted = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ValueError(f"got nodes {self.nodes}; expected at least 2 along each axis, as one has no spread")
        adapted = Adapted(self.model, self.covariance)
        object.__setattr__(self, "_adapted", adapted)
        object.__setattr__(self, "model", adapted.model)

    @property
    def forward_only(self) -> bool:
        return True

    @property
    def twist(self) -> _MarginalTwist:
        return _MarginalTwist(self)

    @property
    def proposal(self) -> _MarginalProposal:
        return _MarginalProposal(self)

    def look(self, steps: dict[str, SiteStep], held: States) -> _Look:
        """What the Gaussian models say of particles about to take a step."""
        first = next(iter(steps.values()))
        covariances = self._adapted.covariances(first.program, first.k, {n: step.estimate for n, step in steps.items()})
        name, sites = _sites(first.program, held)
        measured = given_latents(first.program, name, held, covariances[name], self.max_measurements)
        return _Look(steps, name, sites, measured, covariances[name], self.nodes)


@dataclass(frozen=True)
class _MarginalTwist:
    method: Marginalised

    def log_psi(self, prediction: Prediction) -> Tensor:
        return _found(self.method, prediction)["log_psi"]


@dataclass(frozen=True)
class _MarginalProposal:
    method: Marginalised

    @property
    def extra_passes(self) -> int:
        return 0

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def carry(self, prediction: Prediction) -> dict[str, Tensor]:
        found = _found(self.method, prediction)
        return {"centre": found["centre"], "root": found["root"]}

    def transition(self, steps: dict[str, SiteStep], held: States, carried: dict[str, Tensor]) -> _MarginalTransition:
        return _MarginalTransition(self.method.look(steps, held), carried["centre"], carried["root"])


def _found(method: Marginalised, prediction: Prediction) -> dict[str, Tensor]:
    """log psi_t of each particle, mu (m, d) and a root of V (m, d, d)."""
    if id(method) not in prediction.memo:
        program, x = prediction.program, prediction.x
        held = {name: x[name].detach() for name in program.held}
        steps = {name: SiteStep.at(prediction, name) for name in program.latents if name not in held}
        look = method.look(steps, held)
        mean, variance = look.latents
        log_f = look.under(mean, variance)
        centre, scale = refined(log_f, mean, variance.sqrt())
        nodes = Nodes.about(centre, scale, method.nodes)
        log_psi, centre, root = moments(nodes, log_f(nodes.z), scale)
        prediction.memo[id(method)] = {"log_psi": log_psi, "centre": centre, "root": root}
    return dict(prediction.memo[id(method)])


def _sites(program: Program, held: States) -> tuple[str, tuple[str, ...]]:
    """The picture's site, and those of the latents that are integrated out.

    Raises:
        TypeError: where there is not one picture, or not one to three numbers beside it.
    """
    pictures = [name for name, latent in program.latents.items() if latent.is_diffusion]
    others = tuple(name for name, latent in program.latents.items() if not latent.is_diffusion and name not in held)
    count = sum(program.latents[name].chain.shape.numel() for name in others)
    if len(pictures) != 1 or count not in GRIDS:
        raise TypeError(
            f"sd.Marginalised integrates one to {max(GRIDS)} numbers out beside one diffusion prior; got the diffusion "
            f"priors {pictures} and {count} numbers in the latents {list(others)}. Use sd.Adapted"
        )
    return pictures[0], others


@dataclass(frozen=True, eq=False)
class _Look:
    """Particles before a step, their latents z in a row, and the measurement given z_0.

    Args:
        steps: of the latents that move.
        name: the picture's site.
        sites: those of the latents that are integrated out.
        measured: the measurement given them.
        covariance: C_t.
        count: nodes along each axis.
    """

    steps: dict[str, SiteStep]
    name: str
    sites: tuple[str, ...]
    measured: GivenLatents
    covariance: Covariance
    count: int

    @property
    def picture(self) -> SiteStep:
        return self.steps[self.name]

    @property
    def latents(self) -> tuple[Tensor, Tensor]:
        """m and v of z_0 given z_t, (particles, d)."""
        estimates = [self.steps[name].estimate for name in self.sites]
        variances = [e.variance.expand(e.mean.shape) for e in estimates if e.variance is not None]
        return _row([e.mean for e in estimates]), _row(variances)

    @property
    def z(self) -> Tensor:
        """z_t, (m, d)."""
        return _row([self.steps[name].x for name in self.sites])

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """b, c and kappa of each latent's step, (d,)."""
        steps = [self.steps[name] for name in self.sites]

        def row(value: Callable[[ReverseStep], float]) -> Tensor:  # filled on the device: nothing is copied to it
            return torch.cat(
                [s.x.new_full(s.x.shape[1:], value(s.coefficients), dtype=torch.float64).flatten() for s in steps]
            )

        return row(lambda to: to.b), row(lambda to: to.c), row(lambda to: to.kappa)

    def split(self, z: Tensor) -> States:
        """Rows (m, ..., d) by site, {site: (m, ..., *shape)}."""
        sizes = [self.steps[name].x[0].numel() for name in self.sites]
        parts = z.to(self.picture.x.dtype).split(sizes, -1)
        shapes = [self.steps[name].x.shape[1:] for name in self.sites]
        return {
            name: part.reshape(*z.shape[:-1], *shape)
            for name, part, shape in zip(self.sites, parts, shapes, strict=True)
        }

    def under(self, mean: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """log of N(z_0; mean, variance) exp L_t(z_0) as a function of z_0, (m, nodes, d) to (m, nodes)."""
        x0_hat = self.picture.estimate.mean.detach()

        def log_f(z: Tensor) -> Tensor:
            log_l = self.measured.at(self.split(z)).log_integral(x0_hat, self.covariance)
            return (_log_normal(z, mean, variance) + log_l).nan_to_num(nan=_LOWEST).clamp(min=_LOWEST)

        return log_f


#: Where a latent is so far out that the program's numbers end.
_LOWEST = -1e12


@dataclass(frozen=True, eq=False)
class _MarginalTransition:
    """z_s first, and x_s given z_s.

    Args:
        look: at x_t.
        centre, root: mu and a root of V.
    """

    look: _Look
    centre: Tensor
    root: Tensor
    _kept: list[tuple[Tensor, AtLatents, Tensor]] = field(default_factory=list, repr=False)

    def sample(self, noise: Noise) -> States:
        law = self._latents()
        z = law.loc + (law.scale_tril @ noise(law.loc.shape).double()[..., None])[..., 0]
        latents = self.look.split(z)
        given, log_a = self._measured(latents)
        step = self.look.picture
        mean, to = step.estimate.mean, step.coefficients
        share = (log_a + given.log_integral(mean, self.look.covariance)).softmax(1)
        place = torch.special.ndtr(noise(torch.Size((len(z), 1))).double())
        chosen = (share.cumsum(1) < place).sum(1).clamp(max=share.shape[1] - 1)
        clean = given.draw(mean, self.look.covariance, chosen, noise)
        x_s = to.b * step.x + to.c * clean
        return {**latents, self.look.name: x_s if to.kappa == 0 else x_s + to.kappa * noise(clean.shape)}

    def log_ratio(self, x: States) -> Tensor:
        look, step = self.look, self.look.picture
        given, log_a = self._measured(x)
        x_s = x[look.name]
        before = (log_a + given.log_integral(step.estimate.mean, look.covariance)).logsumexp(1)
        after = (log_a + given.log_integral(*foretold(step, look.covariance, x_s))).logsumexp(1)
        moved = self._log_p_latents(x) - self._latents().log_prob(_row([x[name] for name in look.sites]))
        return moved + before - after + chain_against_own(look.picture, look.covariance, x_s)

    def log_p(self, x: States) -> Tensor:
        return IndependentTransition({name: (step.p, step.p) for name, step in self.look.steps.items()}).log_p(x)

    def _latents(self) -> torch.distributions.MultivariateNormal:
        """q of z_s."""
        b, c, kappa = self.look.coefficients()
        root = c[:, None] * self.root
        lower = torch.linalg.cholesky_ex(root @ root.mT + kappa.square().diag())[0]
        mean = b * self.look.z + c * self.centre
        return torch.distributions.MultivariateNormal(mean, scale_tril=lower, validate_args=False)

    def _log_p_latents(self, x: States) -> Tensor:
        laws = {name: (self.look.steps[name].p,) * 2 for name in self.look.sites}
        return IndependentTransition(laws).log_p(x)

    def _nodes(self, x: States) -> tuple[Tensor, Tensor]:
        """Nodes of z_0 given z_t, z_s and y, (m, nodes, d), and log a_j; one where z_s is z_0 itself."""
        b, c, kappa = self.look.coefficients()
        seen = _row([x[name] for name in self.look.sites]) - b * self.look.z  # c z_0 + kappa noise
        if self.look.steps[self.look.sites[0]].coefficients.kappa == 0:
            z = (seen / c)[:, None]
            return z, z.new_zeros(z.shape[:2])
        mean, variance = self.look.latents
        told = variance / (1 + (c / kappa).square() * variance)
        after = mean + told * c / kappa.square() * (seen - c * mean)
        # root (I + S)^-1 root^T is (V^-1 + diag(c / kappa)^2)^-1 with S = root^T diag(c / kappa)^2 root
        inner = self.root.mT @ ((c / kappa).square()[:, None] * self.root)
        lower = torch.linalg.cholesky_ex(torch.eye(len(c), dtype=c.dtype, device=c.device) + inner)[0]
        scale = torch.linalg.solve_triangular(lower, self.root.mT, upper=False).mT
        pull = (c / kappa.square() * (seen - c * self.centre))[..., None]
        nodes = Nodes.about(self.centre + (scale @ (scale.mT @ pull))[..., 0], scale, self.look.count)
        return nodes.z, nodes.log_rule + _log_normal(nodes.z, after, told)

    def _measured(self, x: States) -> tuple[AtLatents, Tensor]:
        """The measurement at the nodes that z_s leaves, and log a_j; kept for the weight of what was just drawn."""
        key = x[self.look.sites[0]]
        if not self._kept or self._kept[0][0] is not key:
            z, log_a = self._nodes(x)
            self._kept[:] = [(key, self.look.measured.at(self.look.split(z)), log_a)]
        return self._kept[0][1:]


def _row(parts: list[Tensor]) -> Tensor:
    """{(m, *shape)} as (m, d) of float64."""
    return torch.cat([part.detach().reshape(len(part), -1) for part in parts], 1).double()


def _log_normal(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(z; mean, diag(variance)) of z (m, nodes, d), mean and variance (m, d)."""
    terms = (z - mean[:, None]).square() / variance[:, None] + variance[:, None].log() + math.log(2 * math.pi)
    return -0.5 * terms.sum(-1)
