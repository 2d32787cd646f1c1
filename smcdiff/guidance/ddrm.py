r"""Denoising diffusion restoration models (DDRM).

In the singular basis of A, for x_s / alpha_s with its noise r = sigma_s / alpha_s, coordinate by coordinate, with
n_i = sigma_y / s_i the noise of y in units of x,

    s_i = 0:   N(x0_hat_i + sqrt(1 - eta^2) r eps_hat_i,                     eta^2 r^2)
    r < n_i:   N(x0_hat_i + sqrt(1 - eta^2) r (y_i / s_i - x0_hat_i) / n_i,  eta^2 r^2)
    r >= n_i:  N((1 - eta_b) x0_hat_i + eta_b y_i / s_i,                     r^2 - eta_b^2 n_i^2)

The last step has no noise and ends at x0_hat, as the chain itself does. The published start, where the coordinates
that r exceeds are drawn about y_i / s_i, is replaced by the chain's own N(0, I), from which it differs by
alpha_T y_i / s_i in the mean and alpha_T^2 n_i^2 in the variance.

With many particles the variance of q decides: where it is less than half of the chain's, the weights have no finite
variance. That is so at a step where r only just exceeds n_i and eta_b = 1, and for all steps of few and long ones;
``min_variance`` mends it.

References:
    B. Kawar, M. Elad, S. Ermon, J. Song, "Denoising Diffusion Restoration Models" (2022), arXiv 2201.11793,
    section 3.2; the defaults are those of its experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.singular import (
    SingularTwist,
    at_least,
    check_floor,
    check_share,
    eps_hat,
    last_step,
    singular_measurement,
)

__all__ = ["DDRM", "RestorationProposal"]


@dataclass(frozen=True)
class RestorationProposal:
    """The transition of 2201.11793, section 3.2, in the singular basis.

    Args:
        eta: share of the noise that is new where nothing better than x_t is known.
        eta_b: how much of y is taken over where x_s is noisier than y.
        min_variance: least variance of a step, in units of the chain's own.
        who: whose proposal it is, for the errors.
    """

    eta: float
    eta_b: float
    min_variance: float
    who: str

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        singular_measurement(prediction.program, self.who)

    def q(self, step: SiteStep) -> Gaussian:
        here = singular_measurement(step.program, self.who)
        level = step.coefficients.s
        if level.sigma == 0:
            law = last_step(step, step.estimate.mean, here)  # all three cases end at x0_hat
            return step.p if law.variance is None else law
        r, kept = level.ratio, (1 - self.eta**2) ** 0.5
        x0_hat, eps = here.svd.to_spectral(step.estimate.mean), here.svd.to_spectral(eps_hat(step))
        noisier = here.seen & (r >= here.ratio)
        mean = torch.where(
            noisier,
            (1 - self.eta_b) * x0_hat + self.eta_b * here.x,
            x0_hat + kept * r * torch.where(here.seen, (here.x - x0_hat) / here.ratio, eps),
        )
        variance = torch.where(noisier, r**2 - (self.eta_b * here.ratio) ** 2, (self.eta * r) ** 2)
        variance = variance.clamp(min=torch.finfo(variance.dtype).eps * r**2)  # zero at r = n_i, eta_b = 1
        variance = at_least(self.min_variance, step, level.alpha**2 * variance[None])
        return Gaussian(here.svd.from_spectral(level.alpha * mean), variance, here.svd)


@dataclass(frozen=True)
class DDRM:
    """Denoising diffusion restoration of a linear-Gaussian measurement.

    Args:
        model: the Pyro program, y = A x + noise of one known level, A with a singular value decomposition.
        eta: in (0, 1].
        eta_b: in [0, 1].
        min_variance: least variance of a step, in units of the chain's own; 0 as published. With many particles the
            weights have a finite variance where it is more than one half; 1 is a good choice.
        twist: log psi_t; by default one that needs no gradient. Published is none, as there are no weights.

    Raises:
        ValueError: for shares out of range, or a min_variance below 0.
    """

    model: Callable[..., Any]
    eta: float = 0.85
    eta_b: float = 1.0
    min_variance: float = 0.0
    twist: Twist = field(default_factory=lambda: SingularTwist("DDRM"))

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_share("eta_b", self.eta_b, zero=True)
        check_floor(self.min_variance)

    @property
    def proposal(self) -> Proposal:
        return RestorationProposal(self.eta, self.eta_b, self.min_variance, "DDRM")

    @property
    def forward_only(self) -> bool:
        """No gradient is needed where the twist needs none."""
        return isinstance(self.twist, SingularTwist)
