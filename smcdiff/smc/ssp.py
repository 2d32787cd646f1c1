r"""SSP resampling: the Srinivasan sampling process rounds n w_i up or down, with negatively associated counts.

With n w_i = k_i + f_i the counts are N_i = k_i + B_i, B_i of 0 or 1 with mean f_i and a fixed sum. Two fractions p, q
that are not settled meet and one of them is settled,

    p + q < 1:  one becomes 0 and the other p + q; the first keeps it with probability p / (p + q);
    p + q >= 1: one becomes 1 and the other p + q - 1; the first becomes 1 with probability (1 - q) / (2 - p - q),

which leaves both means as they were. Here they meet as in a tournament, so that log2(n) rounds settle all n. The
fractions are integers over a common denominator; the last one comes out as exactly 0.

Given that fraction 0 ends at B_0 = 1 or 0, its own meetings follow the process conditioned on its end, which is the
process weighted by (its fraction after) / (before), or one minus each of them; the other meetings stay as they were.

References:
    A. Srinivasan, "Distributions on level-sets with applications to approximation algorithms", FOCS (2001).
    M. Gerber, N. Chopin, N. Whiteley, "Negative association, ordering and convergence of resampling methods", Annals of
    Statistics 47 (2019), arXiv:1707.01845.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.smc.integer_weights import ancestors_from_counts, cells, cumulative

__all__ = ["SSP"]


@dataclass(frozen=True)
class SSP:
    """SSP resampling: N_i is n w_i rounded up or down, with the right mean and negatively associated.

    Ancestors come in increasing order. Unlike systematic resampling it is known to be consistent for any order of the
    particles.
    """

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`~smcdiff.smc.resampling.Resampler` says."""
        c = cumulative(weights)
        k, f = cells(c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1])), c[:, -1:], c.shape[-1])
        counts = k + _tournament(f, c[:, -1:], None, None, generator)
        return ancestors_from_counts(counts.cumsum(-1), c[:, -1:] > 0)

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors with a_0 = 0: B_0 is 1 with probability (k_0 + 1) f_0 / (k_0 + f_0), the rest given that."""
        c = cumulative(weights)
        total = c[:, -1:]
        k, f = cells(c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1])), total, c.shape[-1])
        k0, f0 = k[:, :1], f[:, :1]
        up = _coins((k0 + 1) * (f0 / (k0 * total.to(torch.float64) + f0)), generator)
        order = torch.rand(c.shape, dtype=torch.float64, device=c.device, generator=generator).argsort(-1)
        raised = _tournament(f.gather(-1, order), total, order == 0, up, generator)
        counts = k.scatter_add(-1, order, raised)
        return ancestors_from_counts(counts.cumsum(-1), c[:, :1] > 0)


def _tournament(f: Tensor, one: Tensor, marked: Tensor | None, up: Tensor | None, generator: torch.Generator) -> Tensor:
    """B (b, n) for fractions f / one, given that the marked one of each row (b, n) ends as ``up`` (b, 1) says."""
    b, n = f.shape
    one = one.clamp(min=1)
    settled = torch.zeros((b, n + 1), dtype=torch.int64, device=f.device)
    label = torch.arange(n, device=f.device).expand(b, n)
    while f.shape[-1] > 1:
        if f.shape[-1] % 2:
            f = torch.nn.functional.pad(f, (0, 1))
            label = torch.nn.functional.pad(label, (0, 1), value=n)
            marked = None if marked is None else torch.nn.functional.pad(marked, (0, 1))
        p, q, first, second = f[:, ::2], f[:, 1::2], label[:, ::2], label[:, 1::2]
        total = p + q
        low = total < one
        chance = torch.where(low, p, one - q) / torch.where(low, total, 2 * one - total).clamp(min=1).to(torch.float64)
        if marked is not None and up is not None:
            chance = _conditioned(chance, p, q, one, marked, up)
        wins = _coins(chance, generator)
        settled.scatter_add_(-1, torch.where(wins, first, second), (~low).to(torch.int64))
        f = torch.where(low, total, total - one)
        stays = wins == low
        label = torch.where(stays, first, second)
        marked = None if marked is None else torch.where(stays, marked[:, ::2], marked[:, 1::2])
    return settled[:, :n]


def _conditioned(chance: Tensor, p: Tensor, q: Tensor, one: Tensor, marked: Tensor, up: Tensor) -> Tensor:
    """The first one's chance to win, changed in the pair of the marked one by how that one must end."""
    first, second = marked[:, ::2], marked[:, 1::2]
    total = p + q
    mine = torch.where(first, chance, 1 - chance)
    own = torch.where(first, p, q)
    kept = torch.where(up, 1.0, mine * ((one - total) / (one - own).to(torch.float64)))
    raised = torch.where(up, mine * (one / own.clamp(min=1).to(torch.float64)), 0.0)
    mine = torch.where(total < one, kept, raised)
    return torch.where(first, mine, torch.where(second, 1 - mine, chance))


def _coins(chance: Tensor, generator: torch.Generator) -> Tensor:
    """True with the given probability."""
    return torch.rand(chance.shape, dtype=torch.float64, device=chance.device, generator=generator) < chance
