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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smcdiff.smc import faults
from smcdiff.smc.checkpoint import Checkpoint, Keeper
from smcdiff.smc.feynman_kac import FeynmanKac, Particles
from smcdiff.smc.graph import Capture
from smcdiff.smc.numbers import Numbers, look_every
from smcdiff.smc.records import History, Records, stack
from smcdiff.smc.resampling import Resampler, Systematic
from smcdiff.smc.state import FilterState
from smcdiff.smc.steps import Steps
from smcdiff.smc.weights import log_mean_exp, normalise

__all__ = ["FilterResult", "ParticleFilter"]


@dataclass(frozen=True)
class FilterResult:
    """What a run of a particle filter leaves.

    Args:
        particles: what the final particles carry, each entry (b, n, *event).
        log_w: their unnormalised log-weights since the chain's last resampling, (b, n), float64.
        log_z: log normalising constant of each chain, (b,), float64, in nats; exp(log_z) is unbiased.
        records: what was kept of the steps.
        settings: the filter that made it.
    """

    particles: Particles
    log_w: Tensor
    log_z: Tensor
    records: History
    settings: ParticleFilter

    @classmethod
    def of(cls, state: FilterState, settings: ParticleFilter) -> FilterResult:
        """What a run leaves whose last state this is."""
        records = stack(state.history, state.num_chains, state.num_particles)
        return cls(state.particles, state.log_w, state.log_z, records, settings)

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

    resampler: Resampler = field(default_factory=Systematic)
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
        checkpoint: Checkpoint | None = None,
        capture: Capture | None = None,
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
            checkpoint: where to keep the state, and to go on from if something is kept there already; not with start.
            capture: CUDA graphs of the steps, to record and to replay; None starts every kernel on its own. The
                numbers are the same.

        Raises:
            CaptureError: for a step that cannot be captured.
            CheckpointError: for a checkpoint of another run, or one that cannot be read or written.
            FilterError: if a chain had a fault, naming step, chains and remedy.
            ValueError: for numbers out of range, a move of wrong shape, or a start or a capture that does not fit.
        """
        keeper = None
        if checkpoint is not None:
            if start is not None:
                raise ValueError("got a start and a checkpoint; give one of them")
            numbers = Numbers(num_particles, num_chains, seed, records)
            keeper = Keeper(checkpoint, numbers.words(feynman_kac, self))
            start = keeper.start(feynman_kac.device)
        every = look_every(feynman_kac.num_steps)
        state = start
        for state in self.iterate(
            feynman_kac,
            num_particles=num_particles,
            num_chains=num_chains,
            seed=seed,
            records=records,
            start=start,
            capture=capture,
        ):
            if progress is not None and (state.step % every == 0 or state.step == state.num_steps):
                faults.check(state, feynman_kac)
                progress(state)
            if keeper is not None and keeper.due(state):
                faults.check(state, feynman_kac)
                keeper.keep(state)
        assert state is not None
        faults.check(state, feynman_kac)
        return FilterResult.of(state, self)

    def iterate(
        self,
        feynman_kac: FeynmanKac,
        *,
        num_particles: int,
        num_chains: int = 1,
        seed: int = 0,
        records: Records | None = None,
        start: FilterState | None = None,
        capture: Capture | None = None,
    ) -> Iterator[FilterState]:
        """Yield the state after the initial move and after each step, or after each step that follows ``start``.

        Faults are kept in the states and not raised: see :func:`smcdiff.smc.faults.check`. Arguments as for
        :meth:`run`.
        """
        numbers = Numbers(num_particles, num_chains, seed, records)
        numbers.check(feynman_kac)
        if start is not None:
            _check_start(start, feynman_kac, numbers)
        if capture is not None:
            capture.bind(feynman_kac, self)
        generator = torch.Generator(device=feynman_kac.device)
        generator.manual_seed(seed)

        def draw(state: FilterState, generator: torch.Generator) -> Tensor:
            return self.resampler(state.w, generator)

        steps = Steps(feynman_kac, draw, self.ess_threshold, numbers.kept, capture)
        return steps.iterate(num_chains, num_particles, generator, start)


def _check_start(start: FilterState, feynman_kac: FeynmanKac, numbers: Numbers) -> None:
    got = (start.num_steps, start.num_chains, start.num_particles)
    expected = (feynman_kac.num_steps, numbers.num_chains, numbers.num_particles)
    if got != expected:
        raise ValueError(
            f"got a start with (steps, chains, particles) = {got}; this run has {expected}: go on with the model and "
            "numbers that the start was made with, or leave start out"
        )
    last, records = start.history[-1], numbers.kept
    kept = (set(last.summaries), last.log_w is not None, start.step > 0 and last.ancestors is not None)
    if kept != (set(records.summaries), records.log_weights, start.step > 0 and records.ancestors):
        raise ValueError("got a start that kept other records than this run's; give the Records of the run it is from")
