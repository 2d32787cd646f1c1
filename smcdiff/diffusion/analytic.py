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

from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import NoiseLevel

__all__ = ["EmpiricalDenoiser", "GaussianDenoiser", "GaussianMixtureDenoiser", "StandardNormalDenoiser"]


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
        self._variances, self._basis = _eigen(covariances.reshape(-1, d, d))

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        alpha, sigma = level.alpha, level.sigma
        x = x_t.reshape(len(x_t), -1)
        spread = alpha**2 * self._variances + sigma**2  # (components or 1, d): variances of x_t in each basis
        residual = (x[:, None] - alpha * self.means)[..., None, :] @ self._basis
        residual = residual[..., 0, :]  # (m, components, d)
        log_density = -0.5 * (residual**2 / spread + spread.log()).sum(-1)
        share = (self.log_weights + log_density).softmax(-1)[..., None]  # (m, components, 1)
        shift = (alpha * self._variances / spread * residual)[..., None, :] @ self._basis.mT
        centres = self.means + shift[..., 0, :]
        mean = (share * centres).sum(1)
        within = (sigma**2 * self._variances / spread).sum(-1)  # traces, (components or 1,)
        between = ((centres - mean[:, None]) ** 2).sum(-1)
        variance = (share[..., 0] * (within + between)).sum(1) / x.shape[1]
        return Estimate(mean.reshape(x_t.shape), variance.reshape(-1, *(1,) * len(self.event_shape)))


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


class StandardNormalDenoiser:
    """x_0 ~ N(0, I): x0_hat = alpha_t x_t / (alpha_t^2 + sigma_t^2), variance sigma_t^2 / (alpha_t^2 + sigma_t^2)."""

    def __init__(self, event_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.event_shape, self.dtype, self.device = event_shape, dtype, device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        total = level.alpha**2 + level.sigma**2
        return Estimate(level.alpha / total * x_t, x_t.new_full((1,) * x_t.ndim, level.sigma**2 / total))


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
        x = x_t.reshape(len(x_t), -1)
        fit = level.alpha * x @ self.samples.T - 0.5 * level.alpha**2 * self._squares
        share = (fit / level.sigma**2).softmax(-1)  # |x_t|^2 is common to all samples and cancels
        mean = share @ self.samples
        variance = ((share @ self._squares) - (mean**2).sum(-1)).clamp(min=0) / x.shape[1]
        return Estimate(mean.reshape(x_t.shape), variance.reshape(-1, *(1,) * len(self.event_shape)))


def _eigen(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (components, d) and eigenvectors (components, d, d) of checked covariances."""
    scale = covariances.abs().amax()
    if not bool((covariances - covariances.mT).abs().amax() <= 1e-6 * scale):
        raise ValueError("got a covariance that is not symmetric (or not finite); pass (C + C.mT) / 2 of a finite one")
    values, vectors = torch.linalg.eigh(covariances)
    if not bool((values >= -1e-6 * scale).all()):
        raise ValueError(f"got a covariance with eigenvalue {float(values.min()):.3g}; expected none below zero")
    return values.clamp(min=0), vectors
