r"""Filtering posterior sampling (FPS-SMC).

The measurement is noised along with the picture: a path of y is drawn once, by the chain's own steps,

    y_T = A noise,    y_s = b y_t + c y + kappa A noise,    y_0 = y,

and each y_s observes its x_s as y observes x_0, y_s given x_s ~ N(A x_s, alpha_s^2 sigma_y^2 I). The proposal is the
exact conditional of a linear-Gaussian step,

    q(x_s given x_t, y_s) proportional to p(x_s given x_t) N(y_s; A x_s, alpha_s^2 sigma_y^2 I).

All particles and chains share the path. The published weights N(y_s; A mean_p, A var_p A^T + alpha_s^2 sigma_y^2 I)
gather the observations of all levels, so their limit is the law given the whole path; here the potential
psi_t = N(y_t; A x_t, alpha_t^2 sigma_y^2 I) of the level left is divided out, and the limit is the posterior. (psi_T
is 1, and x_T from the chain's N(0, I), not from its law given y_T.)

A path that all particles share holds them closer together than the posterior does: where kappa s_i is more than about
sqrt(3) alpha_s sigma_y, at all high noise of a variance-preserving schedule, the weights have no finite variance.
Without a seed every particle meets a path of its own: one that goes through A x_t instead of y_t, drawn anew at every
step and integrated out,

    q(x_s given x_t) = integral of q(x_s given x_t, y_s) N(y_s; b A x_t + c y, kappa^2 A A^T) over y_s,

with a variance between 3/4 and all of the chain's. Without measurement noise it is the same sampler with independent
paths. Its twist is :class:`~smcdiff.guidance.singular.SingularTwist`.

References:
    Z. Dou, Y. Song, "Diffusion Posterior Sampling for Linear Inverse Problem Solving: A Filtering Perspective" (2024),
    ICLR: FPS-SMC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.program import Program
from smcdiff.guidance.singular import (
    SingularTwist,
    conjugate,
    last_step,
    per_program,
    singular_measurement,
    step_variance,
)

__all__ = ["FPS", "FPSProposal", "PathTwist"]


@per_program
def measurement_path(program: Program, seed: int) -> tuple[Tensor, ...]:
    """U^T y_k of the levels k = 0 ... K, each of the shape of x."""
    here = singular_measurement(program, "FPS")
    chain = program.latents[here.name].chain
    generator = torch.Generator(program.device).manual_seed(seed)

    def noise() -> Tensor:
        return here.s * torch.randn(here.s.shape, generator=generator, dtype=program.dtype, device=program.device)

    path = [chain.initial_scale * noise()]
    for k in range(chain.num_steps, 1, -1):
        step = chain.step(k)
        path.append(step.b * path[-1] + step.c * here.y + step.kappa * noise())
    return (here.y, *reversed(path))


@dataclass(frozen=True)
class PathTwist:
    """psi_t(x_t) = N(y_t; A x_t, alpha_t^2 sigma_y^2 I), and psi_T = 1.

    Args:
        seed: of the path.
    """

    seed: int

    def log_psi(self, prediction: Prediction) -> Tensor:
        here = singular_measurement(prediction.program, "FPS")
        y = measurement_path(prediction.program, self.seed)[prediction.k]
        chain = prediction.program.latents[here.name].chain
        x_t = here.svd.to_spectral(prediction.x[here.name].detach())
        variance = (x_t.new_tensor(chain.levels[prediction.k].alpha) * here.sigma_y) ** 2
        met = here.seen if prediction.k < chain.num_steps else torch.zeros_like(here.seen)
        return here.log_density(y, here.s * x_t, variance, met)


@dataclass(frozen=True)
class FPSProposal:
    """q proportional to p(x_s given x_t) N(y_s; A x_s, alpha_s^2 sigma_y^2 I).

    Args:
        seed: of the path; None for paths of the particles' own, integrated out.
    """

    seed: int | None

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        singular_measurement(prediction.program, "FPS")

    def q(self, step: SiteStep) -> Gaussian:
        here = singular_measurement(step.program, "FPS")
        mean, variance, coefficients = step.p.mean, step_variance(step), step.coefficients
        if variance is None:
            p: Gaussian = step.p
            return p
        noise = (coefficients.s.alpha * here.sigma_y) ** 2
        if coefficients.s.sigma == 0:
            return last_step(step, mean, here)
        if self.seed is not None:
            y_s = measurement_path(step.program, self.seed)[step.k - 1]
            law, _ = conjugate(mean, variance, y_s, noise, here)
            return law
        y_s = here.s * here.svd.to_spectral(coefficients.b * step.x) + coefficients.c * here.y
        law, gain = conjugate(mean, variance, y_s, noise, here)
        assert law.variance is not None
        return Gaussian(law.mean, law.variance + (gain * here.s * coefficients.kappa) ** 2, here.svd)


@dataclass(frozen=True)
class FPS:
    """Filtering posterior sampling of a linear-Gaussian measurement.

    Args:
        model: the Pyro program, y = A x + noise of one known level, A with a singular value decomposition.
        seed: of the noised measurements, which are part of the method; None for paths of the particles' own, the
            choice for many particles.
    """

    model: Callable[..., Any]
    seed: int | None = 0

    @property
    def twist(self) -> Twist:
        return SingularTwist("FPS") if self.seed is None else PathTwist(self.seed)

    @property
    def proposal(self) -> Proposal:
        return FPSProposal(self.seed)

    @property
    def forward_only(self) -> bool:
        """No gradient is needed."""
        return True
