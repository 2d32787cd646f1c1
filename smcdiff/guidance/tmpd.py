r"""Tweedie moment projected diffusion (TMPD).

x_0 given x_t has the exact covariance C_t = (sigma_t^2 / alpha_t) d x0_hat / d x_t (Tweedie). A C_t A^T is replaced by
the diagonal matrix of its row sums, which are one vector-Jacobian product away, A C_t A^T 1. For y = A x_0 + noise,

    psi_t(x_t) = N(y; A x0_hat, diag(A C_t A^T 1) + sigma_y^2),
    x0_tilde   = x0_hat + C_t A^T (diag(A C_t A^T 1) + sigma_y^2)^-1 (y - A x0_hat),

and the chain's own step is taken from x0_tilde in place of x0_hat. Through the variance no gradient is taken. A row sum
can be negative where entries of x_0 are anticorrelated; it is then taken as zero, which the publication does not say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.linear import linear_measurement

__all__ = ["TMPD", "MomentStep", "TMPDTwist"]


@dataclass(frozen=True)
class TMPDTwist:
    """psi_t(x_t) = N(y; A x0_hat, diag(A C_t A^T 1) + sigma_y^2) for any linear A; only its transpose is needed."""

    def log_psi(self, prediction: Prediction) -> Tensor:
        problem = linear_measurement(prediction.program, "TMPD")
        x, x0_hat = prediction.x[problem.latent], prediction.x0_hat[problem.latent]
        level = prediction.program.latents[problem.latent].chain.levels[prediction.k]
        ones = problem.operator.adjoint(torch.ones_like(problem.y))
        (summed,) = torch.autograd.grad(x0_hat, x, ones.expand_as(x0_hat), retain_graph=True)
        row_sums = problem.operator(level.sigma**2 / level.alpha * summed)
        variance = row_sums.clamp(min=0) + problem.sigma_y**2
        terms = (problem.y - problem.operator(x0_hat)) ** 2 / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * terms.flatten(1).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class MomentStep:
    """q = p with x0_hat + (sigma_t^2 / alpha_t) grad log psi_t in place of x0_hat."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor:
        return log_psi

    def q(self, step: SiteStep) -> Gaussian:
        assert step.gradient is not None
        t = step.coefficients.t
        shift = t.sigma**2 / t.alpha * step.gradient
        return replace(step.p, mean=step.p.mean + step.coefficients.c * shift)


@dataclass(frozen=True)
class TMPD:
    """TMPD of a Pyro program with one linear measurement and Gaussian noise, of any level per measured value.

    It costs a second pass back through the network.

    Args:
        model: the Pyro program.

    References:
        B. Boys, M. Girolami, J. Pidstrigach, S. Reich, A. Mosca, O. Akyildiz, "Tweedie Moment Projected Diffusions for
        Inverse Problems" (2023), arXiv 2310.06721: the algorithm for a variance-preserving chain, with row sums.
    """

    model: Callable[..., Any]

    @property
    def twist(self) -> Twist:
        return TMPDTwist()

    @property
    def proposal(self) -> Proposal:
        return MomentStep()
