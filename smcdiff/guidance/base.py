r"""What a method is made of: a twist and a proposal.

A method turns the joint chain p of a program's latents and its likelihood into a twisted particle filter. The *twist*
says how well a noisy particle is likely to fit the measurement, ``psi_t(x_t), about p(y given x_t)``; the *proposal*
says where to move it, given what the chain would do. Both see one network evaluation's worth of knowledge: a
:class:`Prediction` of all latents at one noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.kernels import Gaussian, ReverseStep
from smcdiff.guidance.program import Program

__all__ = ["Method", "Prediction", "Proposal", "SiteStep", "Twist"]


@dataclass(frozen=True)
class Prediction:
    """What the denoisers say of all latents of m particles at noise level k.

    Args:
        program: whose latents these are.
        k: index of the noise level, K ... 1.
        x: chain states, {site: (m, *shape)}; part of the autograd graph where the method differentiates.
        estimates: what the denoisers say at x, {site: Estimate}; ``mean`` is x0_hat.
    """

    program: Program
    k: int
    x: dict[str, Tensor]
    estimates: dict[str, Estimate]

    @property
    def x0_hat(self) -> dict[str, Tensor]:
        """E[x_0 given x_t] of each latent."""
        return {name: estimate.mean for name, estimate in self.estimates.items()}

    @property
    def ratio(self) -> float:
        """The largest sigma_t / alpha_t among the diffusion priors (among all latents where there are none)."""
        latents = list(self.program.latents.values())
        chains = [latent.chain for latent in latents if latent.is_diffusion] or [latent.chain for latent in latents]
        return max(chain.levels[self.k].ratio for chain in chains)


@dataclass(frozen=True)
class SiteStep:
    """One latent about to take the step from level t to level s.

    Args:
        program: whose latent it is.
        name: its site.
        k: index of the level t; the step reaches level k - 1.
        coefficients: alpha, sigma, b, c and kappa of the step.
        x: x_t, (m, *shape).
        estimate: what the denoiser said at x_t.
        p: the chain's own transition p(x_s given x_t).
        gradient: of the proposal's objective with respect to x_t, (m, *shape); None where it has no objective.
    """

    program: Program
    name: str
    k: int
    coefficients: ReverseStep
    x: Tensor
    estimate: Estimate
    p: Gaussian
    gradient: Tensor | None


class Twist(Protocol):
    """log psi_t of each particle."""

    def log_psi(self, prediction: Prediction) -> Tensor:
        """(m,): a differentiable function of ``prediction.x``."""


class Proposal(Protocol):
    """Where particles move to."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor | None:
        """(m,): what is differentiated with respect to x_t, or None if nothing need be."""

    def q(self, step: SiteStep) -> Gaussian:
        """The law of x_s for one latent. A point mass that differs from the chain's own is for one particle only."""


class Method(Protocol):
    """A method applied to a Pyro program: what :class:`smcdiff.SMC` runs."""

    @property
    def model(self) -> Callable[..., Any]:
        """The Pyro program."""

    @property
    def twist(self) -> Twist:
        """Weighs the particles."""

    @property
    def proposal(self) -> Proposal:
        """Moves the particles."""
