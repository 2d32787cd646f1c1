r"""Measurements in the Fourier domain, with F the unitary transform over the last two dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from smcdiff.measurement.checks import broadcasts, is_validating, require_finite
from smcdiff.measurement.operators import Operator, SpectralOperator
from smcdiff.measurement.svd import SVD, reciprocal
from smcdiff.transforms import hartley

__all__ = ["FourierMagnitude", "FourierSampling"]


@final
@dataclass(frozen=True, eq=False)
class FourierSampling(SpectralOperator):
    """y = m F x, as real and imaginary parts: (..., rows, columns) gives (..., rows, columns, 2).

    The frequencies f and -f of a real image are conjugate, so A^T A = H diag((m(f)^2 + m(-f)^2) / 2) H with H the
    Hartley transform; s is the root of that, V = H and U = A H s^+.

    Where m = 0 the measurement is noise alone, as for :class:`~smcdiff.measurement.Mask`.

    Args:
        mask: m, bool or real, (rows, columns) or what broadcasts to (..., rows, columns); frequency 0 at [0, 0], as
            ``torch.fft.fft2`` has it.

    Raises:
        ValueError: for a mask that does not broadcast to the shape of x, NaN.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if is_validating():
            require_finite("a mask", self.mask)

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or not broadcasts(self.mask.shape, x.shape):
            raise ValueError(
                f"got a mask of shape {tuple(self.mask.shape)} and x of shape {tuple(x.shape)}; expected a mask that "
                "broadcasts to (..., rows, columns)"
            )
        return torch.view_as_real(self.mask.to(x.dtype) * torch.fft.fft2(x, norm="ortho"))

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifft2(self.mask.to(y.dtype) * torch.view_as_complex(y.contiguous()), norm="ortho").real

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape[:-1]

    def svd(self, x: Tensor) -> SVD:
        power = self.mask.to(x.dtype).square().expand(torch.broadcast_shapes(self.mask.shape, x.shape[-2:]))
        s = ((power + power.flip((-2, -1)).roll((1, 1), (-2, -1))) / 2).sqrt()
        inverse = reciprocal(s)
        return SVD(
            s,
            hartley,
            hartley,
            lambda y: inverse * hartley(self.adjoint(y)),
            lambda c: self(hartley(inverse * c)),
        )


@final
@dataclass(frozen=True)
class FourierMagnitude(Operator):
    """y = |F P x|, phase retrieval: P surrounds the image with zeros; non-linear.

    Its gradient is taken as 0 where the magnitude is 0.

    Args:
        padding: zeros added on each side, in pixels; half the image's size doubles the sampling in each direction,
            without which the phase cannot be found.

    Raises:
        ValueError: for a padding under 0.
    """

    padding: int

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"got padding {self.padding}; expected at least 0 pixels")

    def __call__(self, x: Tensor) -> Tensor:
        p = self.padding
        return torch.fft.fft2(pad(x, (p, p, p, p)), norm="ortho").abs()
