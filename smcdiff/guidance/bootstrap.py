r"""The bootstrap filter: particles follow the prior's own chain and are weighed at its end.

    q = p,    psi_t = 1 for t > 0,    so that log Z is estimated by the likelihood's average over prior draws.

It is exact for any likelihood and hopeless for an informative one; it is what every other method is measured against.

References:
    N. Gordon, D. Salmond, A. Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation" (1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist

__all__ = ["Bootstrap"]


@dataclass(frozen=True)
class NoTwist:
    """psi_t = 1."""

    def log_psi(self, prediction: Prediction) -> Tensor:
        first = next(iter(prediction.x.values()))
        return first.new_zeros(len(first)).double()


@dataclass(frozen=True)
class PriorProposal:
    """q = p."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def q(self, step: SiteStep) -> Gaussian:
        return step.p


@dataclass(frozen=True)
class Bootstrap:
    """The bootstrap filter on a Pyro program.

    Args:
        model: the Pyro program.
    """

    model: Callable[..., Any]

    @property
    def twist(self) -> Twist:
        return NoTwist()

    @property
    def proposal(self) -> Proposal:
        return PriorProposal()
