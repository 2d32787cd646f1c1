r"""Pseudo-inverse guided diffusion (PiGDM).

x_0 given x_t is taken to be N(x0_hat, r_t^2 I) with r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2), which is right for
data that are white noise of unit variance. For y = A x_0 + sigma_y noise,

    psi_t(x_t) = N(y; A x0_hat, r_t^2 A A^T + sigma_y^2 I),
    x_s = draw from p(x_s given x_t) + alpha_s alpha_t r_t^2 grad_{x_t} log psi_t(x_t).

Where sigma_y = 0 the factor r_t^2 cancels that of the twist and the shift is alpha_s alpha_t J^T A^+ (y - A x0_hat), J
the network's Jacobian. The factor alpha_s alpha_t is that of the implementation by some of the paper's authors
(NVlabs/RED-diff) and of azula; a reproduction by others (bb515/tmpdtorch) has alpha_t alone. The full shift of a
conditional mean would be ``sd.TDS(model, twist=sd.PiGDMTwist())``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.isotropic import log_marginal
from smcdiff.guidance.singular import singular_measurement

__all__ = ["PiGDM", "PiGDMTwist", "unit_variance"]


def unit_variance(level: NoiseLevel) -> float:
    """r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2), Var[x_0 given x_t] of standard normal data."""
    return level.sigma**2 / (level.alpha**2 + level.sigma**2)


@dataclass(frozen=True)
class PiGDMTwist:
    """psi_t(x_t) = N(y; A x0_hat, r_t^2 A A^T + sigma_y^2 I) for a linear A with a fast svd.

    Args:
        who: the method that errors name.
    """

    who: str = "PiGDM"

    def log_psi(self, prediction: Prediction) -> Tensor:
        here = singular_measurement(prediction.program, self.who)
        level = prediction.program.latents[here.name].chain.levels[prediction.k]
        return log_marginal(here, prediction.x0_hat[here.name], unit_variance(level))


@dataclass(frozen=True)
class PseudoInverseStep:
    """q = N(mean_p + alpha_s alpha_t r_t^2 grad log psi_t, var_p)."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor:
        return log_psi

    def q(self, step: SiteStep) -> Gaussian:
        assert step.gradient is not None
        t, s = step.coefficients.t, step.coefficients.s
        shift = s.alpha * t.alpha * unit_variance(t) * step.gradient
        return replace(step.p, mean=step.p.mean + shift)


@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance of a Pyro program with one linear measurement and Gaussian noise.

    Args:
        model: the Pyro program.

    References:
        J. Song, A. Vahdat, M. Mardani, J. Kautz, "Pseudoinverse-Guided Diffusion Models for Inverse Problems", ICLR
        (2023), openreview 9_gsMA8MRKQ: algorithm 1. Published with eta = 1 and 100 steps.
    """

    model: Callable[..., Any]

    @property
    def twist(self) -> Twist:
        return PiGDMTwist()

    @property
    def proposal(self) -> Proposal:
        return PseudoInverseStep()
