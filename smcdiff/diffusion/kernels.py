r"""The reverse transitions p(x_s given x_t) of a diffusion model, s < t.

With x0_hat and eps_hat = (x_t - alpha_t x0_hat) / sigma_t the DDIM family, for any (alpha, sigma), is

    p(x_s given x_t) = N(alpha_s x0_hat + sqrt(sigma_s^2 - kappa^2) eps_hat,  kappa^2 I)
                     = N(b x_t + c x0_hat,  kappa^2 I),
    b = sqrt(sigma_s^2 - kappa^2) / sigma_t,   c = alpha_s - b alpha_t,
    kappa = eta sigma_s sqrt(1 - (alpha_t sigma_s)^2 / (alpha_s sigma_t)^2).

eta = 1 is ancestral sampling, kappa^2 the variance beta_tilde of q(x_s given x_t, x_0); eta = 0 is DDIM, which has no
density. The variance of the step is a choice of its own:

    posterior     kappa^2                             ("fixed small")
    fixed_large   beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2
    learned       log-linear between the two, as the network says
    optimal       kappa^2 + c^2 Var[x_0 given x_t],   the step's true second moment where the variance is known
    full          kappa^2 I + c^2 Cov[x_0 given x_t], both moments of the true step: exact for a Gaussian prior at any
                  number of steps

At s = 0 the first three are deterministic, x_0 = x0_hat.

References:
    J. Song, C. Meng, S. Ermon, "Denoising Diffusion Implicit Models" (2020), arXiv 2010.02502, eq. 12, 16.
    J. Ho, A. Jain, P. Abbeel, "Denoising Diffusion Probabilistic Models" (2020), arXiv 2006.11239, section 3.2.
    A. Nichol, P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), arXiv 2102.09672, eq. 15.
    F. Bao, C. Li, J. Zhu, B. Zhang, "Analytic-DPM" (2022), arXiv 2201.06503, theorem 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance, Diagonal
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.transforms import PIXELS, Basis

__all__ = ["Gaussian", "Law", "ReverseStep", "StructuredGaussian", "Variance", "full_transition", "transition"]

Variance = Literal["posterior", "fixed_large", "learned", "optimal", "full"]
VARIANCES: tuple[Variance, ...] = get_args(Variance)


@dataclass(frozen=True)
class Gaussian:
    """A normal law with independent coordinates in an orthonormal basis, or a point where the variance is None.

    Args:
        mean: shape (..., *event).
        variance: of the coordinates V^T (x - mean), broadcastable to ``mean`` and positive; None for the point mass at
            ``mean``.
        basis: V; the event's own entries by default. A variance that is one number for all entries is the same in
            every basis.
    """

    mean: Tensor
    variance: Tensor | None
    basis: Basis = PIXELS

    def sample(self, noise: Tensor) -> Tensor:
        """mean + V sqrt(variance) noise, with standard normal noise of the shape of ``mean``."""
        if self.variance is None:
            return self.mean
        return self.mean + self.basis.from_spectral(self.variance.sqrt() * noise)

    def log_prob(self, x: Tensor, event_dim: int) -> Tensor:
        """log N(x; self), summed over the event in float64; of a point mass 0 at its mean and -inf elsewhere."""
        shape = x.shape[: x.ndim - event_dim]
        if self.variance is None:
            there = torch.isclose(x, self.mean, rtol=1e-5, atol=1e-7).reshape(*shape, -1).all(-1)
            return torch.where(there, 0.0, -torch.inf).double()
        residual = self.basis.to_spectral(x - self.mean)
        terms = residual**2 / self.variance + self.variance.log() + math.log(2 * math.pi)
        return -0.5 * terms.reshape(*shape, -1).sum(-1, dtype=torch.float64)

    def log_density_ratio(self, other: Gaussian, x: Tensor, event_dim: int) -> Tensor:
        """log N(x; self) - log N(x; other), summed over the event in float64; other must have the same support.

        Two point masses have ratio 1 where both hold all their mass at x.
        """
        if self.variance is None or other.variance is None:
            return x.new_zeros(x.shape[: x.ndim - event_dim], dtype=torch.float64)
        ours, theirs = self.basis.to_spectral(x - self.mean), other.basis.to_spectral(x - other.mean)
        terms = theirs**2 / other.variance - ours**2 / self.variance
        if self.variance is not other.variance:
            terms = terms + (other.variance / self.variance).log()
        return 0.5 * terms.reshape(*x.shape[: x.ndim - event_dim], -1).sum(-1, dtype=torch.float64)


@dataclass(frozen=True)
class ReverseStep:
    """The coefficients of one step from level t to level s.

    Args:
        t: the level the step leaves.
        s: the level it reaches, less noisy.
        eta: share of the ancestral noise, in [0, 1].
    """

    t: NoiseLevel
    s: NoiseLevel
    eta: float

    @property
    def kappa(self) -> float:
        """Standard deviation of q(x_s given x_t, x_0) times eta (2010.02502, eq. 16)."""
        ratio = self.t.alpha * self.s.sigma / (self.s.alpha * self.t.sigma)
        return self.eta * self.s.sigma * math.sqrt(max(0.0, 1 - ratio**2))

    @property
    def b(self) -> float:
        """Coefficient of x_t in the mean."""
        return math.sqrt(max(0.0, self.s.sigma**2 - self.kappa**2)) / self.t.sigma

    @property
    def c(self) -> float:
        """Coefficient of x0_hat in the mean."""
        return self.s.alpha - self.b * self.t.alpha

    @property
    def beta(self) -> float:
        """Variance of q(x_t given x_s), the upper end of the reverse variance."""
        return self.t.sigma**2 - (self.t.alpha / self.s.alpha * self.s.sigma) ** 2


class Law(Protocol):
    """p(x_s given x_t): what a chain and a filter ask of it."""

    @property
    def mean(self) -> Tensor:
        """E[x_s given x_t], (m, *event)."""

    def sample(self, noise: Tensor) -> Tensor:
        """A draw made of standard normal noise of the shape of ``mean``."""

    def log_prob(self, x: Tensor, event_dim: int) -> Tensor:
        """Log-density, summed over the event in float64."""


@dataclass(frozen=True, eq=False)
class StructuredGaussian:
    """N(mean, C) with a covariance that is not diagonal in any fixed basis.

    Args:
        mean: (m, *event).
        covariance: C.
    """

    mean: Tensor
    covariance: Covariance

    def sample(self, noise: Tensor) -> Tensor:
        """mean + C^(1/2) noise, with standard normal noise of the shape of ``mean``."""
        return self.mean + self.covariance.draw(noise)

    def log_prob(self, x: Tensor, event_dim: int) -> Tensor:
        """log N(x; self), (m,) of float64."""
        return self.covariance.log_prob(x - self.mean)


def full_transition(
    step: ReverseStep, x_t: Tensor, mean: Tensor, covariance: Covariance
) -> Gaussian | StructuredGaussian:
    """N(b x_t + c x0_hat, kappa^2 I + c^2 C_t)."""
    law = covariance.affine(step.c**2, step.kappa**2)
    centre = step.b * x_t + step.c * mean
    return Gaussian(centre, law.variance, law.basis) if isinstance(law, Diagonal) else StructuredGaussian(centre, law)


def transition(step: ReverseStep, x_t: Tensor, estimate: Estimate, variance: Variance) -> Gaussian:
    """p(x_s given x_t) for particles x_t of shape (m, *event), from what the denoiser said at x_t.

    Raises:
        ValueError: where the variance asked for needs something the denoiser does not give.
    """
    mean = step.b * x_t + step.c * estimate.mean
    small = step.kappa**2
    if variance == "optimal":
        if estimate.variance is None:
            raise ValueError(
                'got variance="optimal" with a denoiser that knows no variance of x_0; measure it once with '
                "prior.with_measured_variance(images), or take another variance"
            )
        return Gaussian(mean, (small + step.c**2 * estimate.variance).clamp(min=torch.finfo(mean.dtype).tiny ** 0.5))
    if small == 0:
        return Gaussian(mean, None)
    if variance == "posterior":
        return Gaussian(mean, _full(mean, small))
    if variance == "fixed_large":
        return Gaussian(mean, _full(mean, step.beta))
    if estimate.fraction is None:
        raise ValueError(
            'got variance="learned" with a network that has no variance output; build the denoiser with '
            "learned_variance=True, or take another variance"
        )
    log_variance = estimate.fraction * math.log(step.beta) + (1 - estimate.fraction) * math.log(small)  # eq. 15
    return Gaussian(mean, log_variance.exp())


def _full(like: Tensor, value: float) -> Tensor:
    return like.new_full((1,) * like.ndim, value)
