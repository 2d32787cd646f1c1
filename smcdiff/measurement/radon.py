r"""Parallel-beam projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from smcdiff.measurement.operators import TransposeOperator

__all__ = ["Radon"]


@final
@dataclass(frozen=True, eq=False)
class Radon(TransposeOperator):
    r"""y[a, b] = sum over the pixels of x[row, column] h(t - b), the projection of an image along parallel beams.

    ``t = (column - c) cos(angle_a) + (row - c) sin(angle_a)`` is the place of a pixel's centre on the detector, c the
    centre of the image, b the place of a detector bin, both in pixels from the detector's centre, and
    ``h(u) = max(0, 1 - |u|)``. The mass of the image and its first moment are kept in every projection.

    A call takes memory for angles x size^2 numbers per event.

    References:
        T. M. Peters, "Algorithms for Fast Back- and Re-Projection in Computed Tomography", IEEE Transactions on
        Nuclear Science 28 (1981): pixel-driven projection with linear interpolation.

    Args:
        size: rows and columns of the square image x of shape (..., size, size); y is (..., angles, bins).
        angles: in radians, shape (angles,); angle 0 sums over rows.

    Raises:
        ValueError: for a size under 1, angles that are not one-dimensional, an image of another size.
    """

    size: int
    angles: Tensor

    def __post_init__(self) -> None:
        if self.size < 1 or self.angles.ndim != 1 or self.angles.numel() == 0:
            raise ValueError(
                f"got size {self.size} and angles of shape {tuple(self.angles.shape)}; expected a size of at least 1 "
                "and angles of shape (number,)"
            )

    @property
    def bins(self) -> int:
        """Detector bins: an odd number that covers the diagonal."""
        return 2 * int(self.size / 2**0.5 + 1) + 1

    @cached_property
    def _footprint(self) -> tuple[Tensor, Tensor]:
        """Per angle and pixel the lower of its two bins, counted through all angles, and its share in the upper one."""
        axis = torch.arange(self.size, dtype=torch.float64, device=self.angles.device) - (self.size - 1) / 2
        angles = self.angles.double()[:, None, None]
        place = axis[None, None, :] * angles.cos() + axis[None, :, None] * angles.sin() + self.bins // 2
        lower = place.floor()
        offset = torch.arange(len(self.angles), device=self.angles.device)[:, None, None] * self.bins
        return (lower.long() + offset).flatten(), (place - lower).flatten()

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(f"got x of shape {tuple(x.shape)}; expected (..., {self.size}, {self.size})")
        lower, share = self._footprint
        share = share.to(x.dtype)
        number = len(self.angles)
        pixels = x.flatten(-2).unsqueeze(-2).expand(*x.shape[:-2], number, self.size**2).flatten(-2)
        sinogram = x.new_zeros(*x.shape[:-2], number * self.bins)
        sinogram = sinogram.index_add(-1, lower, (1 - share) * pixels).index_add(-1, lower + 1, share * pixels)
        return sinogram.unflatten(-1, (number, self.bins))

    def adjoint(self, y: Tensor) -> Tensor:
        if y.shape[-2:] != (len(self.angles), self.bins):
            raise ValueError(f"got y of shape {tuple(y.shape)}; expected (..., {len(self.angles)}, {self.bins})")
        lower, share = self._footprint
        share = share.to(y.dtype)
        y = y.flatten(-2)
        pixels = (1 - share) * y.index_select(-1, lower) + share * y.index_select(-1, lower + 1)
        return pixels.unflatten(-1, (len(self.angles), self.size, self.size)).sum(-3)
