r"""Noise schedules and the time grids laid over them.

A schedule gives the signal and the noise scale of ``p(x_t given x_0) = N(alpha_t x_0, sigma_t^2 I)`` at a noise
time t. Time 0 is the clean picture, alpha = 1 and sigma = 0; ``sigma_t / alpha_t`` grows with t. What t counts is
the schedule's own affair: training steps for the variance-preserving ones, the noise scale for the
variance-exploding one, the mixing share for the flow.

A grid picks the K + 1 noise levels ``t_K > ... > t_1 > t_0 = 0`` of a reverse chain.

References:
    J. Ho, A. Jain, P. Abbeel, "Denoising Diffusion Probabilistic Models" (2020), arXiv 2006.11239.
    A. Nichol, P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), arXiv 2102.09672.
    T. Karras, M. Aittala, T. Aila, S. Laine, "Elucidating the Design Space of Diffusion-Based Generative Models"
    (2022), arXiv 2206.00364.
    Y. Lipman et al., "Flow Matching for Generative Modeling" (2022), arXiv 2210.02747.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CosineSchedule",
    "FlowSchedule",
    "Grid",
    "KarrasGrid",
    "LeadingGrid",
    "LinspaceGrid",
    "LogGrid",
    "NoiseLevel",
    "Schedule",
    "SinhGrid",
    "TabulatedSchedule",
    "TrailingGrid",
    "VESchedule",
    "VPSchedule",
]


@dataclass(frozen=True)
class NoiseLevel:
    """One noise time with its scales: x_t = alpha x_0 + sigma eps.

    Args:
        t: noise time in the schedule's units; 0 is clean.
        alpha: signal scale, in (0, 1].
        sigma: noise scale, at least 0.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise scale of x_t / alpha_t."""
        return self.sigma / self.alpha


CLEAN = NoiseLevel(0.0, 1.0, 0.0)


class Grid(Protocol):
    """Chooses the noise times of a chain: ``num_steps`` of them, rising, without the clean one."""

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        """t_1 < ... < t_K."""


class Schedule(ABC):
    """alpha_t and sigma_t on the noise times [``t_min``, ``t_max``], and the clean level at 0."""

    t_min: float
    t_max: float

    @property
    @abstractmethod
    def default_grid(self) -> Grid:
        """The grid a chain takes unless it is given one."""

    @property
    @abstractmethod
    def num_train_steps(self) -> int | None:
        """Number of noise times the network was trained at, or None for all of them."""

    @abstractmethod
    def level(self, t: float) -> NoiseLevel:
        """The noise level at time t, 0 or in [``t_min``, ``t_max``]."""

    @abstractmethod
    def time(self, ratio: float) -> float:
        """The t at which sigma_t / alpha_t is ``ratio``."""

    def levels(self, num_steps: int, grid: Grid | None = None) -> tuple[NoiseLevel, ...]:
        """The levels of a chain, index k = 0 (clean) ... K (noise).

        Raises:
            ValueError: for less than one step, or for more than the grid has distinct times.
        """
        if num_steps < 1:
            raise ValueError(f"got num_steps {num_steps}; a chain needs at least 1")
        times = (grid or self.default_grid).times(self, num_steps)
        if len(times) > 1 and not (np.diff(times) > 0).all():
            raise ValueError(
                f"got num_steps {num_steps}, more than {type(grid or self.default_grid).__name__} has distinct noise "
                "times; take fewer steps, or a grid with times between the training steps such as KarrasGrid()"
            )
        return (CLEAN, *(self.level(float(t)) for t in times))

    def _check(self, t: float) -> None:
        if not self.t_min * (1 - 1e-9) <= t <= self.t_max * (1 + 1e-9):
            raise ValueError(f"got noise time {t}; expected 0 or a time in [{self.t_min}, {self.t_max}]")


class TabulatedSchedule(Schedule):
    """A variance-preserving schedule from the table of alpha_bar on the training grid.

    alpha_t = sqrt(alpha_bar_t) and sigma_t = sqrt(1 - alpha_bar_t), with t counting training steps: t = i + 1 is the
    network's training index i. Between two steps log(sigma / alpha) is linear in t.

    Args:
        alphas_cumprod: alpha_bar at the training indices 0 ... N - 1, falling, in (0, 1).

    Raises:
        ValueError: for a table that is not one-dimensional and falling within (0, 1).
    """

    def __init__(self, alphas_cumprod: Sequence[float] | NDArray[np.floating[Any]]) -> None:
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        if table.ndim != 1 or len(table) < 2 or not ((table > 0) & (table < 1)).all() or not (np.diff(table) < 0).all():
            raise ValueError(
                f"got alphas_cumprod of shape {table.shape}; expected one dimension of at least two numbers in "
                "(0, 1), each smaller than the one before"
            )
        self.alphas_cumprod = table
        self._log_ratio = 0.5 * (np.log1p(-table) - np.log(table))
        self._index = np.arange(1.0, len(table) + 1)
        self.t_min, self.t_max = 1.0, float(len(table))

    @property
    def default_grid(self) -> Grid:
        return LinspaceGrid()

    @property
    def num_train_steps(self) -> int:
        return len(self.alphas_cumprod)

    def level(self, t: float) -> NoiseLevel:
        if t == 0:
            return CLEAN
        self._check(t)
        log_ratio = float(np.interp(t, self._index, self._log_ratio))
        return NoiseLevel(t, _sqrt_sigmoid(-2 * log_ratio), _sqrt_sigmoid(2 * log_ratio))

    def time(self, ratio: float) -> float:
        return float(np.interp(math.log(ratio), self._log_ratio, self._index))


class VPSchedule(TabulatedSchedule):
    """Variance-preserving with rates linear in the training index, as DDPM: alpha_bar_i = prod_{j <= i} (1 - beta_j).

    Args:
        beta_min: rate of the first training step, in (0, 1).
        beta_max: rate of the last.
        num_train_steps: number of training steps N.
    """

    def __init__(self, beta_min: float = 1e-4, beta_max: float = 2e-2, num_train_steps: int = 1000) -> None:
        if not 0 < beta_min <= beta_max < 1:
            raise ValueError(f"got beta_min {beta_min}, beta_max {beta_max}; expected 0 < beta_min <= beta_max < 1")
        super().__init__(np.cumprod(1 - np.linspace(beta_min, beta_max, num_train_steps)))


class CosineSchedule(TabulatedSchedule):
    """Variance-preserving with the cosine of Nichol and Dhariwal (2102.09672, eq. 17), rates at most 0.999.

    Args:
        offset: their s, which keeps the first step's noise from being too small.
        num_train_steps: number of training steps N.
    """

    def __init__(self, offset: float = 0.008, num_train_steps: int = 1000) -> None:
        f = np.cos((np.linspace(0, 1, num_train_steps + 1) + offset) / (1 + offset) * np.pi / 2) ** 2
        super().__init__(np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 0, 0.999)))


class VESchedule(Schedule):
    """Variance-exploding, as EDM: alpha_t = 1 and sigma_t = t.

    Args:
        sigma_min: smallest noise scale of a chain, in the picture's units.
        sigma_max: largest.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"got sigma_min {sigma_min}, sigma_max {sigma_max}; expected 0 < sigma_min < sigma_max")
        self.t_min, self.t_max = sigma_min, sigma_max

    @property
    def default_grid(self) -> Grid:
        return KarrasGrid()

    @property
    def num_train_steps(self) -> None:
        return None

    def level(self, t: float) -> NoiseLevel:
        if t == 0:
            return CLEAN
        self._check(t)
        return NoiseLevel(t, 1.0, t)

    def time(self, ratio: float) -> float:
        return ratio


class FlowSchedule(Schedule):
    """Flow matching along straight lines: alpha_t = 1 - t and sigma_t = t.

    Args:
        t_min: smallest noise time of a chain.
        t_max: largest; below 1, where alpha is 0 and sigma / alpha would be infinite.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        if not 0 < t_min < t_max < 1:
            raise ValueError(f"got t_min {t_min}, t_max {t_max}; expected 0 < t_min < t_max < 1")
        self.t_min, self.t_max = t_min, t_max

    @property
    def default_grid(self) -> Grid:
        return LinspaceGrid()

    @property
    def num_train_steps(self) -> None:
        return None

    def level(self, t: float) -> NoiseLevel:
        if t == 0:
            return CLEAN
        self._check(t)
        return NoiseLevel(t, 1 - t, t)

    def time(self, ratio: float) -> float:
        return ratio / (1 + ratio)


@dataclass(frozen=True)
class LinspaceGrid:
    """Noise times evenly spaced from ``t_min`` to ``t_max``, both ends taken; rounded to training steps."""

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        ends = (schedule.t_min, schedule.t_max) if num_steps > 1 else (schedule.t_max, schedule.t_max)
        return _rounded(schedule, np.linspace(*ends, num_steps), schedule.t_min)


@dataclass(frozen=True)
class TrailingGrid:
    """Noise times evenly spaced up to ``t_max``, which is taken; rounded to training steps."""

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        return _rounded(schedule, np.linspace(0, schedule.t_max, num_steps + 1)[1:])


@dataclass(frozen=True)
class LeadingGrid:
    """Noise times evenly spaced from ``t_min``, which is taken; rounded to training steps."""

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        gap = schedule.t_max / num_steps
        if schedule.num_train_steps:
            gap = schedule.num_train_steps // num_steps
        return np.asarray(schedule.t_min + gap * np.arange(num_steps), dtype=np.float64)


@dataclass(frozen=True)
class KarrasGrid:
    """(sigma / alpha)^(1 / rho) evenly spaced between both ends (2206.00364, eq. 5); times between training steps.

    Args:
        rho: 1 is linear in sigma / alpha; larger puts more of the steps at small noise.
    """

    rho: float = 7.0

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        low, high = (schedule.level(t).ratio ** (1 / self.rho) for t in (schedule.t_min, schedule.t_max))
        roots = np.linspace(low, high, num_steps) if num_steps > 1 else np.array([high])
        return np.array([schedule.time(root**self.rho) for root in roots])


@dataclass(frozen=True)
class LogGrid:
    """log(sigma / alpha) evenly spaced between both ends; times between training steps."""

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        low, high = (math.log(schedule.level(t).ratio) for t in (schedule.t_min, schedule.t_max))
        logs = np.linspace(low, high, num_steps) if num_steps > 1 else np.array([high])
        return np.array([schedule.time(math.exp(log)) for log in logs])


@dataclass(frozen=True)
class SinhGrid:
    """log(sigma / alpha) = log(center) + width sinh(u), u even between both ends; times between training steps.

    Up to ``width`` from ``center`` steps are about even in log(sigma / alpha), and beyond it they grow with the
    distance. A step of the chain is Gaussian; its error is largest where p(x_0 given x_t) is not, which on pictures of
    values of the order of 1 is where their layout is decided.

    Args:
        center: sigma / alpha where steps are shortest, positive; on the scale of x_0.
        width: over which log(sigma / alpha) they stay about as short, positive.

    Raises:
        ValueError: for a center or width that is not positive and finite.
    """

    center: float = 0.5
    width: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.center < math.inf and 0 < self.width < math.inf):
            raise ValueError(f"got center {self.center}, width {self.width}; expected positive finite numbers")

    def times(self, schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
        middle = math.log(self.center)
        low, high = (
            math.asinh((math.log(schedule.level(t).ratio) - middle) / self.width)
            for t in (schedule.t_min, schedule.t_max)
        )
        u = np.linspace(low, high, num_steps) if num_steps > 1 else np.array([high])
        return np.array([schedule.time(math.exp(middle + self.width * math.sinh(one))) for one in u])


def _rounded(schedule: Schedule, times: NDArray[np.float64], first: float = 0.0) -> NDArray[np.float64]:
    """The nearest training steps, where the schedule has them; of two, that with ``times - first`` even."""
    return np.round(times - first) + first if schedule.num_train_steps else times


def _sqrt_sigmoid(x: float) -> float:
    return math.sqrt(1 / (1 + math.exp(-x))) if x >= 0 else math.exp(0.5 * x) / math.sqrt(1 + math.exp(x))
