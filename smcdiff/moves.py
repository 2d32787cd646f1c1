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

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.guidance.base import Method
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from smcdiff.smc.conditional import ConditionalSMC
from smcdiff.smc.marginal_metropolis import MarginalMetropolis
from smcdiff.smc.weights import normalise

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
        max_batch: largest number of particles put through the network at once.
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
        self._samples: dict[str, Tensor] | None = None

    def run(self, *args: Any, **kwargs: Any) -> ParticleGibbs:
        """Condition the program on these arguments and run; returns itself. The first path is a plain filter's."""
        program = Program(self.kernel.model, args, kwargs)
        model = TwistedModel(program, self.kernel, self._max_batch)
        generator = _generator(self._seed, program)
        path = self._moves.first(model, self.num_particles, self.num_chains, generator)
        kept: list[dict[str, Tensor]] = []
        for sweep in tqdm(range(self._warmup + self.num_sweeps), unit="sweep", disable=not self._progress, leave=False):
            path = self._moves.update(model, path, self.num_particles, generator)
            if sweep >= self._warmup:
                kept.append({name: path[-1][name][:, 0] for name in program.latents})
        states = {name: torch.stack([draw[name] for draw in kept], 1).flatten(0, 1) for name in program.latents}
        shape = (self.num_chains, self.num_sweeps)
        self._samples = {name: value.unflatten(0, shape) for name, value in program.values(states).items()}
        return self

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws, {site: (chains * sweeps, *event)}, or (chains, sweeps, *event) grouped by chain, as Pyro's MCMC."""
        return _draws(self._samples, group_by_chain)


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
        max_batch: largest number of particles put through the network at once.
        seed: of all the noise; None takes one from torch's global generator.
        progress: show a progress bar.

    Raises:
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
        self.kernel, self.sites, self.num_particles = kernel, sites, num_particles
        self.num_steps, self.num_chains = num_steps, num_chains
        self._warmup, self._step_size, self._filter, self._max_batch = warmup, step_size, filter, max_batch
        self._seed, self._progress = seed, progress
        self._samples: dict[str, Tensor] | None = None
        #: Share of proposals accepted after the warm-up, per chain, (b,).
        self.acceptance: Tensor | None = None

    def run(self, *args: Any, **kwargs: Any) -> MarginalMH:
        """Condition the program on these arguments and run from draws of the prior; returns itself."""
        program = Program(self.kernel.model, args, kwargs)
        unknown = [site for site in self.sites if site not in program.latents or program.latents[site].is_diffusion]
        if unknown or not self.sites:
            known = [name for name, latent in program.latents.items() if not latent.is_diffusion]
            raise ValueError(f"got the sites {self.sites} to move; expected some of the program's latents {known}")
        shapes = {site: program.latents[site].chain.shape for site in self.sites}

        def held(theta: Tensor) -> dict[str, Tensor]:
            parts = theta.split([shape.numel() for shape in shapes.values()], -1)
            return {site: part.reshape(-1, *shape) for (site, shape), part in zip(shapes.items(), parts, strict=True)}

        def estimate(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            inner = TwistedModel(Program(self.kernel.model, args, kwargs, held(theta)), self.kernel, self._max_batch)
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            result = self._filter.run(inner, num_particles=self.num_particles, num_chains=len(theta), seed=seed)
            index = torch.multinomial(normalise(result.log_w), 1, generator=generator)[:, 0]
            chain = torch.arange(len(theta), device=index.device)
            return result.log_z, {name: result.particles[name][chain, index] for name in program.latents}

        generator = _generator(self._seed, program)
        size = sum(shape.numel() for shape in shapes.values())
        noise: dict[str, Any] = {"dtype": program.dtype, "device": program.device, "generator": generator}
        moves = MarginalMetropolis(estimate, self._step_size)
        state = moves.first(torch.randn(self.num_chains, size, **noise), generator)
        kept, accepted = [], []
        for step in tqdm(range(self._warmup + self.num_steps), unit="step", disable=not self._progress, leave=False):
            state = moves.update(state, generator)
            if step >= self._warmup:
                kept.append(state.kept)
                accepted.append(state.accepted)
        self.acceptance = torch.stack(accepted).double().mean(0)
        states = {name: torch.stack([draw[name] for draw in kept], 1).flatten(0, 1) for name in program.latents}
        shape = (self.num_chains, self.num_steps)
        self._samples = {name: value.unflatten(0, shape) for name, value in program.values(states).items()}
        return self

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws, {site: (chains * steps, *event)}, or (chains, steps, *event) grouped by chain, as Pyro's MCMC."""
        return _draws(self._samples, group_by_chain)


def _draws(samples: dict[str, Tensor] | None, group_by_chain: bool) -> dict[str, Tensor]:
    if samples is None:
        raise RuntimeError("this chain has not run yet; call run with the program's arguments first")
    return samples if group_by_chain else {name: value.flatten(0, 1) for name, value in samples.items()}


def _generator(seed: int | None, program: Program) -> torch.Generator:
    return torch.Generator(program.device).manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def _check(got: dict[str, int], least: dict[str, int]) -> None:
    for name, value in got.items():
        if not isinstance(value, int) or value < least[name]:
            raise ValueError(f"got {name} {value!r}; expected an integer of at least {least[name]}")
