r"""Monte-Carlo guided diffusion (MCGDiff).

In the singular basis of A each seen coordinate has a level tau_i, the one of the chain whose sigma / alpha is nearest
to sigma_y / s_i. There y_i / s_i is as noisy as x_tau,i / alpha_tau, and is taken for it. Until then the coordinate is
led to it by the potential of the noised measurement,

    g_t,i(x) = N(x; alpha_t y_i / s_i, v_t,i),    v_t,i = sigma_t^2 - (alpha_t / alpha_tau)^2 (sigma_tau^2 - kappa_0),

and the proposal is fully adapted to the next level's potentials: q is proportional to p g_s, so that the weight is
the normalising constant of p g_s over prod_i g_t,i. Below tau_i the coordinate follows the chain, and at the end the
likelihood takes the place of the last potentials.

The twist is prod_i g_t,i, in the units of y. A coordinate with tau_i = K, whose measurement is noisier than x_T, is
left to the likelihood. With the published kappa_0 = 1e-4 the particles are pinned at tau_i and released from a far
narrower potential than the chain's step is wide: the weights there have no finite variance, and no affordable number
of particles gives the exact posterior. A ``variance`` as large as kappa^2, the chain's own at tau_i, mends that.

References:
    G. Cardoso, Y. Janati El Idrissi, S. Le Corff, E. Moulines, "Monte Carlo Guided Diffusion for Bayesian Linear
    Inverse Problems" (2023), arXiv 2308.07983: algorithm 1, in the general schedule's letters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.program import Program
from smcdiff.guidance.singular import last_step, per_program, singular_measurement, step_variance

__all__ = ["MCGDiff", "MCGDiffProposal", "MCGDiffTwist"]


@dataclass(frozen=True, eq=False)
class Potentials:
    """g_k of the levels k = 1 ... K.

    Args:
        tau: the level k at which each coordinate of V^T x meets its measurement, of the shape of x; K + 1 for never.
        alpha, sigma: of that level.
    """

    tau: Tensor
    alpha: Tensor
    sigma: Tensor

    def variance(self, level: NoiseLevel, kappa_0: float) -> Tensor:
        """v_t,i, of the shape of x; of a coordinate in play it is positive."""
        return level.sigma**2 - (level.alpha / self.alpha) ** 2 * (self.sigma**2 - kappa_0)


@per_program
def potentials(program: Program) -> Potentials:
    """Which measured value meets which level."""
    here = singular_measurement(program, "MCGDiff")
    levels = program.latents[here.name].chain.levels
    alpha, sigma = (here.s.new_tensor([getattr(level, part) for level in levels]) for part in ("alpha", "sigma"))
    shape = (-1, *(1,) * here.s.ndim)
    mismatch = (here.sigma_y * alpha[1:].reshape(shape)) ** 2 - (here.s * sigma[1:].reshape(shape)) ** 2
    k = mismatch.abs().argmin(0) + 1
    never = ~here.seen | (k == len(levels) - 1)
    return Potentials(torch.where(never, len(levels), k), alpha[k], sigma[k])


@dataclass(frozen=True)
class MCGDiffTwist:
    """psi_t(x_t) = prod_i g_t,i((V^T x_t)_i) over the coordinates with tau_i <= t.

    Args:
        variance: kappa_0.
    """

    variance: float

    def log_psi(self, prediction: Prediction) -> Tensor:
        here, meet = singular_measurement(prediction.program, "MCGDiff"), potentials(prediction.program)
        level = prediction.program.latents[here.name].chain.levels[prediction.k]
        scale = here.s / level.alpha  # from units of x_t to those of y
        x_t = here.svd.to_spectral(prediction.x[here.name].detach())
        variance = scale**2 * meet.variance(level, self.variance)
        return here.log_density(here.y, scale * x_t, variance, meet.tau <= prediction.k)


@dataclass(frozen=True)
class MCGDiffProposal:
    """q proportional to p(x_s given x_t) prod_i g_s,i, coordinate by coordinate.

    Args:
        variance: kappa_0.
    """

    variance: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def q(self, step: SiteStep) -> Gaussian:
        here, meet = singular_measurement(step.program, "MCGDiff"), potentials(step.program)
        mean, variance, level = step.p.mean, step_variance(step), step.coefficients.s
        if variance is None:
            p: Gaussian = step.p
            return p
        if level.sigma == 0:
            return last_step(step, mean, here)
        share = variance / (variance + meet.variance(level, self.variance))
        share = torch.where(meet.tau < step.k, share, 0.0)
        shift = share * (level.alpha * here.x - here.svd.to_spectral(mean))
        return Gaussian(mean + here.svd.from_spectral(shift), variance * (1 - share), here.svd)


@dataclass(frozen=True)
class MCGDiff:
    """Monte-Carlo guided diffusion of a linear-Gaussian measurement.

    Args:
        model: the Pyro program, y = A x + noise of one known level, A with a singular value decomposition.
        variance: kappa_0, how closely a coordinate meets its measurement at tau_i; positive, in the units of x.

    Raises:
        ValueError: for a variance that is not positive.
    """

    model: Callable[..., Any]
    variance: float = 1e-4

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"got variance {self.variance}; expected a positive number")

    @property
    def twist(self) -> Twist:
        return MCGDiffTwist(self.variance)

    @property
    def proposal(self) -> Proposal:
        return MCGDiffProposal(self.variance)

    @property
    def forward_only(self) -> bool:
        """No gradient is needed."""
        return True
