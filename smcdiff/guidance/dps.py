r"""Diffusion posterior sampling (DPS).

    Gaussian noise    x_s = draw from p(x_s given x_t)  -  zeta grad_{x_t} |y - A(x0_hat(x_t))|_2
    Poisson noise     x_s = draw from p(x_s given x_t)  -  zeta / |r|_2  grad_{x_t} sum_j r_j^2 / (2 y_j),
                      r = y - rate(x0_hat(x_t)), its norm taken as a number

with one particle, the norms over all measured values of that particle. It is a Gaussian proposal with the chain's own
variance, so that with more particles the point twist's weights correct it; alone it is the published sampler, whose
posterior is known to be too narrow or too wide where it was measured. The published algorithm also shifts the last
step, which has no noise under the posterior variance: that point mass cannot be weighed, so it is taken with one
particle only, and such a run has no evidence.

The Poisson form is algorithm 2 with the step sizes zeta / |r| of appendix D.1; where all counts are 1 it is the
Gaussian one. Counts below 1 are taken as 1 in the weights, which the paper leaves open. The authors' code, unlike the
paper, multiplies the gradient of |r|_2 by the mean of 1 / |y_j|: the same direction as for Gaussian noise.

References:
    H. Chung, J. Kim, M. McCann, M. Klasky, J. Ye, "Diffusion Posterior Sampling for General Noisy Inverse Problems"
    (2022), arXiv 2209.14687: algorithms 1 and 2; its step sizes are in appendix D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.program import Program
from smcdiff.guidance.twists import PointTwist
from smcdiff.measurement.noise import poisson_moments

__all__ = ["DPS", "ResidualStep", "residual_loss"]


def residual_loss(prediction: Prediction, who: str) -> Tensor:
    """(m,): what DPS descends, of the particles' clean estimates.

    Args:
        who: needs it, for the error.

    Raises:
        TypeError: for a program whose noise is neither all Gaussian nor all Poisson.
    """
    program = prediction.program
    if _is_poisson(program):
        residuals = program.pointwise(prediction.x0_hat, _counts_residual)
        r = torch.cat([residual.flatten(1) for residual in residuals.values()], 1)
        y = torch.cat([value.reshape(-1) for value in program.observed.values()]).to(r.dtype)
        squared = 0.5 * (r.square() / y.clamp(min=1)).sum(1)  # 2209.14687, algorithm 2, line 7
        return squared / torch.linalg.vector_norm(r.detach(), dim=1).clamp(min=torch.finfo(r.dtype).tiny)
    y, mean, precision = program.moments(prediction.x0_hat, f"{who}, unless all noise is Poisson,")
    return torch.linalg.vector_norm((y - mean) * (precision > 0), dim=1)


@dataclass(frozen=True)
class ResidualStep:
    """q = N(mean_p - zeta grad |y - A(x0_hat)|, var_p) (2209.14687, algorithm 1, line 7), or its form for counts.

    Args:
        step_size: zeta.
    """

    step_size: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor:
        return -residual_loss(prediction, "DPS")

    def q(self, step: SiteStep) -> Gaussian:
        assert step.gradient is not None
        law: Gaussian = replace(step.p, mean=step.p.mean + self.step_size * step.gradient)
        return law


@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling of a Pyro program with Gaussian or Poisson noise.

    Args:
        model: the Pyro program; all its measurements Gaussian, or all Poisson.
        step_size: zeta, positive. Published for 1000 steps and noise 0.05 on the scale [-1, 1]: 0.3 for blur and
            super-resolution, 0.5 for inpainting, 1.0 for phase retrieval; for Poisson noise 0.3.

    Raises:
        ValueError: for a step size that is not positive.
    """

    model: Callable[..., Any]
    step_size: float = 1.0

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"got step_size {self.step_size}; expected a positive number")

    @property
    def twist(self) -> Twist:
        return PointTwist()

    @property
    def proposal(self) -> Proposal:
        return ResidualStep(self.step_size)


def _is_poisson(program: Program) -> bool:
    """Whether all measurements are counts with independent pixels."""
    return all(poisson_moments(law) is not None for law in program.probe.laws.values())


def _counts_residual(name: str, fn: Distribution, y: Tensor) -> Tensor:
    noise = poisson_moments(fn)
    assert noise is not None
    return y - noise.loc
