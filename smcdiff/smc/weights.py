r"""Importance weights from log-weights, each row (chain) on its own, in float64.

With m the largest log-weight of a row and e_j = exp(log_w_j - m), all that a filter needs comes from one pass:

    w_j = e_j / sum(e),    ESS = sum(e)^2 / sum(e^2),    log-mean-exp = m + log(sum(e) / n).

No step can overflow, and since the largest e_j is 1 neither sum can vanish. A row whose log-weights are all -inf has no
weights: it gets w = 0, ESS = 0 and log-mean-exp = -inf, none of them NaN. A NaN or +inf makes its own row NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Weighed", "effective_sample_size", "log_mean_exp", "normalise", "weigh"]


@dataclass(frozen=True)
class Weighed:
    """What one pass over log-weights of shape (..., n) gives, in float64.

    Args:
        w: normalised weights, (..., n); they sum to one, or are all zero if every log-weight is -inf.
        ess: effective sample size 1 / sum(w^2), shape (...), between 1 and n; 0 if every log-weight is -inf.
        log_mean: logarithm of the mean weight, shape (...), in nats.
        largest: the largest log-weight, shape (...), in nats; NaN where one is NaN.
    """

    w: Tensor
    ess: Tensor
    log_mean: Tensor
    largest: Tensor


def weigh(log_w: Tensor) -> Weighed:
    """Normalise log-weights of shape (..., n) over their last axis."""
    log_w = log_w.to(torch.float64)
    largest = log_w.amax(-1, keepdim=True)
    dead = largest == -torch.inf
    e = torch.sub(log_w, largest.masked_fill(dead, 0.0)).exp_()
    total = e.sum(-1, keepdim=True)
    squares = torch.linalg.vector_norm(e, dim=-1).square_().masked_fill_(dead.squeeze(-1), 1.0)
    return Weighed(
        w=e.div_(total.masked_fill(dead, 1.0)),
        ess=total.squeeze(-1) ** 2 / squares,
        log_mean=(largest + torch.log(total / log_w.shape[-1])).squeeze(-1),
        largest=largest.squeeze(-1),
    )


def normalise(log_w: Tensor) -> Tensor:
    """Weights that sum to one over the last axis, float64; all zero where every log-weight is -inf."""
    return weigh(log_w).w


def effective_sample_size(log_w: Tensor) -> Tensor:
    """Effective sample size over the last axis, float64; 0 where every log-weight is -inf."""
    return weigh(log_w).ess


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Logarithm of the mean weight over the last axis, float64, in nats; -inf where every log-weight is -inf."""
    return weigh(log_w).log_mean
