r"""The reverse chain of a diffusion model as a probability law.

    p(x_{t_K}) prod_{k=K}^{1} p(x_{t_{k-1}} given x_{t_k}),        x_{t_K} ~ N(0, (alpha_K^2 + sigma_K^2) I),

is a joint law of K + 1 pictures whose last one, x_0, is a draw from the prior. Called with a name, a chain is a Pyro
model with one sample site per step; this is the executable definition of the prior. The methods that filters run
(:meth:`ReverseChain.estimate`, :meth:`ReverseChain.transition`) are the same numbers without Pyro around them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.kernels import VARIANCES, Gaussian, ReverseStep, Variance, transition
from smcdiff.diffusion.schedule import Grid, NoiseLevel, Schedule

__all__ = ["ReverseChain"]


@dataclass(frozen=True)
class ReverseChain:
    """p(x_{t_K}) prod_k p(x_{t_{k-1}} given x_{t_k}), k = K ... 1.

    Args:
        denoiser: gives x0_hat.
        schedule: gives alpha_t and sigma_t.
        num_steps: K, at least 1.
        eta: share of the ancestral noise, in [0, 1]; 0 has no density.
        variance: of a step: "posterior", "fixed_large", "learned" or "optimal" (see :mod:`smcdiff.diffusion.kernels`).
        grid: where the noise times lie; None takes the schedule's default.
        clip: (low, high) that x0_hat is clipped to; part of the chain. None leaves it as it is.
        batch_shape: independent events in one draw, in front of the denoiser's event shape.

    Raises:
        ValueError: for an eta outside [0, 1], an unknown variance, or a grid with too few distinct times.
    """

    denoiser: Denoiser
    schedule: Schedule
    num_steps: int = 100
    eta: float = 1.0
    variance: Variance = "posterior"
    grid: Grid | None = None
    clip: tuple[float, float] | None = None
    batch_shape: tuple[int, ...] = ()
    levels: tuple[NoiseLevel, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"got eta {self.eta}; expected a share of the ancestral noise in [0, 1]")
        if self.variance not in VARIANCES:
            raise ValueError(f"got variance {self.variance!r}; expected one of {VARIANCES}")
        object.__setattr__(self, "levels", self.schedule.levels(self.num_steps, self.grid))

    @property
    def shape(self) -> torch.Size:
        """Shape of one draw: batch, then event."""
        return torch.Size(self.batch_shape) + self.denoiser.event_shape

    @property
    def initial_scale(self) -> float:
        """Standard deviation of x_{t_K}."""
        top = self.levels[-1]
        return float((top.alpha**2 + top.sigma**2) ** 0.5)

    def expand(self, batch_shape: tuple[int, ...]) -> ReverseChain:
        """The chain of that many independent events."""
        return replace(self, batch_shape=tuple(batch_shape))

    def step(self, k: int) -> ReverseStep:
        """The coefficients of the step from level k to level k - 1."""
        return ReverseStep(self.levels[k], self.levels[k - 1], self.eta)

    def estimate(self, k: int, x_t: Tensor) -> Estimate:
        """What the denoiser says at level k of particles x_t, (m, *shape); the one network evaluation of a step."""
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
        return Estimate(mean.reshape(x_t.shape), variance, fraction)

    def transition(self, k: int, x_t: Tensor, estimate: Estimate) -> Gaussian:
        """p(x_{t_{k-1}} given x_{t_k} = x_t), from the estimate at x_t."""
        return transition(self.step(k), x_t, estimate, self.variance)

    def __call__(self, name: str = "x") -> Tensor:
        """The chain as a Pyro model with sample sites ``name_K`` ... ``name_0``; returns x_0."""
        event_dim = len(self.denoiser.event_shape)
        zero = torch.zeros(self.shape, dtype=self.denoiser.dtype, device=self.denoiser.device)
        x = pyro.sample(f"{name}_{self.num_steps}", dist.Normal(zero, self.initial_scale).to_event(event_dim))
        for k in range(self.num_steps, 0, -1):
            law = self.transition(k, x[None], self.estimate(k, x[None]))
            mean = law.mean[0]
            if law.variance is None:
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

        x = self.initial_scale * noise()
        for k in range(self.num_steps, 0, -1):
            x = self.transition(k, x, self.estimate(k, x)).sample(noise())
        return x
