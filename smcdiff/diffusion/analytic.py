r"""Priors whose denoiser is known exactly, at every noise level.

With x_t = alpha_t x_0 + sigma_t eps and x_0 ~ N(mu, C), x_0 given x_t is normal with

    mean        mu + alpha_t C (alpha_t^2 C + sigma_t^2 I)^-1 (x_t - alpha_t mu),
    covariance  sigma_t^2 C (alpha_t^2 C + sigma_t^2 I)^-1;

a mixture weighs these by the responsibilities of its components for x_t, and a finite sample is a mixture of points.
They are the priors that everything else is tested against, and the ones to use where no training is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smcdiff.diffusion.analytic_covariance import (
    EmpiricalCovariance,
    IndependentCovariance,
    MixtureCovariance,
    shared_covariance,
)
from smcdiff.diffusion.covariance_models import CovarianceModel
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.transforms import HARTLEY, PIXELS, Basis

__all__ = [
    "EmpiricalDenoiser",
    "GaussianDenoiser",
    "GaussianFieldDenoiser",
    "GaussianMixtureDenoiser",
    "StandardNormalDenoiser",
]


class GaussianMixtureDenoiser:
    """x_0 ~ sum_c w_c N(mu_c, C_c).

    Args:
        means: mu, shape (components, *event).
        covariances: C over the flattened event, shape (components, d, d), or (d, d) for one that all share;
            symmetric and positive semi-definite.
        weights: w, shape (components,), positive; normalised here.

    Raises:
        ValueError: for shapes that do not fit, weights that are not positive, or a covariance that is not symmetric
            and positive semi-definite.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor) -> None:
        if means.ndim < 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"got means {tuple(means.shape)} and weights {tuple(weights.shape)}; expected (components, *event) and "
                "(components,)"
            )
        if not bool((weights > 0).all()):
            raise ValueError("got a mixture weight that is not positive; leave that component out")
        self.event_shape, self.dtype, self.device = means.shape[1:], means.dtype, means.device
        d = self.event_shape.numel()
        if tuple(covariances.shape) not in ((len(means), d, d), (d, d)):
            raise ValueError(
                f"got covariances {tuple(covariances.shape)}; expected ({len(means)}, {d}, {d}), or ({d}, {d}) for all"
            )
        self.means = means.reshape(len(means), d)
        self.log_weights = (weights / weights.sum()).log()
        variances, vectors = _eigen(covariances.reshape(-1, d, d))
        self._components: _SharedComponents | _OwnComponents
        self._covariance: CovarianceModel
        if len(variances) == 1:
            shared = _SharedComponents(self.means, variances, vectors, self.log_weights)
            self._components = shared
            self._covariance = shared_covariance(self.means, variances, vectors, self.event_shape, shared.shares)
        else:
            own = _OwnComponents(self.means, variances, vectors, self.log_weights)
            self._components, self._covariance = own, MixtureCovariance(variances, vectors, own)

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        mean, variance = self._components.moments(x_t.flatten(1), level)
        return Estimate(mean.reshape(x_t.shape), variance.reshape(-1, *(1,) * len(self.event_shape)))

    @property
    def covariance(self) -> CovarianceModel:
        """Cov[x_0 given x_t], exact."""
        return self._covariance


class _SharedComponents:
    """Components with one covariance: in its eigenbasis all differ by their means alone.

    Args:
        means: mu, (components, d).
        variances, vectors: eigenvalues (1, d) and eigenvectors (1, d, d).
        log_weights: log w, (components,).
    """

    def __init__(self, means: Tensor, variances: Tensor, vectors: Tensor, log_weights: Tensor) -> None:
        self.variances, self.vectors, self._log_weights = variances, vectors, log_weights
        self._white = bool((variances == variances[:, :1]).all())
        self._centre = means.mean(0)  # the means about it are smaller numbers
        self._away = self._turned(means - self._centre)

    def shares(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Each component's share of x_t, (m, components)."""
        return self._given(x_t, level)[0]

    def moments(self, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """x0_hat (m, d) and the mean of the diagonal of Cov[x_0 given x_t], (m,)."""
        share, residual = self._given(x_t, level)
        spread = level.alpha**2 * self.variances + level.sigma**2
        left = level.sigma**2 / spread  # what of mu_c is in the mean of x_0 given x_t and component c
        mean = left * (share @ self._away) + level.alpha * self.variances / spread * residual
        squares = (left * self._away).square().sum(1)
        between = (share @ squares - (left * (share @ self._away)).square().sum(1)).clamp(min=0)
        variance = (left * self.variances).mean() + between / x_t.shape[1]
        return self._centre + (mean if self._white else mean @ self.vectors[0].mT), variance

    def _given(self, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The shares, and V^T (x_t - alpha_t centre)."""
        residual = self._turned(x_t - level.alpha * self._centre)
        pull = level.alpha * self._away / (level.alpha**2 * self.variances + level.sigma**2)
        fit = residual @ pull.mT - 0.5 * level.alpha * (pull * self._away).sum(1)  # |x_t|^2 is common and cancels
        return (self._log_weights + fit).softmax(1), residual

    def _turned(self, x: Tensor) -> Tensor:
        return x if self._white else x @ self.vectors[0]


class _OwnComponents:
    """Components with covariances of their own.

    Args:
        means: mu, (components, d).
        variances, vectors: eigenvalues (components, d) and eigenvectors (components, d, d).
        log_weights: log w, (components,).
    """

    def __init__(self, means: Tensor, variances: Tensor, vectors: Tensor, log_weights: Tensor) -> None:
        self.means, self.variances, self.vectors, self._log_weights = means, variances, vectors, log_weights

    def moments(self, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """x0_hat (m, d) and the mean of the diagonal of Cov[x_0 given x_t], (m,)."""
        share, centres = self(x_t, level)
        mean = (share[..., None] * centres).sum(1)
        within = (level.sigma**2 * self.variances / self._spread(level)).sum(-1)  # traces, (components,)
        between = ((centres - mean[:, None]) ** 2).sum(-1)
        return mean, (share * (within + between)).sum(1) / mean.shape[1]

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Each component's share of x_t, (m, components), and its mean of x_0 given x_t, (m, components, d)."""
        residual = (x_t[:, None] - level.alpha * self.means)[..., None, :] @ self.vectors
        residual = residual[..., 0, :]  # (m, components, d) in each component's eigenbasis
        spread = self._spread(level)
        log_density = -0.5 * (residual**2 / spread + spread.log()).sum(-1)
        share = (self._log_weights + log_density).softmax(-1)
        shift = (level.alpha * self.variances / spread * residual)[..., None, :] @ self.vectors.mT
        return share, self.means + shift[..., 0, :]

    def _spread(self, level: NoiseLevel) -> Tensor:
        """Variances of x_t in each component's eigenbasis, (components, d)."""
        return level.alpha**2 * self.variances + level.sigma**2


class GaussianDenoiser:
    """x_0 ~ N(mu, C).

    Args:
        mean: mu, shape (*event).
        covariance: C over the flattened event, shape (d, d), symmetric and positive semi-definite; or the variances
            of independent entries, of the shape of the mean.

    Raises:
        ValueError: for a covariance of another shape, or one that is not symmetric and positive semi-definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        if covariance.shape == mean.shape and mean.ndim > 0:
            covariance = covariance.reshape(-1).diag()
        self._mixture = GaussianMixtureDenoiser(mean[None], covariance, mean.new_ones(1))
        self.event_shape, self.dtype, self.device = mean.shape, mean.dtype, mean.device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        return self._mixture(x_t, level)

    @property
    def covariance(self) -> CovarianceModel:
        """Cov[x_0 given x_t], exact."""
        return self._mixture.covariance


class GaussianFieldDenoiser:
    """x_0 ~ N(mu, V diag(lambda) V^T), a Gaussian random field that is independent in an orthonormal basis.

    A stationary field on a torus is one in the Hartley basis, with lambda its power spectrum; elementwise there, so
    that pictures of any size can be had.

    Args:
        mean: mu, shape (*event).
        spectrum: lambda, broadcastable to the event, at least 0.
        basis: V.

    Raises:
        ValueError: for a spectrum that does not fit or is below zero anywhere.
    """

    def __init__(self, mean: Tensor, spectrum: Tensor, basis: Basis = HARTLEY) -> None:
        if torch.broadcast_shapes(spectrum.shape, mean.shape) != mean.shape or not bool((spectrum >= 0).all()):
            raise ValueError(
                f"got a spectrum {tuple(spectrum.shape)}, lowest {float(spectrum.min()):.3g}, for a mean of shape "
                f"{tuple(mean.shape)}; expected values of at least 0 that broadcast to it"
            )
        self.mean, self.spectrum, self.basis = mean, spectrum.to(mean).expand(mean.shape), basis
        self.event_shape, self.dtype, self.device = mean.shape, mean.dtype, mean.device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        gain = level.alpha * self.spectrum / (level.alpha**2 * self.spectrum + level.sigma**2)
        shift = self.basis.from_spectral(gain * self.basis.to_spectral(x_t - level.alpha * self.mean))
        v = self.covariance.at(level, {}, x_t).variance
        return Estimate(self.mean + shift, v.mean().reshape((1,) * x_t.ndim))

    @property
    def covariance(self) -> IndependentCovariance:
        """Cov[x_0 given x_t], exact."""
        return IndependentCovariance(self.spectrum, self.basis)


class StandardNormalDenoiser:
    """x_0 ~ N(0, I): x0_hat = alpha_t x_t / (alpha_t^2 + sigma_t^2), variance sigma_t^2 / (alpha_t^2 + sigma_t^2)."""

    def __init__(self, event_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.event_shape, self.dtype, self.device = event_shape, dtype, device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        total = level.alpha**2 + level.sigma**2
        return Estimate(level.alpha / total * x_t, x_t.new_full((1,) * x_t.ndim, level.sigma**2 / total))

    @property
    def covariance(self) -> CovarianceModel:
        """Cov[x_0 given x_t], exact."""
        return IndependentCovariance(torch.ones(self.event_shape, dtype=self.dtype, device=self.device), PIXELS)


class EmpiricalDenoiser:
    """x_0 uniform on a finite sample: x0_hat = sum_j w_j x_j with w_j proportional to N(x_t; alpha_t x_j, sigma_t^2).

    Args:
        samples: x_j, shape (number, *event).

    References:
        F. Bao, Z. Zhang, G. Zhang, "An Ensemble Score Filter for Tracking High-Dimensional Nonlinear Dynamical
        Systems" (2023), arXiv 2309.00983: the training-free score of an ensemble.
    """

    def __init__(self, samples: Tensor) -> None:
        if samples.ndim < 2:
            raise ValueError(f"got samples of shape {tuple(samples.shape)}; expected (number, *event)")
        self.event_shape, self.dtype, self.device = samples.shape[1:], samples.dtype, samples.device
        self.samples = samples.reshape(len(samples), -1)
        self._squares = (self.samples**2).sum(-1)

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        share = self.shares(x_t, level)
        mean = share @ self.samples
        variance = ((share @ self._squares) - (mean**2).sum(-1)).clamp(min=0) / mean.shape[1]
        return Estimate(mean.reshape(x_t.shape), variance.reshape(-1, *(1,) * len(self.event_shape)))

    @property
    def covariance(self) -> CovarianceModel:
        """Cov[x_0 given x_t], exact; a matrix over the event, so for small events."""
        return EmpiricalCovariance(self.samples, self.shares)

    def shares(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """w_j of each x_t, (m, number)."""
        x = x_t.reshape(len(x_t), -1)
        fit = level.alpha * x @ self.samples.T - 0.5 * level.alpha**2 * self._squares
        return (fit / level.sigma**2).softmax(-1)  # |x_t|^2 is common to all samples and cancels


def _eigen(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (components, d) and eigenvectors (components, d, d) of checked covariances."""
    scale = covariances.abs().amax()
    if not bool((covariances - covariances.mT).abs().amax() <= 1e-6 * scale):
        raise ValueError("got a covariance that is not symmetric (or not finite); pass (C + C.mT) / 2 of a finite one")
    values, vectors = torch.linalg.eigh(covariances)
    if not bool((values >= -1e-6 * scale).all()):
        raise ValueError(f"got a covariance with eigenvalue {float(values.min()):.3g}; expected none below zero")
    return values.clamp(min=0), vectors
