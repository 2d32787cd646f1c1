r"""Point-spread functions with a few parameters.

Every function here takes parameters of shape (*batch,) and gives kernels k of shape (*batch, size, size) for
:class:`~smcdiff.measurement.Blur`: values at least 0 and of sum 1 over the window, their centre at
[size // 2, size // 2], differentiable in the parameters. Lengths are in pixels. Angles are in radians, from the axis
along the columns (to the right), counter-clockwise as a picture is shown (rows run down).

    Gaussian      k[x] ~ exp(-|x|^2 / (2 sigma^2))
    astigmatic    k[x] ~ exp(-x^T C^-1 x / 2),    C = R diag(sigma_1^2, sigma_2^2) R^T
    defocus       k[x] ~ Phi((radius - |x|) / edge)
    motion        k[x] ~ the integral along a line of exp(-|x - u|^2 / (2 edge^2))
    Zernike       k[x] ~ |integral over |v| < 1 of exp(i phi(v) + i pi cutoff v^T x) dv|^2

each sampled at the pixels and divided by its sum. What a window too small cuts off is lost. Sampling adds nothing to
the second moment of a Gaussian beyond 8 pi^2 sigma^4 exp(-2 pi^2 sigma^2), which is 1 % of sigma^2 at sigma = 0.64 and
less above; far below half a pixel the samples are those of a point.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from smcdiff.measurement.checks import holds, is_validating, require_finite

__all__ = ["NOLL", "astigmatic_psf", "defocus_psf", "gaussian_psf", "motion_psf", "stigmator_psf", "zernike_psf"]

#: Noll's indices of the coefficients of :func:`zernike_psf`: defocus, oblique and vertical astigmatism, vertical and
#: horizontal coma, spherical aberration.
NOLL = (4, 5, 6, 7, 8, 11)


def gaussian_psf(sigma: Tensor | float, size: int) -> Tensor:
    """The same width in all directions.

    Args:
        sigma: standard deviation in each direction, greater than 0, (*batch,).
        size: of the window, at least 1.

    Raises:
        ValueError: for a sigma or a size out of range.
    """
    (sigma,) = _numbers(sigma=sigma)
    _require_positive("sigma", sigma)
    up, right = _pixels(size, sigma)
    return _normalised_exp(-0.5 * (up**2 + right**2) / sigma[..., None, None] ** 2)


def astigmatic_psf(sigma_1: Tensor | float, sigma_2: Tensor | float, angle: Tensor | float, size: int) -> Tensor:
    """A width of its own along each of two perpendicular axes.

    Exchanging the widths is turning by a right angle; priors do better with :func:`stigmator_psf`.

    Args:
        sigma_1, sigma_2: standard deviations along the axes, greater than 0, (*batch,).
        angle: of the first axis, (*batch,).
        size: of the window, at least 1.

    Raises:
        ValueError: for a sigma or a size out of range.
    """
    sigma_1, sigma_2, angle = _numbers(sigma_1=sigma_1, sigma_2=sigma_2, angle=angle)
    _require_positive("sigma_1", sigma_1)
    _require_positive("sigma_2", sigma_2)
    up, right = _pixels(size, sigma_1)
    along, across = _turned(up, right, angle)
    return _normalised_exp(-0.5 * ((along / sigma_1[..., None, None]) ** 2 + (across / sigma_2[..., None, None]) ** 2))


def stigmator_psf(sigma: Tensor | float, stigmator: Tensor, size: int) -> Tensor:
    r"""An astigmatic Gaussian by its mean width and the two knobs of a stigmator.

        C = sigma^2 exp S,    S = [[a, b], [b, -a]]

    in the axes to the right and up. With r = (a^2 + b^2)^(1/2) the widths are sigma exp(r / 2) along the angle
    atan2(b, a) / 2 and sigma exp(-r / 2) across. Every C is met once and the kernel is a smooth function of (a, b), at
    zero too; widths and an angle have a jump at the end of the angle's range and no angle where the widths are equal.

    Args:
        sigma: the geometric mean of the two widths, greater than 0, (*batch,).
        stigmator: (a, b), (*batch, 2).
        size: of the window, at least 1.

    Raises:
        ValueError: for a sigma or a size out of range, or a stigmator that is not of two numbers.
    """
    if stigmator.ndim < 1 or stigmator.shape[-1] != 2:
        raise ValueError(f"got a stigmator of shape {tuple(stigmator.shape)}; expected (*batch, 2)")
    sigma, a, b = _numbers(sigma=sigma, a=stigmator[..., 0], b=stigmator[..., 1])
    _require_positive("sigma", sigma)
    square = a**2 + b**2
    small = square < 1e-6  # there the series is exact to 1e-14, and the root has no derivative at 0
    r = torch.where(small, 1.0, square).sqrt()
    even = torch.where(small, 1 + square / 2, r.cosh())
    odd = torch.where(small, 1 + square / 6, r.sinh() / r)
    up, right = _pixels(size, sigma)
    even, odd_a, odd_b = (part[..., None, None] for part in (even, odd * a, odd * b))
    form = even * (up**2 + right**2) - odd_a * (right**2 - up**2) - 2 * odd_b * right * up  # of exp(-S)
    return _normalised_exp(-0.5 * form / sigma[..., None, None] ** 2)


def defocus_psf(radius: Tensor | float, size: int, edge: float = 0.5) -> Tensor:
    """A disc whose edge falls off as a normal distribution function, which makes it differentiable in the radius.

    It is the mean of discs of radius rho ~ N(radius, edge^2), in proportion to their areas. So its area is
    pi (radius^2 + edge^2), and its variance in each direction (radius^4 + 6 radius^2 edge^2 + 3 edge^4) /
    (4 (radius^2 + edge^2)), where the radius is a few times the edge.

    Args:
        radius: at least 0, (*batch,).
        size: of the window, at least 1.
        edge: its softness, greater than 0; at half a pixel the disc is free of the pixels' pattern to a percent.

    Raises:
        ValueError: for a number out of range.
    """
    (radius,) = _numbers(radius=radius)
    _require_not_negative("radius", radius)
    _require_edge(edge)
    up, right = _pixels(size, radius)
    return _normalised(torch.special.ndtr((radius[..., None, None] - (up**2 + right**2).sqrt()) / edge))


def motion_psf(length: Tensor | float, angle: Tensor | float, size: int, edge: float = 0.5) -> Tensor:
    """A straight line about the centre, drawn with a Gaussian pen, which makes it differentiable in length and angle.

    Its variance is length^2 / 12 + edge^2 along the line and edge^2 across.

    Args:
        length: at least 0, (*batch,); below a hundredth of a pixel taken for that.
        angle: of the line, (*batch,).
        size: of the window, at least 1.
        edge: standard deviation of the pen, greater than 0.

    Raises:
        ValueError: for a number out of range.
    """
    length, angle = _numbers(length=length, angle=angle)
    _require_not_negative("length", length)
    _require_edge(edge)
    up, right = _pixels(size, length)
    along, across = _turned(up, right, angle)
    half = length.clamp(min=0.01)[..., None, None] / 2
    far = -along.abs()  # the line is even, and a difference of lower tails keeps its digits
    line = torch.special.ndtr((far + half) / edge) - torch.special.ndtr((far - half) / edge)
    return _normalised(line * torch.exp(-0.5 * (across / edge) ** 2))


def zernike_psf(coefficients: Tensor, size: int, cutoff: float = 0.5) -> Tensor:
    r"""The picture of a point through a circular pupil with a Zernike phase,

        k[x] ~ |integral over |v| < 1 of exp(i phi(v) + i pi cutoff v^T x) dv|^2,    phi = sum_j c_j Z_j,

    for the indices j of :data:`NOLL`, Z_j of mean square 1 over the pupil, so that c_j is the aberration's root mean
    square in radians. The integral is a product quadrature rule that does not wrap round: exact to rounding without
    aberrations, to 1e-6 for coefficients up to one radian. With all c_j = 0 it is the Airy pattern, whose transfer
    function is the autocorrelation of a disc and ends at ``cutoff``. Its tail falls off as |x|^-3 only, so that the
    window cuts off about 4 / (pi^2 cutoff size) of it.

    Changing the sign of defocus, astigmatism and spherical aberration together, the even ones, changes nothing: one
    picture cannot tell the two apart. Changing that of both comas turns the pattern by half a turn.

    Args:
        coefficients: c, (*batch, 6), in radians.
        size: of the window, at least 1.
        cutoff: the highest frequency that passes, in cycles per pixel, in (0, 0.5]: 2 NA pixel / wavelength for
            incoherent light.

    Raises:
        ValueError: for a number out of range, or coefficients of another shape.

    References:
        R. Noll, "Zernike polynomials and atmospheric turbulence", Journal of the Optical Society of America 66 (1976),
        table I: the order and the norm of Z_j.
        J. Goodman, "Introduction to Fourier Optics": the transfer function of an incoherent system with a circular
        pupil.
    """
    (c,) = _numbers(coefficients=coefficients)
    if c.ndim < 1 or c.shape[-1] != len(NOLL):
        raise ValueError(
            f"got Zernike coefficients of shape {tuple(c.shape)}; expected (*batch, {len(NOLL)}), one for each of "
            f"Noll's indices {NOLL}"
        )
    if not 0 < cutoff <= 0.5:
        raise ValueError(f"got a cutoff of {cutoff}; expected cycles per pixel in (0, 0.5], above which pixels alias")
    check_size(size)
    modes, cosine, sine = _pupil(size, float(cutoff), c.dtype, c.device)
    phase = c @ modes
    real = phase.cos() @ cosine - phase.sin() @ sine
    imaginary = phase.cos() @ sine + phase.sin() @ cosine
    return _normalised((real**2 + imaginary**2).unflatten(-1, (size, size)))


@lru_cache(maxsize=16)
def _pupil(size: int, cutoff: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Z_j at the quadrature's nodes (6, nodes), and weight times cos and sin of pi cutoff v^T x, (nodes, pixels)."""
    swing = math.pi * cutoff * math.sqrt(2) * (size // 2 + 1)  # the largest pi cutoff |x|
    nodes, weights = (torch.from_numpy(part) for part in leggauss(math.ceil(swing / 2) + 16))
    rho = (nodes + 1) / 2
    theta = torch.arange(math.ceil(swing) + 48, dtype=torch.float64)
    theta = theta * (2 * math.pi / len(theta))
    weight = (weights * rho)[:, None].expand(-1, len(theta)).flatten()  # d v = rho d rho d theta
    rho, theta = (part.flatten() for part in torch.meshgrid(rho, theta, indexing="ij"))
    modes = torch.stack(
        [
            math.sqrt(3) * (2 * rho**2 - 1),
            math.sqrt(6) * rho**2 * torch.sin(2 * theta),
            math.sqrt(6) * rho**2 * torch.cos(2 * theta),
            math.sqrt(8) * (3 * rho**3 - 2 * rho) * torch.sin(theta),
            math.sqrt(8) * (3 * rho**3 - 2 * rho) * torch.cos(theta),
            math.sqrt(5) * (6 * rho**4 - 6 * rho**2 + 1),
        ]
    )
    up, right = (part.expand(size, size).flatten() for part in _pixels(size, weight))
    wave = math.pi * cutoff * ((rho * torch.cos(theta))[:, None] * right + (rho * torch.sin(theta))[:, None] * up)
    parts = modes, weight[:, None] * wave.cos(), weight[:, None] * wave.sin()
    at_modes, cosine, sine = (part.to(device, dtype) for part in parts)
    return at_modes, cosine, sine


def _pixels(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """How far up (size, 1) and to the right (1, size) of the centre the pixels lie."""
    check_size(size)
    steps = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    return -steps[:, None], steps[None]


def _turned(up: Tensor, right: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates along the direction of that angle and across, (*batch, size, size)."""
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    return cos * right + sin * up, cos * up - sin * right


def _normalised(k: Tensor) -> Tensor:
    return k / k.sum((-2, -1), keepdim=True)


def _normalised_exp(log_k: Tensor) -> Tensor:
    return log_k.flatten(-2).softmax(-1).reshape(log_k.shape)


def _numbers(**named: Tensor | float) -> tuple[Tensor, ...]:
    """The parameters as finite tensors of one shape, dtype and device."""
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.get_default_dtype()
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"got {', '.join(named)} of dtype {dtype}; expected floating-point values")
    device = tensors[0].device if tensors else None
    values = [torch.as_tensor(value, dtype=dtype, device=device) for value in named.values()]
    if is_validating():
        for name, value in zip(named, values, strict=True):
            require_finite(f"a value of {name}", value)
    return tuple(torch.broadcast_tensors(*values))


def check_size(size: int) -> None:
    """Refuse what is no number of pixels.

    Raises:
        ValueError: for a size that is not a whole number of at least 1.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"got a kernel's size of {size!r}; expected a whole number of pixels, at least 1")


def _require_positive(name: str, value: Tensor) -> None:
    if is_validating() and not holds(value > 0):
        raise ValueError(f"got {name} of {float(value.min())}; expected a width in pixels greater than 0")


def _require_not_negative(name: str, value: Tensor) -> None:
    if is_validating() and not holds(value >= 0):
        raise ValueError(f"got {name} of {float(value.min())}; expected a number of pixels, at least 0")


def _require_edge(edge: float) -> None:
    if not 0 < edge < math.inf:
        raise ValueError(f"got an edge of {edge}; expected a width in pixels greater than 0")
