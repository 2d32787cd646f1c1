r"""From one state of a particle filter to the next: the arithmetic in :mod:`smcdiff.smc.particle_filter`'s docstring.

How ancestors are drawn is a function of the state, so that a filter, a conditional filter and whatever else resamples
share these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smcdiff.smc import faults
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.records import Records, StepRecord
from smcdiff.smc.state import FilterState
from smcdiff.smc.weights import weigh

__all__ = ["Resampled", "Steps", "gather"]


def gather(particles: Particles, ancestors: Tensor) -> Particles:
    """All that the particles carry, entries (b, n, *event), taken from ``ancestors`` (b, m): entries (b, m, *event)."""
    b, m = ancestors.shape
    taken: Particles = {}
    for name, value in particles.items():
        index = ancestors + value.shape[1] * torch.arange(b, device=ancestors.device)[:, None]
        taken[name] = value.flatten(0, 1).index_select(0, index.flatten()).reshape(b, m, *value.shape[2:])
    return taken


@dataclass(frozen=True)
class Resampled:
    """Particles before a move, with what they bring along.

    Args:
        particles: entries (b, n, *event), gathered.
        log_w: log-weights that stay, (b, n), zero in chains that were resampled.
        log_z_settled: evidence up to the last resampling, (b,).
        chains: which chains were resampled, (b,) of bool.
        ancestors: (b, n), or None before the initial move.
    """

    particles: Particles
    log_w: Tensor
    log_z_settled: Tensor
    chains: Tensor
    ancestors: Tensor | None


@dataclass(frozen=True)
class Steps:
    """The steps of one run.

    Args:
        feynman_kac: the model.
        draw: ancestors (b, n) of all chains, whether or not they are resampled.
        ess_threshold: a chain is resampled where its effective sample size is below this share of n; always if 1,
            never if 0.
        records: what to keep of each step.
    """

    feynman_kac: FeynmanKac
    draw: Callable[[FilterState, torch.Generator], Tensor]
    ess_threshold: float
    records: Records

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
        zero = torch.zeros((num_chains, num_particles), dtype=torch.float64, device=self.feynman_kac.device)
        before = Resampled({}, zero, zero[:, 0], torch.zeros_like(zero[:, 0], dtype=torch.bool), None)
        move = self.feynman_kac.initial(num_chains, num_particles, generator)
        return self._weighed(0, before, move, {}, (), generator)

    @torch.no_grad()
    def next(self, state: FilterState, generator: torch.Generator) -> FilterState:
        """The state after one more step."""
        before = self._resampled(state, generator)
        move = self.feynman_kac.step(state.step + 1, before.particles, generator)
        return self._weighed(state.step + 1, before, move, state.faults, state.history, generator)

    def _resampled(self, state: FilterState, generator: torch.Generator) -> Resampled:
        threshold = self.ess_threshold
        identity = torch.arange(state.num_particles, device=state.w.device).expand(state.w.shape)
        if threshold == 0:
            none = torch.zeros_like(state.ess, dtype=torch.bool)
            return Resampled(state.particles, state.log_w, state.log_z_settled, none, identity)
        chains = (
            state.ess < threshold * state.num_particles
            if threshold < 1
            else torch.ones_like(state.ess, dtype=torch.bool)
        )
        ancestors = torch.where(chains[:, None], self.draw(state, generator), identity)
        return Resampled(
            particles=gather(state.particles, ancestors),
            log_w=state.log_w.masked_fill(chains[:, None], 0.0),
            log_z_settled=torch.where(chains, state.log_z, state.log_z_settled),
            chains=chains,
            ancestors=ancestors,
        )

    def _weighed(
        self,
        step: int,
        before: Resampled,
        move: Move,
        known: Mapping[str, Tensor],
        history: tuple[StepRecord, ...],
        generator: torch.Generator,
    ) -> FilterState:
        """The state after a move: log_w += log_g, and faults put down."""
        _check_move(step, move, before.log_w)
        log_g = move.log_g.to(torch.float64)
        zero = before.log_w == -torch.inf
        bad = ~zero & ~(log_g < torch.inf)
        log_w = torch.where(zero | bad, -torch.inf, before.log_w + log_g)
        weighed = weigh(log_w)
        flags = {faults.NOT_A_NUMBER: bad.any(-1), faults.ALL_ZERO: weighed.log_mean == -torch.inf}
        state = FilterState(
            step=step,
            num_steps=self.feynman_kac.num_steps,
            particles=move.particles,
            log_w=log_w,
            w=weighed.w,
            ess=weighed.ess,
            log_z=before.log_z_settled + weighed.log_mean,
            log_z_settled=before.log_z_settled,
            faults=faults.merge(known, step, {**move.faults, **flags}),
            history=history,
            generator_state=generator.get_state(),
        )
        return replace(state, history=(*history, self.records.step(state, before.chains, before.ancestors)))


def _check_move(step: int, move: Move, log_w: Tensor) -> None:
    shape = log_w.shape
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
