r"""Models of the covariance of x_0 given x_t: what to believe of the error of a denoiser.

    isotropic    C_t = v_t I                              one number per noise level
    spectral     C_t = V diag(v_t) V^T                    one number per level and per cosine or Fourier coefficient
    Jacobian     C_t = (sigma_t^2 / alpha_t) d x0_hat / d x_t      exact for an exact denoiser (Tweedie); small problems

and spectral with a correction of low rank that each particle gathers on its way (:mod:`smcdiff.diffusion.free_hunch`).
The exact denoisers of :mod:`smcdiff.diffusion.analytic` know theirs exactly; that of a network is measured by
:meth:`smcdiff.DiffusionPrior.calibrate`.

Between measured levels the tables are interpolated so that a Gaussian prior comes out exact: with r = sigma_t / alpha_t
a variance lambda of x_0 gives v = 1 / (1 / lambda + 1 / r^2), so that r^2 / v - 1 = r^2 / lambda is log-linear in r.

References:
    B. Efron, "Tweedie's Formula and Selection Bias" (2011): mean and covariance of x_0 given x_t.
    S. Rissanen, M. Heinonen, A. Solin, "Free Hunch: Denoiser Covariance Estimation for Diffusion Models Without Extra
    Costs" (2024), arXiv 2410.11149: covariances diagonal in the cosine basis.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance, Dense, Diagonal
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.transforms import DCT, HARTLEY, PIXELS, Basis

__all__ = [
    "BASES",
    "CovarianceModel",
    "DependsOnPath",
    "IsotropicCovariance",
    "JacobianCovariance",
    "KnowsCovariance",
    "Parts",
    "SpectralBasis",
    "SpectralCovariance",
    "check_basis",
]

SpectralBasis = Literal["dct", "fft", "pixels"]

#: What a covariance model keeps of each particle, by name; the first dimension is the particles'.
Parts = dict[str, Tensor]


class CovarianceModel(Protocol):
    """C_t = Cov[x_0 given x_t], in two halves: what depends on the particle, and the matrix made of it."""

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        """What :meth:`at` needs to know of particles x_t, (m, *event); empty where one covariance serves all.

        Args:
            estimate: x0_hat, and as its parts what this method gave of the same particles at the level before; none at
                the first.
        """

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Covariance:
        """C_t of the particles whose parts these are.

        Args:
            like: gives dtype, device and number of dimensions, (m, *event).
        """


@runtime_checkable
class DependsOnPath(Protocol):
    """A covariance model for which the state of a particle is not enough."""

    @property
    def depends_on_path(self) -> bool:
        """True: what it says depends on the levels before."""


@runtime_checkable
class KnowsCovariance(Protocol):
    """A denoiser that knows the covariance of x_0 given x_t."""

    @property
    def covariance(self) -> CovarianceModel:
        """Cov[x_0 given x_t]."""


@dataclass(frozen=True, eq=False)
class _Table:
    """Variances measured at some noise levels, between them as the module says.

    Args:
        ratios: r = sigma_t / alpha_t of the levels, rising, (levels,), float64.
        variances: (levels, *coordinates), positive, float64.
    """

    ratios: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        if self.ratios.ndim != 1 or len(self.variances) != len(self.ratios) or len(self.ratios) == 0:
            raise ValueError(
                f"got ratios {tuple(self.ratios.shape)} and variances {tuple(self.variances.shape)}; expected "
                "(levels,) and (levels, *event)"
            )
        if not bool((self.ratios.diff() > 0).all()) or not bool((self.ratios > 0).all()):
            raise ValueError("got noise ratios sigma / alpha that do not rise from above 0; sort the levels by noise")
        if not bool(torch.isfinite(self.variances).all()) or not bool((self.variances > 0).all()):
            raise ValueError("got a variance that is not positive and finite; expected mean squared errors of x0_hat")

    @cached_property
    def _places(self) -> list[float]:
        places: list[float] = self.ratios.tolist()
        return places

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        """The variances on the devices that asked, so that a run waits for each but once."""
        return {}

    def __call__(self, ratio: float, device: torch.device) -> Tensor:
        """Variances at sigma / alpha = ratio, (*coordinates), float64."""
        if device not in self._copies:
            self._copies[device] = self.variances.to(device)
        variances, places = self._copies[device], self._places
        above = bisect_left(places, ratio * (1 - 1e-9))  # the first level not below
        if above < len(places) and math.isclose(places[above], ratio, rel_tol=1e-9):
            return variances[above]
        if above in (0, len(places)):  # beyond the table x_0 keeps the variance 1 / lambda it has there
            end = 0 if above == 0 else -1
            precision = (1 / variances[end] - places[end] ** -2).clamp(min=0)
            return 1 / (precision + ratio**-2)
        (r_0, r_1), (v_0, v_1) = places[above - 1 : above + 1], variances[above - 1 : above + 1]
        w = math.log(ratio / r_0) / math.log(r_1 / r_0)
        u_0, u_1 = r_0**2 / v_0 - 1, r_1**2 / v_1 - 1
        gaussian = (u_0 > 0) & (u_1 > 0)
        u = torch.exp((1 - w) * u_0.clamp(min=1e-30).log() + w * u_1.clamp(min=1e-30).log())
        return torch.where(gaussian, ratio**2 / (1 + u), torch.exp((1 - w) * v_0.log() + w * v_1.log()))


@final
@dataclass(frozen=True, eq=False)
class IsotropicCovariance:
    """C_t = v_t I.

    Args:
        variances: v of the measured levels, (levels,), positive; or one number, the variance of x_0 itself, for
            v_t = 1 / (1 / variance + alpha_t^2 / sigma_t^2).
        ratios: sigma_t / alpha_t of the measured levels, rising, (levels,); None for one number.

    Raises:
        ValueError: for values that are not positive and finite, or shapes that do not fit.
    """

    variances: Tensor | float
    ratios: Tensor | None = None
    _table: _Table = field(init=False, repr=False)

    def __post_init__(self) -> None:
        variances = torch.as_tensor(self.variances, dtype=torch.float64, device="cpu")
        if variances.ndim != (0 if self.ratios is None else 1):
            raise ValueError(
                f"got variances of shape {tuple(variances.shape)}; expected one number, or (levels,) with the ratios "
                "of the levels"
            )
        object.__setattr__(self, "_table", _table(variances, self.ratios, event_dim=0))

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        return {}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Diagonal:
        return Diagonal(self._table(level.ratio, like.device).to(like.dtype).expand((1,) * like.ndim))


@final
class SpectralCovariance:
    """C_t = V diag(v_t) V^T, V the cosine or the Fourier basis of the last two dimensions.

    In the Fourier basis the coordinates are those of the Hartley transform, which is real; variances of a stationary
    law are symmetric, v[i] = v[-i].

    Args:
        variances: v, one of

            - (levels, *event) with ``ratios``: at these levels, interpolated between them;
            - (*event), the spectrum lambda of a Gaussian prior: v_t = 1 / (1 / lambda + alpha_t^2 / sigma_t^2).

        basis: "dct", "fft", or "pixels" for independent entries.
        ratios: sigma_t / alpha_t of the levels, rising, (levels,).

    Raises:
        ValueError: for an unknown basis, values that are not positive and finite, or shapes that do not fit.
    """

    def __init__(self, variances: Tensor, basis: SpectralBasis = "dct", ratios: Tensor | None = None) -> None:
        if basis not in BASES:
            raise ValueError(f"got the basis {basis!r}; expected one of {sorted(BASES)}")
        self.basis: Basis = BASES[basis]
        self.basis_name: SpectralBasis = basis
        if ratios is None and variances.ndim < 1:
            raise ValueError("got one number; expected the spectrum of an event, or sd.IsotropicCovariance")
        self.table = _table(variances.double().cpu(), ratios, event_dim=1)
        check_basis(basis, self.event_shape)

    def __repr__(self) -> str:
        shape, total = tuple(self.table.variances.shape), float(self.table.variances.log().sum())
        return f"SpectralCovariance({shape}, {self.basis_name!r}, sum of logarithms {total:.12g})"

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one event."""
        return self.table.variances.shape[1:]

    def resized(self, event_shape: tuple[int, ...]) -> SpectralCovariance:
        """The covariance of pictures of another size, of the same law: v taken at the same frequencies.

        Frequencies between those measured are interpolated linearly in log v.

        Raises:
            ValueError: for another number of dimensions or channels, or a table in the pixel basis.
        """
        old = self.event_shape
        others = len(event_shape) == len(old) and tuple(event_shape[:-2]) == tuple(old[:-2])
        if self.basis_name == "pixels" or not others:
            raise ValueError(
                f"got the event shape {tuple(event_shape)} for a {self.basis_name} covariance of {tuple(old)}; "
                "expected other rows and columns alone, and a cosine or Fourier basis"
            )
        log_v = self.table.variances.log()
        for axis in (-2, -1):
            log_v = _resampled(log_v, axis, event_shape[axis], periodic=self.basis_name == "fft")
        return SpectralCovariance(log_v.exp(), self.basis_name, self.table.ratios)

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        if x_t.shape[1:] != self.event_shape:
            raise ValueError(
                f"got a covariance for events {tuple(self.event_shape)} and a picture {tuple(x_t.shape[1:])}; "
                "calibrate the prior at that size"
            )
        return {}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Diagonal:
        return Diagonal(self.table(level.ratio, like.device)[None].to(like.dtype), self.basis)


@final
@dataclass(frozen=True)
class JacobianCovariance:
    """C_t = (sigma_t^2 / alpha_t) d x0_hat / d x_t, written out: one pass through the network per entry of the event.

    A network's Jacobian need not be symmetric or positive: the nearest matrix that is takes its place.

    Args:
        max_entries: largest event accepted.

    Raises:
        ValueError: for an event of more entries.
    """

    max_entries: int = 1024

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        d = x_t[0].numel()
        if d > self.max_entries:
            raise ValueError(
                f"got an event of {d} entries; the Jacobian takes a pass through the network for each and is limited "
                f"to {self.max_entries}. Calibrate the prior and use its spectral covariance"
            )
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            flat = denoiser(x, level).mean.flatten(1)
            rows = [torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(d)]
        matrix = level.sigma**2 / level.alpha * torch.stack(rows, 1)
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        floor = torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True).clamp(min=0)
        return {"matrix": vectors * values.clamp(min=0).maximum(floor)[..., None, :] @ vectors.mT}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Dense:
        return Dense(parts["matrix"])


BASES: dict[str, Basis] = {"dct": DCT, "fft": HARTLEY, "pixels": PIXELS}


def _table(variances: Tensor, ratios: Tensor | None, event_dim: int) -> _Table:
    """The measured table, or that of a Gaussian prior whose own variances these are."""
    if ratios is not None:
        return _Table(ratios.double().cpu(), variances)
    if variances.ndim < event_dim:
        raise ValueError(f"got variances of shape {tuple(variances.shape)} without the noise ratios of their levels")
    if not bool((variances > 0).all()):
        raise ValueError("got a variance of x_0 that is not positive; expected the prior's spectrum")
    return _Table(torch.ones(1, dtype=torch.float64), (1 / (1 / variances + 1))[None])


def _resampled(values: Tensor, axis: int, size: int, *, periodic: bool) -> Tensor:
    """Values on the frequencies of ``size`` points instead of their own: i / size cycles (or half cycles) a pixel."""
    old = values.shape[axis]
    place = torch.arange(size, dtype=values.dtype) * old / size
    low = place.floor().long()
    high = (low + 1) % old if periodic else (low + 1).clamp(max=old - 1)
    weight = (place - low).reshape(-1, *(1,) * (-1 - axis))
    return values.index_select(axis, low) * (1 - weight) + values.index_select(axis, high) * weight


def check_basis(basis: str, event_shape: torch.Size) -> None:
    """Refuse a basis of pictures for events that are none.

    Raises:
        ValueError: for cosines or Fourier over fewer than two dimensions.
    """
    if basis != "pixels" and len(event_shape) < 2:
        raise ValueError(
            f"got the basis {basis!r} for events of shape {tuple(event_shape)}; it takes the last two dimensions of "
            'pictures. Use basis="pixels"'
        )
