r"""Resampling: n ancestors in proportion to n weights, each chain on its own.

A scheme draws ancestors a_1 ... a_n whose counts N_i are unbiased, E[N_i] = n w_i. All schemes here compute with
*integer* weights x_i = round(2^60 w_i) and their cumulative sums c_i, so that nothing depends on the order of a sum:

- a cumulative sum is exact and monotone on every device (a parallel scan of floats need not be);
- a particle with x_i = 0 has c_i = c_{i-1} and can never be picked; no index can leave its range;
- the cumulative count of the comb (j c_n + r_j) / n, j = 0 ... n - 1, below c_i is exact: with n c_i = k c_n + rem,
  it is k + [r_k < rem]. A scatter and a cumulative sum turn cumulative counts into ancestors in O(n).

The weights may come in float32; rounding to 2^-60 changes a count's mean by less than n 2^-60. A chain without a
positive finite weight keeps its particles (ancestors 0 ... n - 1): the filter goes on and reports the fault.

References:
    N. Chopin, O. Papaspiliopoulos, "An Introduction to Sequential Monte Carlo", Springer (2020), chapter 9.
    G. Kitagawa, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", Journal of
    Computational and Graphical Statistics 5 (1996): stratified and systematic resampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Resampler", "Systematic"]

_SCALE = 2.0**60


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
        c, total = _cumulative(weights)
        k, rem = _cells(c, total)
        r = _uniform_below(total, generator)
        return _ancestors(k + (r < rem).to(torch.int64), total)


def _cumulative(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative integer weights c (b, n) and their total (b, 1), both int64; zero for a failed row."""
    weights = weights.to(torch.float64)
    total = weights.sum(-1, keepdim=True)
    valid = torch.isfinite(total) & (total > 0)
    scaled = torch.where(valid, weights * (_SCALE / total), 0.0)
    c = scaled.round_().to(torch.int64).cumsum(-1)
    return c, c[..., -1:]


def _cells(c: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The k and rem of n c = k total + rem, 0 <= rem < total, elementwise in int64.

    The float quotient is off by one at most; the products wrap modulo 2^64, but their difference is small and so exact.
    """
    n = c.shape[-1]
    total = total.clamp(min=1)
    k = (c * (n / total.to(torch.float64))).to(torch.int64)
    rem = c * n - k * total
    shift = (rem >= total).to(torch.int64) - (rem < 0).to(torch.int64)
    return k + shift, rem - shift * total


def _uniform_below(total: Tensor, generator: torch.Generator, n: int = 1) -> Tensor:
    """Uniform integers in 0 ... total - 1, shape (b, n), for a total of shape (b, 1)."""
    shape = (*total.shape[:-1], n)
    u = torch.rand(shape, dtype=torch.float64, device=total.device, generator=generator)
    return torch.minimum((u * total).to(torch.int64), total - 1)


def _ancestors(cumulative_counts: Tensor, total: Tensor) -> Tensor:
    """Increasing ancestors from the cumulative counts N_0 + ... + N_i, (b, n); slot j has #{i : that sum <= j}."""
    n = cumulative_counts.shape[-1]
    marks = cumulative_counts.new_zeros((*cumulative_counts.shape[:-1], n + 1))
    marks.scatter_add_(-1, cumulative_counts, torch.ones_like(cumulative_counts))
    identity = torch.arange(n, device=marks.device)
    return torch.where(total > 0, marks[..., :n].cumsum(-1), identity)
