r"""Weights that are gathered along the way and given at the end.

A proposal that knows the measurement well needs no twist, and the weights it gathers before the end, log p - log q,
say nothing of the measurement: to resample by them would only lose particles. Here each particle carries what it has
gathered as a potential of its past,

    log psi_s = log psi_t - (log p(x_s given x_t) - log q(x_s given x_t, y)),      log psi_T = 0,

so that every weight before the last is 1 and the last is the whole path's, p(path) p(y given x_0) / q(path).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc.feynman_kac import Move, Particles

__all__ = ["DeferredModel", "WeighsAtTheEnd"]


@runtime_checkable
class WeighsAtTheEnd(Protocol):
    """A method whose particles are weighed after the last step alone."""

    @property
    def weighs_at_the_end(self) -> bool:
        """True for the whole path's weight at the end."""


class DeferredModel:
    """The moves of a twisted model, weighed at the end.

    Args:
        model: whose steps are taken; its twist is not used.
    """

    def __init__(self, model: TwistedModel) -> None:
        self._model = model

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
        """x_T from the chain's first law, with weight 1."""
        move = self._model.initial(num_chains, num_particles, generator)
        none = torch.zeros_like(move.particles["log_psi"])
        return Move({**move.particles, "log_psi": none}, none, move.faults)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """x_s from q; the weight is 1 up to the last step, and there that of the whole path."""
        k = self.num_steps - i
        x, log_ratio = self._model.propose(i, particles, generator)
        moved, faults = self._model.evaluate(k, x, particles)
        if k > 0:
            moved = {**moved, "log_psi": particles["log_psi"] - log_ratio}
        return Move(moved, log_ratio + moved["log_psi"] - particles["log_psi"], faults)
