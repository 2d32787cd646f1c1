r"""Denoisers: what a diffusion model knows of the clean picture given a noisy one.

A denoiser returns ``x0_hat = E[x_0 given x_t]``. Networks are trained to predict it in one of several forms, all of
them linear in ``x0_hat`` and ``x_t = alpha_t x_0 + sigma_t eps``:

    eps-prediction       x0_hat = (x_t - sigma_t eps_hat) / alpha_t
    x0-prediction        x0_hat = the output
    v-prediction         v = alpha_t eps - sigma_t x_0,
                         x0_hat = (alpha_t x_t - sigma_t v_hat) / (alpha_t^2 + sigma_t^2)
    flow                 u = eps - x_0,  x0_hat = (x_t - sigma_t u_hat) / (alpha_t + sigma_t)

References:
    J. Ho, A. Jain, P. Abbeel, "Denoising Diffusion Probabilistic Models" (2020), arXiv 2006.11239, eq. 15: eps.
    T. Salimans, J. Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), arXiv 2202.00512,
    Appendix D: v.
    A. Nichol, P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), arXiv 2102.09672, eq. 15: the
    learned variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smcdiff.diffusion.schedule import NoiseLevel

__all__ = [
    "Denoiser",
    "Estimate",
    "NetworkDenoiser",
    "WithVariance",
    "from_clean",
    "from_epsilon",
    "from_flow",
    "from_velocity",
]


@dataclass(frozen=True)
class Estimate:
    """What a denoiser says of x_0 given x_t.

    Args:
        mean: x0_hat, shape (m, *event).
        variance: Var[x_0 given x_t], its isotropic or per-pixel part, broadcastable to ``mean``; None where unknown.
        fraction: the network's learned interpolation of log beta_tilde (0) ... log beta (1), broadcastable to
            ``mean``; None where it has none.
        parts: what a covariance model keeps of each particle, {name: (m, ...)}; what it kept at the level before, where
            it is asked for those of this one.
    """

    mean: Tensor
    variance: Tensor | None = None
    fraction: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class Denoiser(Protocol):
    """Maps a batch of noisy events, all of one noise level, to what is known of their clean ones."""

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one event, such as (channels, rows, columns)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of events."""

    @property
    def device(self) -> torch.device:
        """Where events live."""

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        """x_t: (m, *event)."""


Parametrisation = Callable[[Tensor, Tensor, NoiseLevel], Tensor]


def from_epsilon(x_t: Tensor, output: Tensor, level: NoiseLevel) -> Tensor:
    """x0_hat of an eps-prediction (2006.11239, eq. 15)."""
    return (x_t - level.sigma * output) / level.alpha


def from_clean(x_t: Tensor, output: Tensor, level: NoiseLevel) -> Tensor:
    """x0_hat of an x0-prediction: the output itself."""
    return output


def from_velocity(x_t: Tensor, output: Tensor, level: NoiseLevel) -> Tensor:
    """x0_hat of a v-prediction (2202.00512, Appendix D)."""
    return (level.alpha * x_t - level.sigma * output) / (level.alpha**2 + level.sigma**2)


def from_flow(x_t: Tensor, output: Tensor, level: NoiseLevel) -> Tensor:
    """x0_hat of a flow network that predicts eps - x_0."""
    return (x_t - level.sigma * output) / (level.alpha + level.sigma)


class NetworkDenoiser:
    """A trained network as a denoiser.

    Args:
        network: takes (m, *event) and a time, returns (m, *event), or twice the channels with ``learned_variance``.
        event_shape: shape of one event.
        parametrisation: turns the network's output into x0_hat: :func:`from_epsilon`, :func:`from_clean`,
            :func:`from_velocity` or :func:`from_flow`.
        time: the number the network takes for a noise level; by default the training index t - 1 of the
            variance-preserving schedules.
        learned_variance: the network's output has a second half of channels, v in [-1, 1] (2102.09672, eq. 15).
        dtype, device: of events; by default those of the network's first parameter.
        autocast: a lower precision for the network's own arithmetic, such as torch.bfloat16; events, densities and
            weights keep theirs. None for no change.

    Raises:
        ValueError: for a network without parameters when dtype and device are not given, or, at the call, for an
            output of the wrong shape.
    """

    def __init__(
        self,
        network: Callable[[Tensor, float], Tensor],
        event_shape: tuple[int, ...],
        parametrisation: Parametrisation = from_epsilon,
        time: Callable[[NoiseLevel], float] = lambda level: level.t - 1,
        learned_variance: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        first = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
        if first is None and (dtype is None or device is None):
            raise ValueError("got a network without parameters; give dtype and device, which cannot be read off it")
        self.network = network
        self.event_shape = torch.Size(event_shape)
        self.parametrisation = parametrisation
        self.time = time
        self.learned_variance = learned_variance
        self.autocast = autocast
        self.dtype = dtype or first.dtype  # type: ignore[union-attr]
        self.device = device or first.device  # type: ignore[union-attr]

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.network(x_t, self.time(level)).to(x_t.dtype)
        channels = self.event_shape[0] * (2 if self.learned_variance else 1)
        expected = (len(x_t), channels, *self.event_shape[1:])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"got a network output of shape {tuple(output.shape)}; expected {expected}. Check event_shape, and "
                "learned_variance, which doubles the channels"
            )
        if not self.learned_variance:
            return Estimate(self.parametrisation(x_t, output, level))
        output, v = output.chunk(2, dim=1)
        return Estimate(self.parametrisation(x_t, output, level), fraction=(v + 1) / 2)


class WithVariance:
    """A denoiser with a variance of x_0 given x_t per noise level, as a one-off estimate gives it.

    Between the levels it was measured at, log variance is linear in log(sigma / alpha); beyond them it is constant.

    Args:
        denoiser: any denoiser.
        ratios: sigma / alpha of the measured levels, rising, shape (levels,).
        variances: mean squared error per pixel of x0_hat at each, shape (levels,).

    References:
        F. Bao, C. Li, J. Zhu, B. Zhang, "Analytic-DPM" (2022), arXiv 2201.06503, eq. 11: the Monte-Carlo estimate.
    """

    def __init__(self, denoiser: Denoiser, ratios: Tensor, variances: Tensor) -> None:
        if ratios.ndim != 1 or ratios.shape != variances.shape or not bool((ratios.diff() > 0).all()):
            raise ValueError(
                f"got ratios {tuple(ratios.shape)} and variances {tuple(variances.shape)}; expected two vectors of one "
                "length, the ratios rising"
            )
        if not bool((variances > 0).all()):
            raise ValueError("got a variance that is not positive; expected the mean squared error of x0_hat per level")
        self.denoiser = denoiser
        self.event_shape, self.dtype, self.device = denoiser.event_shape, denoiser.dtype, denoiser.device
        self._log_ratios = ratios.double().log().cpu().numpy()
        self._log_variances = variances.double().log().cpu().numpy()

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        estimate = self.denoiser(x_t, level)
        log_variance = float(np.interp(np.log(level.ratio), self._log_ratios, self._log_variances))
        variance = estimate.mean.new_full((1,) * estimate.mean.ndim, float(np.exp(log_variance)))
        return Estimate(estimate.mean, variance, estimate.fraction)
