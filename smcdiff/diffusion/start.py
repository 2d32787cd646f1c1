r"""A chain that begins part of the way, at a noised picture.

    p(x_{t_K}) = N(alpha_{t_0} image, sigma_{t_0}^2 I),        t_K = t_0,

in place of the prior's own start. The steps below t_0 are what they were, so that such a chain takes few of them. It
is another prior: pictures that could have become the given one, the more alike the smaller t_0. A posterior and an
evidence under it are those of that prior, and whoever reports them must say so.

References:
    C. Meng, Y. He, Y. Song, J. Song, J. Wu, J.-Y. Zhu, S. Ermon, "SDEdit: Guided Image Synthesis and Editing with
    Stochastic Differential Equations" (2021), arXiv 2108.01073.
    H. Chung, B. Sim, J. C. Ye, "Come-Closer-Diffuse-Faster: Accelerating Conditional Diffusion Models for Inverse
    Problems through Stochastic Contraction" (2021), arXiv 2112.05146.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diffusion.schedule import Grid, NoiseLevel, Schedule

__all__ = ["Start"]


@dataclass(frozen=True, eq=False)
class Start:
    """x_{t_K} ~ N(alpha_{t_K} image, sigma_{t_K}^2 I) with t_K = t_0.

    Of the grids ``LeadingGrid`` has its last time t_K below t_0; those that keep to training steps round it.

    Args:
        image: a clean event, of the shape of one draw of the prior or broadcastable to it.
        t_0: the noise time to begin at, in the schedule's units (training steps for the variance-preserving ones);
            above the schedule's ``t_min``, at most its ``t_max``.
    """

    image: Tensor
    t_0: float

    def levels(self, schedule: Schedule, num_steps: int, grid: Grid | None) -> tuple[NoiseLevel, ...]:
        """The levels of a chain of ``num_steps`` steps from t_0 down, on the grid as it lies over [t_min, t_0].

        Raises:
            ValueError: for a t_0 outside the schedule's times, or more steps than the grid has distinct ones.
        """
        if not schedule.t_min < self.t_0 <= schedule.t_max:
            raise ValueError(
                f"got a start at noise time {self.t_0}; expected one above {schedule.t_min:.6g} and at most "
                f"{schedule.t_max:.6g}, the times of {type(schedule).__name__}"
            )
        return _Until(schedule, self.t_0).levels(num_steps, grid)

    def check_shape(self, shape: torch.Size) -> None:
        """Refuse an image that is not of the shape of one draw.

        Raises:
            ValueError: for an image that cannot be expanded to ``shape``.
        """
        image = self.image.shape
        if len(image) > len(shape) or any(
            a not in (1, b) for a, b in zip(reversed(image), reversed(shape), strict=False)
        ):
            raise ValueError(f"got a start from a picture of shape {tuple(image)}; a draw has shape {tuple(shape)}")

    def __str__(self) -> str:
        return (
            f"started at noise time {self.t_0:.6g} from a given picture (sum {float(self.image.double().sum()):.6g}), "
            "which is not the prior's own law"
        )


class _Until(Schedule):
    """A schedule up to an earlier last time."""

    def __init__(self, schedule: Schedule, t_max: float) -> None:
        self.schedule, self.t_min, self.t_max = schedule, schedule.t_min, t_max

    @property
    def default_grid(self) -> Grid:
        return self.schedule.default_grid

    @property
    def num_train_steps(self) -> int | None:
        return None if self.schedule.num_train_steps is None else int(self.t_max)

    def level(self, t: float) -> NoiseLevel:
        return self.schedule.level(t)

    def time(self, ratio: float) -> float:
        return min(self.t_max, self.schedule.time(ratio))
