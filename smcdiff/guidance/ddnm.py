r"""Denoising diffusion null-space models: DDNM, DDNM+ for noisy measurements, and the bias-optimal BO-DDNM.

DDNM puts the measurement into the range of A^+ and leaves the null space to the network,

    x0' = x0_hat - A^+ (A x0_hat - y),
    q(x_s given x_t, y) = N(alpha_s x0' + sqrt(1 - eta^2) sigma_s eps_hat,  eta^2 sigma_s^2 I),

with eta the share of sigma_s that is new noise, as in the authors' code (not the eta of DDIM). DDNM+ weighs the
correction of each singular value by lambda_i so that the noise of y is part of sigma_s and not on top of it,

    n_i = alpha_s sigma_y / s_i
    sigma_s >= n_i:  lambda_i = 1,                              variance sigma_s^2 - n_i^2
    sigma_s <  n_i:  lambda_i = sqrt(1 - eta^2) sigma_s / n_i,  variance eta^2 sigma_s^2

and no eps_hat in the range. That is DDRM's transition with eta_b = 1, and its remarks on many particles hold.
BO-DDNM is the chain's own step with a guided score,

    g     = (I - A^+ A) score + Sigma^-1 (alpha_t A^+ y - A^+ A x_t),
    Sigma = alpha_t^2 sigma_y^2 A^+ (A^+)^T + sigma_t^2 I,

which is an x0' = (x_t + sigma_t^2 g) / alpha_t that keeps x0_hat in the null space and is between y_i / s_i and
x_t,i / alpha_t in the range; without noise it is DDNM's x0'. Its kernel is the program's chain.

The published last step of DDNM and BO-DDNM ends at x0', a point mass with one particle only. DDNM+ ends at x0_hat.
Time travel, which repeats steps, has no density and is not offered.

References:
    Y. Wang, J. Yu, J. Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model" (2022), arXiv
    2212.00490: algorithm 1 for DDNM, eq. 17 and 51 for DDNM+.
    Y. Liang, P. Ju, Y. Liang, N. Shroff, "Theory on Score-Mismatched Diffusion Models and Zero-Shot Conditional
    Samplers" (2024), arXiv 2410.13746: BO-DDNM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.ddrm import RestorationProposal
from smcdiff.guidance.singular import (
    SingularTwist,
    at_least,
    check_floor,
    check_share,
    eps_hat,
    last_step,
    singular_measurement,
)

__all__ = ["BODDNM", "DDNM", "BiasOptimalProposal", "DDNMPlus", "NullSpaceProposal"]


@dataclass(frozen=True)
class NullSpaceProposal:
    """q = N(alpha_s x0' + sqrt(1 - eta^2) sigma_s eps_hat, eta^2 sigma_s^2 I), x0' = x0_hat - A^+ (A x0_hat - y).

    Args:
        eta: share of sigma_s that is new noise.
        min_variance: least variance of a step, in units of the chain's own.
    """

    eta: float
    min_variance: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        singular_measurement(prediction.program, "DDNM")

    def q(self, step: SiteStep) -> Gaussian:
        here = singular_measurement(step.program, "DDNM")
        x0_hat = here.svd.to_spectral(step.estimate.mean)
        x0 = here.svd.from_spectral(torch.where(here.seen, here.x, x0_hat))
        level = step.coefficients.s
        if level.sigma == 0:
            return last_step(step, x0, here)
        mean = level.alpha * x0 + (1 - self.eta**2) ** 0.5 * level.sigma * eps_hat(step)
        variance = mean.new_full((1,) * mean.ndim, (self.eta * level.sigma) ** 2)
        return Gaussian(mean, at_least(self.min_variance, step, variance))


@dataclass(frozen=True)
class BiasOptimalProposal:
    """q = N(b x_t + c x0', var_p), x0' = (x_t + sigma_t^2 g) / alpha_t (2410.13746)."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        singular_measurement(prediction.program, "BO-DDNM")

    def q(self, step: SiteStep) -> Gaussian:
        here = singular_measurement(step.program, "BO-DDNM")
        coefficients = step.coefficients
        level = coefficients.t
        x0_hat, x_t = here.svd.to_spectral(step.estimate.mean), here.svd.to_spectral(step.x) / level.alpha
        share = level.ratio**2 / (level.ratio**2 + here.ratio**2)  # sigma_t^2 Sigma^-1
        x0 = here.svd.from_spectral(torch.where(here.seen, x_t + share * (here.x - x_t), x0_hat))
        if coefficients.s.sigma == 0:
            return last_step(step, x0, here)
        law: Gaussian = replace(step.p, mean=coefficients.b * step.x + coefficients.c * x0)
        return law


@dataclass(frozen=True)
class DDNM:
    """The null-space model for a measurement of little noise: it takes y for exact.

    Weights cannot undo that where sigma_s s_i is well below sigma_y: take DDNM+ or BO-DDNM for noisy measurements.

    Args:
        model: the Pyro program, y = A x + noise of one known level, A with a singular value decomposition.
        eta: share of the noise that is new, in (0, 1].
        min_variance: least variance of a step, in units of the chain's own; 0 as published. With many particles the
            weights have a finite variance where it is more than one half; 1 is a good choice.
        twist: log psi_t; by default one that needs no gradient.

    Raises:
        ValueError: for an eta out of range, or a min_variance below 0.
    """

    model: Callable[..., Any]
    eta: float = 0.85
    min_variance: float = 0.0
    twist: Twist = field(default_factory=lambda: SingularTwist("DDNM"))

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_floor(self.min_variance)

    @property
    def proposal(self) -> Proposal:
        return NullSpaceProposal(self.eta, self.min_variance)

    @property
    def forward_only(self) -> bool:
        """No gradient is needed where the twist needs none."""
        return isinstance(self.twist, SingularTwist)


@dataclass(frozen=True)
class DDNMPlus:
    """The null-space model for noisy measurements.

    Args:
        model: the Pyro program, as for :class:`DDNM`.
        eta: share of the noise that is new, in (0, 1].
        min_variance: least variance of a step, in units of the chain's own; 0 as published. With many particles the
            weights have a finite variance where it is more than one half; 1 is a good choice.
        twist: log psi_t; by default one that needs no gradient.

    Raises:
        ValueError: for an eta out of range, or a min_variance below 0.
    """

    model: Callable[..., Any]
    eta: float = 0.85
    min_variance: float = 0.0
    twist: Twist = field(default_factory=lambda: SingularTwist("DDNM+"))

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_floor(self.min_variance)

    @property
    def proposal(self) -> Proposal:
        return RestorationProposal(self.eta, 1.0, self.min_variance, "DDNM+")

    @property
    def forward_only(self) -> bool:
        """No gradient is needed where the twist needs none."""
        return isinstance(self.twist, SingularTwist)


@dataclass(frozen=True)
class BODDNM:
    """The bias-optimal null-space model.

    Args:
        model: the Pyro program, as for :class:`DDNM`.
        twist: log psi_t; by default one that needs no gradient.
    """

    model: Callable[..., Any]
    twist: Twist = field(default_factory=lambda: SingularTwist("BO-DDNM"))

    @property
    def proposal(self) -> Proposal:
        return BiasOptimalProposal()

    @property
    def forward_only(self) -> bool:
        """No gradient is needed where the twist needs none."""
        return isinstance(self.twist, SingularTwist)
