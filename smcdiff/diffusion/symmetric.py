r"""A denoiser averaged over the symmetries of its pictures.

    x0_hat(x_t) = mean over g in G of g^-1 x0_hat_network(g x_t)

for a group G of turns and mirrors that the law of the pictures is invariant under: then E[x_0 given g x_t] =
g E[x_0 given x_t], and the mean has no larger squared error than its terms have on average. What a network says at one
noise level then follows better from what it says at another, which is what the weights of a whole picture are made of.
It takes as many passes as G has elements.

References:
    T. Cohen, M. Welling, "Group Equivariant Convolutional Networks" (2016), arXiv 1602.07576: equivariance to turns and
    mirrors.
    B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles" (2016), arXiv 1612.01474: what averaging networks does to their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel

__all__ = ["SymmetricDenoiser", "Symmetries"]

#: "mirrors": left and right, top and bottom, 4 elements; "square": also turns by 90 degrees, 8 elements.
Symmetries = Literal["mirrors", "square"]
#: Quarter turns of each group.
_TURNS: dict[Symmetries, tuple[int, ...]] = {"mirrors": (0, 2), "square": (0, 1, 2, 3)}


@final
class SymmetricDenoiser:
    """The mean over g in G of g^-1 x0_hat(g x_t).

    Put it into a prior with ``prior.replace(denoiser=sd.SymmetricDenoiser(prior.chain.denoiser))``; the covariance that
    the prior has stays, until it is calibrated anew. A run counts one evaluation for all of G.

    Args:
        denoiser: of events whose last two dimensions are a picture's rows and columns.
        symmetries: G, "mirrors" or "square".

    Raises:
        ValueError: for other symmetries, events that are no pictures, or turns of pictures that are not square.
    """

    def __init__(self, denoiser: Denoiser, symmetries: Symmetries = "square") -> None:
        shape = denoiser.event_shape
        if symmetries not in _TURNS:
            raise ValueError(f"got symmetries {symmetries!r}; expected one of {sorted(_TURNS)}")
        if len(shape) < 2 or (symmetries == "square" and shape[-1] != shape[-2]):
            raise ValueError(
                f"got events of shape {tuple(shape)} for the symmetries {symmetries!r}; expected pictures (..., rows, "
                'columns), with as many rows as columns for "square"'
            )
        self.denoiser, self.symmetries = denoiser, symmetries
        self.event_shape, self.dtype, self.device = shape, denoiser.dtype, denoiser.device

    @property
    def order(self) -> int:
        """Number of elements of G, and of passes through the denoiser."""
        return 2 * len(_TURNS[self.symmetries])

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        said = []
        for turns in _TURNS[self.symmetries]:
            for mirrored in (False, True):
                seen = x_t.rot90(turns, (-2, -1))
                estimate = self.denoiser(seen.flip(-1) if mirrored else seen, level)
                said.append(_turned_back(estimate, turns, mirrored))
        return Estimate(
            _mean([one.mean for one in said]),
            None if said[0].variance is None else _mean([one.variance for one in said if one.variance is not None]),
            None if said[0].fraction is None else _mean([one.fraction for one in said if one.fraction is not None]),
        )


def _turned_back(estimate: Estimate, turns: int, mirrored: bool) -> Estimate:
    def back(part: Tensor) -> Tensor:
        if part.shape[-2:] == (1, 1):  # one value for all pixels
            return part
        return (part.flip(-1) if mirrored else part).rot90(-turns, (-2, -1))

    optional: Callable[[Tensor | None], Tensor | None] = lambda part: None if part is None else back(part)  # noqa: E731
    return Estimate(back(estimate.mean), optional(estimate.variance), optional(estimate.fraction))


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)
