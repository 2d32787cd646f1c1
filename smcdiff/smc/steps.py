r"""From one state of a particle filter to the next: the arithmetic in :mod:`smcdiff.smc.particle_filter`'s docstring.

How ancestors are drawn is a function of the state, so that a filter, a conditional filter and whatever else resamples
share these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from smcdiff.smc import faults
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.records import Records, StepRecord
from smcdiff.smc.state import FilterState
from smcdiff.smc.weights import weigh

__all__ = ["Advance", "Advanced", "Resampled", "Steps", "gather"]


def gather(particles: Particles, ancestors: Tensor) -> Particles:
    """All that the particles carry, entries (b, n, *event), taken from ``ancestors`` (b, m): entries (b, m, *event)."""
    b, m = ancestors.shape
    rows: dict[int, Tensor] = {}  # of the flattened particles, by n
    taken: Particles = {}
    for name, value in particles.items():
        n = value.shape[1]
        if n not in rows:
            first = n * torch.arange(b, device=ancestors.device)[:, None]
            rows[n] = (ancestors if b == 1 else ancestors + first).flatten()
        taken[name] = value.flatten(0, 1).index_select(0, rows[n]).reshape(b, m, *value.shape[2:])
    return taken


@dataclass(frozen=True)
class Resampled:
    """Particles before a move, with what they bring along.

    Args:
        particles: entries (b, n, *event), gathered.
        log_w: log-weights that stay, (b, n), zero in chains that were resampled; None where all were.
        log_z_settled: evidence up to the last resampling, (b,).
        chains: which chains were resampled, (b,) of bool.
        ancestors: (b, n), or None before the initial move.
    """

    particles: Particles
    log_w: Tensor | None
    log_z_settled: Tensor
    chains: Tensor
    ancestors: Tensor | None


@dataclass(frozen=True)
class Advanced:
    """Particles after a move: all that a step computes on the device. The names are those of the state.

    Args:
        chains: which chains were resampled before the move, (b,) of bool.
        ancestors: (b, n); None for the initial move.
    """

    particles: Particles
    log_w: Tensor
    w: Tensor
    ess: Tensor
    log_z: Tensor
    log_z_settled: Tensor
    faults: Mapping[str, Tensor]
    chains: Tensor
    ancestors: Tensor | None


class Advance(Protocol):
    """Carries out :meth:`Steps.advance` in a way of its own, with the same numbers."""

    def __call__(self, steps: Steps, state: FilterState, generator: torch.Generator) -> Advanced:
        """What ``steps.advance(state, state.step + 1, generator)`` returns."""


@dataclass(frozen=True)
class Steps:
    """The steps of one run.

    Args:
        feynman_kac: the model.
        draw: ancestors (b, n) of all chains, whether or not they are resampled.
        ess_threshold: a chain is resampled where its effective sample size is below this share of n; always if 1,
            never if 0.
        records: what to keep of each step.
        advance_by: how the device's part of a step is carried out; None calls :meth:`advance`.
    """

    feynman_kac: FeynmanKac
    draw: Callable[[FilterState, torch.Generator], Tensor]
    ess_threshold: float
    records: Records
    advance_by: Advance | None = None

    def iterate(
        self, num_chains: int, num_particles: int, generator: torch.Generator, state: FilterState | None = None
    ) -> Iterator[FilterState]:
        """Yield the state after each step that follows ``state``, or from the initial move on if that is None."""
        if state is None:
            state = self.first(num_chains, num_particles, generator)
            yield state
        else:
            generator.set_state(state.generator_state)
        while state.step < state.num_steps:
            state = self.next(state, generator)
            yield state

    @torch.no_grad()
    def first(self, num_chains: int, num_particles: int, generator: torch.Generator) -> FilterState:
        """The state after the initial move."""
        zero = torch.zeros(num_chains, dtype=torch.float64, device=self.feynman_kac.device)
        before = Resampled({}, None, zero, torch.zeros_like(zero, dtype=torch.bool), None)
        move = self.feynman_kac.initial(num_chains, num_particles, generator)
        _check_move(0, move, (num_chains, num_particles))
        return self._recorded(0, _weighed(0, before, move, {}), (), generator)

    @torch.no_grad()
    def next(self, state: FilterState, generator: torch.Generator) -> FilterState:
        """The state after one more step."""
        i = state.step + 1
        if self.advance_by is None:
            after = self.advance(state, i, generator)
        else:
            after = self.advance_by(self, state, generator)
        return self._recorded(i, after, state.history, generator)

    def advance(self, state: FilterState, at: int | Tensor, generator: torch.Generator) -> Advanced:
        """Resample, move and weigh: nothing but work of the device, so that it can be captured as a CUDA graph.

        Args:
            at: the step's index, with which faults are put down; the model gets ``state.step + 1``.
        """
        before = self._resampled(state, generator)
        move = self.feynman_kac.step(state.step + 1, before.particles, generator)
        _check_move(state.step + 1, move, (state.num_chains, state.num_particles))
        return _weighed(at, before, move, state.faults)

    def _resampled(self, state: FilterState, generator: torch.Generator) -> Resampled:
        threshold = self.ess_threshold
        if threshold == 1:
            ancestors = self.draw(state, generator)
            everywhere = torch.ones_like(state.ess, dtype=torch.bool)
            return Resampled(gather(state.particles, ancestors), None, state.log_z, everywhere, ancestors)
        identity = torch.arange(state.num_particles, device=state.w.device).expand(state.w.shape)
        if threshold == 0:
            nowhere = torch.zeros_like(state.ess, dtype=torch.bool)
            return Resampled(state.particles, state.log_w, state.log_z_settled, nowhere, identity)
        chains = state.ess < threshold * state.num_particles
        ancestors = torch.where(chains[:, None], self.draw(state, generator), identity)
        return Resampled(
            particles=gather(state.particles, ancestors),
            log_w=state.log_w.masked_fill(chains[:, None], 0.0),
            log_z_settled=torch.where(chains, state.log_z, state.log_z_settled),
            chains=chains,
            ancestors=ancestors,
        )

    def _recorded(
        self, step: int, after: Advanced, history: tuple[StepRecord, ...], generator: torch.Generator
    ) -> FilterState:
        """The state after a step, and its record in the history."""
        state = FilterState(
            step=step,
            num_steps=self.feynman_kac.num_steps,
            particles=after.particles,
            log_w=after.log_w,
            w=after.w,
            ess=after.ess,
            log_z=after.log_z,
            log_z_settled=after.log_z_settled,
            faults=after.faults,
            history=history,
            generator_state=generator.get_state(),
        )
        return replace(state, history=(*history, self.records.step(state, after.chains, after.ancestors)))


def _weighed(at: int | Tensor, before: Resampled, move: Move, known: Mapping[str, Tensor]) -> Advanced:
    """After a move: log_w += log_g, and faults put down.

    A log_g that is NaN or +inf, unless of a particle without weight, makes the largest log-weight of its row the same.
    """
    log_w = move.log_g.to(torch.float64)
    if before.log_w is not None:
        log_w = torch.add(before.log_w, log_w).masked_fill_(before.log_w == -torch.inf, -torch.inf)
    weighed = weigh(log_w)
    flags = {faults.NOT_A_NUMBER: ~(weighed.largest < torch.inf), faults.ALL_ZERO: weighed.largest == -torch.inf}
    return Advanced(
        particles=move.particles,
        log_w=log_w,
        w=weighed.w,
        ess=weighed.ess,
        log_z=before.log_z_settled + weighed.log_mean,
        log_z_settled=before.log_z_settled,
        faults=faults.merge(known, at, {**move.faults, **flags}),
        chains=before.chains,
        ancestors=before.ancestors,
    )


def _check_move(step: int, move: Move, shape: tuple[int, int]) -> None:
    for name, value, expected in (
        ("log_g", move.log_g.shape, shape),
        *((f"the particles' {name!r}", value.shape[:2], shape) for name, value in move.particles.items()),
        *((f"the fault {name!r}", value.shape, shape[:1]) for name, value in move.faults.items()),
    ):
        if value != expected:
            raise ValueError(
                f"got {name} of shape {tuple(value)} from step {step} of the Feynman-Kac model; expected "
                f"{tuple(expected)}, (chains, particles) first"
            )
