r"""Decoupled diffusion sequential Monte Carlo (DDSMC).

x_0 given x_t is taken to be N(x0_hat, rho_t^2 I), which for y = A x_0 + sigma_y noise has a Gaussian posterior; x_s is
that noised to level s. In the coordinates of A = U diag(s) V^T, with b, c, kappa below,

    psi_t(x_t) = N(y; A x0_hat, rho_t^2 A A^T + sigma_y^2 I),
    m   = x0_hat + rho_t^2 A^T (rho_t^2 A A^T + sigma_y^2 I)^-1 (y - A x0_hat),
    v   = rho_t^2 sigma_y^2 / (rho_t^2 s^2 + sigma_y^2),
    x_s ~ N(b x_t + c m,  (kappa^2 - c^2 rho_t^2)_+ + c^2 v),        rho_t^2 = spread sigma_t^2.

How much of x_t is kept is a choice, eta. With a = alpha_t / alpha_s, beta = sigma_t^2 - a^2 sigma_s^2 and
D = beta + eta a^2 sigma_s^2,

    b = eta a sigma_s^2 / D,    c = alpha_s beta / D,    kappa^2 = sigma_s^2 beta / D :

eta = 1 is the ancestral step, eta = 0 the decoupled one, x_s = alpha_s x_0 + sigma_s noise. The paper changes the chain
of the prior along with eta; here the target stays the program's, and eta only moves the proposal: far from 1 it is for
long steps. (.)_+ stands where the published variance turns negative, which long steps bring about. Where the chain's
own variance exceeds kappa^2 of its step (``variance="optimal"``), so does the proposal's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian, ReverseStep
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.isotropic import log_marginal, pull
from smcdiff.guidance.known import variance_in
from smcdiff.guidance.singular import singular_measurement

__all__ = ["DDSMC", "DDSMCTwist"]


@dataclass(frozen=True)
class DDSMCTwist:
    """psi_t(x_t) = N(y; A x0_hat, rho_t^2 A A^T + sigma_y^2 I), with rho_t^2 = spread sigma_t^2."""

    spread: float = 0.5

    def log_psi(self, prediction: Prediction) -> Tensor:
        here = singular_measurement(prediction.program, "DDSMC")
        level = prediction.program.latents[here.name].chain.levels[prediction.k]
        return log_marginal(here, prediction.x0_hat[here.name], self.spread * level.sigma**2)


@dataclass(frozen=True)
class DecoupledStep:
    """q = N(b x_t + c m, (kappa^2 - c^2 rho_t^2)_+ + c^2 v)."""

    eta: float
    spread: float

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def q(self, step: SiteStep) -> Gaussian:
        here, x0_hat = singular_measurement(step.program, "DDSMC"), step.estimate.mean
        rho2, noise = self.spread * step.coefficients.t.sigma**2, here.sigma_y**2
        posterior = x0_hat + rho2 * pull(here, x0_hat, rho2)
        b, c, kappa2 = _coefficients(step.coefficients, self.eta)
        mean = b * step.x + c * posterior
        chain = variance_in(step, here)
        if chain is None:
            return Gaussian(mean, None)
        own = kappa2 + chain - step.coefficients.kappa**2
        posterior_variance = rho2 * noise / (rho2 * here.s.square() + noise)
        return Gaussian(mean, (own - c**2 * rho2).clamp(min=0) + c**2 * posterior_variance, here.svd)


def _coefficients(step: ReverseStep, eta: float) -> tuple[float, float, float]:
    """b, c and kappa^2 of the decoupled step."""
    a, variance_s = step.t.alpha / step.s.alpha, step.s.sigma**2
    total = step.beta + eta * a**2 * variance_s
    return eta * a * variance_s / total, step.s.alpha * step.beta / total, variance_s * step.beta / total


@dataclass(frozen=True)
class DDSMC:
    """DDSMC on a Pyro program with one linear measurement and Gaussian noise; no pass back through the network.

    Args:
        model: the Pyro program.
        eta: in [0, 1], how much of x_t a step keeps; the paper's eta.
        spread: rho_t^2 / sigma_t^2, positive; published: 1/2 for a variance-preserving chain.

    Raises:
        ValueError: for an eta outside [0, 1] or a spread that is not positive.

    References:
        F. Ekström Kelvinius, Z. Zhao, F. Lindsten, "Solving Linear-Gaussian Bayesian Inverse Problems with Decoupled
        Diffusion Sequential Monte Carlo" (2025), arXiv 2502.06379: the algorithm with reconstruction by Tweedie's
        formula; settings from the authors' code (filipekstrm/ddsmc).
    """

    model: Callable[..., Any]
    eta: float = 1.0
    spread: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"got eta {self.eta}; expected a number in [0, 1], where 1 is the ancestral step")
        if not self.spread > 0:
            raise ValueError(f"got spread {self.spread}; expected a positive number, 0.5 as published")

    @property
    def twist(self) -> Twist:
        return DDSMCTwist(self.spread)

    @property
    def proposal(self) -> Proposal:
        return DecoupledStep(self.eta, self.spread)

    @property
    def forward_only(self) -> bool:
        return True
