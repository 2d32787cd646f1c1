r"""Rewards: Feynman-Kac steering, and any function of the clean estimate as a twist.

Steering draws from the program tilted by a reward,

    p(x_0) p(y given x_0) exp(scale r(x_0)),

by the bootstrap filter with potentials of r(x0_hat(x_t)) on the way (:mod:`smcdiff.guidance.potentials`). It needs no
gradient: the reward may be any code on a batch of pictures, such as a simulator or a program in another library. The
log-evidence is log of the mean of p(y given x_0) exp(scale r(x_0)) over the prior.

References:
    R. Singhal, Z. Horvitz, R. Teehan, M. Ren, Z. Yu, K. McKeown, R. Ranganath, "A General Framework for Inference-time
    Scaling and Steering of Diffusion Models" (2025), arXiv 2501.06848.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.guidance.base import Prediction, Proposal, Twist
from smcdiff.guidance.bootstrap import PriorProposal
from smcdiff.guidance.potentials import Difference, Potential, is_scored
from smcdiff.guidance.program import Program

__all__ = ["FeynmanKacSteering", "Reward", "RewardTwist", "black_box"]

#: r of a batch of clean events: (m, *event) -> (m,).
Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RewardTwist:
    """psi_t(x_t) = exp(scale r(x0_hat(x_t))): steers towards a reward whatever the program's own likelihood is.

    The target stays the program's. The more alike scale r and the log-likelihood are, the more even are the weights;
    to have the reward in the target, put it into the program with ``pyro.factor`` or take
    :class:`FeynmanKacSteering`.

    Args:
        reward: r, a function of a batch of clean events (m, *event) with values (m,); differentiable for ``sd.TDS``.
        scale: any finite number.
        site: of the latent that it is a function of; None for the program's one diffusion prior.

    Raises:
        ValueError: for a scale that is not finite; in a run for a reward of another shape or a site that is none.
    """

    reward: Reward
    scale: float = 1.0
    site: str | None = None

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def log_psi(self, prediction: Prediction) -> Tensor:
        x0_hat = prediction.x0_hat[_site(self.site, prediction.program)]
        return self.scale * _checked(self.reward(x0_hat), len(x0_hat)).double()


@dataclass(frozen=True)
class FeynmanKacSteering:
    """Steering by a reward: q = p, and potentials of scale r(x0_hat(x_t)) + log p(y given x_0 = x0_hat(x_t)).

    Args:
        model: the Pyro program; it may observe nothing else. It runs with ``pyro.factor("reward", ...)`` added.
        reward: r, any function of a batch of clean events (m, *event) with values (m,); it needs no gradient. None if
            the program has its own factor.
        scale: lambda, any finite number.
        site: of the latent that r is a function of; None for the program's one diffusion prior.
        potential: what is made of the rewards on the way. ``Max()`` and ``Sum()`` add up over the scored levels and
            are published with a few of these.
        every: at every how many levels the reward is asked, from the noisiest on, besides the end.

    Raises:
        ValueError: for a scale that is not finite or ``every`` below 1; in a run for a reward of another shape or a
            site that is none.
    """

    model: Callable[..., Any]
    reward: Reward | None = None
    scale: float = 1.0
    site: str | None = None
    potential: Potential = field(default_factory=Difference)
    every: int = 1

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.every < 1:
            raise ValueError(f"got every = {self.every}; expected at least 1, where 1 asks at every level")
        plain = self.model.model if isinstance(self.model, _Rewarded) else self.model
        if self.reward is not None:
            rewarded = _Rewarded(plain, black_box(self.reward), self.scale, self.site)
            object.__setattr__(self, "model", rewarded)

    @property
    def twist(self) -> Twist:
        return _EstimateTwist(self.every)

    @property
    def proposal(self) -> Proposal:
        return PriorProposal()

    @property
    def forward_only(self) -> bool:
        return True


@dataclass(frozen=True)
class _EstimateTwist:
    """All that is observed, rewards among it, at x0_hat; 0 where nothing is scored."""

    every: int

    def log_psi(self, prediction: Prediction) -> Tensor:
        program = prediction.program
        if is_scored(prediction.k, program.num_steps, self.every):
            return program.log_prob(prediction.x0_hat)
        first = next(iter(prediction.x.values()))
        return first.new_zeros(len(first)).double()


@dataclass(frozen=True)
class _Rewarded:
    """A program and ``pyro.factor("reward", scale r(x))`` on one of its sites."""

    model: Callable[..., Any]
    reward: Reward
    scale: float
    site: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Watch() as sites:
            result = self.model(*args, **kwargs)
        value = sites.values[_pick(self.site, list(sites.values), sites.priors)]
        pyro.factor("reward", self.scale * _checked(self.reward(value[None]), 1)[0])
        return result


class _Watch(Messenger):
    """Sees the values of all sites, and which of them are diffusion priors by what the program itself says."""

    def __init__(self) -> None:
        super().__init__()
        self.priors: list[str] = []
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], DiffusionPrior):
            self.priors.append(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        self.values[msg["name"]] = msg["value"]


def black_box(function: Reward) -> Reward:
    """A function of a batch of events, of any code whatever, for use in a Pyro program that is run on all particles.

    ``pyro.factor("reward", black_box(r)(x[None])[0])`` calls r once with all particles' events, however many axes the
    program has, and lets no gradient through.
    """

    class _Call(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.as_tensor(function(x.detach()), device=x.device).to(x.dtype)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.mark_non_differentiable(output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> None:
            return None

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
            (dim,) = in_dims
            if dim is None:
                return _Call.apply(x), None
            particles = x.movedim(dim, 0)
            values = _Call.apply(particles.flatten(0, 1))
            return values.unflatten(0, particles.shape[:2]), 0

    return _Call.apply


def _check_scale(scale: float) -> None:
    if not abs(scale) < float("inf"):
        raise ValueError(f"got scale {scale}; expected a finite number")


def _checked(reward: Tensor, count: int) -> Tensor:
    if tuple(reward.shape) != (count,):
        raise ValueError(
            f"got a reward of shape {tuple(reward.shape)} for {count} events; expected ({count},), one number for each"
        )
    return reward


def _site(site: str | None, program: Program) -> str:
    priors = [name for name, latent in program.latents.items() if latent.is_diffusion]
    return _pick(site, list(program.latents), priors)


def _pick(site: str | None, latents: list[str], priors: list[str]) -> str:
    """The latent that a reward is a function of."""
    if site is None and len(priors) == 1:
        return priors[0]
    if site is None:
        raise ValueError(f"got a reward without a site and a program with the diffusion priors {priors}; give one")
    if site not in latents:
        raise ValueError(f"got a reward of the site {site!r}; expected one of the latents {latents}")
    return site
