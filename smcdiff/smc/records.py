r"""What a run keeps of its steps.

After the initial move and after each of the K moves the filter makes one :class:`StepRecord`; at the end they are
stacked into a :class:`History`. In bytes a run keeps, besides what the ``summaries`` return,

    16 b (K + 1) + b K + 4 b n K  [ancestors],

b chains of n particles: 2.6 MB for 4 chains, 64 particles, 1000 steps and their ancestors; 4 GB for a million particles
and 1000 steps, where ``Records(ancestors=False)`` keeps 17 kB.
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
        summaries: what the summaries of :class:`Records` returned.
    """

    ess: Tensor
    log_z: Tensor
    resampled: Tensor
    ancestors: Tensor | None
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
        summaries: each summary of :class:`Records`, (K + 1, *its shape).
    """

    ess: Tensor
    log_z: Tensor
    resampled: Tensor
    ancestors: Tensor | None
    summaries: Mapping[str, Tensor]


@dataclass(frozen=True)
class Records:
    """What to keep of each step. The effective sample size, log_z and who was resampled are always kept.

    Args:
        ancestors: keep the ancestors, which :mod:`smcdiff.smc.genealogy` reads.
        summaries: more to keep, {name: function of the :class:`~smcdiff.smc.state.FilterState`}: each returns a tensor
            of the same shape at every step, and must not synchronise with the host. For example, filtering means:
            ``{"mean": lambda state: (state.w[..., None] * state.particles["x"]).sum(1)}``.
    """

    ancestors: bool = True
    summaries: Mapping[str, Callable[[FilterState], Tensor]] = field(default_factory=dict)

    def step(self, state: FilterState, resampled: Tensor, ancestors: Tensor | None) -> StepRecord:
        """The record of the step that led to ``state``."""
        keep = ancestors is not None and self.ancestors
        return StepRecord(
            ess=state.ess,
            log_z=state.log_z,
            resampled=resampled,
            ancestors=ancestors.to(torch.int32) if keep and ancestors is not None else None,
            summaries={name: summary(state) for name, summary in self.summaries.items()},
        )


def stack(steps: tuple[StepRecord, ...], num_chains: int, num_particles: int) -> History:
    """Stack the records of steps 0 ... K; ``ancestors`` is None unless every move has them."""
    first, moves = steps[0], steps[1:]
    parents = [record.ancestors for record in moves if record.ancestors is not None]
    device = first.ess.device
    ancestors = None
    if not moves:
        ancestors = torch.empty((0, num_chains, num_particles), dtype=torch.int64, device=device)
    elif len(parents) == len(moves):
        ancestors = torch.stack(parents).to(torch.int64)
    resampled = [record.resampled for record in moves]
    return History(
        ess=torch.stack([record.ess for record in steps]),
        log_z=torch.stack([record.log_z for record in steps]),
        resampled=torch.stack(resampled) if moves else first.resampled.new_empty((0, num_chains)),
        ancestors=ancestors,
        summaries={name: torch.stack([record.summaries[name] for record in steps]) for name in first.summaries},
    )
