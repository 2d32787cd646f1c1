"""The front door: run a method on a Pyro program and read its posterior, in the manner of ``pyro.infer.MCMC``.

One run may take several processes, which share its chains or its particles; each of them then holds the whole result.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.diagnostics.provenance import describe, references, versions, write_references
from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.weights import entropy
from smcdiff.guidance.base import Method
from smcdiff.guidance.batching import max_batch_of_run
from smcdiff.guidance.deferred import DeferredModel, WeighsAtTheEnd
from smcdiff.guidance.potentials import Steers, with_potential
from smcdiff.guidance.predictive import Call
from smcdiff.guidance.program import Program
from smcdiff.guidance.time_travel import TravellingModel, with_travel
from smcdiff.guidance.twisted import POINT_MASS, Evaluations, TwistedModel
from smcdiff.smc import FeynmanKac, FilterResult, FilterState, History, ParticleFilter, Records
from smcdiff.smc.checkpoint import Checkpoint, digest
from smcdiff.smc.distributed import ChainsOverRanks, ChainsResult, OfWeights, ParticlesOverRanks, reading_particles
from smcdiff.smc.evidence import evidence_variance
from smcdiff.smc.genealogy import surviving_roots
from smcdiff.smc.ranks import Ranks

if TYPE_CHECKING:
    from smcdiff.diagnostics.groups import Group
    from smcdiff.diagnostics.verdict import Diagnostics

__all__ = ["SMC", "WeightedSamples"]

_WITHOUT_DENSITY = (
    "the method's last step is a point mass, as published: the draws are the sampler's own and carry no evidence. Give "
    "the prior variance='optimal', or take more than one particle, for an exact correction"
)
_TRAVELLED = (
    "the method jumps back in time, as published: the draws are the sampler's own and carry no evidence. Leave the "
    "jumps out for an exact correction"
)


@dataclass(frozen=True)
class WeightedSamples:
    """The particles of a run with their pooled weights.

    Args:
        values: {site: (b, n, *event)}, latents and deterministic sites in the program's own units.
        log_w: (b, n), float64: log-weights over all chains, each chain by its share of the evidence; logsumexp = 0.
    """

    values: dict[str, Tensor]
    log_w: Tensor


class SMC:
    """Sequential Monte Carlo on a Pyro program.

    With ``filter=ChainsOverRanks()`` or ``ParticlesOverRanks()`` the processes of ``torchrun`` share a run: each makes
    the same calls, and each holds the posterior of all chains and particles after :meth:`run`. Nothing after it needs
    the others, so one process may write files while the rest goes on. Over NCCL each process first sets its own GPU,
    ``torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))``.

    Args:
        kernel: a method applied to the program, such as ``sd.TDS(model)``.
        num_particles: n, particles of one chain, resampled among each other.
        num_chains: b, independent particle systems; pooled by their evidence.
        filter: how particles are resampled, and when; and over which processes they are spread.
        max_batch: largest number of particles put through the network at once; None takes what fits into half of the
            free memory. The result does not depend on it.
        seed: of all the noise; None takes one from torch's global generator, which ``pyro.set_rng_seed`` sets, that of
            rank 0 on several processes.
        records: what to keep of the steps; the entropy of the weights is added to its summaries.
        progress: show a progress bar, on rank 0 alone.
        checkpoint: a file to keep the run in; if the same run is kept there already, it goes on from where it stood, to
            the same result. Needs a seed. Each of several processes keeps files of its own, with ``.rank<r>`` and
            ``.a`` or ``.b`` in the name.
        checkpoint_seconds, checkpoint_steps: how often, by the clock and by steps of the chain; None for never.

    Raises:
        TypeError: for a filter that is none of the three.
        ValueError: for numbers of particles or chains below 1, a checkpoint without a seed or with intervals that are
            not positive or both None, or, on several processes, summaries in ``records`` that are not
            :class:`~smcdiff.smc.distributed.OfWeights`.
    """

    def __init__(
        self,
        kernel: Method,
        num_particles: int,
        num_chains: int = 1,
        *,
        filter: ParticleFilter | ChainsOverRanks | ParticlesOverRanks = ParticleFilter(),  # noqa: B008 (immutable)
        max_batch: int | None = None,
        seed: int | None = None,
        records: Records = Records(),  # noqa: B008 (immutable)
        progress: bool = True,
        checkpoint: Path | str | None = None,
        checkpoint_seconds: float | None = 60.0,
        checkpoint_steps: int | None = None,
    ) -> None:
        if checkpoint is not None and seed is None:
            raise ValueError("got a checkpoint without a seed; a run can only be continued if its seed is known")
        for name, value in (("num_particles", num_particles), ("num_chains", num_chains)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"got {name} {value!r}; expected an integer of at least 1")
        _check_filter(filter, records)
        self.kernel, self.num_particles, self.num_chains = kernel, num_particles, num_chains
        self._filter, self._max_batch, self._seed = filter, max_batch, seed
        self._records = replace(records, summaries={"entropy": OfWeights(entropy), **records.summaries})
        self._progress = progress
        self._checkpoint = (
            None if checkpoint is None else Checkpoint(checkpoint, {}, checkpoint_seconds, checkpoint_steps)
        )
        self._finished: _Finished | None = None

    def run(self, *args: Any, **kwargs: Any) -> SMC:
        """Condition the program on these arguments, measurements among them, and run; returns itself.

        Raises:
            ValueError, TypeError: for a program or a measurement that cannot be run, or numbers that the processes
                cannot share, before any work is done.
            FilterError: for a run whose result cannot stand, naming step, chain, fault and remedy.
            RankError: if another process failed, died, did not answer in time or was given another program,
                measurement or number.
            RuntimeError: for a filter over ranks where ``torch.distributed`` was not initialised.
        """
        with self._processes() as ranks:
            program = Program(self.kernel.model, args, kwargs)
            model = TwistedModel(
                program, self.kernel, max_batch_of_run(self._max_batch, program, self.kernel, ranks.count)
            )
            path = _path(model, self.kernel, self.num_particles)
            kept = self._kept(program)
            seed = int(torch.randint(2**62, ())) if self._seed is None else self._seed
            if ranks.count > 1:
                ranks.agree(_fingerprint(self.kernel, program, kept), "programs, measurements or checkpoints")
                self._check_shares(ranks)
                first = int(ranks.gather(torch.tensor(seed))[0])
                seed = first if self._seed is None else seed
            hidden = not self._progress or ranks.rank > 0
            with tqdm(total=path.num_steps, unit="step", disable=hidden, leave=False) as bar:

                def progress(state: FilterState) -> None:
                    bar.update(state.step - bar.n)
                    ess, log_z = float(state.ess.mean()), float(state.log_z.mean())
                    bar.set_postfix(ess=f"{ess:.1f}/{self.num_particles}", log_z=f"{log_z:.5g}")

                here = self._filter.run(
                    path,
                    num_particles=self.num_particles,
                    num_chains=self.num_chains,
                    seed=seed,
                    records=self._records,
                    progress=progress,
                    checkpoint=kept,
                )
            result = here if isinstance(here, FilterResult) else here.whole(ranks, program.latents)
            carried = here.local.particles if isinstance(here, ChainsResult) else here.particles
            pointed = not model.has_density or POINT_MASS in carried
            counts = torch.tensor([model.evaluations.forward, model.evaluations.backward, pointed])
            forward, backward, without = ranks.gather(counts).sum(0).tolist()
        log_z = torch.full_like(result.log_z, torch.nan) if without else result.log_z
        pooled = result.w.log() + (torch.zeros_like(log_z) if without else log_z)[:, None]
        states = {name: result.particles[name] for name in program.latents}
        ancestors, resampled = result.records.ancestors, result.records.resampled
        itself = torch.arange(self.num_particles, device=program.device).expand(1, self.num_chains, -1)
        call = Call(self.kernel.model, args, kwargs, program)
        self._finished = _Finished(
            call=call,
            evaluations=Evaluations(forward, backward),
            history=result.records,
            seed=seed,
            run=Run(
                values=self._in_chunks(program.values, states),
                log_w=pooled,
                log_z=log_z,
                ess=result.records.ess,
                log_z_path=result.records.log_z,
                roots=None if ancestors is None else surviving_roots(ancestors),
                entropy=result.records.summaries["entropy"],
                resampled=torch.cat([resampled.new_zeros(1, self.num_chains), resampled]),
                ancestors=None if ancestors is None else torch.cat([itself, ancestors]),
                log_z_variance=None if without else _variance_of_one_run(result),
                log_likelihood=self._in_chunks(program.pointwise, states),
                observed=program.observed,
                constants=call.constants(),
                about={
                    "method": describe(self.kernel),
                    "filter": describe(self._filter),
                    "num_steps": program.num_steps,
                    "seed": seed,
                    "device": str(program.device),
                    "dtype": str(program.dtype),
                    "network_evaluations_forward": forward,
                    "network_evaluations_backward": backward,
                    "processes": ranks.count,
                    **versions(),
                    "references": write_references(references(self.kernel, self._filter)),
                },
            ),
        )
        if without:
            warnings.warn(_TRAVELLED if isinstance(path, TravellingModel) else _WITHOUT_DENSITY, stacklevel=2)
        return self

    def get_samples(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """Equally weighted draws from the posterior, {site: (draws, *event)}: pooled over chains by their evidence.

        Args:
            num_samples: number of draws; as many as there are particles by default. Draws that come from one particle
                are copies of each other, and stand next to each other.
        """
        run, seed = self._done.run, self._done.seed
        count = num_samples or run.log_w.numel()
        generator = torch.Generator(run.log_w.device).manual_seed(seed)
        w = run.log_w.exp().flatten()
        comb = (torch.arange(count, device=w.device) + torch.rand((), generator=generator, device=w.device)) / count
        index = torch.searchsorted(w.cumsum(0), comb.to(w.dtype) * w.sum()).clamp(max=len(w) - 1)
        return {name: value.flatten(0, 1)[index] for name, value in run.values.items()}

    def weighted_samples(self) -> WeightedSamples:
        """All particles with their pooled log-weights."""
        run = self._done.run
        return WeightedSamples(dict(run.values), run.log_w)

    @property
    def log_evidence(self) -> Tensor:
        """log p(y) of the program, pooled over chains: log of the mean of exp(log_z). 0-d, float64, in nats."""
        log_z = self._done.run.log_z
        return log_z.logsumexp(0) - log_z.new_tensor(len(log_z)).log()

    @property
    def log_evidence_per_chain(self) -> Tensor:
        """log p(y) as each chain estimates it, (b,), float64, in nats. exp of it is unbiased, chain by chain."""
        return self._done.run.log_z

    @property
    def posterior(self) -> Run:
        """The run as plain tensors: particles, weights, evidence, pointwise log-likelihood."""
        return self._done.run

    @property
    def records(self) -> History:
        """What was kept of the steps: effective sample sizes, evidence, ancestors."""
        return self._done.history

    @property
    def network_evaluations(self) -> tuple[int, int]:
        """Evaluations of the denoisers forward and backward, counted per particle, over all processes."""
        count = self._done.evaluations
        return count.forward, count.backward

    def diagnostics(self) -> Diagnostics:
        """Effective sample sizes, Pareto k-hat, surviving roots, evidence per chain, and a verdict with its reasons."""
        from smcdiff.diagnostics.verdict import diagnose

        return diagnose(self._done.run)

    def summary(self) -> str:
        """A table of the latent sites, and the diagnostics below it, as text."""
        from smcdiff.diagnostics.summary import summarise

        return summarise(self._done.run)

    def to_arviz(self, *, posterior_predictive: bool = False, prior: int = 0) -> Any:
        """The run as an ArviZ object: InferenceData on ArviZ 0.23, DataTree on ArviZ 1.

        Args:
            posterior_predictive: draw a new measurement for every draw of the posterior as well; this runs the program
                once for each of them.
            prior: draw so many latents from the prior, and a measurement for each, as well; this runs the reverse
                chains of the diffusion priors from their beginning.
        """
        from smcdiff.diagnostics.arviz import to_arviz

        return to_arviz(self._groups(posterior_predictive, prior))

    def save(self, path: Path | str, *, posterior_predictive: bool = False, prior: int = 0) -> None:
        """Write the run to a netCDF file, which ``smcdiff report`` and ``arviz.from_netcdf`` read.

        Arguments as for :meth:`to_arviz`.
        """
        from smcdiff.diagnostics.arviz import write

        write(self._groups(posterior_predictive, prior), Path(path))

    def _groups(self, posterior_predictive: bool, prior: int) -> dict[str, Group]:
        from smcdiff.diagnostics.export import run_groups, take

        done = self._done
        draws = {name: take(value, done.run.equal_draws()) for name, value in done.run.values.items()}
        more = predictive_groups(done.call, done.seed, draws if posterior_predictive else {}, prior, self._max_batch)
        return run_groups(done.run, more)

    def _kept(self, program: Program) -> Checkpoint | None:
        if self._checkpoint is None:
            return None
        return replace(self._checkpoint, identity=_identity(self.kernel, program))

    def _processes(self) -> AbstractContextManager[Ranks]:
        """The processes of a run, connected until it is over."""
        if isinstance(self._filter, ParticleFilter):
            return nullcontext(Ranks(None))
        return Ranks.open(self._filter.time_limit)

    def _check_shares(self, ranks: Ranks) -> None:
        """See that chains or particles can be shared among the processes."""
        over_chains = isinstance(self._filter, ChainsOverRanks)
        name, number = ("num_chains", self.num_chains) if over_chains else ("num_particles", self.num_particles)
        # a method may leave out the weight of a single particle, as it does where one process is alone
        least = 1 if over_chains or ranks.count == 1 else 2
        if number % ranks.count or number < least * ranks.count:
            raise ValueError(
                f"got {name} = {number} on {ranks.count} processes with {type(self._filter).__name__}; expected a "
                f"multiple of the processes, at least {least} for each"
            )

    @property
    def _done(self) -> _Finished:
        if self._finished is None:
            raise RuntimeError("this SMC has not run yet; call run with the program's arguments first")
        return self._finished

    def _in_chunks(self, function: Any, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """``function`` of flattened particles, chunk by chunk, with the chains put back in front."""
        flat = {name: state.flatten(0, 1) for name, state in states.items()}
        total = self.num_chains * self.num_particles
        size = self._max_batch or total
        with torch.no_grad():
            parts = [
                function({name: state[start : start + size] for name, state in flat.items()})
                for start in range(0, total, size)
            ]
        shape = (self.num_chains, self.num_particles)
        return {name: torch.cat([part[name] for part in parts]).unflatten(0, shape) for name in parts[0]}


def predictive_groups(
    call: Call, seed: int, draws: dict[str, Tensor], prior: int, max_batch: int | None
) -> dict[str, dict[str, Tensor]]:
    """The groups of an ArviZ object that cost draws from the program.

    Args:
        call: the program.
        seed: of the run; the draws here have seeds of their own, which follow from it.
        draws: of the posterior, {site: (chains, draws, *event)}, to draw a measurement for each; {} for none.
        prior: number of draws from the prior; 0 for none.
        max_batch: largest number of particles put through the network at once.

    Raises:
        ValueError: for a negative number of draws.
    """
    if not isinstance(prior, int) or prior < 0:
        raise ValueError(f"got prior {prior!r}; expected a number of draws, 0 for none")
    groups = {}
    if draws:
        shape = next(iter(draws.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in draws.items()}
        drawn = call.measurements(flat, (seed + 1) % 2**62)
        groups["posterior_predictive"] = {name: value.unflatten(0, shape) for name, value in drawn.items()}
    if prior:
        values = call.prior(prior, (seed + 2) % 2**62, max_batch)
        measured = call.measurements(values, (seed + 3) % 2**62)
        groups["prior"] = {name: value[None] for name, value in values.items()}
        groups["prior_predictive"] = {name: value[None] for name, value in measured.items()}
    return groups


def _check_filter(filter: object, records: Records) -> None:
    if isinstance(filter, ParticleFilter):
        return
    if not isinstance(filter, ChainsOverRanks | ParticlesOverRanks):
        raise TypeError(
            f"got filter {describe(filter)}; expected a ParticleFilter, or ChainsOverRanks or ParticlesOverRanks with "
            "one. Conditional moves are made by ParticleGibbs"
        )
    if names := reading_particles(records):
        raise ValueError(
            f"got the summaries {names} with {type(filter).__name__}; a process sees its own particles alone, so only "
            "summaries that are OfWeights are kept. Leave them out, or run on one process"
        )


def _fingerprint(kernel: Method, program: Program, checkpoint: Checkpoint | None) -> Tensor:
    """A 0-d integer that hardly ever is the same for another method, prior, network or measurement."""
    data = [part for name, value in program.observed.items() for part in (name, value)]
    words = (str(_identity(kernel, program)), "kept" if checkpoint else "not kept")
    return torch.tensor(int(digest(*words, *data), 16) >> 1)


def _identity(kernel: Method, program: Program) -> dict[str, str]:
    """What a run's result depends on, in words."""
    return {"method": describe(kernel), **program.identity()}


def _variance_of_one_run(result: FilterResult) -> Tensor | None:
    """Variance of log Z of each chain from its own genealogy; None where theory does not cover the run."""
    try:
        return evidence_variance(result)
    except ValueError:
        return None


def _path(model: TwistedModel, kernel: Method, num_particles: int) -> FeynmanKac:
    """The model that a run of the method takes: with its potentials, its jumps, or weights at the end."""
    if isinstance(kernel, Steers):
        return with_potential(model, kernel)
    if isinstance(kernel, WeighsAtTheEnd) and kernel.weighs_at_the_end:
        return DeferredModel(model)
    return with_travel(model, kernel, num_particles)


@dataclass(frozen=True)
class _Finished:
    call: Call
    evaluations: Evaluations
    history: History
    seed: int
    run: Run
