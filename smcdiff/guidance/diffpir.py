r"""Plug-and-play restoration by denoising diffusion (DiffPIR).

    x0'   = argmin over x of |y - A x|^2 + rho_t |x - x0_hat|^2,     rho_t = lambda sigma_y^2 alpha_t^2 / sigma_t^2
    eps'  = (x_t - alpha_t x0') / sigma_t
    q(x_s given x_t, y) = N(alpha_s x0' + sigma_s sqrt(1 - zeta) eps',  zeta sigma_s^2 I)

The published last step ends at x0', a point mass with one particle only. The published start, a noised measurement
for blur and super-resolution, is replaced by the chain's own N(0, I).

With many particles the variance of q decides: the weights have a finite variance only where zeta sigma_s^2 is more
than half of the variance of the chain's step. With the published zeta = 0.1 that asks for about a hundred steps evenly
spaced in log(sigma / alpha); ``min_variance`` mends it for fewer.

References:
    Y. Zhu, K. Zhang, J. Liang, J. Cao, B. Wen, R. Timofte, L. Van Gool, "Denoising Diffusion Models for Plug-and-Play
    Image Restoration" (2023), arXiv 2305.08995: algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.singular import (
    SingularTwist,
    at_least,
    check_floor,
    check_share,
    last_step,
    singular_measurement,
)

__all__ = ["DiffPIR", "ProximalProposal"]


@dataclass(frozen=True)
class ProximalProposal:
    """q = N(alpha_s x0' + sigma_s sqrt(1 - zeta) eps', zeta sigma_s^2 I) (2305.08995, algorithm 1).

    Args:
        lambda_: weight of x0_hat against y.
        zeta: share of the noise's variance that is new.
        min_variance: least variance of a step, in units of the chain's own.
    """

    lambda_: float
    zeta: float
    min_variance: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        singular_measurement(prediction.program, "DiffPIR")

    def q(self, step: SiteStep) -> Gaussian:
        here = singular_measurement(step.program, "DiffPIR")
        t, s = step.coefficients.t, step.coefficients.s
        rho = self.lambda_ * (here.sigma_y / t.ratio) ** 2
        x0_hat = here.svd.to_spectral(step.estimate.mean)
        x0 = here.svd.from_spectral((here.s * here.y + rho * x0_hat) / (here.s**2 + rho))
        if s.sigma == 0:
            return last_step(step, x0, here)
        eps = (step.x - t.alpha * x0) / t.sigma
        mean = s.alpha * x0 + s.sigma * (1 - self.zeta) ** 0.5 * eps
        variance = mean.new_full((1,) * mean.ndim, self.zeta * s.sigma**2)
        return Gaussian(mean, at_least(self.min_variance, step, variance))


@dataclass(frozen=True)
class DiffPIR:
    """Plug-and-play diffusion restoration of a linear-Gaussian measurement.

    Args:
        model: the Pyro program, y = A x + noise of one known level, A with a singular value decomposition.
        lambda_: lambda, positive.
        zeta: in (0, 1]; published 1 for inpainting and about 0.1 to 0.3 elsewhere.
        min_variance: least variance of a step, in units of the chain's own; 0 as published. With many particles the
            weights have a finite variance where it is more than one half; 1 is a good choice.
        twist: log psi_t; by default one that needs no gradient. Published is none, as there are no weights.

    Raises:
        ValueError: for a lambda that is not positive a zeta out of range, or a min_variance below 0.
    """

    model: Callable[..., Any]
    lambda_: float = 1.0
    zeta: float = 0.1
    min_variance: float = 0.0
    twist: Twist = field(default_factory=lambda: SingularTwist("DiffPIR"))

    def __post_init__(self) -> None:
        if not self.lambda_ > 0:
            raise ValueError(f"got lambda_ {self.lambda_}; expected a positive number")
        check_share("zeta", self.zeta)
        check_floor(self.min_variance)

    @property
    def proposal(self) -> Proposal:
        return ProximalProposal(self.lambda_, self.zeta, self.min_variance)

    @property
    def forward_only(self) -> bool:
        """No gradient is needed where the twist needs none."""
        return isinstance(self.twist, SingularTwist)
