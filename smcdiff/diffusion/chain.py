r"""The reverse chain of a diffusion model as a probability law.

    p(x_{t_K}) prod_{k=K}^{1} p(x_{t_{k-1}} given x_{t_k}),        x_{t_K} ~ N(0, (alpha_K^2 + sigma_K^2) I),

or another law of x_{t_K} where the chain is given a :class:`~smcdiff.diffusion.start.Start`,
is a joint law of K + 1 pictures whose last one, x_0, is a draw from the prior. Called with a name, a chain is a Pyro
model with one sample site per step; this is the executable definition of the prior. The methods that filters run
(:meth:`ReverseChain.estimate`, :meth:`ReverseChain.transition`) are the same numbers without Pyro around them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from smcdiff.diffusion.covariance import Covariance
from smcdiff.diffusion.covariance_models import CovarianceModel, DependsOnPath, KnowsCovariance, Parts
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.kernels import (
    VARIANCES,
    Gaussian,
    Law,
    ReverseStep,
    StructuredGaussian,
    Variance,
    full_transition,
    transition,
)
from smcdiff.diffusion.schedule import Grid, NoiseLevel, Schedule
from smcdiff.diffusion.start import Start

__all__ = ["ReverseChain"]


@dataclass(frozen=True)
class ReverseChain:
    """p(x_{t_K}) prod_k p(x_{t_{k-1}} given x_{t_k}), k = K ... 1.

    Args:
        denoiser: gives x0_hat.
        schedule: gives alpha_t and sigma_t.
        num_steps: K, at least 1.
        eta: share of the ancestral noise, in [0, 1]; 0 has no density.
        variance: of a step: "posterior", "fixed_large", "learned", "optimal" or "full" (see
            :mod:`smcdiff.diffusion.kernels`).
        grid: where the noise times lie; None takes the schedule's default.
        clip: (low, high) that x0_hat is clipped to; part of the chain. None leaves it as it is.
        batch_shape: independent events in one draw, in front of the denoiser's event shape.
        covariance: Cov[x_0 given x_t]; None takes the denoiser's own, where it knows one.
        start: begin part of the way, at a noised picture; the law of x_0 is then another one. None begins at noise.

    Raises:
        ValueError: for an eta outside [0, 1], an unknown variance, a grid with too few distinct times, or a start
            that is not of a draw's shape or outside the schedule's times.
    """

    denoiser: Denoiser
    schedule: Schedule
    num_steps: int = 100
    eta: float = 1.0
    variance: Variance = "posterior"
    grid: Grid | None = None
    clip: tuple[float, float] | None = None
    batch_shape: tuple[int, ...] = ()
    start: Start | None = None
    covariance: CovarianceModel | None = None
    levels: tuple[NoiseLevel, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"got eta {self.eta}; expected a share of the ancestral noise in [0, 1]")
        if self.variance not in VARIANCES:
            raise ValueError(f"got variance {self.variance!r}; expected one of {VARIANCES}")
        if self.covariance is None and isinstance(self.denoiser, KnowsCovariance):
            object.__setattr__(self, "covariance", self.denoiser.covariance)
        if self.variance == "full" and self.covariance is None:
            raise ValueError(
                'got variance="full" with a prior that knows no covariance of x_0 given x_t; measure it once with '
                "prior.calibrate(images), or take another variance"
            )
        if isinstance(self.covariance, DependsOnPath) and self.covariance.depends_on_path:
            raise ValueError(
                f"got {type(self.covariance).__name__} as the covariance of a prior; it depends on the path of a "
                "particle, and a chain on its last state alone. Calibrate the prior, or give it a covariance of its "
                "own, and take sd.Adapted(model, covariance=...) for this one"
            )
        if self.variance == "full" and self.batch_shape:
            raise ValueError('got variance="full" in a plate, which it does not support; give each event its own site')
        if self.start is None:
            levels = self.schedule.levels(self.num_steps, self.grid)
        else:
            levels = self.start.levels(self.schedule, self.num_steps, self.grid)
            self.start.check_shape(self.shape)
        object.__setattr__(self, "levels", levels)

    @property
    def shape(self) -> torch.Size:
        """Shape of one draw: batch, then event."""
        return torch.Size(self.batch_shape) + self.denoiser.event_shape

    @property
    def initial_scale(self) -> float:
        """Standard deviation of x_{t_K}."""
        top = self.levels[-1]
        return float((top.alpha**2 + top.sigma**2) ** 0.5) if self.start is None else top.sigma

    @property
    def initial_mean(self) -> Tensor:
        """Mean of x_{t_K}, of the shape of one draw."""
        like = self.denoiser
        if self.start is None:
            return torch.zeros(self.shape, dtype=like.dtype, device=like.device)
        return (self.levels[-1].alpha * self.start.image.to(like.device, like.dtype)).expand(self.shape)

    def expand(self, batch_shape: tuple[int, ...]) -> ReverseChain:
        """The chain of that many independent events."""
        return replace(self, batch_shape=tuple(batch_shape))

    def step(self, k: int) -> ReverseStep:
        """The coefficients of the step from level k to level k - 1."""
        return ReverseStep(self.levels[k], self.levels[k - 1], self.eta)

    def denoise(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """x0_hat of events x_t, (m, *event), clipped as the chain clips it."""
        mean = self.denoiser(x_t, level).mean
        return mean if self.clip is None else mean.clamp(*self.clip)

    def estimate(self, k: int, x_t: Tensor, before: Parts | None = None) -> Estimate:
        """What the denoiser says at level k of particles x_t, (m, *shape); the one network evaluation of a step.

        Args:
            before: what the covariance kept of these particles at the level before; None where there was none.
        """
        event_shape = self.denoiser.event_shape
        estimate = self.denoiser(x_t.reshape(-1, *event_shape), self.levels[k])
        mean = estimate.mean if self.clip is None else estimate.mean.clamp(*self.clip)

        def unfolded(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            shared = len(part) == 1  # one value for all events
            shape = (1,) * (1 + len(self.batch_shape)) if shared else (len(x_t), *self.batch_shape)
            return part.reshape(*shape, *part.shape[1:])

        variance, fraction = unfolded(estimate.variance), unfolded(estimate.fraction)
        parts = {}
        if self.covariance is not None and self.variance == "full":
            parts = self.covariance.parts(self.denoiser, x_t, self.levels[k], Estimate(mean, parts=before or {}))
        return Estimate(mean.reshape(x_t.shape), variance, fraction, parts)

    def covariance_of(self, k: int, x_t: Tensor, estimate: Estimate) -> Covariance | None:
        """Cov[x_0 given x_{t_k} = x_t] of particles x_t, (m, *shape), or None where none is known."""
        if self.covariance is None:
            return None
        return self.covariance.at(self.levels[k], estimate.parts, x_t)

    def transition(self, k: int, x_t: Tensor, estimate: Estimate) -> Gaussian | StructuredGaussian:
        """p(x_{t_{k-1}} given x_{t_k} = x_t), from the estimate at x_t."""
        covariance = self.covariance_of(k, x_t, estimate) if self.variance == "full" else None
        if covariance is not None:
            return full_transition(self.step(k), x_t, estimate.mean, covariance)
        return transition(self.step(k), x_t, estimate, self.variance)

    def __call__(self, name: str = "x") -> Tensor:
        """The chain as a Pyro model with sample sites ``name_K`` ... ``name_0``; returns x_0."""
        event_dim = len(self.denoiser.event_shape)
        first = dist.Normal(self.initial_mean, self.initial_scale).to_event(event_dim)
        x = pyro.sample(f"{name}_{self.num_steps}", first)
        for k in range(self.num_steps, 0, -1):
            law = self.transition(k, x[None], self.estimate(k, x[None]))
            mean = law.mean[0]
            if isinstance(law, StructuredGaussian) or self.variance == "full":
                x = pyro.sample(f"{name}_{k - 1}", LawOfOne(law))
            elif law.variance is None:
                x = pyro.sample(f"{name}_{k - 1}", dist.Delta(mean, event_dim=event_dim))
            else:
                scale = law.variance[0].sqrt().expand(mean.shape)
                x = pyro.sample(f"{name}_{k - 1}", dist.Normal(mean, scale).to_event(event_dim))
        return x

    @torch.no_grad()
    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """(number, *shape): draws of x_0, without Pyro; noise from ``generator`` or torch's global one."""

        def noise() -> Tensor:
            shape = (number, *self.shape)
            like = self.denoiser
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        x = self.initial_mean + self.initial_scale * noise()
        for k in range(self.num_steps, 0, -1):
            x = self.transition(k, x, self.estimate(k, x)).sample(noise())
        return x


class LawOfOne(TorchDistribution):
    """A transition of one particle as a Pyro distribution.

    Args:
        law: of particles (1, *event).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the base class declares it so)

    def __init__(self, law: Law) -> None:
        self.law = law
        super().__init__(torch.Size(), law.mean.shape[1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *event)."""
        draws = [self.law.sample(torch.randn_like(self.law.mean)) for _ in range(torch.Size(sample_shape).numel())]
        return torch.cat(draws).reshape(torch.Size(sample_shape) + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values (..., *event), summed over the event in float64."""
        flat = value.reshape(-1, *self.event_shape)
        found = torch.cat([self.law.log_prob(one[None], event_dim=self.event_dim) for one in flat])
        return found.reshape(value.shape[: value.ndim - self.event_dim])
