r"""A measured power spectrum with its sampling noise taken down.

A variance measured on N independent values is off by a factor of which the logarithm has mean psi(N / 2) - log(N / 2)
and variance psi'(N / 2), psi the digamma function. Spectra of pictures are smoother than that. With l the log-spectrum,
s its mean over the 3 x 3 neighbours and e the local mean of (l - s)^2,

    l' = s + w (l - s),     w = max(0, 1 - (8 / 9) psi'(N / 2) / e),

keeps what stands out of the noise and averages what does not: the positive-part estimator of James and Stein, taken
locally.

In the Fourier basis a stationary law has the same variance at f and -f, which are measured together first.

References:
    W. James, C. Stein, "Estimation with quadratic loss" (1961).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from smcdiff.transforms import DCT, HARTLEY, Basis, same_basis

__all__ = ["smoothed"]


def smoothed(variances: Tensor, number: int, basis: Basis) -> Tensor:
    """The spectrum with neighbouring coordinates averaged as far as sampling noise asks for it.

    Args:
        variances: means of ``number`` squares, (levels, *event), positive; float64.
        number: of independent pictures they were measured on.
        basis: of the coordinates.
    """
    if variances.ndim < 3 or min(variances.shape[-2:]) < 3:
        return variances
    count = torch.full(variances.shape[-2:], float(number), dtype=variances.dtype, device=variances.device)
    mode = "replicate"
    if same_basis(basis, HARTLEY):
        mode = "circular"
        variances = 0.5 * (variances + _mirrored(variances))
        place = torch.arange(count.numel(), device=count.device).reshape(count.shape)
        count = torch.where(place == _mirrored(place), count, 2 * count)
    elif same_basis(basis, DCT):
        mode = "reflect"  # a cosine spectrum is even about frequency 0
    log_v = variances.log()
    near = _neighbours(log_v, mode)
    away = log_v - near
    noise = 8 / 9 * torch.special.polygamma(1, count / 2)
    kept = (1 - noise / _neighbours(away.square(), mode).clamp(min=1e-30)).clamp(min=0)
    low = torch.digamma(count / 2) - (count / 2).log()  # by so much the mean logarithm is too low
    return (near + kept * away - (1 - kept) * low).exp()


def _mirrored(values: Tensor) -> Tensor:
    """values[-i, -j] of the last two dimensions."""
    return values.flip((-2, -1)).roll((1, 1), (-2, -1))


def _neighbours(values: Tensor, mode: str) -> Tensor:
    """The mean over 3 x 3 neighbours in the last two dimensions."""
    flat = values.reshape(-1, 1, *values.shape[-2:])
    box = torch.full((1, 1, 3, 3), 1 / 9, dtype=values.dtype, device=values.device)
    return conv2d(pad(flat, (1, 1, 1, 1), mode=mode), box).reshape(values.shape)
