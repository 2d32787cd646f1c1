r"""What a method is made of: a twist and a proposal.

A method turns the joint chain p of a program's latents and its likelihood into a twisted particle filter. The *twist*
says how well a noisy particle is likely to fit the measurement, ``psi_t(x_t), about p(y given x_t)``; the *proposal*
says where to move it, given what the chain would do. Both see one network evaluation's worth of knowledge: a
:class:`Prediction` of all latents at one noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.kernels import Gaussian, ReverseStep, StructuredGaussian
from smcdiff.guidance.program import Program

__all__ = [
    "ForwardOnly",
    "IndependentTransition",
    "InformedProposal",
    "JointProposal",
    "Method",
    "Prediction",
    "Proposal",
    "SiteStep",
    "Transition",
    "TransitionLaw",
    "Twist",
    "WithHeld",
    "log_ratio",
]


#: p or q of one latent.
TransitionLaw = Gaussian | StructuredGaussian


@dataclass(frozen=True)
class Prediction:
    """What the denoisers say of all latents of m particles at noise level k.

    Args:
        program: whose latents these are.
        k: index of the noise level, K ... 1.
        x: chain states, {site: (m, *shape)}; part of the autograd graph where the method differentiates.
        estimates: what the denoisers say at x, {site: Estimate}; ``mean`` is x0_hat.
        memo: what a method's twist has made of this, for its proposal.
    """

    program: Program
    k: int
    x: dict[str, Tensor]
    estimates: dict[str, Estimate]
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

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
        own: what a denoiser of the proposal's own said at x_t; None where it has none.
    """

    program: Program
    name: str
    k: int
    coefficients: ReverseStep
    x: Tensor
    estimate: Estimate
    p: Any
    gradient: Tensor | None
    own: Estimate | None = None

    @classmethod
    def at(cls, prediction: Prediction, name: str) -> SiteStep:
        """The step that a latent is about to take from where it was just evaluated."""
        chain, k = prediction.program.latents[name].chain, prediction.k
        x, estimate = prediction.x[name], prediction.estimates[name]
        return cls(prediction.program, name, k, chain.step(k), x, estimate, chain.transition(k, x, estimate), None)


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


class Transition(Protocol):
    """p and q of one step of all latents of m particles."""

    def sample(self, noise: Callable[[torch.Size], Tensor]) -> dict[str, Tensor]:
        """x_s from q, {site: (m, *shape)}.

        Args:
            noise: standard normal numbers of a shape.
        """

    def log_ratio(self, x: dict[str, Tensor]) -> Tensor:
        """log p(x_s given x_t) - log q(x_s given x_t, y), (m,) of float64."""

    def log_p(self, x: dict[str, Tensor]) -> Tensor:
        """log p(x_s given x_t), (m,) of float64."""


@runtime_checkable
class InformedProposal(Protocol):
    """A proposal with denoisers of its own. They are asked once at every particle, which carries what they said."""

    def inform(self, prediction: Prediction) -> dict[str, Estimate]:
        """What they say at x_t, {site: Estimate}: one network evaluation each, without gradients."""


@runtime_checkable
class JointProposal(Protocol):
    """A proposal that moves all latents together."""

    @property
    def extra_passes(self) -> int:
        """Network evaluations per particle that :meth:`carry` makes, forward."""

    def objective(self, prediction: Prediction, log_psi: Tensor) -> Tensor | None:
        """As that of a :class:`Proposal`."""

    def carry(self, prediction: Prediction) -> dict[str, Tensor]:
        """What :meth:`transition` will ask for of each particle, {name: (m, ...)}; it is resampled with them."""

    def transition(self, steps: dict[str, SiteStep], held: dict[str, Tensor], carried: dict[str, Tensor]) -> Transition:
        """p and q of latents about to take a step.

        Args:
            steps: of the latents that move.
            held: states of those that do not, {site: (m, *shape)}.
            carried: what :meth:`carry` said of these particles.
        """


@dataclass(frozen=True, eq=False)
class IndependentTransition:
    """p and q that are products over latents.

    Args:
        laws: {site: (p, q)}.
    """

    laws: dict[str, tuple[TransitionLaw, TransitionLaw]]

    def sample(self, noise: Callable[[torch.Size], Tensor]) -> dict[str, Tensor]:
        return {name: q.sample(noise(p.mean.shape)) for name, (p, q) in self.laws.items()}

    def log_ratio(self, x: dict[str, Tensor]) -> Tensor:
        return _total(log_ratio(p, q, x[name]) for name, (p, q) in self.laws.items())

    def log_p(self, x: dict[str, Tensor]) -> Tensor:
        return _total(p.log_prob(x[name], event_dim=x[name].ndim - 1) for name, (p, _) in self.laws.items())


@dataclass(frozen=True, eq=False)
class WithHeld:
    """A joint transition beside the latents that stay where they are.

    Args:
        moving: of the others.
        held: of those that stay.
    """

    moving: Transition
    held: IndependentTransition

    def sample(self, noise: Callable[[torch.Size], Tensor]) -> dict[str, Tensor]:
        return {**self.moving.sample(noise), **{name: p.mean for name, (p, _) in self.held.laws.items()}}

    def log_ratio(self, x: dict[str, Tensor]) -> Tensor:
        return self.moving.log_ratio(x)

    def log_p(self, x: dict[str, Tensor]) -> Tensor:
        return self.moving.log_p(x)


def log_ratio(p: Gaussian | StructuredGaussian, q: Gaussian | StructuredGaussian, x: Tensor) -> Tensor:
    """log p - log q, as one difference where both are diagonal."""
    event_dim = x.ndim - 1
    if isinstance(p, Gaussian) and isinstance(q, Gaussian):
        return p.log_density_ratio(q, x, event_dim)
    return x.new_zeros(len(x), dtype=torch.float64) if p is q else p.log_prob(x, event_dim) - q.log_prob(x, event_dim)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


@runtime_checkable
class ForwardOnly(Protocol):
    """A method that says whether it does without gradients through the denoisers; the others are taken to need them."""

    @property
    def forward_only(self) -> bool:
        """True: denoisers are run without recording a graph."""


class Method(Protocol):
    """A method applied to a Pyro program: what :class:`smcdiff.SMC` runs."""

    @property
    def model(self) -> Callable[..., Any]:
        """The Pyro program."""

    @property
    def twist(self) -> Twist:
        """Weighs the particles."""

    @property
    def proposal(self) -> Proposal | JointProposal:
        """Moves the particles."""
