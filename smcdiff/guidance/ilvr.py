r"""Iterative latent variable refinement (ILVR).

With phi = A^+ A the projection on what is measured,

    x_s = x_s' - phi(x_s') + phi(y_s),    x_s' ~ p(x_s given x_t),    y_s the measurement noised to level s.

For y = A x_0 + sigma_y noise, y_s is drawn in the coordinates V^T x_s, where A = U diag(s) V^T and y_bar = s^+ U^T y,

    V^T y_s ~ N(alpha_s y_bar, sigma_s^2 + (alpha_s sigma_y / s)^2),

new at every step, and is integrated out: the measured coordinates of x_s have that law, the others are the chain's. As
sigma_y tends to 0 this is the published step. It has a density, so more particles correct it; but y_s does not remember
the step before, so that p(x_s given x_t) is small on steps that are short against sigma_s or sigma_y: the weights are
even for few long steps only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.known import clean_variance, with_known
from smcdiff.guidance.pigdm import PiGDMTwist
from smcdiff.guidance.singular import singular_measurement

__all__ = ["ILVR", "NoisedMeasurement"]


@dataclass(frozen=True)
class NoisedMeasurement:
    """q: measured coordinates from N(alpha_s y_bar, sigma_s^2 + (alpha_s sigma_y / s)^2), the others from p.

    Args:
        who: the method that errors name.
    """

    who: str

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def q(self, step: SiteStep) -> Gaussian:
        here, s = singular_measurement(step.program, self.who), step.coefficients.s
        return with_known(step, here, s.alpha * here.x, s.sigma**2 + s.alpha**2 * clean_variance(here))


@dataclass(frozen=True)
class ILVR:
    """ILVR on a Pyro program with one linear measurement and Gaussian noise.

    The published low-pass filter, down-sampling and up again, is that of ``sd.Downsample``; any operator with a fast
    svd does. The twist, with which the publication has nothing to do, is that of PiGDM.

    Args:
        model: the Pyro program.

    References:
        J. Choi, S. Kim, Y. Jeong, Y. Gwon, S. Yoon, "ILVR: Conditioning Method for Denoising Diffusion Probabilistic
        Models" (2021), arXiv 2108.02938: algorithm 1.
    """

    model: Callable[..., Any]

    @property
    def twist(self) -> Twist:
        return PiGDMTwist("ILVR")

    @property
    def proposal(self) -> Proposal:
        return NoisedMeasurement("ILVR")

    @property
    def forward_only(self) -> bool:
        return True
