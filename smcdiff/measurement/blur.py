r"""Convolution of images with a kernel.

    y[i] = sum_j k[j] x[i + c - j],    c = (rows // 2, columns // 2) of the kernel, its centre,

per channel, with x continued beyond its border as the padding says. It is computed by the fast Fourier transform: a
circular convolution is y = F^-1 (h . F x) with the transfer function h, the transform of the kernel rolled to its
centre; a zero-padded one is a circular convolution on a canvas large enough that nothing wraps onto the image.

With H the (real, orthonormal) Hartley transform and P the convolution whose transfer function is h / |h|, a circular
convolution is A = (P H) diag(|h|) H, a singular value decomposition in real coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from smcdiff.measurement.checks import broadcasts, is_validating, require_finite
from smcdiff.measurement.operators import SpectralOperator
from smcdiff.measurement.svd import SVD, cut
from smcdiff.transforms import hartley

__all__ = ["Blur", "Circular", "Padding", "Zero"]


@final
@dataclass(frozen=True)
class Circular:
    """The image repeats itself beyond its border: the convolution has a fast svd."""


@final
@dataclass(frozen=True)
class Zero:
    """The image is 0 beyond its border (mid-grey on the scale [-1, 1]): no svd."""


Padding = Circular | Zero


@final
@dataclass(frozen=True, eq=False)
class Blur(SpectralOperator):
    """y = k * x, of the shape of x, each channel convolved with the kernel.

    Differentiable in the kernel as in x, so that a kernel may be a latent of the program.

    Args:
        kernel: k, of shape (rows, columns), any sizes, also even ones and ones larger than the image; its centre is
            [rows // 2, columns // 2]. Not normalised here. A kernel of shape (*batch, rows, columns) is one kernel
            per sample: batch broadcasts to the batch dimensions of x of shape (*batch, channels, rows, columns).
        padding: how x is continued, :class:`Circular` or :class:`Zero`.

    Raises:
        ValueError: for a kernel with fewer than two dimensions, empty, complex or integer, with NaN, or whose batch
            does not broadcast to that of x.
    """

    kernel: Tensor
    padding: Padding = field(default_factory=Circular)

    def __post_init__(self) -> None:
        kernel = self.kernel
        if kernel.ndim < 2 or kernel.numel() == 0 or not kernel.is_floating_point():
            raise ValueError(
                f"got a kernel of shape {tuple(kernel.shape)} and dtype {kernel.dtype}; expected floating-point values "
                "of shape (rows, columns), or (*batch, rows, columns) for one kernel per sample"
            )
        if not isinstance(self.padding, Circular | Zero):
            raise TypeError(f"got padding {self.padding!r}; expected Circular() or Zero()")
        if is_validating():
            require_finite("a kernel", kernel)

    def __call__(self, x: Tensor) -> Tensor:
        return self._convolve(x, adjoint=False)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._convolve(y, adjoint=True)

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def svd(self, x: Tensor) -> SVD | None:
        """For circular padding, in Hartley coordinates; None for zero padding."""
        if isinstance(self.padding, Zero):
            return None
        rows, columns = self._size(x)
        transfer = torch.fft.fft2(self._rolled(rows, columns, x.dtype))
        s = cut(transfer.abs(), 2)
        phase = torch.where(s > 0, transfer / torch.where(s > 0, s, 1.0), 0.0)

        def measurement_to_spectral(y: Tensor) -> Tensor:
            spectrum = phase.conj() * torch.fft.fft2(y, norm="ortho")
            return spectrum.real - spectrum.imag

        def measurement_from_spectral(c: Tensor) -> Tensor:
            return torch.fft.ifft2(phase * torch.fft.fft2(hartley(c))).real

        return SVD(s, hartley, hartley, measurement_to_spectral, measurement_from_spectral)

    def _convolve(self, x: Tensor, *, adjoint: bool) -> Tensor:
        rows, columns = self._size(x)
        canvas = (rows, columns)
        if isinstance(self.padding, Zero):
            canvas = (rows + self.kernel.shape[-2] // 2, columns + self.kernel.shape[-1] // 2)
        transfer = torch.fft.rfft2(self._rolled(*canvas, x.dtype))
        spectrum = torch.fft.rfft2(x, s=canvas) * (transfer.conj() if adjoint else transfer)
        return torch.fft.irfft2(spectrum, s=canvas)[..., :rows, :columns]

    def _size(self, x: Tensor) -> tuple[int, int]:
        batch = self.kernel.shape[:-2]
        if x.ndim < 2 or (batch and not broadcasts(batch, x.shape[:-3])):
            raise ValueError(
                f"got a kernel of shape {tuple(self.kernel.shape)} and x of shape {tuple(x.shape)}; expected x of "
                "shape (*batch, channels, rows, columns) with a kernel of shape (rows, columns) or (*batch, rows, "
                "columns). Take the channel out of a kernel of shape (1, rows, columns) with kernel[0]; expand x for "
                "a larger batch of kernels"
            )
        return x.shape[-2], x.shape[-1]

    def _rolled(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The kernel on a canvas of that size, its centre at [0, 0] and wrapped; (*batch, 1, rows, columns)."""
        down, right = self.kernel.shape[-2:]
        k = pad(self.kernel.to(dtype), (0, -right % columns, 0, -down % rows))
        k = k.unflatten(-1, (-1, columns)).sum(-2).unflatten(-2, (-1, rows)).sum(-3)
        k = k.roll((-(down // 2), -(right // 2)), (-2, -1))
        return k.unsqueeze(-3) if k.ndim > 2 else k
