r"""Can weighted particles be trusted? Numbers about their weights, and a verdict in words.

For weights w_1 ... w_S that sum to one:

    ESS = 1 / sum(w^2),    entropy = -sum(w log w),    perplexity = exp(entropy);    1 <= ESS <= perplexity <= S.

The Pareto shape k-hat describes the tail of the distribution the weights came from: the M = min(S / 5, 3 sqrt(S))
largest of them, less the next largest, follow nearly a generalised Pareto law with density
(1 / s) (1 + k x / s)^(-1/k - 1). For k < 1/2 the weights have a finite variance; from k = 0.7 on estimates converge too
slowly to be of use; for k >= 1 even the mean is infinite.

References:
    J. Zhang, M. Stephens, "A new and efficient estimation method for the generalized Pareto distribution",
    Technometrics 51 (2009): the fit.
    A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto smoothed importance sampling" (2024),
    arXiv 1507.02646: k-hat, the size of the tail, the shrinkage towards 1/2 and the limit min(1 - 1 / log10 S, 0.7).
    E. Koblents, J. Miguez, "A population Monte Carlo scheme with transformed weights and its application to stochastic
    kinetic models" (2015), arXiv 1208.5600: tempered weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["effective_sample_size", "entropy", "pareto_k", "perplexity", "tempered"]

_SMALLEST_TAIL = 5
_BISECTIONS = 60


def effective_sample_size(log_w: Tensor) -> float:
    """ESS of all the weights together, whatever their shape; 0 if none is positive."""
    log_w = log_w.to(torch.float64).flatten()
    ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
    return float(ess.nan_to_num(0.0))


def entropy(w: Tensor) -> Tensor:
    """-sum(w log w) of normalised weights over the last axis, in nats: 0 if one has it all, log n if all are equal."""
    return torch.special.entr(w).sum(-1)


def perplexity(log_w: Tensor) -> float:
    """exp(entropy) of all the weights together, whatever their shape; 0 if none is positive."""
    log_w = log_w.to(torch.float64).flatten()
    return float(entropy((log_w - log_w.logsumexp(0)).exp()).exp().nan_to_num(0.0))


def pareto_k(log_w: Tensor) -> float:
    """The shape k-hat of the tail of all the weights together, whatever their shape.

    Returns:
        k-hat; -inf for weights that are all equal; NaN where fewer than five weights stand out, too few to tell.
    """
    log_w = log_w.to(torch.float64).flatten()
    w = (log_w - log_w.max()).exp().sort(descending=True).values
    size = math.ceil(min(len(w) / 5, 3 * math.sqrt(len(w))))
    if w[0] == w[-1]:
        return -math.inf
    if size < _SMALLEST_TAIL:
        return math.nan
    excess = w[:size] - w[size]
    excess = excess[excess > 0]
    if len(excess) < _SMALLEST_TAIL:
        return math.nan
    k = _generalised_pareto_shape(excess.flip(0))
    return (len(excess) * k + 10 * 0.5) / (len(excess) + 10)


def _generalised_pareto_shape(x: Tensor) -> float:
    """k of a generalised Pareto law fitted to positive values ``x`` in increasing order (Zhang & Stephens, 2009).

    With theta = -k / s the profile likelihood has k(theta) = mean log(1 - theta x) and
    l(theta) = n (log(-theta / k) - k - 1); theta is its average over a grid of points with weights exp(l).
    """
    n = len(x)
    points = 30 + math.floor(math.sqrt(n))
    quartile = x[math.floor(n / 4 + 0.5) - 1]
    j = torch.arange(1, points + 1, dtype=x.dtype, device=x.device)
    theta = 1 / x[-1] + (1 - (points / (j - 0.5)).sqrt()) / (3 * quartile)  # their equation (8), prior of equation (9)
    k = torch.log1p(-theta[:, None] * x).mean(1)
    likelihood = n * ((-theta / k).log() - k - 1)
    theta_mean = (theta * likelihood.softmax(0)).sum()
    return float(torch.log1p(-theta_mean * x).mean())


def tempered(log_w: Tensor, min_ess: float) -> tuple[Tensor, float]:
    """Log-weights times the largest exponent tau in [0, 1] for which ESS >= min_ess, normalised to logsumexp = 0.

    What they average is *not* the posterior: for tau < 1 the estimate is biased towards the proposal, in exchange for
    a smaller variance. They are for pictures made from weights that have collapsed, and the exponent belongs next to
    every such picture. ESS falls as tau grows (its logarithm is 2 L(tau) - L(2 tau) with L convex), so bisection
    finds tau.

    Args:
        log_w: of any shape, one population; zero weights (-inf) stay zero.
        min_ess: wanted effective sample size, between 1 and the number of positive weights.

    Returns:
        The new log-weights, float64, and tau.

    Raises:
        ValueError: for a ``min_ess`` outside that range.
    """
    log_w = log_w.to(torch.float64)
    positive = int((log_w > -torch.inf).sum())
    if not 1 <= min_ess <= positive:
        raise ValueError(f"got min_ess {min_ess} for {positive} positive weights; expected between 1 and {positive}")

    def raised(tau: float) -> Tensor:
        return torch.where(log_w == -torch.inf, log_w, tau * log_w)

    low, high = 0.0, 1.0
    if effective_sample_size(log_w) >= min_ess:
        low = 1.0
    else:
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if effective_sample_size(raised(middle)) >= min_ess else (low, middle)
    result = raised(low)
    return result - result.flatten().logsumexp(0), low
