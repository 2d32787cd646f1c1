r"""Markov chains on a program's posterior whose every move is a particle filter.

- :class:`ParticleGibbs` keeps one whole reverse path of each chain and replaces it by conditional SMC: the exact
  posterior stays invariant for any number of particles from two on, so that sweeps improve what one filter with too
  few particles got wrong, and R-hat and effective sample sizes over sweeps mean what they mean for any MCMC.
- :class:`MarginalMH` moves some of the latents, such as a noise level or the width of a point-spread function, by
  Metropolis-Hastings on the filter's unbiased evidence, and draws the others along.

References:
    C. Andrieu, A. Doucet, R. Holenstein, "Particle Markov chain Monte Carlo methods", Journal of the Royal Statistical
    Society B 72 (2010).
    F. Lindsten, M. I. Jordan, T. B. Schon, "Particle Gibbs with ancestor sampling" (2014), arXiv 1401.0604.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.diagnostics.provenance import describe, references, versions, write_references
from smcdiff.guidance.base import Method
from smcdiff.guidance.batching import max_batch_of_run
from smcdiff.guidance.deferred import WeighsAtTheEnd
from smcdiff.guidance.potentials import Steers
from smcdiff.guidance.predictive import Call
from smcdiff.guidance.program import Program
from smcdiff.guidance.time_travel import Travels
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.infer import predictive_groups
from smcdiff.smc import FilterError, ParticleFilter, Records, faults
from smcdiff.smc.conditional import ConditionalSMC, Past
from smcdiff.smc.marginal_metropolis import MarginalMetropolis

__all__ = ["MarginalMH", "ParticleGibbs"]


class ParticleGibbs:
    """Particle Gibbs on a Pyro program: x*_{K:0} -> conditional SMC -> x*_{K:0}.

    Args:
        kernel: a method applied to the program.
        num_particles: n, of one sweep, the kept path included; at least 2.
        num_sweeps: sweeps that are kept.
        num_chains: independent chains, run side by side.
        warmup: sweeps before the first one that is kept.
        moves: how a sweep resamples and chooses the past of its path; ancestor sampling by default.
        max_batch: largest number of particles put through the network at once; None takes what fits into half of the
            memory that is free when the run begins. The result does not depend on it, up to rounding and the tolerance
            of a method's solver.
        seed: of all the noise; None takes one from torch's global generator.
        progress: show a progress bar.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        kernel: Method,
        num_particles: int,
        num_sweeps: int,
        num_chains: int = 1,
        *,
        warmup: int = 0,
        moves: ConditionalSMC = ConditionalSMC(),  # noqa: B008 (immutable)
        max_batch: int | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        least = {"num_particles": 2, "num_sweeps": 1, "num_chains": 1, "warmup": 0}
        got = {"num_particles": num_particles, "num_sweeps": num_sweeps, "num_chains": num_chains, "warmup": warmup}
        _check(got, least)
        self.kernel, self.num_particles = kernel, num_particles
        self.num_sweeps, self.num_chains = num_sweeps, num_chains
        self._warmup, self._moves, self._max_batch = warmup, moves, max_batch
        self._seed, self._progress = seed, progress
        self._done: _Chains | None = None

    def run(self, *args: Any, **kwargs: Any) -> ParticleGibbs:
        """Condition the program on these arguments and run; returns itself. The first path is a plain filter's."""
        _check_method(self.kernel)
        program = Program(self.kernel.model, args, kwargs)
        model = TwistedModel(program, self.kernel, max_batch_of_run(self._max_batch, program, self.kernel))
        if self._moves.past is not Past.TRACED:
            model.check_past()
        seed, generator = _generator(self._seed, program)
        path = self._moves.first(model, self.num_particles, self.num_chains, generator)
        kept: list[dict[str, Tensor]] = []
        for sweep in tqdm(range(self._warmup + self.num_sweeps), unit="sweep", disable=not self._progress, leave=False):
            path = self._moves.update(model, path, self.num_particles, generator)
            if sweep >= self._warmup:
                kept.append({name: path[-1][name][:, 0] for name in program.latents})
        states = {name: torch.stack([draw[name] for draw in kept], 1).flatten(0, 1) for name in program.latents}
        self._done = _Chains(
            call=Call(self.kernel.model, args, kwargs, program),
            states=states,
            shape=(self.num_chains, self.num_sweeps),
            seed=seed,
            max_batch=self._max_batch,
            about={"num_particles": self.num_particles, "warmup": self._warmup, **_about(self.kernel, self._moves)},
        )
        return self

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws, {site: (chains * sweeps, *event)}, or (chains, sweeps, *event) grouped by chain, as Pyro's MCMC."""
        return _finished(self._done).draws(group_by_chain)

    def to_arviz(self, *, posterior_predictive: bool = False, prior: int = 0) -> Any:
        """The draws as an ArviZ object; arguments as for :meth:`smcdiff.SMC.to_arviz`."""
        return _finished(self._done).to_arviz(posterior_predictive, prior)


class MarginalMH:
    """Particle-marginal Metropolis-Hastings on some latents of a Pyro program, the others drawn by the filter.

    The moved latents are carried as standard normal noise, so that their own priors, bounded or not, need no care.

    Args:
        kernel: a method applied to the program.
        sites: the latents to move; none of them a diffusion prior, none with a prior that depends on another latent
            that is not moved.
        num_particles: n, of each filter; enough that the evidence varies by about a nat.
        num_steps: proposals that are kept.
        num_chains: independent chains, run side by side.
        warmup: proposals before the first one that is kept.
        step_size: standard deviation of the random walk in the noise, positive.
        filter: how particles are resampled.
        max_batch: largest number of particles put through the network at once; None takes what fits into half of the
            memory that is free when the run begins. The result does not depend on it, up to rounding and the tolerance
            of a method's solver.
        seed: of all the noise; None takes one from torch's global generator.
        progress: show a progress bar.

    Raises:
        FilterError: at :meth:`run`, for a chain that has come to no possible values of its sites within the warm-up. A
            proposal at which all particles have zero weight is rejected.
        TypeError: for a filter over several processes.
        ValueError: for numbers out of range, or, at :meth:`run`, for sites that cannot be moved.
    """

    def __init__(
        self,
        kernel: Method,
        sites: list[str],
        num_particles: int,
        num_steps: int,
        num_chains: int = 1,
        *,
        warmup: int = 0,
        step_size: float = 0.5,
        filter: ParticleFilter = ParticleFilter(),  # noqa: B008 (immutable)
        max_batch: int | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        least = {"num_particles": 1, "num_steps": 1, "num_chains": 1, "warmup": 0}
        got = {"num_particles": num_particles, "num_steps": num_steps, "num_chains": num_chains, "warmup": warmup}
        _check(got, least)
        if not isinstance(filter, ParticleFilter):
            raise TypeError(
                f"got a filter of type {type(filter).__name__}; MarginalMH runs on one process and takes a "
                "ParticleFilter. Spread independent chains by starting several"
            )
        self.kernel, self.sites, self.num_particles = kernel, sites, num_particles
        self.num_steps, self.num_chains = num_steps, num_chains
        self._warmup, self._step_size, self._filter, self._max_batch = warmup, step_size, filter, max_batch
        self._seed, self._progress = seed, progress
        self._done: _Chains | None = None
        #: Share of proposals accepted after the warm-up, per chain, (b,).
        self.acceptance: Tensor | None = None

    def run(self, *args: Any, **kwargs: Any) -> MarginalMH:
        """Condition the program on these arguments and run from draws of the prior; returns itself."""
        _check_method(self.kernel)
        program = Program(self.kernel.model, args, kwargs)
        unknown = [site for site in self.sites if site not in program.latents or program.latents[site].is_diffusion]
        if unknown or not self.sites:
            known = [name for name, latent in program.latents.items() if not latent.is_diffusion]
            raise ValueError(f"got the sites {self.sites} to move; expected some of the program's latents {known}")
        shapes, n = {site: program.latents[site].chain.shape for site in self.sites}, self.num_particles

        def held(theta: Tensor) -> dict[str, Tensor]:
            parts = theta.split([shape.numel() for shape in shapes.values()], -1)
            return {site: part.reshape(-1, *shape) for (site, shape), part in zip(shapes.items(), parts, strict=True)}

        def estimate(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            inner = TwistedModel(Program(self.kernel.model, args, kwargs, held(theta)), self.kernel, max_batch)
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            light = Records(ancestors=False)
            states = self._filter.iterate(inner, num_particles=n, num_chains=len(theta), seed=seed, records=light)
            last = deque(states, maxlen=1).pop()
            faults.check(last, inner, zero_allowed=True)
            if not inner.has_density:
                raise ValueError(
                    f"got {type(self.kernel).__name__}, whose last step is a point mass and has no evidence to accept "
                    "by; give the prior variance='optimal', or take another method"
                )
            impossible = faults.all_zero(last)  # theta without a weighted particle: an estimate of zero
            index = torch.multinomial(last.w.masked_fill(impossible[:, None], 1.0), 1, generator=generator)[:, 0]
            chain = torch.arange(len(theta), device=index.device)
            kept = {name: last.particles[name][chain, index] for name in program.latents}
            return last.log_z.masked_fill(impossible, -torch.inf), kept

        seed, generator = _generator(self._seed, program)
        size = sum(shape.numel() for shape in shapes.values())
        medians = held(torch.zeros(1, size, dtype=program.dtype, device=program.device))
        max_batch = max_batch_of_run(self._max_batch, Program(self.kernel.model, args, kwargs, medians), self.kernel)
        noise: dict[str, Any] = {"dtype": program.dtype, "device": program.device, "generator": generator}
        moves = MarginalMetropolis(estimate, self._step_size)
        state = moves.first(torch.randn(self.num_chains, size, **noise), generator)
        kept, accepted, log_z = [], [], []
        for step in tqdm(range(self._warmup + self.num_steps), unit="step", disable=not self._progress, leave=False):
            state = moves.update(state, generator)
            if step >= self._warmup:
                kept.append(state.kept)
                accepted.append(state.accepted)
                log_z.append(state.log_z)
        never = (torch.stack(log_z) == -torch.inf).any(0).nonzero().flatten().tolist()
        if never:
            raise FilterError(
                f"all weights were zero at every proposal of the warm-up in chains {never} of {self.num_chains}, so "
                f"they have found no possible values of {self.sites}; use a longer warm-up, more particles or another "
                "step_size, and check that the measurement is possible under the model"
            )
        self.acceptance = torch.stack(accepted).double().mean(0)
        states = {name: torch.stack([draw[name] for draw in kept], 1).flatten(0, 1) for name in program.latents}
        self._done = _Chains(
            call=Call(self.kernel.model, args, kwargs, program),
            states=states,
            shape=(self.num_chains, self.num_steps),
            seed=seed,
            max_batch=self._max_batch,
            about={"num_particles": self.num_particles, "warmup": self._warmup, **_about(self.kernel, self._filter)},
            sample_stats={"accepted": torch.stack(accepted, 1), "log_z": torch.stack(log_z, 1)},
        )
        return self

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws, {site: (chains * steps, *event)}, or (chains, steps, *event) grouped by chain, as Pyro's MCMC."""
        return _finished(self._done).draws(group_by_chain)

    def to_arviz(self, *, posterior_predictive: bool = False, prior: int = 0) -> Any:
        """The draws as an ArviZ object; arguments as for :meth:`smcdiff.SMC.to_arviz`."""
        return _finished(self._done).to_arviz(posterior_predictive, prior)


@dataclass(frozen=True)
class _Chains:
    """Finished Markov chains on a program: chain states of the latents, (chains * draws, *shape), and what they are."""

    call: Call
    states: dict[str, Tensor]
    shape: tuple[int, int]
    seed: int
    max_batch: int | None
    about: dict[str, int | str]
    sample_stats: dict[str, Tensor] = field(default_factory=dict)

    def draws(self, group_by_chain: bool) -> dict[str, Tensor]:
        values = self.call.program.values(self.states)
        return self._by_chain(values) if group_by_chain else values

    def to_arviz(self, posterior_predictive: bool, prior: int) -> Any:
        from smcdiff.diagnostics.arviz import to_arviz
        from smcdiff.diagnostics.export import chain_groups

        program, posterior = self.call.program, self.draws(group_by_chain=True)
        with torch.no_grad():
            log_likelihood = self._by_chain(program.pointwise(self.states))
        drawn = posterior if posterior_predictive else {}
        groups = {
            "posterior": posterior,
            "sample_stats": self.sample_stats,
            "log_likelihood": log_likelihood,
            "observed_data": program.observed,
            "constant_data": self.call.constants(),
            **predictive_groups(self.call, self.seed, drawn, prior, self.max_batch),
        }
        return to_arviz(chain_groups(groups, {**self.about, "seed": self.seed, **versions()}))

    def _by_chain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.unflatten(0, self.shape) for name, value in values.items()}


def _finished(done: _Chains | None) -> _Chains:
    if done is None:
        raise RuntimeError("this chain has not run yet; call run with the program's arguments first")
    return done


def _about(kernel: Method, moves: object) -> dict[str, str]:
    return {
        "method": describe(kernel),
        "moves": describe(moves),
        "references": write_references(references(kernel, moves)),
    }


def _generator(seed: int | None, program: Program) -> tuple[int, torch.Generator]:
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    return seed, torch.Generator(program.device).manual_seed(seed)


def _check_method(kernel: Method) -> None:
    """Refuse methods that are more than a twist and a proposal.

    Raises:
        ValueError: for jumps in time, potentials of a particle's past, or weights at the end.
    """
    travels = isinstance(kernel, Travels) and kernel.travel is not None
    at_the_end = isinstance(kernel, WeighsAtTheEnd) and kernel.weighs_at_the_end
    if travels or at_the_end or isinstance(kernel, Steers):
        raise ValueError(
            f"got {type(kernel).__name__}, which jumps in time or weighs particles by their past; a Markov chain's "
            "moves need a twist and a proposal alone. Use sd.Adapted, sd.TDS or another such method"
        )


def _check(got: dict[str, int], least: dict[str, int]) -> None:
    for name, value in got.items():
        if not isinstance(value, int) or value < least[name]:
            raise ValueError(f"got {name} {value!r}; expected an integer of at least {least[name]}")
