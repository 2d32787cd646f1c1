r"""A conditional network as the proposal of an unconditional prior.

Networks such as SR3 and Palette are given the measurement and estimate E[x_0 given x_t, y]. Alone they draw from what
they learned of p(x_0 given y), right or wrong. Here they propose,

    q(x_s given x_t, y) = the chain's own transition with x0_hat(x_t, y) in place of x0_hat(x_t),

and the unconditional prior with the program's likelihood weighs: the target stays p(x_0) p(y given x_0) for whatever
the conditional network says of measurements it was never shown. With one particle it is the published sampler.

It takes two network evaluations per particle and step, one of each network.

References:
    C. Saharia, J. Ho, W. Chan, T. Salimans, D. Fleet, M. Norouzi, "Image Super-Resolution via Iterative Refinement"
    (2021), arXiv 2104.07636: SR3.
    C. Saharia, W. Chan, H. Chang, C. Lee, J. Ho, T. Salimans, D. Fleet, M. Norouzi, "Palette: Image-to-Image Diffusion
    Models" (2021), arXiv 2111.05826.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.kernels import Gaussian
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.base import Prediction, Proposal, SiteStep, Twist
from smcdiff.guidance.program import Program
from smcdiff.guidance.twists import PointTwist, WidenedTwist

__all__ = ["Conditional", "ConditionalDenoiser", "ConditionalProposal"]


class ConditionalDenoiser(Protocol):
    """What is known of clean events given noisy ones and the measurement."""

    def __call__(self, x_t: Tensor, y: Tensor, level: NoiseLevel) -> Estimate:
        """x_t: (m, *shape) of one draw of the prior each; y: the measurement, the same for all of them."""


@dataclass(frozen=True)
class ConditionalProposal:
    """q = p(x_s given x_t) with x0_hat(x_t, y) in place of x0_hat(x_t).

    The chain clips the conditional estimate as it clips its own. Where the step's variance is "optimal" or "learned"
    and the conditional denoiser knows none, q has the variance of p.

    Args:
        denoiser: of the conditional model.
        latent: the site it estimates; None for the program's one diffusion prior. Other latents follow their chains.
        measured: the observed site it is given; None for the program's only one.
    """

    denoiser: ConditionalDenoiser
    latent: str | None = None
    measured: str | None = None

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        self._sites(prediction.program)  # refused before the run if there are none

    def inform(self, prediction: Prediction) -> dict[str, Estimate]:
        program = prediction.program
        name, measured = self._sites(program)
        chain, x_t = program.latents[name].chain, prediction.x[name]
        said = self.denoiser(x_t, program.observed[measured], chain.levels[prediction.k])
        if said.mean.shape != x_t.shape:
            raise ValueError(
                f"got an estimate of shape {tuple(said.mean.shape)} from the conditional denoiser; expected that of "
                f"x_t, {tuple(x_t.shape)}"
            )
        mean = said.mean if chain.clip is None else said.mean.clamp(*chain.clip)
        return {name: Estimate(mean, said.variance, said.fraction)}

    def q(self, step: SiteStep) -> Gaussian:
        if step.own is None:
            return step.p
        without, given = step.estimate, step.own
        estimate = Estimate(
            given.mean,
            without.variance if given.variance is None else given.variance,
            without.fraction if given.fraction is None else given.fraction,
            without.parts,
        )
        law: Any = step.program.latents[step.name].chain.transition(step.k, step.x, estimate)
        return law

    def _sites(self, program: Program) -> tuple[str, str]:
        priors = [name for name, latent in program.latents.items() if latent.is_diffusion]
        latent = priors[0] if self.latent is None and len(priors) == 1 else self.latent
        if latent not in priors:
            raise ValueError(
                f"got a conditional denoiser of the latent {self.latent!r} and the diffusion priors {priors}; name one "
                "of them"
            )
        observed = list(program.observed)
        measured = observed[0] if self.measured is None and len(observed) == 1 else self.measured
        if measured not in observed:
            raise ValueError(
                f"got a conditional denoiser given the measurement {self.measured!r} and the observed sites "
                f"{observed}; name one of them"
            )
        return latent, measured


@dataclass(frozen=True)
class Conditional:
    """A conditional network as the proposal, the unconditional chain as the prior.

    Args:
        model: the Pyro program.
        denoiser: of the conditional model, called as ``denoiser(x_t, y, level)``.
        twist: log psi_t; the point twist by default.
        latent, measured: see :class:`ConditionalProposal`.
    """

    model: Callable[..., Any]
    denoiser: ConditionalDenoiser
    twist: Twist = field(default_factory=PointTwist)
    latent: str | None = None
    measured: str | None = None

    @property
    def proposal(self) -> Proposal:
        return ConditionalProposal(self.denoiser, self.latent, self.measured)

    @property
    def forward_only(self) -> bool:
        """Whether the twist needs no graph: known of these two."""
        return isinstance(self.twist, PointTwist | WidenedTwist)
