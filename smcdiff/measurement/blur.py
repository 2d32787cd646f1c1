r"""Convolution of images with a kernel.

    y[i] = sum_j k[j] x[i + c - j],    c = (rows // 2, columns // 2) of the kernel, its centre,

per channel, with x continued beyond its border as the padding says. It is computed by the fast Fourier transform: a
circular convolution is y = F^-1 (h . F x) with the transfer function h, the transform of the kernel rolled to its
centre; a zero-padded one is a circular convolution on a canvas large enough that nothing wraps onto the image, and a
reflected one on the canvas of twice the sides that the image and its mirror images fill.

With H the (real, orthonormal) Hartley transform and P the convolution whose transfer function is h / |h|, a circular
convolution is A = (P H) diag(|h|) H, a singular value decomposition in real coordinates. With reflection and a kernel
that is symmetric about its centre in both directions, A = V diag(h) V^T with V^T the cosine transform and h the real
transfer function at the frequencies of the cosines.

References:
    M. Ng, R. Chan, W.-C. Tang, "A Fast Algorithm for Deblurring Models with Neumann Boundary Conditions" (1999):
    reflection and the cosine transform.
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
from smcdiff.transforms import DCT, HARTLEY, Basis, dct, hartley, inverse_dct, same_basis

__all__ = ["Blur", "Circular", "Padding", "Reflective", "Zero"]


@final
@dataclass(frozen=True)
class Circular:
    """The image repeats itself beyond its border: the convolution has a fast svd."""


@final
@dataclass(frozen=True)
class Zero:
    """The image is 0 beyond its border (mid-grey on the scale [-1, 1]): no svd."""


@final
@dataclass(frozen=True)
class Reflective:
    """The image is mirrored at its border, c b a | a b c: a fast svd for kernels symmetric in both directions."""


Padding = Circular | Zero | Reflective


@final
@dataclass(frozen=True, eq=False)
class Blur(SpectralOperator):
    """y = k * x, of the shape of x, each channel convolved with the kernel.

    Differentiable in the kernel as in x, so that a kernel may be a latent of the program.

    Args:
        kernel: k, of shape (rows, columns), any sizes, also even ones and ones larger than the image; its centre is
            [rows // 2, columns // 2]. Not normalised here. A kernel of shape (*batch, rows, columns) is one kernel
            per sample: batch broadcasts to the batch dimensions of x of shape (*batch, channels, rows, columns).
        padding: how x is continued, :class:`Circular`, :class:`Zero` or :class:`Reflective`.

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
        if not isinstance(self.padding, Circular | Zero | Reflective):
            raise TypeError(f"got padding {self.padding!r}; expected Circular(), Zero() or Reflective()")
        if is_validating():
            require_finite("a kernel", kernel)

    def __call__(self, x: Tensor) -> Tensor:
        return self._convolve(x, adjoint=False)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._convolve(y, adjoint=True)

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def svd(self, x: Tensor) -> SVD | None:
        """For circular padding, in Hartley coordinates; for reflection and a kernel symmetric in both directions, in
        those of the cosine transform; None elsewhere. The derivatives of the latter in the kernel are those within
        symmetric kernels."""
        if isinstance(self.padding, Circular):
            return self._circular_svd(x)
        h = self.eigenvalues(x, DCT)
        if h is None:
            return None
        s = cut(h.abs(), 2)
        signs = torch.where(s > 0, h.sign(), 0.0)
        return SVD(s, dct, inverse_dct, lambda y: signs * dct(y), lambda c: inverse_dct(signs * c))

    def eigenvalues(self, x: Tensor, basis: Basis) -> Tensor | None:
        """The transfer function: for kernels symmetric about their centre with circular padding in Hartley coordinates,
        for those symmetric in both directions with reflection in those of the cosine transform; None elsewhere."""
        mirrors: tuple[tuple[int, ...], ...]
        if isinstance(self.padding, Circular) and same_basis(basis, HARTLEY):
            times, mirrors = 1, ((-2, -1),)
        elif isinstance(self.padding, Reflective) and same_basis(basis, DCT):
            times, mirrors = 2, ((-2,), (-1,))
        else:
            return None
        rows, columns = self._size(x)
        kernel = self._rolled(times * rows, times * columns, x.dtype)
        eps = max(torch.finfo(dtype).eps for dtype in (self.kernel.dtype, x.dtype))
        if not all(_is_even(kernel, dims, eps) for dims in mirrors):
            return None
        return torch.fft.fft2(kernel).real[..., :rows, :columns]

    def _circular_svd(self, x: Tensor) -> SVD:
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
        reflective = isinstance(self.padding, Reflective)
        if isinstance(self.padding, Zero):
            canvas = (rows + self.kernel.shape[-2] // 2, columns + self.kernel.shape[-1] // 2)
        elif reflective:
            canvas = (2 * rows, 2 * columns)
        given = _mirrored(x) if reflective and not adjoint else x
        transfer = torch.fft.rfft2(self._rolled(*canvas, x.dtype))
        spectrum = torch.fft.rfft2(given, s=canvas) * (transfer.conj() if adjoint else transfer)
        y = torch.fft.irfft2(spectrum, s=canvas)
        return _folded(y) if reflective and adjoint else y[..., :rows, :columns]

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


def _mirrored(x: Tensor) -> Tensor:
    """x and its mirror images, on twice as many rows and columns."""
    wide = torch.cat([x, x.flip(-1)], -1)
    return torch.cat([wide, wide.flip(-2)], -2)


def _folded(x: Tensor) -> Tensor:
    """The transpose of :func:`_mirrored`."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    high = x[..., :rows, :] + x[..., rows:, :].flip(-2)
    return high[..., :columns] + high[..., columns:].flip(-1)


def _is_even(rolled: Tensor, dims: tuple[int, ...], eps: float) -> bool:
    """Whether each kernel with its centre at [0, 0] is its own mirror image, up to a few roundings of its largest
    value; False where values cannot be read, as under ``torch.func.vmap``."""
    mirror = rolled.flip(dims).roll((1,) * len(dims), dims)
    even = (rolled - mirror).abs() <= 8 * eps * rolled.abs().amax((-2, -1), keepdim=True)
    try:
        return bool(even.all())
    except RuntimeError:
        return False
