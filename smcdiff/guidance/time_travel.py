r"""Time travel: a sampler that goes up in noise again and comes down once more.

From level s to a noisier level u by the forward process,

    x_u = (alpha_u / alpha_s) x_s + sqrt(sigma_u^2 - (alpha_u / alpha_s)^2 sigma_s^2) noise,

many levels in one draw. A path then visits levels more than once: it is no draw of the chain, has no density relative
to it and cannot be weighed. It is for one particle, and its run has no evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import ReverseStep
from smcdiff.guidance.base import Method
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles

__all__ = ["TimeTravel", "TravellingModel", "Travels", "with_travel"]


@dataclass(frozen=True)
class TimeTravel:
    """From each of the levels 1, 1 + L, 1 + 2 L, ... up to K - L, jump up by L levels, ``passes`` - 1 times.

    Args:
        length: L, at least 1.
        passes: how often each stretch of L levels is gone through, at least 1.

    Raises:
        ValueError: for numbers below 1.

    References:
        A. Lugmayr, M. Danelljan, A. Romero, F. Yu, R. Timofte, L. Van Gool, "RePaint: Inpainting using Denoising
        Diffusion Probabilistic Models" (2022), arXiv 2201.09865: the jumps of its appendix.
    """

    length: int
    passes: int

    def __post_init__(self) -> None:
        if self.length < 1 or self.passes < 1:
            raise ValueError(
                f"got jumps of {self.length} levels and {self.passes} passes; expected at least 1 of each, where 1 "
                "pass never jumps"
            )

    def moves(self, num_steps: int) -> list[tuple[int, int]]:
        """(k, landing) of each move: a reverse step from level k to k - 1, and from there up to ``landing``."""
        left = {level: self.passes - 1 for level in range(1, num_steps - self.length + 1, self.length)}
        moves, level = [], num_steps
        while level > 0:
            k, level = level, level - 1
            if left.get(level, 0) > 0:
                left[level] -= 1
                level += self.length
            moves.append((k, level))
        return moves


@runtime_checkable
class Travels(Protocol):
    """A method that may travel in time."""

    @property
    def travel(self) -> TimeTravel | None:
        """Its jumps, or None."""


class TravellingModel:
    """The moves of a twisted model with jumps between them, for one particle per chain, without weights.

    Args:
        model: whose steps are taken.
        travel: the jumps.
    """

    def __init__(self, model: TwistedModel, travel: TimeTravel) -> None:
        self._model, self._moves = model, travel.moves(model.num_steps)
        model.has_density = False

    @property
    def num_steps(self) -> int:
        return len(self._moves)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def describe(self, i: int) -> str:
        """Move i in the words of the diffusion chain."""
        k, landing = self._moves[i - 1] if i else (self._model.num_steps + 1, self._model.num_steps)
        jump = f", then up to k = {landing}" if landing >= k else ""
        return self._model.describe(self._model.num_steps + 1 - k) + jump

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        """x_T from the chain's first law."""
        return self._unweighed(self._model.initial(num_chains, num_particles, generator))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """A reverse step, and the jump after it where there is one; one network evaluation."""
        k, landing = self._moves[i - 1]
        x, _ = self._model.propose(self._model.num_steps + 1 - k, particles, generator)
        if landing >= k:
            x = {name: self._noised(name, x_s, k - 1, landing, generator) for name, x_s in x.items()}
        moved, faults = self._model.evaluate(landing, x)
        return self._unweighed(Move(moved, moved["log_psi"], faults))

    def _noised(self, name: str, x_s: Tensor, s: int, u: int, generator: torch.Generator) -> Tensor:
        program = self._model.program
        if name in program.held:
            return x_s
        levels = program.latents[name].chain.levels
        up = ReverseStep(levels[u], levels[s], eta=1.0)  # beta is the variance of x_u given x_s
        noise = torch.randn(x_s.shape, generator=generator, dtype=x_s.dtype, device=x_s.device)
        return up.t.alpha / up.s.alpha * x_s + math.sqrt(up.beta) * noise

    def _unweighed(self, move: Move) -> Move:
        return Move(move.particles, torch.zeros_like(move.log_g), move.faults)


def with_travel(model: TwistedModel, method: Method, num_particles: int) -> FeynmanKac:
    """The model that a run of the method takes: with its jumps, where it has any.

    Raises:
        ValueError: for jumps with more than one particle.
    """
    travel = method.travel if isinstance(method, Travels) else None
    if travel is None:
        return model
    if num_particles > 1:
        raise ValueError(
            f"got {num_particles} particles and {type(method).__name__} with jumps back in time; such a path has no "
            "density, so it cannot be weighed. Take num_particles=1, with as many chains as draws are wanted, or no "
            "jumps"
        )
    return TravellingModel(model, travel)
