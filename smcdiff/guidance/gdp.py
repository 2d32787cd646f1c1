r"""Generative diffusion prior (GDP).

    x_s = draw from p(x_s given x_t)  -  scale grad_{x0_hat} MSE(y, A(x0_hat)),      MSE the mean over measured values,

the gradient with respect to x0_hat itself: none is taken through the network, which makes a step as cheap as one
without guidance. In the blind form the degradation has unknown parameters that gradient steps fit along the way; here
they are latents of the program, and they move by the twisted step of their own chains,
N(mean_p + var_p grad log psi_t, var_p) with psi_t = p(y given x0_hat).

The shift is the same on short and on long steps: where it exceeds the step's standard deviation the weights of many
particles are uneven, and a smaller scale does better than the published one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.tds import GuidedProposal
from smcdiff.guidance.twists import PointTwist

__all__ = ["GDP", "CleanGradientStep"]


@dataclass(frozen=True)
class CleanGradientStep:
    """q = N(mean_p - scale grad_{x0_hat} MSE, var_p) for diffusion priors, the twisted step for other latents.

    Args:
        scale: of the gradient.
    """

    scale: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor:
        """A linear function of x_t, whose gradient is the one wanted at x0_hat."""
        program, total = prediction.program, torch.zeros_like(log_psi)
        y, mean, precision = program.moments(prediction.x0_hat, "GDP")
        seen = (precision > 0).to(mean.dtype)
        fit = -((y - mean) ** 2 * seen).sum(1) / seen.sum(1)
        for name, x in prediction.x.items():
            if name in program.held:
                continue
            # of other latents x0_hat is a known function of x_t, and no network lies in between
            is_diffusion = program.latents[name].is_diffusion
            target, at = (fit, prediction.x0_hat[name]) if is_diffusion else (log_psi, x)
            (slope,) = torch.autograd.grad(
                target.sum(), at, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            total = total + (slope * x).reshape(len(x), -1).sum(1, dtype=torch.float64)
        return total

    def q(self, step: SiteStep) -> Gaussian:
        if not step.program.latents[step.name].is_diffusion:
            return GuidedProposal().q(step)
        assert step.gradient is not None
        return replace(step.p, mean=step.p.mean + self.scale * step.gradient)


@dataclass(frozen=True)
class GDP:
    """GDP on a Pyro program with Gaussian noise and any differentiable operator.

    Args:
        model: the Pyro program.
        scale: of the gradient, positive. Published, for pictures of 256 x 256 and a mean squared error on the scale
            [0, 1]: from 2000 for super-resolution to 80000 for low light.

    Raises:
        ValueError: for a scale that is not positive.

    References:
        B. Fei, Z. Lyu, L. Pan, J. Zhang, W. Yang, T. Luo, B. Zhang, B. Dai, "Generative Diffusion Prior for Unified
        Image Restoration and Enhancement" (2023), arXiv 2304.01247: the form with guidance on x0_hat, and without the
        step's variance as a factor.
    """

    model: Callable[..., Any]
    scale: float = 2000.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"got scale {self.scale}; expected a positive number")

    @property
    def twist(self) -> Twist:
        return PointTwist()

    @property
    def proposal(self) -> Proposal:
        return CleanGradientStep(self.scale)
