r"""Conditional SMC: a Markov kernel on whole paths that leaves the law of a Feynman-Kac model as it was.

One particle, number 0, is made to follow a reference path x*_{0:K}; the other n - 1 are moved, weighed and resampled
around it, and a path is chosen among all at the end. If the reference has the model's law, so has the chosen path, for
any n, and a chain of such updates (particle Gibbs) converges to that law although every update uses few particles.

After resampling, coalescence would tie the chosen path to the reference at early steps. Two remedies use the density of
a transition, through gamma_i(x_{i-1}, x_i) = M_i(x_i | x_{i-1}) G_i(x_{i-1}, x_i):

- *ancestor sampling*: at each resampling the reference gets a new past, x_{i-1}^j with probability proportional to
  w_{i-1}^j gamma_i(x_{i-1}^j, x*_i); the ancestors of the others are then drawn given this one;
- *backward sampling*: the chosen path is redrawn from its end, x_{i-1}^j with probability proportional to
  w_{i-1}^j gamma_i(x_{i-1}^j, x_i), whether or not the chain was resampled there.

Both draw from the exact law of a past given the particles up to i - 1 and the path from i on, all other particles
from i on being integrated out. That law needs of a resampling scheme only that an ancestor is j with probability w^j
once the particles are shuffled, so every scheme here will do.

References:
    C. Andrieu, A. Doucet, R. Holenstein, "Particle Markov chain Monte Carlo methods", Journal of the Royal Statistical
    Society B 72 (2010): conditional SMC.
    F. Lindsten, M. I. Jordan, T. B. Schon, "Particle Gibbs with ancestor sampling", Journal of Machine Learning
    Research 15 (2014), arXiv:1401.0604.
    N. Whiteley, discussion of Andrieu et al. (2010): backward sampling.
    N. Chopin, S. S. Singh, "On particle Gibbs sampling", Bernoulli 21 (2015), arXiv:1304.1887: conditional versions of
    other resampling schemes than multinomial.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from smcdiff.smc import faults
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.integer_weights import cumulative, pick, uniform_below
from smcdiff.smc.records import Records
from smcdiff.smc.resampling import ConditionalResampler, Systematic
from smcdiff.smc.state import FilterState
from smcdiff.smc.steps import Steps, gather
from smcdiff.smc.weights import normalise

__all__ = ["ConditionalFeynmanKac", "ConditionalSMC", "Past", "Path"]

_NO_PAST = (
    "no past for a path: log_transition is NaN or +inf, or -inf for every particle of positive weight, its own parent "
    "among them; look at the density of this step's transition"
)

#: A path of each chain: what its particle carries after each move i = 0 ... K, entries of shape (b, 1, *event).
Path = tuple[Particles, ...]


class ConditionalFeynmanKac(FeynmanKac, Protocol):
    """A Feynman-Kac model that can also say how likely a given move is.

    What a particle carries after move i must be a function of its path x_{0:i}, so that a reference path can be put
    back, and of x_i alone for ancestor or backward sampling, which give the path another past.
    """

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        """log G_i(x_{i-1}, x_i) of given particles, (b, n), exactly as a move would report it.

        Args:
            i: 0 ... K.
            previous: particles after move i - 1, entries (b, n, *event); None for i = 0.
            current: particles after move i, entries (b, n, *event).
        """

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        """log gamma_i = log M_i(x_i | x_{i-1}) + log G_i(x_{i-1}, x_i), up to a function of x_i, (b, n).

        For a guided model that is log p(x_i | x_{i-1}) - log psi_{i-1}(x_{i-1}): the proposal cancels. For a move
        without noise it is 0 where x_{i-1} leads to x_i and -inf elsewhere. Arguments as above, i = 1 ... K.
        """


class Past(Enum):
    """How the past of a path is chosen."""

    TRACED = "traced"  #: by the genealogy as it is: needs no density, mixes badly where paths coalesce
    ANCESTOR_SAMPLED = "ancestor sampled"  #: drawn anew for the reference at each resampling
    BACKWARD_SAMPLED = "backward sampled"  #: drawn anew for the chosen path from its end


@dataclass(frozen=True)
class ConditionalSMC:
    """The conditional SMC kernel: x*_{0:K} -> a path among n particles, one of which follows x*_{0:K}.

    All particles of all steps are held in memory while an update runs: K + 1 times what n particles carry.

    Args:
        resampler: how ancestors are drawn, given one of them.
        past: how the past of a path is chosen.
        ess_threshold: a chain is resampled where its effective sample size is below this share of n; in [0, 1].

    Raises:
        ValueError: for a threshold outside [0, 1].
    """

    resampler: ConditionalResampler = field(default_factory=Systematic)
    past: Past = Past.ANCESTOR_SAMPLED
    ess_threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"got ess_threshold {self.ess_threshold}; it is a share of the particles, in [0, 1]")

    def first(
        self, feynman_kac: ConditionalFeynmanKac, num_particles: int, num_chains: int, generator: torch.Generator
    ) -> Path:
        """A path of each chain from a plain particle filter: somewhere to start from, not yet the model's law.

        Raises:
            FilterError: if a chain had a fault.
        """
        return self._chosen(feynman_kac, feynman_kac, None, num_particles, num_chains, generator)

    def update(
        self, feynman_kac: ConditionalFeynmanKac, reference: Path, num_particles: int, generator: torch.Generator
    ) -> Path:
        """One update of the path of each chain. Synchronises with the host once, at its end.

        Args:
            feynman_kac: the model.
            reference: a path that :meth:`first` or an update returned.
            num_particles: n, the reference included; at least 2, or nothing would move.
            generator: source of all the noise.

        Raises:
            FilterError: if a chain had a fault.
            ValueError: for fewer than two particles, or a reference of another length.
        """
        if num_particles < 2:
            raise ValueError(f"got {num_particles} particles; conditional SMC needs another one besides the reference")
        if len(reference) != feynman_kac.num_steps + 1:
            raise ValueError(
                f"got a reference of {len(reference)} steps; the model has {feynman_kac.num_steps + 1}, counting the "
                "initial one"
            )
        num_chains = next(iter(reference[0].values())).shape[0]
        pinned = _Pinned(feynman_kac, reference)
        return self._chosen(feynman_kac, pinned, reference, num_particles, num_chains, generator)

    @torch.no_grad()
    def _chosen(
        self,
        feynman_kac: ConditionalFeynmanKac,
        moved: FeynmanKac,
        reference: Path | None,
        num_particles: int,
        num_chains: int,
        generator: torch.Generator,
    ) -> Path:
        """Run the particles of ``moved``, and choose a path from the last step to the first."""
        found: dict[str, Tensor] = {}

        def past(state: FilterState, following: Particles) -> Tensor:
            nonlocal found
            index, bad = _drawn_past(feynman_kac, state, following, generator)
            found = faults.merge(found, state.step + 1, {_NO_PAST: bad})
            return index

        def draw(state: FilterState, generator: torch.Generator) -> Tensor:
            if reference is None:
                return self.resampler(state.w, generator)
            if self.past is Past.ANCESTOR_SAMPLED:
                parent = past(state, reference[state.step + 1])
            else:
                parent = torch.zeros((num_chains, 1), dtype=torch.int64, device=state.w.device)
            return _with_first(self.resampler, state.w, parent, generator)

        steps = Steps(moved, draw, self.ess_threshold, Records())
        states = list(steps.iterate(num_chains, num_particles, generator))
        index = _categorical(states[-1].w, generator)
        path = [gather(states[-1].particles, index)]
        for state, after in zip(states[-2::-1], states[:0:-1], strict=True):
            parents = after.history[-1].ancestors
            assert parents is not None
            traced = self.past is not Past.BACKWARD_SAMPLED
            index = parents.to(torch.int64).gather(-1, index) if traced else past(state, path[-1])
            path.append(gather(state.particles, index))
        faults.check(replace(states[-1], faults={**states[-1].faults, **found}), feynman_kac)
        return tuple(path[::-1])


@dataclass(frozen=True)
class _Pinned:
    """A model whose particle 0 is put on the reference path after each move, with the potential that it has there."""

    inner: ConditionalFeynmanKac
    reference: Path

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self._pin(0, None, self.inner.initial(num_chains, num_particles, generator))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        return self._pin(i, particles, self.inner.step(i, particles, generator))

    def _pin(self, i: int, before: Particles | None, move: Move) -> Move:
        star = self.reference[i]
        previous = None if before is None else {name: value[:, :1] for name, value in before.items()}
        log_g = self.inner.log_potential(i, previous, star).to(move.log_g.dtype)
        particles = {name: torch.cat([star[name], value[:, 1:]], 1) for name, value in move.particles.items()}
        return Move(particles, torch.cat([log_g, move.log_g[:, 1:]], 1), move.faults)


def _drawn_past(
    feynman_kac: ConditionalFeynmanKac, state: FilterState, following: Particles, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Index (b, 1) of a particle, drawn in proportion to w^j gamma(x^j, following), and where there is none (b,)."""
    n = state.num_particles
    ahead = {name: value.expand(value.shape[0], n, *value.shape[2:]) for name, value in following.items()}
    log_gamma = feynman_kac.log_transition(state.step + 1, state.particles, ahead).to(torch.float64)
    there = state.log_w > -torch.inf
    log_w = torch.where(there, state.log_w + log_gamma, -torch.inf)
    wrong = (there & ~(log_gamma < torch.inf)).any(-1)
    return _categorical(normalise(log_w), generator), wrong | (log_w == -torch.inf).all(-1)


def _categorical(w: Tensor, generator: torch.Generator) -> Tensor:
    """One index (b, 1) for each row of weights (b, n)."""
    c = cumulative(w)
    return pick(c, uniform_below(c[:, -1:], 1, generator))


def _with_first(resampler: ConditionalResampler, w: Tensor, parent: Tensor, generator: torch.Generator) -> Tensor:
    """Ancestors (b, n) given that the first one is ``parent`` (b, 1), which changes names with particle 0 meanwhile."""
    swapped = w.scatter(-1, parent, w[:, :1])
    swapped = torch.cat([w.gather(-1, parent), swapped[:, 1:]], -1)
    drawn = resampler.conditional(swapped, generator)
    return torch.where(drawn == 0, parent, torch.where(drawn == parent, 0, drawn))
