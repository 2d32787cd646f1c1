r"""The tilted denoiser: the mean of x_0 given x_t *and* y, by a second pass at a lower noise level.

The log-weights of a whole path spread by about the integral over the signal-to-noise ratio snr = alpha^2 / sigma^2 of
|m_y - E[x_0 given x_t, y]|^2, m_y the proposal's guess of that mean, however many steps are taken. A Gaussian guess
(:mod:`smcdiff.guidance.adapted`) misses what is not Gaussian in p(x_0 given x_t). The denoiser knows it: tilted by
exp(w^T x_0 - lambda |x_0|^2 / 2), p(x_0 given x_t) is again a law that it was trained for, at another noise level,

    E[x_0 given x_t, tilt] = x0_hat_u(z),    snr_u = snr_t + lambda,    z = (alpha_t x_t / sigma_t^2 + w) / snr_u,

z on the scale of x_0. The likelihood is such a tilt up to what of its curvature J differs from lambda I. Expanding that
remainder about the Gaussian guess x_1, with m_u the denoiser's answer and C_u the covariance at level u,

    w = grad log p(y given x_1) + lambda x_1,
    m_y = mean of N(m', C') given y,    C' = (C_u^-1 - lambda I)^-1,    m' = m_u + C' (lambda m_u - w).

For white noise on all pixels J = lambda I and m_y is exact, whatever the prior; for a Gaussian prior it always is. The
proposal is that of sd.Adapted, moved by c (m_y - x_1). Two forward passes a particle and step, none back. The weights
are p / q of the whole path, exact, and given at the end (:mod:`smcdiff.guidance.deferred`).

References:
    I. Girsanov, "On transforming a certain class of stochastic processes by absolutely continuous substitution of
    measures" (1960): the spread of a path's weights.
    B. Efron, "Tweedie's Formula and Selection Bias" (2011): exponential families of x_0 given x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from smcdiff.diffusion.covariance import Diagonal
from smcdiff.diffusion.covariance_models import CovarianceModel
from smcdiff.guidance.adapted import Adapted
from smcdiff.guidance.base import Prediction, SiteStep, Transition
from smcdiff.guidance.bootstrap import NoTwist
from smcdiff.guidance.curvature import gradient, survey
from smcdiff.guidance.quadratic import Noise, States

__all__ = ["Tilted"]


@dataclass(frozen=True)
class Tilted:
    """The tilted denoiser's proposal on a Pyro program with one diffusion prior.

    As with :class:`smcdiff.Adapted`, the diffusion prior is run with ``variance="full"``; its covariance must be one
    for all particles and diagonal in a basis, as that of a calibrated prior is.

    Args:
        model: the Pyro program.
        covariance: as for :class:`smcdiff.Adapted`.
        tilt: lambda, at least 0, in units of 1 / x_0^2; None takes the mean of J's diagonal, which is exact for white
            noise on all pixels. Elsewhere the more lambda, the more of y the denoiser sees, and the less what it sees
            looks like what it was trained on.

    Raises:
        ValueError: for a tilt below 0; at the run, for a prior without a covariance.
        TypeError: at the run, for a program that it cannot take, with the remedy.
    """

    model: Callable[..., Any]
    covariance: CovarianceModel | None = None
    tilt: float | None = None
    _adapted: Adapted = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tilt is not None and not 0 <= self.tilt < math.inf:
            raise ValueError(f"got tilt {self.tilt}; expected a number of at least 0, or None")
        adapted = Adapted(self.model, self.covariance)
        object.__setattr__(self, "_adapted", adapted)
        object.__setattr__(self, "model", adapted.model)

    @property
    def forward_only(self) -> bool:
        return True

    @property
    def weighs_at_the_end(self) -> bool:
        return True

    @property
    def twist(self) -> NoTwist:
        return NoTwist()

    @property
    def proposal(self) -> _TiltedProposal:
        return _TiltedProposal(self._adapted, self.tilt)


@dataclass(frozen=True)
class _TiltedProposal:
    """That of sd.Adapted, moved by c (m_y - x_1)."""

    adapted: Adapted
    tilt: float | None

    @property
    def extra_passes(self) -> int:
        return 1

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def carry(self, prediction: Prediction) -> dict[str, Tensor]:
        carried = self.adapted.proposal.carry(prediction)
        return {**carried, _AWAY: self._away(prediction)}

    def transition(self, steps: dict[str, SiteStep], held: States, carried: dict[str, Tensor]) -> Transition:
        (name,) = (name for name, step in steps.items() if step.program.latents[name].is_diffusion)
        base = self.adapted.proposal.transition(steps, held, {k: v for k, v in carried.items() if k != _AWAY})
        return _Moved(base, steps[name], name, steps[name].coefficients.c * carried[_AWAY])

    def _away(self, prediction: Prediction) -> Tensor:
        """m_y - x_1, (m, *shape)."""
        program, k = prediction.program, prediction.k
        priors = [name for name, latent in program.latents.items() if latent.is_diffusion]
        if len(priors) != 1:
            raise TypeError(f"sd.Tilted takes a program with one diffusion prior and got {priors}; use sd.Adapted")
        (name,) = priors
        chain, x_t = program.latents[name].chain, prediction.x[name]
        level, schedule = chain.levels[k], chain.schedule
        mean, held, covariances, information = self.adapted.looked(prediction)
        known = covariances[name]
        if not isinstance(known, Diagonal) or len(known.variance) != 1:
            raise TypeError(
                f"sd.Tilted needs one covariance for all particles, diagonal in a basis; that of {name!r} is a "
                f"{type(known).__name__} of {len(x_t)}. Calibrate it by prior.calibrate(images), or use sd.Adapted"
            )
        first = self.adapted.met(prediction).mean()[name]  # x_1
        _, slope = gradient(program, {**mean, **held, name: first}, name)
        snr = level.ratio**-2
        wanted = survey(program, name, known.basis).mean if self.tilt is None else self.tilt
        under = schedule.level(schedule.time(max((snr + wanted) ** -0.5, schedule.level(schedule.t_min).ratio)))
        tilt = max(under.ratio**-2 - snr, 0.0)  # lambda, as far as the schedule goes
        w = slope + tilt * first
        m_u = chain.denoise(under.alpha * (level.alpha / level.sigma**2 * x_t + w) / (snr + tilt), under)
        c_u = self.adapted.shared_covariance(program, name, under, x_t)
        assert isinstance(c_u, Diagonal)
        rest = Diagonal(
            1 / (1 / c_u.variance - tilt).clamp(min=snr), known.basis
        )  # C'; x_0 is at least as sure as x_t makes it
        moved = {**mean, name: m_u + rest.apply(tilt * m_u - w)}
        return information.condition(moved, {**covariances, name: rest}).mean()[name] - first


_AWAY = "away"


@dataclass(frozen=True, eq=False)
class _Moved:
    """A transition whose proposal is moved for one latent."""

    base: Transition
    step: SiteStep
    name: str
    shift: Tensor

    def sample(self, noise: Noise) -> States:
        x = self.base.sample(noise)
        return {**x, self.name: x[self.name] + self.shift}

    def log_ratio(self, x: States) -> Tensor:
        back = x[self.name] - self.shift  # log p(x) - log q(x - shift) with log p - log q known at x - shift
        p, event_dim = self.step.p, back.ndim - 1
        gained = p.log_prob(x[self.name], event_dim) - p.log_prob(back, event_dim)
        return self.base.log_ratio({**x, self.name: back}) + gained

    def log_p(self, x: States) -> Tensor:
        return self.base.log_p(x)
