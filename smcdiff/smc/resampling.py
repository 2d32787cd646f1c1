r"""Resampling: n ancestors in proportion to n weights, each chain on its own.

A scheme draws ancestors a_0 ... a_{n-1} whose counts N_i = #{j : a_j = i} are unbiased, E[N_i] = n w_i. All schemes
compute with integer weights (:mod:`smcdiff.smc.integer_weights`), so that they are right for float32 and float64
weights and any n, never pick a particle of zero weight and never leave the range of indices.

*Conditional* schemes serve conditional SMC, where particle 0 must survive as particle 0. If the particles are shuffled,
a scheme applied and a slot looked at, its ancestor is i with probability w_i, whatever the scheme; given that it is
particle 0, the counts follow the *size-biased* law

    P(N | a_0 = 0) = P(N) N_0 / (n w_0).

A scheme that draws n points on a line is size-biased by a uniform point in the interval of particle 0 that replaces the
scheme's own point in that cell; schemes with independent draws by forcing one of the draws.

References:
    N. Chopin, O. Papaspiliopoulos, "An Introduction to Sequential Monte Carlo", Springer (2020), chapter 9.
    N. Chopin, S. S. Singh, "On particle Gibbs sampling", Bernoulli 21 (2015), arXiv:1304.1887: conditional resampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smcdiff.smc.integer_weights import (
    ancestors_from_counts,
    cells,
    comb_counts,
    comb_search,
    cumulative,
    pick,
    pin,
    point_of_first,
    sorted_below,
    uniform_below,
)

__all__ = ["ConditionalResampler", "Killing", "Multinomial", "Resampler", "Residual", "Stratified", "Systematic"]

#: Up to how many particles, over all chains, it is faster to search for the points of a comb than to count them, with
#: the same ancestors; measured by benchmarks/resampling_paths.py.
_SEARCHED = 1024


class Resampler(Protocol):
    """Draws ancestors: n of n, in proportion to the weights."""

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors of each chain.

        Args:
            weights: (b, n), not negative; they need not sum to one. A row without a positive finite sum has failed.
            generator: source of all the noise.

        Returns:
            (b, n) of int64, indices in 0 ... n - 1; 0 ... n - 1 in order for a failed row.
        """


class ConditionalResampler(Resampler, Protocol):
    """A resampler that can also draw the other ancestors given that particle 0 is its own."""

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) with a_0 = 0 from the size-biased law; a row where w_0 is zero has failed as well."""


@dataclass(frozen=True)
class Multinomial:
    """Multinomial resampling: n independent draws, N ~ Multinomial(n, w).

    The noisiest scheme, and the one for which theory gives the variance of the evidence from a single run. Ancestors
    come in increasing order.

    References:
        N. Gordon, D. Salmond, A. Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation", IEE
        Proceedings F 140 (1993).
    """

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`Resampler` says."""
        c, n = cumulative(weights), weights.shape[-1]
        total = c[:, -1:]
        all_of_them = torch.full_like(total, n)
        return _or_in_order(pick(c, sorted_below(total, all_of_them, n, generator)), total)

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """The other draws are as independent as before."""
        c = cumulative(weights)
        others = pick(c, uniform_below(c[:, -1:], c.shape[-1] - 1, generator))
        return _or_in_order(torch.cat([torch.zeros_like(c[:, :1]), others], -1), c[:, :1])


@dataclass(frozen=True)
class Systematic:
    """Systematic resampling: N_i = #{j : c_{i-1} <= (j c_n + r) / n < c_i}, one uniform r in [0, c_n) per chain.

    Every N_i is n w_i rounded up or down. Ancestors come in increasing order.

    References:
        J. Carpenter, P. Clifford, P. Fearnhead, "Improved particle filter for nonlinear problems", IEE Proceedings
        Radar, Sonar and Navigation 146 (1999).
    """

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`Resampler` says."""
        c = cumulative(weights, failed=1)  # equal weights come out in order
        r = uniform_below(c[:, -1:], 1, generator)
        return comb_search(c, r) if c.numel() <= _SEARCHED else ancestors_from_counts(comb_counts(c, r))

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """The comb that goes through a uniform point of particle 0."""
        return _conditional_comb(weights, generator, None)


@dataclass(frozen=True)
class Stratified:
    """Stratified resampling: as systematic, with an independent r_j for each cell j of the line.

    N_i differs from n w_i by less than 2. Ancestors come in increasing order.

    References:
        G. Kitagawa, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", Journal of
        Computational and Graphical Statistics 5 (1996).
    """

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`Resampler` says."""
        c = cumulative(weights)
        r = uniform_below(c[:, -1:], c.shape[-1], generator)
        return ancestors_from_counts(comb_counts(c, r), c[:, -1:] > 0)

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """A uniform point of particle 0 replaces the draw of its cell."""
        total = cumulative(weights)[:, -1:]
        return _conditional_comb(weights, generator, uniform_below(total, weights.shape[-1], generator))


@dataclass(frozen=True)
class Residual:
    """Residual resampling: floor(n w_i) copies of each particle, the rest multinomial in proportion to what is left.

    N_i is at least floor(n w_i). Ancestors come in increasing order.

    References:
        J. S. Liu, R. Chen, "Sequential Monte Carlo methods for dynamic systems", Journal of the American Statistical
        Association 93 (1998).
    """

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`Resampler` says."""
        c = cumulative(weights)
        k, rest = cells(c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1])), c[:, -1:], c.shape[-1])
        return self._draw(k, rest, c[:, -1:] > 0, generator)

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """One of the multinomial draws is particle 0, with the probability that a copy of it came from them."""
        c = cumulative(weights)
        total = c[:, -1:]
        k, rest = cells(c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1])), total, c.shape[-1])
        share = rest[:, :1] / (k[:, :1] * total.to(torch.float64) + rest[:, :1])
        drawn = torch.rand(share.shape, dtype=share.dtype, device=share.device, generator=generator) < share
        k = torch.cat([k[:, :1] + drawn.to(torch.int64), k[:, 1:]], -1)
        return self._draw(k, rest, c[:, :1] > 0, generator)

    def _draw(self, k: Tensor, rest: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Fill up the counts k (b, n) to n by draws in proportion to the rest (b, n)."""
        n = k.shape[-1]
        missing = n - k.sum(-1, keepdim=True)
        c = cumulative(rest)
        drawn = pick(c, sorted_below(c[:, -1:], missing, n, generator))
        counted = (torch.arange(n, device=k.device) < missing).to(torch.int64)
        return ancestors_from_counts(k.scatter_add(-1, drawn, counted).cumsum(-1), valid)


@dataclass(frozen=True)
class Killing:
    """Killing: a particle survives in its slot with probability w_i / max(w); the others are drawn from w.

    Slots of survivors keep their own particle, so nothing moves while the weights are equal.

    References:
        P. Del Moral, "Feynman-Kac Formulae", Springer (2004), section 2.5.3: the selection with potentials G / max G.
    """

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Ancestors (b, n) for weights (b, n), as :class:`Resampler` says."""
        c = cumulative(weights)
        x = c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1]))
        largest = x.amax(-1, keepdim=True)
        killed = uniform_below(largest, x.shape[-1], generator) >= x
        return _or_in_order(self._replace(c, killed, generator), c[:, -1:])

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """One slot holds particle 0, chosen by the probability that it does; the other slots are as before."""
        c = cumulative(weights)
        x = c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1]))
        largest = x.amax(-1, keepdim=True)
        killed = uniform_below(largest, x.shape[-1], generator) >= x
        survives = x / largest.clamp(min=1).to(torch.float64)
        holds = (1 - survives) * (x[:, :1] / c[:, -1:].clamp(min=1).to(torch.float64))
        holds = torch.cat([holds[:, :1] + survives[:, :1], holds[:, 1:]], -1)
        slots = cumulative(holds)
        slot = pick(slots, uniform_below(slots[:, -1:], 1, generator))
        replaced = self._replace(c, killed.scatter(-1, slot, False), generator)
        return _or_in_order(pin(replaced.scatter(-1, slot, 0), slot), x[:, :1])

    def _replace(self, c: Tensor, killed: Tensor, generator: torch.Generator) -> Tensor:
        """Every killed slot gets one of as many sorted draws; the others keep their own particle."""
        n = c.shape[-1]
        rank = killed.to(torch.int64).cumsum(-1)
        drawn = pick(c, sorted_below(c[:, -1:], rank[:, -1:], n, generator))
        own = torch.arange(n, device=c.device)
        return torch.where(killed, drawn.gather(-1, (rank - 1).clamp(min=0)), own)


def _or_in_order(ancestors: Tensor, weight: Tensor) -> Tensor:
    """The ancestors (b, n) of rows of positive weight (b, 1); 0 ... n - 1 in the others."""
    return torch.where(weight > 0, ancestors, torch.arange(ancestors.shape[-1], device=ancestors.device))


def _conditional_comb(weights: Tensor, generator: torch.Generator, r: Tensor | None) -> Tensor:
    """Shuffle, draw a point of particle 0, comb with the places r (b, n) elsewhere or the same place everywhere."""
    b, n = weights.shape
    order = torch.rand((b, n), dtype=torch.float64, device=weights.device, generator=generator).argsort(-1)
    place = order.argmin(-1, keepdim=True)
    c = cumulative(weights.gather(-1, order))
    x = c.diff(dim=-1, prepend=torch.zeros_like(c[:, :1])).gather(-1, place)
    cell, at = point_of_first(c.gather(-1, place) - x, x, c[:, -1:], n, generator)
    cell, at = cell.clamp(0, n - 1), torch.minimum(at, c[:, -1:] - 1)  # of a row that has failed, too
    counts = comb_counts(c, at if r is None else r.scatter(-1, cell, at))
    ancestors = order.gather(-1, ancestors_from_counts(counts, x > 0))
    return _or_in_order(pin(ancestors, cell), x)
