r"""A scanning electron microscope: what it measures of a noise-free picture.

A picture x on the scale [-1, 1] is the brightness I = (x + 1) / 2, the rate at which electrons arrive. In this order,

    B  = k * I                                       blur by the point-spread function k, I continued by reflection,
    R  = max(B + charge, 0)                          charging of the wafer,
    e  = Poisson(dose R) / dose - R + read_noise z   counting and read-out noise, z standard normal,
    n_i0 = e_i0,    n_ij = rho n_i,j-1 + sqrt(1 - rho^2) e_ij      detector of little bandwidth, along each row,
    y  = 2 (R + n) - 1.

Rows are scanned one after the other: the fast axis is the column index j. The noise of a flat picture is stationary
from its first pixel on,

    Var[n_ij] = R / dose + read_noise^2,    Corr[n_ij, n_i,j+m] = rho^m,

and :func:`smcdiff.restoration.noise_level.whiten` turns n back into e, exactly, whatever the picture. On the scale of y
variances are four times that: shot noise has sigma^2 (1 + x) with sigma = sqrt(2 / dose), as
:class:`smcdiff.restoration.noise_level.Noise` counts it.

Charge is a linear drift over the picture and a tail behind what is bright, because charge left by emitted electrons
leaks away with time: with u the place along an axis, from -1/2 to 1/2, and lambda = exp(-1 / tail_length),

    charge_ij = slow u_i + fast u_j + tail (1 - lambda) sum_{m >= 1} lambda^{m - 1} B_i,j-m.

Behind a large bright region the tail comes to tail B; a negative one leaves dark streaks, as on insulators.

References:
    L. Reimer, "Scanning Electron Microscopy", Springer (1998): the probe, charging, and counting noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Charging", "Microscope", "probe"]

Array = NDArray[np.float64]

_REACH = 5.0  # standard deviations; beyond them lies 1e-6 of a normal law
_PER_WIDTH = 2  # rings of the disc to a standard deviation of the Gaussian


def probe(major: float, minor: float | None = None, angle: float = 0.0, defocus: float = 0.0) -> Array:
    """The point-spread function of an electron beam: an astigmatic Gaussian, convolved with the disc of defocus.

    Its covariance in (row, column) coordinates is Sigma + (defocus^2 / 4) I, Sigma with the eigenvalue major^2 along
    the direction (sin angle, cos angle) and minor^2 across it. The disc is a sum over
    points with its second moments, a half of minor apart.

    Args:
        major, minor: standard deviations, in pixels, at least 0.3, for the Gaussian to be seen by the pixels; a minor
            of None is the major, which is without astigmatism.
        angle: of the major axis from the column axis towards the row axis, in radians.
        defocus: radius of the disc, in pixels, 0 in focus.

    Returns:
        (side, side) with side odd, at least 0, of sum 1.

    Raises:
        ValueError: for a value outside its domain.
    """
    minor = major if minor is None else minor
    if not (0.3 <= major < math.inf and 0.3 <= minor < math.inf):
        raise ValueError(f"got a probe of {major} by {minor} pixels; expected standard deviations of at least 0.3")
    if not 0 <= defocus < math.inf or not math.isfinite(angle):
        raise ValueError(f"got defocus {defocus} and angle {angle}; expected a radius of at least 0 and a finite angle")
    reach = math.ceil(_REACH * max(major, minor) + defocus)
    grid = np.arange(-reach, reach + 1)
    points = _disc(defocus, math.ceil(_PER_WIDTH * defocus / min(major, minor)))
    rows, columns = (g[..., None] - p for g, p in zip(np.meshgrid(grid, grid, indexing="ij"), points, strict=True))
    along = math.sin(angle) * rows + math.cos(angle) * columns
    across = math.cos(angle) * rows - math.sin(angle) * columns
    kernel: Array = np.exp(-0.5 * ((along / major) ** 2 + (across / minor) ** 2)).sum(-1)
    return kernel / kernel.sum()


def _disc(radius: float, rings: int) -> tuple[Array, Array]:
    """Rows and columns of points with equal areas of the disc: their mean is 0, their covariance (radius^2 / 4) I.

    Ring k holds 6 k + 3 points at the root mean square radius of the k-th annulus of width radius / rings.
    """
    if rings == 0:
        return np.zeros(1), np.zeros(1)
    k = np.arange(rings)
    r = radius / rings * np.sqrt((k**2 + (k + 1) ** 2) / 2)
    number = 6 * k + 3
    turn = 2 * math.pi * np.concatenate([np.arange(n) / n for n in number])
    return r.repeat(number) * np.sin(turn), r.repeat(number) * np.cos(turn)


@dataclass(frozen=True)
class Charging:
    """charge = slow u_i + fast u_j + tail (what is bright to the left in its row), on the scale of the brightness I.

    Args:
        slow: rise from the first row to the last.
        fast: rise from the first column to the last.
        tail: share of a bright region's brightness that it adds behind itself; negative for dark streaks.
        tail_length: pixels after which the tail has fallen to 1/e; greater than 0.

    Raises:
        ValueError: for a value that is not finite, or a length that is not positive.
    """

    slow: float = 0.0
    fast: float = 0.0
    tail: float = 0.0
    tail_length: float = 8.0

    def __post_init__(self) -> None:
        if not (all(map(math.isfinite, (self.slow, self.fast, self.tail))) and 0 < self.tail_length < math.inf):
            raise ValueError(f"got {self}; expected finite numbers and a tail_length greater than 0")

    def add(self, brightness: Array) -> Array:
        """max(B + charge, 0) of B (..., rows, columns)."""
        rows, columns = brightness.shape[-2:]
        charge = self.slow * _places(rows)[:, None] + self.fast * _places(columns)
        if self.tail:
            decay = math.exp(-1 / self.tail_length)
            source = (1 - decay) * brightness
            source[..., 1:], source[..., 0] = source[..., :-1].copy(), 0.0
            charge = charge + self.tail * _along_rows(source, decay)
        return np.maximum(brightness + charge, 0.0)


@dataclass(frozen=True, eq=False)
class Microscope:
    """What is measured of a noise-free picture; the module says how.

    Args:
        kernel: k, (rows, columns), values of at least 0 with the sum 1, such as :func:`probe` gives; None for no blur.
            Its centre is [rows // 2, columns // 2], as that of :class:`smcdiff.Blur`.
        dose: electrons per pixel at I = 1; infinity for no counting noise.
        read_noise: standard deviation of the read-out noise on the scale of I, at least 0.
        row_correlation: rho, of neighbours along a row, in [0, 1).
        charging: of the wafer.

    Raises:
        ValueError: for a value outside its domain.
    """

    kernel: Array | None = None
    dose: float = 1000.0
    read_noise: float = 0.0
    row_correlation: float = 0.0
    charging: Charging = field(default_factory=Charging)

    def __post_init__(self) -> None:
        k = self.kernel
        if k is not None and (k.ndim != 2 or k.size == 0):
            raise ValueError(f"got a kernel of shape {k.shape}; expected (rows, columns)")
        if k is not None and not (k.min() >= 0 and abs(k.sum() - 1) < 1e-5):
            raise ValueError(
                f"got a kernel of lowest value {k.min():.3g} and sum {k.sum():.6g}; expected a point-spread function: "
                "values of at least 0 with the sum 1. Divide it by its sum"
            )
        if not self.dose > 0:
            raise ValueError(f"got dose {self.dose}; expected electrons per pixel, greater than 0")
        if not 0 <= self.read_noise < math.inf:
            raise ValueError(f"got read_noise {self.read_noise}; expected a standard deviation of at least 0")
        if not 0 <= self.row_correlation < 1:
            raise ValueError(f"got row_correlation {self.row_correlation}; expected at least 0 and less than 1")

    def expected(self, clean: NDArray[np.floating]) -> Array:
        """2 R - 1, the mean of the measurement of a picture ``clean`` (..., rows, columns) on the scale [-1, 1].

        Raises:
            ValueError: for a picture that is not finite, far beyond [-1, 1], or no larger than the kernel's reach.
        """
        return 2 * self._rate(clean) - 1

    def image(self, clean: NDArray[np.floating], rng: np.random.Generator) -> Array:
        """A measurement y of a picture ``clean`` (..., rows, columns) on the scale [-1, 1], of the same shape.

        Raises:
            ValueError: as for :meth:`expected`.
        """
        rate = self._rate(clean)
        noise = rng.poisson(self.dose * rate) / self.dose - rate if math.isfinite(self.dose) else np.zeros_like(rate)
        if self.read_noise:
            noise = noise + self.read_noise * rng.standard_normal(rate.shape)
        if self.row_correlation:
            noise[..., 1:] *= math.sqrt(1 - self.row_correlation**2)
            noise = _along_rows(noise, self.row_correlation)
        return 2 * (rate + noise) - 1

    def _rate(self, clean: NDArray[np.floating]) -> Array:
        """R."""
        if clean.ndim < 2 or not bool((np.abs(clean) <= 2).all()):
            raise ValueError(
                f"got a picture of shape {clean.shape}, largest absolute value {np.abs(clean).max(initial=0):.3g}; "
                "expected (..., rows, columns) on the scale [-1, 1]"
            )
        brightness = (clean.astype(np.float64) + 1) / 2
        return self.charging.add(brightness if self.kernel is None else _blurred(brightness, self.kernel))


def _blurred(picture: Array, kernel: Array) -> Array:
    """k * picture, continued by reflection about its outermost pixels."""
    size = picture.shape[-2:]
    if any(side // 2 >= length for side, length in zip(kernel.shape, size, strict=True)):
        raise ValueError(f"got a picture of {size} pixels and a kernel of {kernel.shape}; expected a smaller kernel")
    around = [((side - 1) // 2, side // 2) for side in kernel.shape]
    padded = np.pad(picture, [(0, 0)] * (picture.ndim - 2) + around, mode="reflect")
    canvas = padded.shape[-2:]
    whole = np.fft.irfft2(np.fft.rfft2(padded) * np.fft.rfft2(kernel, canvas), canvas)
    rows, columns = kernel.shape
    return whole[..., rows - 1 :, columns - 1 :]  # before that lies what has wrapped around


def _places(number: int) -> Array:
    """u, from -1/2 to 1/2."""
    return np.linspace(-0.5, 0.5, number) if number > 1 else np.zeros(1)


def _along_rows(source: Array, decay: float) -> Array:
    """r_j = decay r_{j-1} + source_j along the last axis, from r_0 = source_0."""
    result = source.copy()
    for j in range(1, source.shape[-1]):
        result[..., j] += decay * result[..., j - 1]
    return result
