r"""The noise of a picture taken by scanning, and estimates of it from the picture alone.

The noise n of y = A(x) + n may depend on brightness and may be correlated along a row, the direction of the fast scan,
where a detector with little bandwidth smears it:

    Var[n_ij] = sigma^2                                (Gaussian)
    Var[n_ij] = sigma^2 max(1 + A(x)_ij, floor)        (shot: electrons arrive at random, in number as the brightness)
    Corr[n_ij, n_i,j+k] = rho^k.

On the scale [-1, 1] the brightness is 1 + x, so for shot noise sigma is the deviation at mid-grey. The correlation is
that of an autoregression, so that one linear map of every row,

    (W y)_i0 = y_i0,    (W y)_ij = (y_ij - rho y_i,j-1) / sqrt(1 - rho^2),

makes it white: W y = W A(x) + sigma_ij eps_ij with independent eps.

The estimates use the diagonal differences of neighbouring rows, in which straight horizontal and vertical edges vanish,

    d_k = (y_ij - y_i,j+k - y_i+1,j + y_i+1,j+k) / 2,    Var[d_k] = sigma^2 (1 - rho^k),

divided by sqrt(max(1 + local mean, floor)) for shot noise, and the median absolute deviation
s_k = median |d_k| / 0.6745, which edges in few places do not move:

    rho = 1 - s_1^2 / s_8^2,    sigma = s_1 / sqrt(1 - rho),

the former up to rho^8.

References:
    D. Donoho, I. Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81 (1994): noise level from
    the median absolute deviation of the finest wavelet coefficients, which d_1 on every second place are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Noise", "estimate_row_correlation", "estimate_sigma", "whiten"]

#: Brightness below which shot noise falls no further, on the scale on which mid-grey is 1.
FLOOR = 0.1
_MAD = 0.6744897501960817  # median of |z| for a standard normal z
_LARGEST_CORRELATION = 0.95
_FAR = 8  # pixels; what is so far apart in a row is taken to be independent


@dataclass(frozen=True)
class Noise:
    """The law of a picture's noise.

    Args:
        sigma: standard deviation on the scale [-1, 1], of shot noise that at mid-grey; greater than 0.
        width: 0 if sigma is known; otherwise sigma is a latent with the prior LogNormal(log sigma, width).
        shot: the variance follows the brightness.
        row_correlation: rho, the correlation of neighbours in a row, in [0, 1).

    Raises:
        ValueError: for a value outside its domain.
    """

    sigma: float
    width: float = 0.0
    shot: bool = False
    row_correlation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"got sigma {self.sigma}; expected a standard deviation greater than 0 (scale [-1, 1])")
        if not 0 <= self.width < math.inf:
            raise ValueError(f"got width {self.width}; expected at least 0, the deviation of log sigma")
        if not 0 <= self.row_correlation < 1:
            raise ValueError(f"got row_correlation {self.row_correlation}; expected at least 0 and less than 1")

    def relative_scale(self, brightness: Tensor) -> Tensor:
        """Standard deviation over sigma at each pixel of the noise-free picture."""
        return (1 + brightness).clamp(min=FLOOR).sqrt() if self.shot else torch.ones_like(brightness)


def whiten(y: Tensor, row_correlation: float) -> Tensor:
    """W y over the last axis; the identity for rho = 0."""
    if row_correlation == 0:
        return y
    rest = (y[..., 1:] - row_correlation * y[..., :-1]) / math.sqrt(1 - row_correlation**2)
    return torch.cat([y[..., :1], rest], -1)


def estimate_row_correlation(y: Tensor, shot: bool = False) -> float:
    """rho of the noise of a picture (1, rows, columns), between 0 and 0.95."""
    ratio = _robust_deviation(y, 1, shot, None) ** 2 / _robust_deviation(y, _FAR, shot, None) ** 2
    return min(max(1 - ratio, 0.0), _LARGEST_CORRELATION)


def estimate_sigma(y: Tensor, shot: bool = False, row_correlation: float = 0.0, mask: Tensor | None = None) -> float:
    """sigma of the noise of a picture (1, rows, columns).

    Args:
        y: the picture; its measured pixels must not all be alike.
        shot: the variance follows the brightness.
        row_correlation: rho.
        mask: which pixels were measured, of the shape of y; all of them if None.

    Raises:
        ValueError: for a picture too small, too flat or with too few measured pixels to tell.
    """
    return _robust_deviation(y, 1, shot, mask) / math.sqrt(1 - row_correlation)


def _robust_deviation(y: Tensor, lag: int, shot: bool, mask: Tensor | None) -> float:
    """s_k for k = ``lag``."""
    if y.ndim != 3 or y.shape[-2] < 2 or y.shape[-1] <= lag:
        raise ValueError(
            f"got a picture of shape {tuple(y.shape)}; expected (1, rows, columns) with at least 2 rows and "
            f"{lag + 1} columns"
        )

    def corners(picture: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        above, below = picture[..., :-1, :], picture[..., 1:, :]
        return above[..., :-lag], above[..., lag:], below[..., :-lag], below[..., lag:]

    a, b, c, d = corners(y.double())
    differences = (a - b - c + d) / 2
    if shot:
        local = functional.avg_pool2d(y.double()[None], 5, 1, 2, count_include_pad=False)[0]
        brightness = 1 + torch.stack(corners(local)).mean(0)
        differences = differences / brightness.clamp(min=FLOOR).sqrt()
    if mask is not None:
        differences = differences[torch.stack(corners(mask > 0)).all(0)]
    size = differences.numel()
    deviation = float(differences.abs().median()) / _MAD if size else 0.0
    if not deviation > 0:
        raise ValueError(
            f"the noise level cannot be read off this picture: of {size} differences of measured neighbours at least "
            "half are exactly 0. Give sigma as a number"
        )
    return deviation
