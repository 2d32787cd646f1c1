r"""Weights as integers, so that resampling is exact: x_i = floor(2^60 w_i), cumulative sums c_i, total c_n.

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
    "comb_search",
    "cumulative",
    "pick",
    "pin",
    "point_of_first",
    "sorted_below",
    "uniform_below",
]

_SCALE = 2.0**60


def cumulative(weights: Tensor, failed: int = 0) -> Tensor:
    """c, (b, n) of int64, for weights (b, n); rounding to 2^-60 changes n w by less than n 2^-60.

    Args:
        failed: x_i of all particles in a failed row; 1 makes its weights equal.
    """
    weights = weights.to(torch.float64)
    total = weights.sum(-1, keepdim=True)
    valid = torch.isfinite(total) & (total > 0)
    scaled = (weights * (_SCALE / total)).masked_fill_(~valid, failed)
    return scaled.to(torch.int64).cumsum_(-1)


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
    n, total = c.shape[-1], c[..., -1:]
    if r.shape[-1] == 1:
        return _shared_comb_counts(c, total.clamp(min=1), r, n)
    j, rem = cells(c, total, n)
    place = r.gather(-1, j.clamp(max=n - 1))
    return j + (place < rem).to(torch.int64)


def _shared_comb_counts(c: Tensor, total: Tensor, r: Tensor, n: int) -> Tensor:
    """The count is ceil(a), a = (n c - r) / total, which in floats is found as k = floor(a + 1 - e).

    The float expression is off by less than (n + 2) 2^-51; e is taken larger, so that k is the count or one less: less
    where k total < n c - r. The products wrap modulo 2^64; their difference is small and so exact, and its sign bit
    is the correction. All is done in few passes over memory, which is what it costs.
    """
    length = total.to(torch.float64)
    k = c.to(torch.float64).mul_(n / length).add_(1 - r / length - (n + 2) * 2.0**-50).to(torch.int64)
    behind = (k * total).sub_(torch.add(-r, c, alpha=n))
    return k.sub_(behind.bitwise_right_shift_(63))


def comb_search(c: Tensor, r: Tensor) -> Tensor:
    """The particles (b, n) at the points of a comb with place r (b, 1), in rows of positive total.

    Point j lies at (j total + r) / n of the line; as the c are integers, it may be rounded down.
    """
    n, total = c.shape[-1], c[..., -1:]
    j, whole = torch.arange(n, device=c.device), total // n
    points = torch.addcmul(r, j, total - n * whole).div_(n, rounding_mode="floor")
    return torch.searchsorted(c, points.addcmul_(j, whole), right=True)


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


def ancestors_from_counts(cumulative_counts: Tensor, valid: Tensor | None = None) -> Tensor:
    """Increasing ancestors from N_0 + ... + N_i, (b, n): slot j has #{i : that sum <= j}.

    Args:
        valid: (b, 1), False for rows whose slots get 0 ... n - 1 in order; None if all are True.
    """
    n = cumulative_counts.shape[-1]
    marks = cumulative_counts.new_zeros((cumulative_counts.shape[0], n + 1))
    marks.scatter_add_(-1, cumulative_counts, marks.new_ones(()).expand_as(cumulative_counts))
    ancestors = marks.cumsum_(-1)[:, :n]
    return ancestors if valid is None else torch.where(valid, ancestors, torch.arange(n, device=marks.device))


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
