r"""What a run keeps of its steps.

After the initial move and after each of the K moves the filter makes one :class:`StepRecord`; at the end they are
stacked into a :class:`History`. In bytes a history takes, besides what the ``summaries`` return,

    16 b (K + 1) + b K + 8 b n K [ancestors] + 8 b n (K + 1) [log_weights],

b chains of n particles; while the run goes on ancestors take half of it, and three halves for the moment of the
stacking. With the default, which keeps ancestors: 2.1 MB for 4 chains, 64 particles and 1000 steps; 8 GB for a million
particles and 1000 steps, where ``Records(ancestors=False)`` keeps 17 kB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smcdiff.smc.state import FilterState

__all__ = ["History", "Records", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """What is kept of one step.

    Args:
        ess: effective sample size after the step, (b,), float64.
        log_z: log normalising constant up to and with the step, (b,), float64, in nats.
        resampled: which chains were resampled before the move, (b,) of bool; all False for the initial move.
        ancestors: index of each particle's parent, (b, n) of int32; None for the initial move or where not kept.
        log_w: log-weights after the step, (b, n), float64; None where not kept.
        summaries: what the summaries of :class:`Records` returned.
    """

    ess: Tensor
    log_z: Tensor
    resampled: Tensor
    ancestors: Tensor | None
    log_w: Tensor | None
    summaries: Mapping[str, Tensor]


@dataclass(frozen=True)
class History:
    """The steps of a run, stacked.

    Args:
        ess: effective sample size after move i = 0 ... K, (K + 1, b), float64.
        log_z: log normalising constant up to and with move i, (K + 1, b), float64, in nats.
        resampled: which chains were resampled between move i - 1 and move i, i = 1 ... K, (K, b) of bool.
        ancestors: entry [i - 1] is the index, among the particles after move i - 1, of each particle's parent at
            move i, (K, b, n) of int64; None where not kept.
        log_w: log-weights since the last resampling, after move i, (K + 1, b, n), float64; None where not kept.
        summaries: each summary of :class:`Records`, (K + 1, *its shape).
    """

    ess: Tensor
    log_z: Tensor
    resampled: Tensor
    ancestors: Tensor | None
    log_w: Tensor | None
    summaries: Mapping[str, Tensor]


@dataclass(frozen=True)
class Records:
    """What to keep of each step. The effective sample size, log_z and who was resampled are always kept.

    Args:
        ancestors: keep the ancestors, which :mod:`smcdiff.smc.genealogy` reads.
        log_weights: keep the log-weights, for the fixed-lag variance of :mod:`smcdiff.smc.evidence`.
        summaries: more to keep, {name: function of the :class:`~smcdiff.smc.state.FilterState`}: each returns a tensor
            of the same shape at every step, and must not synchronise with the host. For example, filtering means:
            ``{"mean": lambda state: (state.w[..., None] * state.particles["x"]).sum(1)}``.
    """

    ancestors: bool = True
    log_weights: bool = False
    summaries: Mapping[str, Callable[[FilterState], Tensor]] = field(default_factory=dict)

    def step(self, state: FilterState, resampled: Tensor, ancestors: Tensor | None) -> StepRecord:
        """The record of the step that led to ``state``."""
        return StepRecord(
            ess=state.ess,
            log_z=state.log_z,
            resampled=resampled,
            ancestors=ancestors.to(torch.int32) if self.ancestors and ancestors is not None else None,
            log_w=state.log_w if self.log_weights else None,
            summaries={name: summary(state) for name, summary in self.summaries.items()},
        )


def stack(steps: tuple[StepRecord, ...], num_chains: int, num_particles: int) -> History:
    """Stack the records of steps 0 ... K; what a step does not have is None."""
    first, moves = steps[0], steps[1:]
    nothing = (0, num_chains, num_particles)
    ancestors = _stacked([record.ancestors for record in moves], first.ess.new_empty(nothing, dtype=torch.int32))
    resampled = _stacked([record.resampled for record in moves], first.resampled.new_empty(nothing[:2]))
    assert resampled is not None
    return History(
        ess=torch.stack([record.ess for record in steps]),
        log_z=torch.stack([record.log_z for record in steps]),
        resampled=resampled,
        ancestors=None if ancestors is None else ancestors.to(torch.int64),
        log_w=_stacked([record.log_w for record in steps], first.ess),
        summaries={name: torch.stack([record.summaries[name] for record in steps]) for name in first.summaries},
    )


def unstack(history: History, steps: int) -> tuple[StepRecord, ...]:
    """The records of which ``history`` is the stack, ``steps`` of them."""
    return tuple(
        StepRecord(
            ess=history.ess[i],
            log_z=history.log_z[i],
            resampled=history.resampled[i - 1] if i else torch.zeros_like(history.ess[0], dtype=torch.bool),
            ancestors=history.ancestors[i - 1].to(torch.int32) if i and history.ancestors is not None else None,
            log_w=None if history.log_w is None else history.log_w[i],
            summaries={name: values[i] for name, values in history.summaries.items()},
        )
        for i in range(steps)
    )


def _stacked(values: list[Tensor | None], empty: Tensor) -> Tensor | None:
    """The stack of all values, ``empty`` if there are none, None if a step has none."""
    there = [value for value in values if value is not None]
    if not values:
        return empty
    return torch.stack(there) if len(there) == len(values) else None
