r"""RePaint: inpainting with jumps back in time.

    known pixels     alpha_s y + sigma_s noise,
    the others       from p(x_s given x_t),
    and every ``jump_length`` levels the particle is noised again by that many, ``jumps`` - 1 times.

The known pixels' noise is drawn anew in every step, as in ILVR, so its step is the one here: see
:mod:`smcdiff.guidance.ilvr` for its form with measurement noise and any operator. Without jumps it has a density, and
more particles correct it. With jumps it has none, and one particle is the published sampler: see
:mod:`smcdiff.guidance.time_travel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smcdiff.guidance.base import Proposal, Twist
from smcdiff.guidance.ilvr import NoisedMeasurement
from smcdiff.guidance.pigdm import PiGDMTwist
from smcdiff.guidance.time_travel import TimeTravel

__all__ = ["RePaint"]


@dataclass(frozen=True)
class RePaint:
    """RePaint on a Pyro program with one linear measurement and Gaussian noise.

    Published for ``sd.Mask`` and ``sd.Select``; any operator with a fast svd does. The twist, with which the
    publication has nothing to do, is that of PiGDM.

    Args:
        model: the Pyro program.
        jump_length: levels of one jump, j, at least 1; published: 10 of 250 steps.
        jumps: passes over each stretch, r, at least 1, where 1 never jumps; published: 10.

    Raises:
        ValueError: for numbers below 1, or from :class:`smcdiff.SMC` for jumps with more than one particle.

    References:
        A. Lugmayr, M. Danelljan, A. Romero, F. Yu, R. Timofte, L. Van Gool, "RePaint: Inpainting using Denoising
        Diffusion Probabilistic Models" (2022), arXiv 2201.09865: algorithm 1, with the jumps of its appendix.
    """

    model: Callable[..., Any]
    jump_length: int = 1
    jumps: int = 1

    def __post_init__(self) -> None:
        TimeTravel(self.jump_length, self.jumps)

    @property
    def travel(self) -> TimeTravel | None:
        """The jumps, or None where there are none."""
        return TimeTravel(self.jump_length, self.jumps) if self.jumps > 1 else None

    @property
    def twist(self) -> Twist:
        return PiGDMTwist("RePaint")

    @property
    def proposal(self) -> Proposal:
        return NoisedMeasurement("RePaint")

    @property
    def forward_only(self) -> bool:
        return True
