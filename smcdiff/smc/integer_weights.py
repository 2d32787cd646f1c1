r"""Weights as integers, so that resampling is exact: x_i = round(2^60 w_i), cumulative sums c_i, total c_n.

Sums of integers do not depend on their order, so c is exact and monotone on every device (a parallel scan of floats
need not be); a particle with x_i = 0 has c_i = c_{i-1} and can never be picked; no index leaves its range. The line of
length c_n is cut into n cells of equal length: a point u of the line, counted in units of 1 / n, is

    n u = j c_n + r,    j = 0 ... n - 1 its cell,  r = 0 ... c_n - 1 its place in the cell.

A row without a positive finite sum has failed: all its integers are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ancestors_from_counts",
    "cells",
    "comb_counts",
    "cumulative",
    "pick",
    "pin",
    "point_of_first",
    "sorted_below",
    "uniform_below",
]

_SCALE = 2.0**60


def cumulative(weights: Tensor) -> Tensor:
    """c, (b, n) of int64, for weights (b, n); rounding to 2^-60 changes n w by less than n 2^-60."""
    weights = weights.to(torch.float64)
    total = weights.sum(-1, keepdim=True)
    valid = torch.isfinite(total) & (total > 0)
    scaled = torch.where(valid, weights * (_SCALE / total), 0.0)
    return scaled.round_().to(torch.int64).cumsum(-1)


def cells(c: Tensor, total: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Cell j and place r of points c (b, m) on a line of length total (b, 1) cut into n: n c = j total + r.

    The float quotient is off by one at most. The products wrap modulo 2^64; their difference is small and so exact.
    """
    total = total.clamp(min=1)
    j = (c * (n / total.to(torch.float64))).to(torch.int64)
    r = c * n - j * total
    shift = (r >= total).to(torch.int64) - (r < 0).to(torch.int64)
    return j + shift, r - shift * total


def comb_counts(c: Tensor, r: Tensor) -> Tensor:
    """How many points of a comb with one point in each cell, at place r (b, n) or (b, 1), lie before each c, (b, n)."""
    n = c.shape[-1]
    j, rem = cells(c, c[..., -1:], n)
    place = r.expand_as(c).gather(-1, j.clamp(max=n - 1))
    return j + (place < rem).to(torch.int64)


def uniform_below(bound: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Uniform integers in 0 ... bound - 1, shape (b, n), for a bound (b, 1) or (b, n); -1 where the bound is zero."""
    u = torch.rand((bound.shape[0], n), dtype=torch.float64, device=bound.device, generator=generator)
    return torch.minimum((u * bound).to(torch.int64), bound - 1)


def sorted_below(bound: Tensor, count: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """In the first ``count`` (b, 1) of n columns, that many uniform integers in 0 ... bound - 1 in increasing order.

    Made from exponential spacings: with S_j the sum of j exponentials, S_1 ... S_m over S_{m+1} are m sorted uniforms.
    """
    u = torch.rand((bound.shape[0], n + 1), dtype=torch.float64, device=bound.device, generator=generator)
    s = -torch.log1p(-u).cumsum(-1)
    u = s[:, :n] / s.gather(-1, count)
    return torch.minimum((u * bound).to(torch.int64), bound - 1)


def pick(c: Tensor, points: Tensor) -> Tensor:
    """The particle i with c_{i-1} <= point < c_i for points (b, m) in 0 ... total - 1, (b, m) of int64."""
    return torch.searchsorted(c, points, right=True).clamp_(max=c.shape[-1] - 1)


def ancestors_from_counts(cumulative_counts: Tensor, valid: Tensor) -> Tensor:
    """Increasing ancestors from N_0 + ... + N_i, (b, n): slot j has #{i : that sum <= j}. In order where not valid."""
    n = cumulative_counts.shape[-1]
    marks = cumulative_counts.new_zeros((cumulative_counts.shape[0], n + 1))
    marks.scatter_add_(-1, cumulative_counts, torch.ones_like(cumulative_counts))
    return torch.where(valid, marks[:, :n].cumsum(-1), torch.arange(n, device=marks.device))


def point_of_first(
    before: Tensor, x: Tensor, total: Tensor, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cell and place, each (b, 1), of a uniform point among the n x places of the interval [before, before + x)."""
    j, r = cells(before + uniform_below(x, 1, generator), total, n)
    r = r + torch.randint(n, r.shape, device=r.device, generator=generator)
    over = (r >= total).to(torch.int64)
    return j + over, r - over * total


def pin(ancestors: Tensor, slot: Tensor) -> Tensor:
    """Exchange slot 0 with ``slot`` (b, 1), so that the ancestor found there comes first."""
    first = ancestors.gather(-1, slot)
    moved = ancestors.scatter(-1, slot, ancestors[:, :1])
    return torch.cat([first, moved[:, 1:]], -1)
