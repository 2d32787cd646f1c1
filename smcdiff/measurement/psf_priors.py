r"""Priors of point-spread functions, for programs in which the blur is not known.

    def model(y):
        x = pyro.sample("x", prior)
        kernel = GaussianPSF(11).sample("psf", like=x)
        pyro.sample("y", GaussianMeasurement(Blur(kernel), x, 0.05), obs=y)

``sample`` makes the prior's sample sites, named after the kernel, and returns the kernel; it is also recorded, as a
deterministic site, so that a run has its posterior mean and spread. All latents here are normal or log-normal, which
enter a program by exact chains (:mod:`smcdiff.guidance.latents`).

They are chosen so that a kernel is met at one point of them and changes smoothly all round it: twists and expansions
look at one point of each particle, and a posterior torn into copies of itself is what they do worst. A pair of widths
and an angle would tear it, at the ends of the angle's range and by exchange of the widths; the double-angle
coordinates used for astigmatism and motion do not. The direction of either is uniform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff.measurement.psf import (
    NOLL,
    check_size,
    defocus_psf,
    gaussian_psf,
    motion_psf,
    stigmator_psf,
    zernike_psf,
)

__all__ = [
    "AstigmaticPSF",
    "DefocusPSF",
    "GaussianPSF",
    "KernelPrior",
    "MotionPSF",
    "SimplexKernel",
    "ZernikePSF",
]


class KernelPrior(Protocol):
    """A law of kernels, as statements of a Pyro program."""

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        """A kernel (size, size), at least 0 and of sum 1; the program's latents are named ``name`` and what they are.

        Args:
            name: of the kernel among the program's sites.
            like: the picture, or another tensor of the dtype and the device to compute in; None for torch's default
                dtype on the CPU.
        """


@final
@dataclass(frozen=True)
class GaussianPSF:
    """log sigma ~ N(log median, spread^2): the site ``name_sigma``.

    Args:
        size: of the kernel.
        median: of sigma, in pixels.
        spread: standard deviation of log sigma.

    Raises:
        ValueError: for a number that is not greater than 0.
    """

    size: int
    median: float = 1.0
    spread: float = 0.3

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_positive(self, "median", "spread")

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        sigma = _log_normal(f"{name}_sigma", self.median, self.spread, like)
        return _recorded(name, gaussian_psf(sigma, self.size))


@final
@dataclass(frozen=True)
class AstigmaticPSF:
    """log sigma ~ N(log median, spread^2) and (a, b) ~ N(0, astigmatism^2 I) of :func:`stigmator_psf`.

    The direction is uniform, and the log-ratio of the two widths, (a^2 + b^2)^(1/2), has a Rayleigh law of that scale.
    Sites ``name_sigma`` and ``name_stigmator``.

    Args:
        size: of the kernel.
        median: of the geometric mean of the two widths, in pixels.
        spread: standard deviation of its logarithm.
        astigmatism: of a and b; 0.3 has a median ratio of widths of 1.42.

    Raises:
        ValueError: for a number that is not greater than 0.
    """

    size: int
    median: float = 1.0
    spread: float = 0.3
    astigmatism: float = 0.3

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_positive(self, "median", "spread", "astigmatism")

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        sigma = _log_normal(f"{name}_sigma", self.median, self.spread, like)
        stigmator = _normal(f"{name}_stigmator", (self.astigmatism,) * 2, like)
        return _recorded(name, stigmator_psf(sigma, stigmator, self.size))


@final
@dataclass(frozen=True)
class DefocusPSF:
    """log radius ~ N(log median, spread^2): the site ``name_radius``.

    Args:
        size: of the kernel.
        median: of the radius, in pixels.
        spread: standard deviation of log radius.
        edge: softness of the disc, see :func:`defocus_psf`.

    Raises:
        ValueError: for a number that is not greater than 0.
    """

    size: int
    median: float = 2.0
    spread: float = 0.3
    edge: float = 0.5

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_positive(self, "median", "spread", "edge")

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        radius = _log_normal(f"{name}_radius", self.median, self.spread, like)
        return _recorded(name, defocus_psf(radius, self.size, self.edge))


@final
@dataclass(frozen=True)
class MotionPSF:
    """w ~ N(0, scale^2 I) in the plane; the line has the length |w| and half the polar angle of w.

    The direction is uniform and the length has a Rayleigh law, of mode ``scale``. Site ``name_motion``.

    Args:
        size: of the kernel.
        scale: in pixels.
        edge: width of the line, see :func:`motion_psf`.

    Raises:
        ValueError: for a number that is not greater than 0.
    """

    size: int
    scale: float = 3.0
    edge: float = 0.5

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_positive(self, "scale", "edge")

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        w = _normal(f"{name}_motion", (self.scale,) * 2, like)
        still = (w == 0).all(-1, keepdim=True)  # no direction, and no derivative of the length
        moved = torch.where(still, torch.ones_like(w), w)
        length = torch.where(still[..., 0], 0.0, torch.linalg.vector_norm(moved, dim=-1))
        angle = 0.5 * torch.atan2(moved[..., 1], moved[..., 0])
        return _recorded(name, motion_psf(length, angle, self.size, self.edge))


@final
@dataclass(frozen=True)
class ZernikePSF:
    """c_j ~ N(mean_j, scale_j^2), independent: the site ``name_zernike``, of :func:`zernike_psf`.

    A picture does not tell the even aberrations from their negative: with means of 0 the posterior has two halves that
    mirror each other. A mean, such as a defocus of known sign, takes one of them. A scale close to 0 for what the
    instrument does not have is better than a wide prior for everything.

    Args:
        size: of the kernel.
        cutoff: the highest frequency that passes, in cycles per pixel, in (0, 0.5].
        scales: of the six coefficients, in radians: defocus, two astigmatisms, two comas, spherical.
        means: theirs, in radians.

    Raises:
        ValueError: for other than six scales and means, or a scale that is not greater than 0.
    """

    size: int
    cutoff: float = 0.5
    scales: tuple[float, ...] = (0.5,) * len(NOLL)
    means: tuple[float, ...] = (0.0,) * len(NOLL)

    def __post_init__(self) -> None:
        if len(self.scales) != len(NOLL) or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(
                f"got scales {self.scales}; expected {len(NOLL)} numbers greater than 0, for Noll's indices {NOLL}"
            )
        if len(self.means) != len(NOLL) or not all(math.isfinite(mean) for mean in self.means):
            raise ValueError(f"got means {self.means}; expected {len(NOLL)} finite numbers, for Noll's indices {NOLL}")
        zernike_psf(torch.zeros(len(NOLL)), self.size, self.cutoff)

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        coefficients = _normal(f"{name}_zernike", self.scales, like, self.means)
        return _recorded(name, zernike_psf(coefficients, self.size, self.cutoff))


@final
@dataclass(frozen=True, eq=False)
class SimplexKernel:
    r"""Any kernel, near a stated one: the logistic-normal law

        k = softmax(log centre + g),    Cov[g_i, g_j] = spread^2 exp(-|i - j|^2 / (2 correlation^2)),

    at least 0 and of sum 1 by construction, with neighbouring pixels alike. So log(k_i / k_j) is normal about
    log(centre_i / centre_j) with variance 2 spread^2 (1 - exp(-|i - j|^2 / (2 correlation^2))). A number added to all
    of g changes nothing. One site, ``name_logits``, of size^2 values.

    References:
        J. Aitchison, S. Shen, "Logistic-normal distributions: some properties and uses" (1980).

    Args:
        centre: the stated kernel, (size, size), at least 0 with a positive sum, such as ``gaussian_psf(1.0, 11)``.
        spread: standard deviation of each g.
        correlation: how far it reaches, in pixels.
        floor: values of the centre under this share of its largest are raised to it.

    Raises:
        ValueError: for a centre that is no kernel, or a number that is not greater than 0.
    """

    centre: Tensor
    spread: float = 0.5
    correlation: float = 1.5
    floor: float = 1e-4
    _log_centre: Tensor = field(init=False, repr=False)
    _root: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive(self, "spread", "correlation", "floor")
        k = self.centre
        if k.ndim != 2 or k.shape[0] != k.shape[1] or not k.is_floating_point() or k.numel() == 0:
            raise ValueError(f"got a centre of shape {tuple(k.shape)} and dtype {k.dtype}; expected a square kernel")
        if not bool((k >= 0).all() & torch.isfinite(k).all() & (k.sum() > 0)):
            raise ValueError("got a centre with negative or no finite values; expected at least 0 with a positive sum")
        k = k.double()
        steps = torch.arange(len(k), dtype=torch.float64, device=k.device)
        along = torch.exp(-0.5 * ((steps[:, None] - steps) / self.correlation) ** 2)
        covariance = self.spread**2 * torch.kron(along, along)
        covariance.diagonal().add_(1e-6 * self.spread**2)  # smooth fields have variances that round below zero
        object.__setattr__(self, "_log_centre", k.clamp(min=self.floor * float(k.max())).log().flatten())
        object.__setattr__(self, "_root", torch.linalg.cholesky(covariance))

    def sample(self, name: str = "psf", like: Tensor | None = None) -> Tensor:
        dtype, device = _format(like)
        law = dist.MultivariateNormal(
            self._log_centre.to(device, dtype), scale_tril=self._root.to(device, dtype), validate_args=False
        )
        logits = pyro.sample(f"{name}_logits", law)
        return _recorded(name, logits.softmax(-1).unflatten(-1, self.centre.shape))


def _log_normal(site: str, median: float, spread: float, like: Tensor | None) -> Tensor:
    dtype, device = _format(like)
    loc = torch.full((), math.log(median), dtype=dtype, device=device)
    return pyro.sample(site, dist.LogNormal(loc, torch.full_like(loc, spread)))


def _normal(
    site: str, scales: tuple[float, ...], like: Tensor | None, means: tuple[float, ...] | None = None
) -> Tensor:
    dtype, device = _format(like)

    def row(numbers: tuple[float, ...]) -> Tensor:  # filled on the device: nothing is copied to it
        return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])

    scale = row(scales)
    mean = torch.zeros_like(scale) if means is None else row(means)
    return pyro.sample(site, dist.Normal(mean, scale).to_event(1))


def _format(like: Tensor | None) -> tuple[torch.dtype, torch.device]:
    return (torch.get_default_dtype(), torch.device("cpu")) if like is None else (like.dtype, like.device)


def _recorded(name: str, kernel: Tensor) -> Tensor:
    found: Tensor = pyro.deterministic(name, kernel, event_dim=2)
    return found


def _check_positive(prior: object, *names: str) -> None:
    """Refuse numbers of a prior that are not greater than 0."""
    for name in names:
        value = getattr(prior, name)
        if not 0 < value < math.inf:
            raise ValueError(f"got {name} {value} in {type(prior).__name__}; expected a number greater than 0")
