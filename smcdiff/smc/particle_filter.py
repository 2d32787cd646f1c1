r"""The particle filter: moves, weighs and resamples the particles of a Feynman-Kac model, many chains at once.

Each chain c keeps log-weights log_w since its last resampling. For i = 1 ... K,

    1. if ESS(log_w) < threshold n:  ancestors ~ resampler(w),  settled += log-mean-exp(log_w),  log_w = 0;
       otherwise every particle is its own ancestor and *its log-weight stays*;
    2. everything that a particle carries goes with its ancestor;
    3. particles, log_g = M_i(particles);  log_w += log_g,

and log Z = settled + log-mean-exp(log_w). exp(log Z) is unbiased for the normalising constant of the model, for any n
and any threshold: a resampling keeps the expected weight of every particle, and is decided on before it is drawn. The
choice in 1 is made per chain by ``torch.where``; nothing in the loop waits for the device. A particle of zero weight
keeps it until it is resampled away, whatever its log_g.

References:
    N. Gordon, D. Salmond, A. Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation", IEE
    Proceedings F 140 (1993).
    P. Del Moral, A. Doucet, A. Jasra, "On adaptive resampling strategies for sequential Monte Carlo methods", Bernoulli
    18 (2012), arXiv:1203.0464.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smcdiff.smc import faults
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.records import History, Records, StepRecord, stack
from smcdiff.smc.resampling import Resampler, Systematic
from smcdiff.smc.state import FilterState
from smcdiff.smc.weights import log_mean_exp, normalise, weigh

__all__ = ["FilterResult", "ParticleFilter", "gather"]

#: How often at most a run's progress is read; every reading waits for the device once.
_READINGS = 50


@dataclass(frozen=True)
class FilterResult:
    """What a run of a particle filter leaves.

    Args:
        particles: what the final particles carry, each entry (b, n, *event).
        log_w: their unnormalised log-weights since the chain's last resampling, (b, n), float64.
        log_z: log normalising constant of each chain, (b,), float64, in nats; exp(log_z) is unbiased.
        records: what was kept of the steps.
    """

    particles: Particles
    log_w: Tensor
    log_z: Tensor
    records: History

    @property
    def w(self) -> Tensor:
        """Normalised weights of each chain, (b, n), float64."""
        return normalise(self.log_w)

    @property
    def log_evidence(self) -> Tensor:
        """Pooled over chains: log of the mean of exp(log_z), a 0-d float64 tensor, in nats."""
        return log_mean_exp(self.log_z)


@dataclass(frozen=True)
class ParticleFilter:
    """A particle filter for any Feynman-Kac model; it iterates, and ``run`` takes it to the end.

    Args:
        resampler: how ancestors are drawn.
        ess_threshold: a chain is resampled before a move if its effective sample size is below this share of n; in
            [0, 1]. With 1 every chain is resampled before every move, with 0 none ever is.

    Raises:
        ValueError: for a threshold outside [0, 1].
    """

    resampler: Resampler = Systematic()
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"got ess_threshold {self.ess_threshold}; it is a share of the particles, in [0, 1]")

    def run(
        self,
        feynman_kac: FeynmanKac,
        *,
        num_particles: int,
        num_chains: int = 1,
        seed: int = 0,
        records: Records | None = None,
        progress: Callable[[FilterState], None] | None = None,
        start: FilterState | None = None,
    ) -> FilterResult:
        """Run the model to its last step.

        Args:
            feynman_kac: the model.
            num_particles: n, of each chain; at least 1.
            num_chains: b, independent particle systems; at least 1.
            seed: of the generator of all noise; not negative.
            records: what to keep of the steps; by default ``Records()``.
            progress: called with the state some 50 times at most, after the faults were checked.
            start: a state to go on from, of a run with the same model and settings.

        Raises:
            FilterError: if a chain had a fault, naming step, chains and remedy.
            ValueError: for numbers out of range, a move of wrong shape, or a start that does not fit.
        """
        every = -(-feynman_kac.num_steps // _READINGS) or 1
        state = start
        for state in self.iterate(
            feynman_kac,
            num_particles=num_particles,
            num_chains=num_chains,
            seed=seed,
            records=records,
            start=start,
        ):
            if progress is not None and (state.step % every == 0 or state.step == state.num_steps):
                faults.check(state, feynman_kac)
                progress(state)
        assert state is not None
        faults.check(state, feynman_kac)
        return FilterResult(
            particles=state.particles,
            log_w=state.log_w,
            log_z=state.log_z,
            records=stack(state.history, num_chains, num_particles),
        )

    def iterate(
        self,
        feynman_kac: FeynmanKac,
        *,
        num_particles: int,
        num_chains: int = 1,
        seed: int = 0,
        records: Records | None = None,
        start: FilterState | None = None,
    ) -> Iterator[FilterState]:
        """Yield the state after the initial move and after each step, or after each step that follows ``start``.

        Faults are kept in the states and not raised: see :func:`smcdiff.smc.faults.check`. Arguments as for
        :meth:`run`.
        """
        _check_numbers(feynman_kac, num_particles, num_chains, seed)
        records = Records() if records is None else records
        if start is not None:
            _check_start(start, feynman_kac, records, num_particles, num_chains)
        return self._states(_Run(self, feynman_kac, records), num_chains, num_particles, seed, start)

    def _states(
        self, run: _Run, num_chains: int, num_particles: int, seed: int, state: FilterState | None
    ) -> Iterator[FilterState]:
        generator = torch.Generator(device=run.feynman_kac.device)
        if state is None:
            generator.manual_seed(seed)
            state = run.first(num_chains, num_particles, generator)
            yield state
        else:
            generator.set_state(state.generator_state)
        while state.step < state.num_steps:
            state = run.next(state, generator)
            yield state


def gather(particles: Particles, ancestors: Tensor) -> Particles:
    """All that the particles carry, entries (b, n, *event), taken from ``ancestors`` (b, m): entries (b, m, *event)."""
    b, m = ancestors.shape
    taken: Particles = {}
    for name, value in particles.items():
        index = ancestors + value.shape[1] * torch.arange(b, device=ancestors.device)[:, None]
        taken[name] = value.flatten(0, 1).index_select(0, index.flatten()).reshape(b, m, *value.shape[2:])
    return taken


@dataclass(frozen=True)
class _Resampled:
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
class _Run:
    """The steps of one run: from a state to the next."""

    settings: ParticleFilter
    feynman_kac: FeynmanKac
    records: Records

    @torch.no_grad()
    def first(self, num_chains: int, num_particles: int, generator: torch.Generator) -> FilterState:
        """The state after the initial move."""
        zero = torch.zeros((num_chains, num_particles), dtype=torch.float64, device=self.feynman_kac.device)
        before = _Resampled({}, zero, zero[:, 0], torch.zeros_like(zero[:, 0], dtype=torch.bool), None)
        move = self.feynman_kac.initial(num_chains, num_particles, generator)
        return self._weighed(0, before, move, {}, (), generator)

    @torch.no_grad()
    def next(self, state: FilterState, generator: torch.Generator) -> FilterState:
        """The state after one more step."""
        before = self._resampled(state, generator)
        move = self.feynman_kac.step(state.step + 1, before.particles, generator)
        return self._weighed(state.step + 1, before, move, state.faults, state.history, generator)

    def _resampled(self, state: FilterState, generator: torch.Generator) -> _Resampled:
        threshold = self.settings.ess_threshold
        identity = torch.arange(state.num_particles, device=state.w.device).expand(state.w.shape)
        if threshold == 0:
            none = torch.zeros_like(state.ess, dtype=torch.bool)
            return _Resampled(state.particles, state.log_w, state.log_z_settled, none, identity)
        chains = (
            state.ess < threshold * state.num_particles
            if threshold < 1
            else torch.ones_like(state.ess, dtype=torch.bool)
        )
        ancestors = torch.where(chains[:, None], self.settings.resampler(state.w, generator), identity)
        return _Resampled(
            particles=gather(state.particles, ancestors),
            log_w=state.log_w.masked_fill(chains[:, None], 0.0),
            log_z_settled=torch.where(chains, state.log_z, state.log_z_settled),
            chains=chains,
            ancestors=ancestors,
        )

    def _weighed(
        self,
        step: int,
        before: _Resampled,
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


def _check_numbers(feynman_kac: FeynmanKac, num_particles: int, num_chains: int, seed: int) -> None:
    for name, value, least in (
        ("num_particles", num_particles, 1),
        ("num_chains", num_chains, 1),
        ("seed", seed, 0),
        ("num_steps of the Feynman-Kac model", feynman_kac.num_steps, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"got {name} = {value!r}; expected an integer of at least {least}")


def _check_start(
    start: FilterState, feynman_kac: FeynmanKac, records: Records, num_particles: int, num_chains: int
) -> None:
    got = (start.num_steps, start.num_chains, start.num_particles)
    expected = (feynman_kac.num_steps, num_chains, num_particles)
    if got != expected:
        raise ValueError(
            f"got a start with (steps, chains, particles) = {got}; this run has {expected}: go on with the model and "
            "numbers that the start was made with, or leave start out"
        )
    first, last = start.history[0], start.history[-1]
    kept_ancestors = start.step == 0 or (last.ancestors is not None) == records.ancestors
    if set(first.summaries) != set(records.summaries) or not kept_ancestors:
        raise ValueError("got a start that kept other records than this run's; give the Records of the run it is from")


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
