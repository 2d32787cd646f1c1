r"""Twisted diffusion sampling (TDS).

    q(x_s given x_t, y) = N(mean_p + var_p grad_{x_t} log psi_t(x_t),  var_p)
    log_g = log p(x_s given x_t) - log q(x_s given x_t, y) + log psi_s(x_s) - log psi_t(x_t),   psi_0 = p(y given x_0)

References:
    L. Wu, B. Trippe, C. Naesseth, D. Blei, J. Cunningham, "Practical and Asymptotically Exact Conditional Sampling in
    Diffusion Models" (2023), arXiv 2306.17775: the proposal is eq. 9, the weight eq. 10, the algorithm number 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.twists import PointTwist

__all__ = ["TDS", "GuidedProposal"]


@dataclass(frozen=True)
class GuidedProposal:
    """q = N(mean_p + var_p grad log psi_t, var_p) (2306.17775, eq. 9).

    Args:
        max_shift: largest shift per latent, root mean square over its entries, in standard deviations of p; None for
            no limit, as published. A limited shift is just another proposal: the weights stay exact. It holds a step
            that is too long for a sharp likelihood (small noise, few steps) from overshooting.
    """

    max_shift: float | None = None

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor:
        return log_psi

    def q(self, step: SiteStep) -> Gaussian:
        p = step.p
        if not isinstance(p, Gaussian):
            raise TypeError(
                f"sd.TDS got the step covariance of the latent {step.name!r} as a {type(p.covariance).__name__} "
                'matrix; it takes independent coordinates. Use sd.Adapted, or a prior with variance="optimal"'
            )
        if p.variance is None or step.gradient is None:
            return p
        deviation = p.variance.sqrt() * p.basis.to_spectral(step.gradient)  # the shift in standard deviations of p
        if self.max_shift is not None:
            size = deviation.reshape(len(deviation), -1).square().mean(1).sqrt()
            size = size.reshape(-1, *(1,) * (deviation.ndim - 1))
            deviation = deviation * (self.max_shift / size.clamp(min=self.max_shift))
        return Gaussian(p.mean + p.basis.from_spectral(p.variance.sqrt() * deviation), p.variance, p.basis)


@dataclass(frozen=True)
class TDS:
    """Twisted diffusion sampling of a Pyro program's posterior.

    The published point twist is too sure at high noise: where the noise of the measurement is small it can put the
    log-evidence off by many nats with any affordable number of particles, and its gradient step can even diverge.
    Compare with ``sd.WidenedTwist()``, with ``sd.TweedieTwist()`` for few measured values, or limit the step by
    ``max_shift``.

    Args:
        model: the Pyro program.
        twist: log psi_t; the published point twist by default.
        max_shift: see :class:`GuidedProposal`.

    Raises:
        ValueError: for a ``max_shift`` that is not positive.
    """

    model: Callable[..., Any]
    twist: Twist = field(default_factory=PointTwist)
    max_shift: float | None = None

    def __post_init__(self) -> None:
        if self.max_shift is not None and not self.max_shift > 0:
            raise ValueError(f"got max_shift {self.max_shift}; expected a positive number or None")

    @property
    def proposal(self) -> Proposal:
        return GuidedProposal(self.max_shift)
