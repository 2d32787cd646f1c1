r"""Kernel Stein discrepancy: how far draws are from a density of which only the score is known.

For a density pi on R^d with score s = grad log pi and a kernel k, the Stein kernel

    k_pi(x, x') = s(x).s(x') k + s(x).grad_{x'} k + s(x').grad_x k + trace(grad_x grad_{x'} k)

has mean zero in each argument under pi, so that KSD^2 = sum_ij w_i w_j k_pi(x_i, x_j) vanishes, as the number of draws
grows, if the draws are from pi. With the inverse multiquadric kernel

    k(x, x') = (1 + |u|^2)^beta,    u = (x - x') / scale,    -1 < beta < 0,

it controls weak convergence, for scores that are Lipschitz and dissipative. What it cannot see at any affordable number
of draws is how the mass is shared between modes far apart: the score is the same within each, whatever the shares.

The V-statistic above is never negative; the U-statistic leaves the terms i = j out and is unbiased for independent
draws. Under pi the U-statistic is degenerate, and its law is that of sum_{i != j} (e_i - 1/S) (e_j - 1/S) k_pi with
multinomial counts e_i / S: that bootstrap gives the p-value.

References:
    J. Gorham, L. Mackey, "Measuring Sample Quality with Kernels" (2017), arXiv 1703.01717: the inverse multiquadric.
    Q. Liu, J. D. Lee, M. I. Jordan, "A Kernelized Stein Discrepancy for Goodness-of-fit Tests" (2016),
    arXiv 1602.03253: the U-statistic and its bootstrap.
    X. Qiu, T. Yang, Z. Liu, G. Wang, L. Shen, "Beyond Accuracy: Evaluating Posterior Fidelity of Diffusion Inverse
    Solvers" (2026), arXiv 2602.04189: with the posterior score of a diffusion prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SteinDiscrepancy", "kernel_stein_discrepancy", "median_distance"]


@dataclass(frozen=True)
class SteinDiscrepancy:
    """How far weighted draws are from a density.

    Args:
        ksd: the square root of the V-statistic, at least 0; compare methods with the same scale and number of draws.
        u_statistic: the unbiased estimate of KSD^2, near 0 for draws from the density; may be negative.
        p_value: of the U-statistic under the density, for independent equally weighted draws; NaN for weighted ones.
        scale: of the kernel.
        num_draws: S.
    """

    ksd: float
    u_statistic: float
    p_value: float
    scale: float
    num_draws: int


def kernel_stein_discrepancy(
    x: Tensor,
    score: Tensor,
    scale: float,
    log_w: Tensor | None = None,
    *,
    beta: float = -0.5,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> SteinDiscrepancy:
    """KSD of draws against the density with these scores.

    Args:
        x: (S, *event), draws.
        score: (S, *event), grad log pi at each.
        scale: of the kernel, in the units of x, positive; :func:`median_distance` of draws that are known to be good is
            a choice, the same one for all methods that are compared.
        log_w: (S,), log-weights up to a constant; None for equally weighted draws.
        beta: exponent of the kernel, in (-1, 0).
        num_bootstrap: repetitions for the p-value.
        seed: of the bootstrap.

    Raises:
        ValueError: for shapes that do not fit, fewer than two draws, numbers out of range, or values that are not
            finite.
    """
    if x.shape != score.shape or len(x) < 2:
        raise ValueError(
            f"got draws {tuple(x.shape)} and scores {tuple(score.shape)}; expected both (S, *event), S > 1"
        )
    if not scale > 0 or not -1 < beta < 0:
        raise ValueError(f"got scale {scale} and beta {beta}; expected a positive scale and beta in (-1, 0)")
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(score).all()):
        raise ValueError("got draws or scores that are not finite; take a larger noise level for the score")
    number = len(x)
    kernel = _stein_kernel(
        x.detach().double().reshape(number, -1), score.detach().double().reshape(number, -1), scale, beta
    )
    w = kernel.new_full((number,), 1 / number)
    if log_w is not None:
        log_w = log_w.to(kernel)
        w = (log_w - log_w.logsumexp(0)).exp()
    squared = float(w @ kernel @ w)
    off = kernel - kernel.diag().diag()
    u_statistic = float(w @ off @ w) / (1 - float(w.square().sum()))
    p_value = math.nan if log_w is not None else _p_value(off, u_statistic, num_bootstrap, seed)
    return SteinDiscrepancy(math.sqrt(max(squared, 0.0)), u_statistic, p_value, scale, number)


def median_distance(x: Tensor) -> float:
    """The median Euclidean distance between two of the draws (S, *event).

    Raises:
        ValueError: if it is zero: the draws are copies of one another.
    """
    distance = float(torch.pdist(x.detach().double().reshape(len(x), -1)).median())
    if not distance > 0:
        raise ValueError("got draws of which more than half are copies; give the kernel's scale in their units")
    return distance


def _stein_kernel(x: Tensor, score: Tensor, scale: float, beta: float) -> Tensor:
    """k_pi of all pairs, (S, S), in the coordinates x / scale."""
    x, s = x / scale, score * scale
    squares = x.square().sum(1)
    r2 = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    base = 1 + r2
    # s(x_i) . (x_i - x_j) and s(x_j) . (x_i - x_j)
    own, cross = (s * x).sum(1), s @ x.T
    towards = (own[:, None] - cross) - (cross.T - own)
    slope = 2 * beta * base ** (beta - 1)  # grad_x k = slope (x - x'), grad_x' k = -slope (x - x')
    trace = -slope * x.shape[1] - 4 * beta * (beta - 1) * base ** (beta - 2) * r2
    kernel: Tensor = (s @ s.T) * base**beta - slope * towards + trace
    return kernel


def _p_value(off: Tensor, observed: float, num_bootstrap: int, seed: int) -> float:
    """The share of bootstrapped degenerate U-statistics at least as large, the observed one among them."""
    number = len(off)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(number, (num_bootstrap, number), generator=generator)
    counts = torch.zeros(num_bootstrap, number, dtype=off.dtype)
    counts.scatter_add_(1, index, torch.ones((), dtype=off.dtype).expand(index.shape))
    e = (counts.to(off) - 1) / number
    simulated = ((e @ off) * e).sum(1)
    exceeding = int((simulated >= observed * (number - 1) / number).sum())
    return (1 + exceeding) / (1 + num_bootstrap)
