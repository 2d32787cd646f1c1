r"""Potentials that depend on a particle's past: difference, maximum and sum of its intermediate rewards.

With r_t the log of what a clean estimate at level t would be worth, steering weighs a path by potentials G_T ... G_1,
scored at some of the levels, and at the end by what is left of exp(r_0),

    difference    G_t = exp(r_t - r_t'),    t' the level scored before
    max           G_t = exp(max over scored u >= t of r_u)
    sum           G_t = exp(sum over scored u >= t of r_u)
    at last       G_0 = exp(r_0) / (G_1 ... G_T)

so that the product is exp(r_0) whichever is taken, and the target p(x_0) exp(r_0). Max and sum are no function of x_t:
each particle carries log(G_t ... G_T) as its log psi_t, and what it needs of its past beside it, through every
resampling.

References:
    R. Singhal, Z. Horvitz, R. Teehan, M. Ren, Z. Yu, K. McKeown, R. Ranganath, "A General Framework for Inference-time
    Scaling and Steering of Diffusion Models" (2025), arXiv 2501.06848: the potentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from smcdiff.guidance.base import Method
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles

__all__ = ["Difference", "Max", "Potential", "SteeredModel", "Steers", "Sum", "is_scored", "with_potential"]


class Potential(Protocol):
    """What particles make of the reward they have just earned."""

    def follow(self, reward: Tensor, before: Particles | None) -> Particles:
        """``log_psi``, the log of the product of all potentials so far, and what else is carried on; each (b, n).

        Args:
            reward: r_t of each particle, (b, n).
            before: what the particles carried at the level scored before, or None at the first.
        """


@dataclass(frozen=True)
class Difference:
    """G_t = exp(r_t - r_t'): the product so far is exp(r_t), an ordinary twist."""

    def follow(self, reward: Tensor, before: Particles | None) -> Particles:
        return {"log_psi": reward}


@dataclass(frozen=True)
class Max:
    """G_t = exp(max r_u): favours particles that once did well."""

    def follow(self, reward: Tensor, before: Particles | None) -> Particles:
        if before is None:
            return {"log_psi": reward, _PAST: reward}
        best = torch.maximum(reward, before[_PAST])
        return {"log_psi": before["log_psi"] + best, _PAST: best}


@dataclass(frozen=True)
class Sum:
    """G_t = exp(sum r_u): favours particles that did well all along."""

    def follow(self, reward: Tensor, before: Particles | None) -> Particles:
        if before is None:
            return {"log_psi": reward, _PAST: reward}
        total = reward + before[_PAST]
        return {"log_psi": before["log_psi"] + total, _PAST: total}


def is_scored(k: int, num_steps: int, every: int) -> bool:
    """Whether a reward is asked at level k: at K, K - every, K - 2 every, ..."""
    return (num_steps - k) % every == 0


@runtime_checkable
class Steers(Protocol):
    """A method with potentials."""

    @property
    def potential(self) -> Potential:
        """What is made of the rewards, the method's log psi_t."""

    @property
    def every(self) -> int:
        """At every how many levels they are earned."""


class SteeredModel:
    """The moves of a twisted model with potentials of its particles' past for its twist.

    Args:
        model: whose steps are taken; its log psi_t is the reward r_t.
        potential: what is made of it.
        every: at every how many levels.
    """

    def __init__(self, model: TwistedModel, potential: Potential, every: int) -> None:
        self._model, self._potential, self._every = model, potential, every

    @property
    def num_steps(self) -> int:
        return self._model.num_steps

    @property
    def device(self) -> torch.device:
        return self._model.device

    def describe(self, i: int) -> str:
        """Filter step i in the words of the diffusion chain."""
        return self._model.describe(i)

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        """x_T from the chain's first law, and log G_T."""
        move = self._model.initial(num_chains, num_particles, generator)
        particles = {**move.particles, **self._potential.follow(move.particles["log_psi"], None)}
        return Move(particles, particles["log_psi"], move.faults)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """x_s from q, and the incremental weight log p - log q + log G_s."""
        k = self.num_steps - i
        x, log_ratio = self._model.propose(i, particles, generator)
        moved, faults = self._model.evaluate(k, x, particles)
        if k > 0 and is_scored(k, self.num_steps, self._every):
            moved |= self._potential.follow(moved["log_psi"], particles)
        elif k > 0:
            moved |= {part: particles[part] for part in ("log_psi", _PAST) if part in particles}
        return Move(moved, log_ratio + moved["log_psi"] - particles["log_psi"], faults)


#: What a particle carries of its earlier rewards.
_PAST = "past rewards"


def with_potential(model: TwistedModel, method: Method) -> FeynmanKac:
    """The model that a run of the method takes: with its potentials, where it has any."""
    return SteeredModel(model, method.potential, method.every) if isinstance(method, Steers) else model
