r"""Replacement and its correction by weights (SMCDiff).

The measured part of x_s is replaced by that of a noised measurement, and the particles are weighed by how likely the
chain finds it. The noised measurement is a path of the forward process that starts in the measured part of x_0. Read
from high noise to low it is a chain too, so that each particle's own measured part can carry it: in the coordinates
V^T x of A = U diag(s) V^T, with y_bar = s^+ U^T y and b, c, kappa of the step (:mod:`smcdiff.diffusion.kernels`),

    measured   V^T x_s ~ N(b V^T x_t + c m,  kappa^2 + c^2 v),   the law of the path's x_s given its x_t and y,
               1 / v = (alpha_t / sigma_t)^2 + (s / sigma_y)^2,
               m = v (alpha_t V^T x_t / sigma_t^2 + s^2 y_bar / sigma_y^2),
    others     from p(x_s given x_t),
    log_g = log p(x_s given x_t) - log q(x_s given x_t, y),    psi_t = 1 for t > 0.

m and v are of x_0's coordinate as x_t and y know it, whatever the prior; where sigma_y = 0 it is y_bar. Weights only:
nothing looks ahead. The publication, where sigma_y = 0, draws one path for all particles. q is then a point mass, and
the weight p(y_s given x_t) is the above one up to a factor common to all particles; here each particle has a path of
its own, so that q has a density and the estimate of p(y) stands by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.bootstrap import NoTwist
from smcdiff.guidance.known import clean_variance, with_known
from smcdiff.guidance.singular import singular_measurement

__all__ = ["Replacement"]


@dataclass(frozen=True)
class ReplacedPart:
    """q: measured coordinates from N(b x_t + c m, kappa^2 + c^2 v), the others from p."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        singular_measurement(prediction.program, "Replacement")  # refuses what is none

    def q(self, step: SiteStep) -> Gaussian:
        here, move = singular_measurement(step.program, "Replacement"), step.coefficients
        x, noise, blurred = here.svd.to_spectral(step.x), clean_variance(here), move.t.ratio**2
        share = blurred / (blurred + noise)  # of y_bar in m
        m, v = share * here.x + (1 - share) * x / move.t.alpha, share * noise
        return with_known(step, here, move.b * x + move.c * m, move.kappa**2 + move.c**2 * v)


@dataclass(frozen=True)
class Replacement:
    """SMCDiff on a Pyro program with one linear measurement and Gaussian noise.

    Published for known parts of x_0, the operators ``sd.Mask`` and ``sd.Select``; any with a fast svd does.

    Args:
        model: the Pyro program.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, "Score-Based Generative Modeling through
        Stochastic Differential Equations" (2020), arXiv 2011.13456: replacement, for inpainting.
        B. Trippe, J. Yim, D. Tischer, D. Baker, T. Broderick, R. Barzilay, T. Jaakkola, "Diffusion Probabilistic
        Modeling of Protein Backbones in 3D for the Motif-Scaffolding Problem" (2022), arXiv 2206.04119: SMCDiff.
    """

    model: Callable[..., Any]

    @property
    def twist(self) -> Twist:
        return NoTwist()

    @property
    def proposal(self) -> Proposal:
        return ReplacedPart()

    @property
    def forward_only(self) -> bool:
        return True
