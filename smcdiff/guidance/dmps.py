r"""Diffusion model based posterior sampling (DMPS).

The prior is left out of the twist: under a flat one x_0 given x_t is N(x_t / alpha_t, (sigma_t / alpha_t)^2 I), so that

    psi_t(x_t) = N(y; A x_t / alpha_t, (sigma_t / alpha_t)^2 A A^T + sigma_y^2 I)

needs no network, and its gradient no pass back through one. With a = alpha_t / alpha_s and beta = sigma_t^2 - a^2
sigma_s^2, the variance of the forward step from s to t (1 - a^2 for a variance-preserving chain),

    x_s = draw from p(x_s given x_t) + gain (beta / a) grad_{x_t} log psi_t(x_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.isotropic import log_marginal, pull
from smcdiff.guidance.singular import singular_measurement

__all__ = ["DMPS", "DMPSTwist"]


@dataclass(frozen=True)
class DMPSTwist:
    """psi_t(x_t) = N(y; A x_t / alpha_t, (sigma_t / alpha_t)^2 A A^T + sigma_y^2 I), linear A with a fast svd."""

    def log_psi(self, prediction: Prediction) -> Tensor:
        here = singular_measurement(prediction.program, "DMPS")
        level = prediction.program.latents[here.name].chain.levels[prediction.k]
        return log_marginal(here, prediction.x[here.name] / level.alpha, level.ratio**2)


@dataclass(frozen=True)
class PseudoLikelihoodStep:
    """q = N(mean_p + gain (beta / a) grad log psi_t, var_p), the gradient in closed form.

    Args:
        gain: lambda of the paper.
    """

    gain: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def q(self, step: SiteStep) -> Gaussian:
        t, s = step.coefficients.t, step.coefficients.s
        gradient = pull(singular_measurement(step.program, "DMPS"), step.x / t.alpha, t.ratio**2) / t.alpha
        shift = self.gain * step.coefficients.beta / (t.alpha / s.alpha) * gradient
        return replace(step.p, mean=step.p.mean + shift)


@dataclass(frozen=True)
class DMPS:
    """DMPS of a Pyro program with one linear measurement and Gaussian noise.

    Args:
        model: the Pyro program.
        gain: how much of the twist's gradient is taken, positive; published: 1.75 for all problems, 1000 steps. 1 is
            the step of the conditional score.

    Raises:
        ValueError: for a gain that is not positive.

    References:
        X. Meng, Y. Kabashima, "Diffusion Model Based Posterior Sampling for Noisy Linear Inverse Problems" (2022),
        arXiv 2211.12343: algorithm 1, in the form of the svd; the gain is that of the authors' configurations.
    """

    model: Callable[..., Any]
    gain: float = 1.75

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"got gain {self.gain}; expected a positive number, 1.75 as published")

    @property
    def twist(self) -> Twist:
        return DMPSTwist()

    @property
    def proposal(self) -> Proposal:
        return PseudoLikelihoodStep(self.gain)

    @property
    def forward_only(self) -> bool:
        return True
