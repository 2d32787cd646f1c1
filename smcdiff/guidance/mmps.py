r"""Moment matching posterior sampling (MMPS).

With C_t = (sigma_t^2 / alpha_t) d x0_hat / d x_t, the exact covariance of x_0 given x_t (Tweedie), y = A x_0 + noise,

    (A C_t A^T + sigma_y^2 I) u = y - A x0_hat       by a few steps of conjugate gradients, one VJP each,
    x0_tilde = x0_hat + C_t A^T u,

and the chain's own step is taken from x0_tilde in place of x0_hat. The same u gives the twist

    log psi_t = -1/2 u^T (y - A x0_hat),

the Gaussian log-density without its normaliser. Conjugate gradients approach the quadratic form from below, so that
few steps only make the twist wider; and any twist leaves the weights exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smcdiff.guidance.base import Prediction, Proposal, Twist
from smcdiff.guidance.linear import linear_measurement
from smcdiff.guidance.tmpd import MomentStep

__all__ = ["MMPS", "MMPSTwist", "conjugate_gradients"]


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The iterate u of M u = b after that many steps from zero, each particle by itself.

    A direction of no positive curvature, which a network's Jacobian can have, is not followed.

    Args:
        matrix: u -> M u, symmetric, for u of the shape of b.
        b: (m, *event).
    """
    u, residual, direction = torch.zeros_like(b), b, b
    square = _dot(residual, residual)
    for _ in range(iterations):
        image = matrix(direction)
        curvature = _dot(direction, image)
        length = torch.where(curvature > 0, square / torch.where(curvature > 0, curvature, 1.0), 0.0)
        u, residual = u + length * direction, residual - length * image
        before, square = square, _dot(residual, residual)
        share = torch.where(before > 0, square / torch.where(before > 0, before, 1.0), 0.0)
        direction = residual + share * direction
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each particle, of shape (m, 1, ..., 1)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))


@dataclass(frozen=True)
class MMPSTwist:
    """log psi_t = -1/2 u^T (y - A x0_hat), with u from conjugate gradients; only the transpose of A is needed.

    Args:
        iterations: steps of conjugate gradients, each a pass back through the network.
    """

    iterations: int = 1

    def log_psi(self, prediction: Prediction) -> Tensor:
        problem = linear_measurement(prediction.program, "MMPS")
        operator, noise = problem.operator, problem.sigma_y**2
        x, x0_hat = prediction.x[problem.latent], prediction.x0_hat[problem.latent]
        level = prediction.program.latents[problem.latent].chain.levels[prediction.k]

        def covariance(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(x0_hat, x, operator.adjoint(u), retain_graph=True)
            return operator(level.sigma**2 / level.alpha * product) + noise * u

        residual = problem.y - operator(x0_hat)
        u = conjugate_gradients(covariance, residual.detach(), self.iterations)
        terms = u * residual  # its gradient is J^T A^T u, as the quadratic form's at fixed covariance
        return (0.5 * terms.detach() - terms).flatten(1).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class MMPS:
    """MMPS of a Pyro program with one linear measurement and Gaussian noise, of any level per measured value.

    Args:
        model: the Pyro program.
        iterations: steps of conjugate gradients, at least 1; 1 to 5 are published.

    Raises:
        ValueError: for less than one iteration.

    References:
        F. Rozet, G. Andry, F. Lanusse, G. Louppe, "Learning Diffusion Priors from Observations by Expectation
        Maximization" (2024), arXiv 2405.13712: the posterior sampling scheme of its method section.
    """

    model: Callable[..., Any]
    iterations: int = 1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"got iterations {self.iterations}; expected at least 1 step of conjugate gradients")

    @property
    def twist(self) -> Twist:
        return MMPSTwist(self.iterations)

    @property
    def proposal(self) -> Proposal:
        return MomentStep()
