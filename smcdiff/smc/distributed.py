r"""One run on several processes: independent chains on each, or the particles of every chain sharded over all.

Start R processes with ``torchrun --nproc-per-node R script.py``; each calls
``torch.distributed.init_process_group("gloo")``, or ``"nccl"`` with a GPU of its own, and then the same ``run``:

    ChainsOverRanks      rank r runs b / R chains; log Z is pooled over all b as ever. The ranks meet rarely.
    ParticlesOverRanks   rank r moves n / R particles of each chain; all weights are gathered at each step, every rank
                         resamples all n alike, and only surplus offspring travel (:mod:`smcdiff.smc.sharding`).

Both have the law of the filter on one process. Rank r draws its noise from a generator of its own, seeded by the run's
seed and r; ancestors of sharded particles are drawn from one that all ranks seed alike. When a rank raises, dies or
does not answer within the time limit, every other rank ends with a :class:`~smcdiff.smc.ranks.RankError`.

A run leaves on each rank what that rank moved. ``whole`` of its result puts the parts together, once, at the end: what
every rank then has is what one process would have. :class:`smcdiff.SMC` does so.

Each rank keeps its own checkpoint, in two files that are written in turn: a file is written over only when all ranks
hold the step in the other one, so that whenever the run is killed there is a step that all have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from smcdiff.smc import faults
from smcdiff.smc.checkpoint import Checkpoint, CheckpointError, CheckpointWarning, Watch, load, save, versions
from smcdiff.smc.feynman_kac import FeynmanKac, Particles
from smcdiff.smc.numbers import Numbers, look_every
from smcdiff.smc.particle_filter import FilterResult, ParticleFilter
from smcdiff.smc.ranks import Ranks
from smcdiff.smc.records import History, Records, stack
from smcdiff.smc.sharding import Placed, Shards, derive_seed
from smcdiff.smc.state import FilterState
from smcdiff.smc.weights import log_mean_exp, normalise

__all__ = ["ChainsOverRanks", "ChainsResult", "OfWeights", "ParticlesOverRanks", "ParticlesResult"]

Progress = Callable[[FilterState], None]


@dataclass(frozen=True)
class OfWeights:
    """A summary for ``Records`` that reads the weights alone, which every rank knows or can be told.

    Args:
        function: of the normalised weights (b, n), float64; it returns an entry for each chain, (b, *shape).

    Raises:
        ValueError: when called, for a function that returns another shape.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, state: FilterState) -> Tensor:
        found = self.function(state.w)
        if found.shape[:1] != state.w.shape[:1]:
            raise ValueError(
                f"got a summary of shape {tuple(found.shape)} of weights {tuple(state.w.shape)}; expected an entry for "
                "each chain, the chains first"
            )
        return found


@dataclass(frozen=True)
class ChainsResult:
    """What a run of independent chains leaves on one rank.

    Args:
        rank: r.
        local: this rank's chains, as :class:`~smcdiff.smc.particle_filter.ParticleFilter` gives them.
        log_z: log normalising constant of all chains, those of rank 0 first, (b,), float64, in nats; the same on every
            rank.
    """

    rank: int
    local: FilterResult
    log_z: Tensor

    def whole(self, ranks: Ranks, names: Iterable[str] | None = None) -> FilterResult:
        """The result of all chains, those of rank 0 first, the same on every rank; every rank calls this.

        Args:
            ranks: the processes of the run.
            names: what to gather of what the final particles carry; None for all of it.

        Raises:
            RankError: if another rank failed, died or did not answer in time.
            ValueError: for a summary in the records that has no entry for each chain.
        """
        local, kept = self.local, self.local.records
        steps = {name: value for name, value in vars(kept).items() if isinstance(value, Tensor)}
        carried, log_w, steps, summaries = ranks.gather_all(
            _only(local.particles, names), {"log_w": local.log_w}, steps, kept.summaries
        )
        odd = [name for name, value in kept.summaries.items() if value.shape[1:2] != local.log_z.shape]
        if odd:
            raise ValueError(
                f"got the summaries {odd}, which do not have the shape (b, ...) of an entry for each chain, so that "
                "those of several ranks cannot be put together; leave them out, or read each rank's own"
            )
        return FilterResult(
            particles=_joined(carried, 0),
            log_w=_joined(log_w, 0)["log_w"],
            log_z=self.log_z,
            records=replace(kept, **_joined(steps, 1), summaries=_joined(summaries, 1)),
            settings=local.settings,
        )

    @property
    def log_evidence(self) -> Tensor:
        """Pooled over all chains of all ranks: log of the mean of exp(log_z), a 0-d float64 tensor, in nats."""
        return log_mean_exp(self.log_z)


@dataclass(frozen=True)
class ParticlesResult:
    """What a run with sharded particles leaves on one rank.

    Args:
        rank: r.
        particles: what this rank's final particles carry, slots r m ... (r + 1) m - 1 of each chain, entries
            (b, m, *event).
        log_w: their unnormalised log-weights since the chain's last resampling, (b, m), float64.
        w: their weights, normalised over the particles of all ranks, (b, m), float64.
        log_z: log normalising constant of each chain, (b,), float64, in nats; the same on every rank.
        records: what was kept of the steps, of the particles of all ranks; the same on every rank.
        moved: particles of each chain that moved to another rank before each move, (K, b) of int64.
        settings: the filter that made it.
    """

    rank: int
    particles: Particles
    log_w: Tensor
    w: Tensor
    log_z: Tensor
    records: History
    moved: Tensor
    settings: ParticleFilter

    def whole(self, ranks: Ranks, names: Iterable[str] | None = None) -> FilterResult:
        """The result of all particles, those of rank 0 first in each chain, the same on every rank; every rank calls
        this.

        Args:
            ranks: the processes of the run.
            names: what to gather of what the final particles carry; None for all of it.

        Raises:
            RankError: if another rank failed, died or did not answer in time.
        """
        carried, log_w = ranks.gather_all(_only(self.particles, names), {"log_w": self.log_w})
        return FilterResult(_joined(carried, 1), _joined(log_w, 1)["log_w"], self.log_z, self.records, self.settings)

    @property
    def log_evidence(self) -> Tensor:
        """Pooled over chains: log of the mean of exp(log_z), a 0-d float64 tensor, in nats."""
        return log_mean_exp(self.log_z)


@dataclass(frozen=True)
class ChainsOverRanks:
    """A particle filter whose chains are spread over the ranks, b / R on each.

    Args:
        filter: what each rank runs.
        time_limit: seconds a rank waits for another at a meeting: more than two per cent of the slowest rank's run.
    """

    filter: ParticleFilter = field(default_factory=ParticleFilter)
    time_limit: float = 600.0

    def run(
        self,
        feynman_kac: FeynmanKac,
        *,
        num_particles: int,
        num_chains: int,
        seed: int = 0,
        records: Records | None = None,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> ChainsResult:
        """Run the model to its last step; every rank calls this with the same arguments.

        Args:
            feynman_kac: the model.
            num_particles: n, of each chain; at least 1.
            num_chains: b, over all ranks; a multiple of R.
            seed: of all noise; not negative.
            records: what to keep of the steps of this rank's chains; by default ``Records()``.
            progress: called with this rank's state some 50 times at most.
            checkpoint: where to keep the run, and to go on from; ``.rank<r>.<a or b>`` is put into the file's name.

        Raises:
            CheckpointError: for a checkpoint of another run, or one that cannot be read or written.
            FilterError: if a chain of this rank had a fault.
            RankError: if another rank failed, died or did not answer in time.
            ValueError: for numbers out of range.
        """
        numbers = Numbers(num_particles, num_chains, seed, records)
        words = {**numbers.words(feynman_kac, self.filter), "spread over ranks": "chains"}
        with Ranks.open(self.time_limit, feynman_kac.device) as ranks:
            _begin(words, numbers, feynman_kac, "num_chains", num_chains, ranks)
            b = num_chains // ranks.count
            own = derive_seed(seed, f"rank {ranks.rank}")
            saver, start = None, None
            if checkpoint is not None:
                saver = _Saver(checkpoint, words, ranks)
                start = saver.start(feynman_kac.device)
            states = self.filter.iterate(
                feynman_kac, num_particles=num_particles, num_chains=b, seed=own, records=records, start=start
            )
            state = _drive(states, start, feynman_kac, ranks, saver, _Views(), progress)
            return ChainsResult(
                rank=ranks.rank,
                local=FilterResult.of(state, self.filter),
                log_z=ranks.gather(state.log_z).flatten(),
            )


@dataclass(frozen=True)
class ParticlesOverRanks:
    """A particle filter whose particles are sharded over the ranks, n / R of each chain on each.

    All ranks compute the same weights and ancestors, so their devices must be of one kind, with the same version of
    torch; a difference in the ancestors is an error.

    Args:
        filter: resampler and threshold.
        time_limit: seconds a rank waits for another: more than the slowest move takes.
    """

    filter: ParticleFilter = field(default_factory=ParticleFilter)
    time_limit: float = 600.0

    def run(
        self,
        feynman_kac: FeynmanKac,
        *,
        num_particles: int,
        num_chains: int = 1,
        seed: int = 0,
        records: Records | None = None,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> ParticlesResult:
        """Run the model to its last step; every rank calls this with the same arguments.

        Args:
            feynman_kac: the model; its kernels and potentials treat every particle on its own.
            num_particles: n, of each chain, over all ranks; a multiple of R.
            num_chains: b; at least 1.
            seed: of all noise; not negative.
            records: what to keep of the steps, with summaries :class:`OfWeights` alone; by default ``Records()``.
            progress: called some 50 times at most with a state that has all weights (b, n) and this rank's particles
                (b, m, *event).
            checkpoint: where to keep the run, and to go on from; ``.rank<r>.<a or b>`` is put into the file's name.

        Raises:
            CheckpointError: for a checkpoint of another run, or one that cannot be read or written.
            FilterError: if a chain had a fault; on every rank.
            RankError: if another rank failed, died, did not answer in time or computed other weights.
            ValueError: for numbers out of range, or summaries in ``records`` that read particles.
        """
        numbers = Numbers(num_particles, num_chains, seed, records)
        summaries = reading_particles(numbers.kept)
        if summaries:
            raise ValueError(
                f"got the summaries {summaries}; a rank sees its own particles alone, so summaries of a step are not "
                "kept when particles are sharded, but those that are OfWeights: use progress, or ChainsOverRanks"
            )
        words = {**numbers.words(feynman_kac, self.filter), "spread over ranks": "particles"}
        with Ranks.open(self.time_limit, feynman_kac.device) as ranks:
            _begin(words, numbers, feynman_kac, "num_particles", num_particles, ranks)
            shards = Shards(feynman_kac, ranks, seed)
            records = replace(numbers.kept, summaries={**numbers.kept.summaries, _MOVED: lambda state: shards.moved})
            saver, start = None, None
            if checkpoint is not None:
                saver = _Saver(checkpoint, words, ranks)
                latest = saver.start(feynman_kac.device)
                start = None if latest is None else shards.go_on(latest)
            placed = replace(self.filter, resampler=Placed(self.filter.resampler, ranks.count))
            states = placed.iterate(
                shards,
                num_particles=num_particles,
                num_chains=num_chains,
                seed=derive_seed(seed, "all ranks"),
                records=records,
                start=start,
            )
            views = _Views(show=shards.with_particles, keep=shards.to_keep)
            state = _drive(states, start, feynman_kac, ranks, saver, views, progress)
            history = stack(state.history, num_chains, num_particles)
            kept = dict(history.summaries)
            went = kept.pop(_MOVED)[1:]
            return ParticlesResult(
                rank=ranks.rank,
                particles=shards.particles,
                log_w=shards.mine(state.log_w),
                w=shards.mine(normalise(state.log_w)),
                log_z=state.log_z,
                records=replace(history, summaries=kept),
                moved=went,
                settings=self.filter,
            )


#: The name under which the steps keep how many particles moved to another rank.
_MOVED = "(moved)"


def reading_particles(records: Records) -> list[str]:
    """The names of the summaries that are not :class:`OfWeights`."""
    return sorted(name for name, summary in records.summaries.items() if not isinstance(summary, OfWeights))


def _only(particles: Particles, names: Iterable[str] | None) -> Particles:
    return dict(particles) if names is None else {name: particles[name] for name in names}


def _joined(values: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Values (R, *shape) of the ranks side by side along ``dim`` of the shape."""
    return {name: torch.cat(list(value), dim) for name, value in values.items()}


@dataclass(frozen=True)
class _Views:
    """How a rank's state is shown and kept."""

    show: Callable[[FilterState], FilterState] = lambda state: state
    keep: Callable[[FilterState], FilterState] = lambda state: state


def _drive(
    states: Iterator[FilterState],
    start: FilterState | None,
    feynman_kac: FeynmanKac,
    ranks: Ranks,
    saver: _Saver | None,
    views: _Views,
    progress: Progress | None,
) -> FilterState:
    """Take the states to the last one; at a meeting the ranks see that all are well before they go on."""
    every = look_every(feynman_kac.num_steps)
    state = start
    for state in states:
        due = saver is not None and saver.due(state)
        met = state.step % every == 0 or state.step == state.num_steps
        if met or due:
            ranks.settle(_fault(state, feynman_kac))
        if met and progress is not None:
            progress(views.show(state))
        if saver is not None and due:
            saver.keep(views.keep(state))
    assert state is not None
    ranks.settle(_fault(state, feynman_kac))  # of a start that was the last state already, too
    return state


def _fault(state: FilterState, feynman_kac: FeynmanKac) -> faults.FilterError | None:
    try:
        faults.check(state, feynman_kac)
    except faults.FilterError as error:
        return error
    return None


class _Saver:
    """One rank's checkpoints, in step with those of the others."""

    def __init__(self, checkpoint: Checkpoint, words: Mapping[str, str], ranks: Ranks) -> None:
        self._by_clock, self._ranks = checkpoint.every_seconds is not None, ranks
        self._watch = Watch(checkpoint)
        self._identity = {**checkpoint.identity, **words, **versions(), "rank": f"{ranks.rank} of {ranks.count}"}
        path = Path(checkpoint.path)
        self._paths = [path.with_name(f"{path.stem}.rank{ranks.rank}.{letter}{path.suffix}") for letter in "ab"]
        self._next = 0

    def start(self, device: torch.device) -> FilterState | None:
        """The latest state that all ranks have, or None where the run is to begin."""
        error, kept = None, []
        try:
            kept = [load(path, self._identity, device) if path.exists() else None for path in self._paths]
        except CheckpointError as cause:
            error = cause
        self._ranks.settle(error)
        steps = [-1 if state is None else state.step for state in kept]
        table = self._ranks.gather(torch.tensor(steps)).tolist()
        common = max(set.intersection(*(set(row) - {-1} for row in table)), default=-1)
        if common >= 0:
            here = steps.index(common)
            self._next = 1 - here
            return kept[here]
        if all(-1 in row for row in table) and any(max(row) == -1 for row in table):
            return None  # killed before every rank had its first
        raise CheckpointError(
            f"the checkpoints {self._paths[0]} and the other ranks' have no step in common; the ranks hold "
            f"{[sorted(set(row) - {-1}) for row in table]}. They are of different runs, or some are lost: delete or "
            "rename all of them to start anew"
        )

    def due(self, state: FilterState) -> bool:
        """Whether to write now; by the clock, as rank 0's says."""
        due = self._watch.due(state)
        return bool(self._ranks.gather(torch.tensor(due, dtype=torch.uint8))[0]) if self._by_clock else due

    def keep(self, state: FilterState) -> None:
        """Write the state. If a rank cannot, its first write is an error and a later one a warning on that rank."""
        error = None
        try:
            save(self._paths[self._next], state, self._identity)
        except CheckpointError as cause:
            error = cause
        if not self._watch.kept_once:
            self._ranks.settle(error)
        elif error is not None:
            warnings.warn(f"{error}; the run goes on", CheckpointWarning, stacklevel=3)
        if not self._ranks.gather(torch.tensor(error is not None, dtype=torch.uint8)).any():
            self._next = 1 - self._next
        self._watch.kept()


def _begin(
    words: Mapping[str, str], numbers: Numbers, feynman_kac: FeynmanKac, name: str, spread: int, ranks: Ranks
) -> None:
    """See that all ranks begin the same run, and that the number that is spread over them is a multiple of theirs."""
    ranks.agree(torch.tensor(derive_seed(0, str(sorted(words.items())))), "runs or arguments")
    numbers.check(feynman_kac)
    if spread % ranks.count:
        raise ValueError(f"got {name} = {spread!r} on {ranks.count} ranks; expected a positive multiple of the ranks")
