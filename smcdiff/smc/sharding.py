r"""The n particles of each chain, sharded over R processes: who lives where, and who moves.

Rank r holds the slots r m ... (r + 1) m - 1 of every chain, m = n / R. Log-weights are few and are known everywhere, so
every rank resamples all n with the same generator and finds the same ancestors; only the particles have to travel.

With O_r offspring of the particles of rank r, the order of the slots is free: after resampling all weights of a chain
are equal. Each rank keeps min(O_r, m) of the offspring of its own particles, and only the surplus moves,

    moved = sum_r max(0, O_r - m),

the least possible, since rank r has room for m. Copies of one particle for one rank are sent once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.integer_weights import ancestors_from_counts
from smcdiff.smc.ranks import Ranks
from smcdiff.smc.resampling import Resampler
from smcdiff.smc.state import FilterState

__all__ = ["Placed", "Shards", "derive_seed", "moved", "place"]


def derive_seed(seed: int, stream: str) -> int:
    """The seed of a named stream of a run; different names and seeds give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:8], "big") >> 1


def place(ancestors: Tensor, ranks: int) -> Tensor:
    """Ancestors (b, n) in another order, in which as few as possible are on another rank than their slot."""
    b, n = ancestors.shape
    m = n // ranks
    counts = ancestors.new_zeros((b, n)).scatter_add_(-1, ancestors, torch.ones_like(ancestors))
    ancestors = ancestors_from_counts(counts.cumsum(-1))  # sorted
    offspring = counts.unflatten(-1, (ranks, m)).sum(-1)
    first = offspring.cumsum(-1) - offspring
    slot, owner = torch.arange(n, device=ancestors.device), ancestors // m
    surplus = slot - first.gather(-1, owner) >= m
    free = slot % m >= offspring[:, slot // m]
    # As many are True in both, so the kept offspring, in order, get the kept slots, and the surplus the free ones.
    ordered = torch.empty_like(ancestors).scatter_(-1, _false_first(surplus), ancestors)
    return ordered.gather(-1, _false_first(free))


def _false_first(flags: Tensor) -> Tensor:
    """Where each entry of flags (b, n) stands once those that are False come first, both kinds in their order."""
    true, false = flags.to(torch.int64).cumsum(-1), (~flags).to(torch.int64).cumsum(-1)
    return torch.where(flags, false[:, -1:] + true, false) - 1


def moved(ancestors: Tensor, ranks: int) -> Tensor:
    """How many slots (..., n) have an ancestor on another rank, shape (...)."""
    m = ancestors.shape[-1] // ranks
    return (ancestors // m != torch.arange(ancestors.shape[-1], device=ancestors.device) // m).sum(-1)


@dataclass(frozen=True)
class Placed:
    """A resampler whose ancestors are put where the fewest particles move.

    Args:
        resampler: draws them.
        ranks: R.
    """

    resampler: Resampler
    ranks: int

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`~smcdiff.smc.resampling.Resampler` says."""
        return place(self.resampler(weights, generator), self.ranks)


class Shards:
    """A Feynman-Kac model on all ranks, of which this one moves a shard of each chain's particles.

    To the filter its particles are their global slots alone, (b, n); what they carry stays here, (b, m, *event), and
    travels when the slots are resampled. All ranks must report the same kinds of faults at a step.

    Args:
        feynman_kac: the model; its noise comes from a generator of this rank.
        ranks: the processes.
        seed: of the run.
    """

    def __init__(self, feynman_kac: FeynmanKac, ranks: Ranks, seed: int) -> None:
        self._feynman_kac, self._ranks = feynman_kac, ranks
        self._generator = torch.Generator(device=feynman_kac.device)
        self._generator.manual_seed(derive_seed(seed, f"rank {ranks.rank}"))
        #: What this rank's particles carry, entries (b, m, *event).
        self.particles: Particles = {}
        #: How many particles of each chain moved to another rank before the latest move, (b,) of int64.
        self.moved = torch.zeros(0, dtype=torch.int64, device=feynman_kac.device)

    @property
    def num_steps(self) -> int:
        return self._feynman_kac.num_steps

    @property
    def device(self) -> torch.device:
        return self._feynman_kac.device

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        """Draw this rank's particles and gather all weights; the noise is not from ``generator``."""
        self.moved = torch.zeros(num_chains, dtype=torch.int64, device=self.device)
        return self._everywhere(
            self._feynman_kac.initial(num_chains, num_particles // self._ranks.count, self._generator)
        )

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """Let particles travel to their slots, move this rank's and gather all weights."""
        self._travel(particles[_SLOT])
        return self._everywhere(self._feynman_kac.step(i, self.particles, self._generator))

    def mine(self, values: Tensor) -> Tensor:
        """This rank's columns (b, m) of values (b, n)."""
        return values.chunk(self._ranks.count, -1)[self._ranks.rank]

    def with_particles(self, state: FilterState) -> FilterState:
        """The state with this rank's particles (b, m, *event) in it; its weights stay those of all, (b, n)."""
        return replace(state, particles=self.particles)

    def to_keep(self, state: FilterState) -> FilterState:
        """The state with all in it that this rank goes on from."""
        kept = {f"{_SHARD}{name}": value for name, value in self.particles.items()}
        return replace(state, particles={**kept, _GENERATOR: self._generator.get_state()})

    def go_on(self, kept: FilterState) -> FilterState:
        """Take back what :meth:`to_keep` put in; the state for the filter."""
        self._generator.set_state(kept.particles[_GENERATOR].cpu())
        self.particles = {
            name.removeprefix(_SHARD): value for name, value in kept.particles.items() if name.startswith(_SHARD)
        }
        self.moved = torch.zeros(kept.num_chains, dtype=torch.int64, device=self.device)
        return replace(kept, particles=_slots(kept.log_w))

    def _everywhere(self, move: Move) -> Move:
        """The move as every rank sees it: all weights and all faults."""
        self.particles = move.particles
        names = sorted(move.faults)
        columns = [move.log_g.to(torch.float64), *(move.faults[name].to(torch.float64)[:, None] for name in names)]
        gathered = self._ranks.gather(torch.cat(columns, -1))
        m = move.log_g.shape[1]
        log_g = gathered[:, :, :m].transpose(0, 1).flatten(1)
        faults = {name: (gathered[:, :, m + j] > 0).any(0) for j, name in enumerate(names)}
        return Move(_slots(log_g), log_g, faults)

    def _travel(self, ancestors: Tensor) -> None:
        """Replace this rank's particles by those of the ancestors (b, n) of its slots. Waits for the device."""
        count, rank = self._ranks.count, self._ranks.rank
        b, n = ancestors.shape
        m = n // count
        self._ranks.agree(_checksum(ancestors), "ancestors")
        self.moved = moved(ancestors, count)
        away = bool(self.moved.any())
        rows = [_rows(ancestors, source, rank, m) for source in range(count)] if away else []
        came: Particles = {}
        if away:
            nobody = ancestors.new_empty(0)
            leaving = [_rows(ancestors, rank, other, m) if other != rank else nobody for other in range(count)]
            sent = _pack(self.particles, torch.cat(leaving))
            rows[rank] = nobody
            received = self._ranks.exchange(sent, [len(r) for r in leaving], [len(r) for r in rows])
            came = _unpack(received, self.particles)
        wanted = self.mine(ancestors)
        owner = (wanted // m).flatten()
        row = (wanted % m + m * torch.arange(b, device=ancestors.device)[:, None]).flatten()
        here = owner == rank
        taken: Particles = {}
        for name, value in self.particles.items():
            taken[name] = value.flatten(0, 1).index_select(0, row.where(here, 0))
        start = 0
        for other in range(count) if away else ():
            slots = (owner == other).nonzero().flatten() if other != rank else row[:0]
            index = start + torch.searchsorted(rows[other], row[slots])
            for name, value in came.items():
                taken[name].index_copy_(0, slots, value.index_select(0, index))
            start += len(rows[other])
        self.particles = {name: value.unflatten(0, (b, m)) for name, value in taken.items()}


#: The names under which the filter and a checkpoint know what a rank has.
_SLOT, _SHARD, _GENERATOR = "slot", "shard/", "generator"

_ODD = 0x2545F4914F6CDD1D


def _slots(like: Tensor) -> Particles:
    """Every particle in its own slot, (b, n)."""
    return {_SLOT: torch.arange(like.shape[1], device=like.device).expand(like.shape)}


def _checksum(ancestors: Tensor) -> Tensor:
    """An integer that hardly ever is the same for different ancestors; products and sums wrap modulo 2^64."""
    factors = torch.arange(ancestors.numel(), device=ancestors.device) * _ODD + 1
    return (ancestors.flatten() * factors).sum()


def _rows(ancestors: Tensor, source: int, destination: int, m: int) -> Tensor:
    """Which of the source's particles the destination needs: rows of its flattened shard, each once, in order."""
    wanted = ancestors[:, destination * m : (destination + 1) * m]
    chain, slot = (wanted // m == source).nonzero(as_tuple=True)
    return torch.unique_consecutive(chain * m + wanted[chain, slot] % m)  # placed ancestors of one rank are in order


def _pack(particles: Particles, rows: Tensor) -> Tensor:
    """Those rows of the flattened particles, all entries side by side as bytes, (rows, bytes of one particle)."""
    parts = [value.flatten(0, 1).index_select(0, rows) for value in particles.values()]
    return torch.cat([_matrix(part).view(torch.uint8) for part in parts], 1)


def _unpack(packed: Tensor, like: Particles) -> Particles:
    """The inverse of :func:`_pack`: entries (rows, *event) of the shapes and dtypes of ``like``."""
    widths = [math.prod(value.shape[2:]) * value.element_size() for value in like.values()]
    parts: Sequence[Tensor] = packed.split(widths, 1)
    return {
        name: part.contiguous().view(value.dtype).reshape(len(packed), *value.shape[2:])
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def _matrix(part: Tensor) -> Tensor:
    return part.reshape(part.shape[0], math.prod(part.shape[1:])).contiguous()
