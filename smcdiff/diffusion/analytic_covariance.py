r"""The exact covariances of x_0 given x_t of the exact denoisers.

    independent      v_t = lambda sigma_t^2 / (alpha_t^2 lambda + sigma_t^2) in the basis where x_0 is independent
    mixture          sum_c share_c (C_ct + (mu_ct - x0_hat)(mu_ct - x0_hat)^T)
    finite sample    sum_j w_j (x_j - x0_hat)(x_j - x0_hat)^T

A mixture whose components share one covariance has the first form plus a few columns per particle: the means mu_ct
differ only within the span of the mu_c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Dense, Diagonal, LowRank
from smcdiff.diffusion.covariance_models import CovarianceModel, Parts
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.transforms import PIXELS, Basis, Transform

__all__ = ["EmpiricalCovariance", "IndependentCovariance", "MixtureCovariance", "shared_covariance"]

#: (x_t, level) -> share of each component, (m, components), for x_t of shape (m, d).
Shares = Callable[[Tensor, NoiseLevel], Tensor]
#: The same, and each component's mean of x_0 given x_t, (m, components, d).
Components = Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True, eq=False)
class IndependentCovariance:
    """x_0 with independent normal coordinates in a basis.

    Args:
        spectrum: lambda, variances of the coordinates, (*event).
        basis: of the coordinates.
    """

    spectrum: Tensor
    basis: Basis

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        return {}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Diagonal:
        v = level.sigma**2 * self.spectrum / (level.alpha**2 * self.spectrum + level.sigma**2)
        return Diagonal(v[None].to(like), self.basis)


@final
@dataclass(frozen=True, eq=False)
class _SharedMixtureCovariance:
    """Components with one covariance V diag(lambda) V^T: diagonal plus the spread of the means.

    Args:
        within: the covariance inside a component.
        coordinates: (components, rank): the means' coordinates along ``span``.
        span: orthonormal rows V^T (mu_c - mu_0), (rank, *event).
        radius: distance of the farthest mean from the first, which bounds their spread.
        shares: of the components given x_t.
    """

    within: IndependentCovariance
    coordinates: Tensor
    span: Tensor
    radius: float
    shares: Shares

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        share = self.shares(x_t.flatten(1), level)
        away = self.coordinates - (share @ self.coordinates)[:, None]  # (m, components, rank)
        spread = (share[..., None] * away).mT @ away
        hair = 4 * torch.finfo(spread.dtype).eps * spread.diagonal(dim1=-2, dim2=-1).sum(-1)
        hair = hair.clamp(min=torch.finfo(spread.dtype).tiny ** 0.5)[:, None, None]
        eye = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
        return {"spread": torch.linalg.cholesky_ex(spread + hair * eye)[0] / self.radius}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> LowRank:
        spectrum = self.within.spectrum
        # mu_ct - mu_0t = (1 - alpha_t^2 lambda / (alpha_t^2 lambda + sigma_t^2)) (mu_c - mu_0) in the basis
        shrink = level.sigma**2 / (level.alpha**2 * spectrum + level.sigma**2)
        factors = self.radius * shrink * self.span
        return LowRank(
            self.within.at(level, {}, like).variance, factors[None].to(like), self.within.basis, parts["spread"].mT
        )


@final
@dataclass(frozen=True, eq=False)
class MixtureCovariance:
    """Components with covariances of their own, as a matrix.

    Args:
        variances: eigenvalues, (components, d).
        basis: eigenvectors, (components, d, d).
        components: shares and means given x_t.
    """

    variances: Tensor
    basis: Tensor
    components: Components

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        share, centres = self.components(x_t.flatten(1), level)
        within = level.sigma**2 * self.variances / (level.alpha**2 * self.variances + level.sigma**2)
        matrices = self.basis * within[:, None] @ self.basis.mT
        away = centres - estimate.mean.flatten(1)[:, None]
        return {"matrix": torch.einsum("mc,cij->mij", share, matrices) + (share[..., None] * away).mT @ away}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Dense:
        return Dense(parts["matrix"])


def shared_covariance(
    means: Tensor, variances: Tensor, basis: Tensor, event_shape: torch.Size, shares: Shares
) -> CovarianceModel:
    """The exact covariance of a mixture whose components share one.

    Args:
        means: (components, d).
        variances, basis: eigenvalues (1, d) and eigenvectors (1, d, d).
        shares: of the components given x_t.
    """
    isotropic = bool((variances == variances[:, :1]).all())
    maps = PIXELS if isotropic else _eigenbasis(basis[0])
    within = IndependentCovariance(variances[0].reshape(event_shape), maps)
    if len(means) == 1:
        return within
    away = means - means[0]
    _, size, rows = torch.linalg.svd(away, full_matrices=False)
    rows = rows[: max(1, int((size > 16 * torch.finfo(size.dtype).eps * size[0]).sum()))]
    span = maps.to_spectral(rows.reshape(-1, *event_shape))
    return _SharedMixtureCovariance(within, away @ rows.mT, span, float(away.norm(dim=1).amax()), shares)


@final
@dataclass(frozen=True, eq=False)
class EmpiricalCovariance:
    """The covariance of a finite sample under its weights.

    Args:
        samples: x_j, (number, d).
        shares: (x_t, level) -> w, (m, number).
    """

    samples: Tensor
    shares: Callable[[Tensor, NoiseLevel], Tensor]

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        share = self.shares(x_t, level)
        away = self.samples - estimate.mean.flatten(1)[:, None]
        return {"matrix": (share[..., None] * away).mT @ away}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Dense:
        return Dense(parts["matrix"])


@dataclass(frozen=True)
class _Maps:
    to_spectral: Transform
    from_spectral: Transform


def _eigenbasis(vectors: Tensor) -> Basis:
    """The basis of the columns of an orthogonal matrix over flattened events."""
    return _Maps(
        lambda x: (x.flatten(1) @ vectors.to(x.dtype)).reshape(x.shape),
        lambda c: (c.flatten(1) @ vectors.mT.to(c.dtype)).reshape(c.shape),
    )
