r"""BlindDPS: diffusion posterior sampling of a picture and of what blurred it, together.

Two chains run side by side and one loss of both clean estimates moves both,

    L = |y - A(k0_hat) x0_hat|_2 + regulariser(k0_hat),
    x_s = draw from p(x_s given x_t) - zeta_x grad_{x_t} L,
    k_s = draw from p(k_s given k_t) - zeta_k grad_{k_t} L,

with step sizes of their own, for any number of latents of a Pyro program. How the kernel enters is the program's
affair; published is a kernel on [-1, 1] mapped to (k + 1) / 2 and divided by its sum, :func:`normalised_kernel`. As for
:mod:`~smcdiff.guidance.dps` the proposals are Gaussian with the chains' own variances: alone it is the published
sampler, and with more particles the point twist's weights correct it to the joint posterior.

The published regulariser is lambda times the l1 or l0 norm of that normalised kernel. A kernel of values at least 0
and of sum 1 has l1 norm 1 whatever its shape, and the l0 norm, a count, has no gradient: it regularises nothing as long
as the estimate of k stays above -1. It is here so that the published runs can be repeated. What does regularise is the
prior of the kernel: its diffusion model, or a parametric point-spread function with physical priors.

References:
    H. Chung, J. Kim, S. Kim, J. C. Ye, "Parallel Diffusion Models of Operator and Image for Blind Inverse Problems"
    (2022), arXiv 2211.10656. The paper's step sizes are constant; the authors' code has sqrt(alpha_bar_t), which is
    alpha_t of a variance-preserving schedule, with lambda = 0.1 and the l0 norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian, ReverseStep
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.dps import residual_loss
from smcdiff.guidance.twists import PointTwist

__all__ = ["BlindDPS", "ConstantStep", "KernelNorm", "Regulariser", "SignalStep", "StepRule", "normalised_kernel"]


class StepRule(Protocol):
    """zeta of one chain's step."""

    def __call__(self, step: ReverseStep) -> float:
        """The step size on the way from level ``step.t`` to ``step.s``."""


@dataclass(frozen=True)
class ConstantStep:
    """zeta, as in the paper.

    Args:
        size: zeta, positive.
    """

    size: float

    def __post_init__(self) -> None:
        _check_positive("a step size", self.size)

    def __call__(self, step: ReverseStep) -> float:
        return self.size


@dataclass(frozen=True)
class SignalStep:
    """zeta alpha_t, as in the authors' code: small at high noise.

    Args:
        size: zeta, positive.
    """

    size: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("a step size", self.size)

    def __call__(self, step: ReverseStep) -> float:
        return self.size * step.t.alpha


class Regulariser(Protocol):
    """A term of the loss."""

    def __call__(self, x0_hat: dict[str, Tensor]) -> Tensor:
        """(m,): of the clean estimates {site: (m, *shape)}."""


def normalised_kernel(k: Tensor) -> Tensor:
    """(k + 1) / 2 divided by its sum over the last two dimensions: a kernel on [-1, 1] as published."""
    positive = (k + 1) / 2
    return positive / positive.sum((-2, -1), keepdim=True)


@dataclass(frozen=True)
class KernelNorm:
    """weight |normalised k0_hat|_order, the published regulariser, whose gradient is zero.

    Args:
        site: of the kernel, with rows and columns last.
        weight: lambda, positive.
        order: 0 counts entries that are not zero, 1 adds up their sizes.
        of: what the norm is taken of; with the estimate itself, ``of=lambda k: k``, the l1 norm does have a gradient.
    """

    site: str
    weight: float = 0.1
    order: Literal[0, 1] = 0
    of: Callable[[Tensor], Tensor] = normalised_kernel

    def __post_init__(self) -> None:
        _check_positive("a weight", self.weight)
        if self.order not in (0, 1):
            raise ValueError(f"got the order {self.order}; expected 0 or 1")

    def __call__(self, x0_hat: dict[str, Tensor]) -> Tensor:
        if self.site not in x0_hat:
            raise ValueError(
                f"got a regulariser on the site {self.site!r}; expected one of the latents {sorted(x0_hat)}"
            )
        kernel = self.of(x0_hat[self.site]).flatten(1)
        return self.weight * torch.linalg.vector_norm(kernel, ord=self.order, dim=1)


@dataclass(frozen=True)
class JointResidualStep:
    """q = N(mean_p - zeta grad L, var_p) of each latent, with its own zeta.

    Args:
        step_sizes: {site: zeta}, or one for all of them.
        regulariser: a term of L besides the residual.
    """

    step_sizes: StepRule | Mapping[str, StepRule]
    regulariser: Regulariser | None

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor:
        moving = set(prediction.program.latents) - set(prediction.program.held)
        if isinstance(self.step_sizes, Mapping) and not moving <= set(self.step_sizes) <= set(prediction.x):
            raise ValueError(
                f"got step sizes for {sorted(self.step_sizes)}; expected one for each of the latents "
                f"{sorted(prediction.program.latents)}"
            )
        loss = residual_loss(prediction, "BlindDPS")
        return -loss if self.regulariser is None else -(loss + self.regulariser(prediction.x0_hat))

    def q(self, step: SiteStep) -> Gaussian:
        assert step.gradient is not None
        rule = self.step_sizes[step.name] if isinstance(self.step_sizes, Mapping) else self.step_sizes
        law: Gaussian = replace(step.p, mean=step.p.mean + rule(step.coefficients) * step.gradient)
        return law


@dataclass(frozen=True)
class BlindDPS:
    """Diffusion posterior sampling of several latents by one loss, with step sizes of their own.

    Args:
        model: the Pyro program; all its measurements Gaussian, or all Poisson.
        step_sizes: {site: zeta} for every latent of the program, or one for all; published are 0.3, constant, and
            ``SignalStep()``.
        regulariser: a term of the loss; published is :class:`KernelNorm`, which does nothing. None for none.
    """

    model: Callable[..., Any]
    step_sizes: StepRule | Mapping[str, StepRule] = field(default_factory=lambda: ConstantStep(0.3))
    regulariser: Regulariser | None = None

    @property
    def twist(self) -> Twist:
        return PointTwist()

    @property
    def proposal(self) -> Proposal:
        return JointResidualStep(self.step_sizes, self.regulariser)


def _check_positive(what: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"got {what} of {value}; expected a positive number")
