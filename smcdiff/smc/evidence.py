r"""How certain the evidence of a particle filter is: its variance over chains, and from a single run.

Over b chains, with ratios Z_c / mean(Z), the standard error of the pooled log-evidence is their standard error. From
one run of n particles and r resamplings, with W_j the final weights and E_j the initial particle from which j descends,

    V = 1 - (n / (n - 1))^{r+1} (1 - S),    S = sum_e (sum_{j : E_j = e} W_j)^2

estimates the relative variance of Z, which is the variance of log Z when it is small. For multinomial resampling at
fixed times Z^2 V is exactly unbiased for the variance of Z, at every n; without the power of n / (n - 1) it would be
off by a multiple of itself. V saturates at 1 when all particles descend from one: a long run needs a *lag*. The
evidence forgets a generation of particles after some steps, so its contribution is read off L steps after it ended,

    V_L = sum_p (V_{p,q} - V_{p+1,q}),    q = min(p + L, K),

where V_{p,q} is V for the run from step p to step q, as if it began with the particles of step p, and V_{K+1,K} = 0.
Without resampling between p and p + 1 the term is zero; with L >= K the sum is V.

References:
    A. Lee, N. Whiteley, "Variance estimation in the particle filter", Biometrika 105 (2018), arXiv:1509.00394: V, and
    its parts by generation.
    J. Olsson, R. Douc, "Numerically stable online estimation of variance in particle filters", Bernoulli 25 (2019),
    arXiv:1701.01001: the fixed lag, and the variance of an expectation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smcdiff.smc.particle_filter import FilterResult
from smcdiff.smc.records import History
from smcdiff.smc.resampling import Multinomial
from smcdiff.smc.weights import normalise

__all__ = ["error_over_chains", "evidence_variance", "expectation_variance", "relative_variance"]


def error_over_chains(log_z: Tensor) -> Tensor:
    """Standard error of the pooled log-evidence from the spread over chains, log_z (b,), a 0-d tensor, in nats.

    Raises:
        ValueError: for fewer than two chains.
    """
    b = log_z.shape[0]
    if b < 2:
        raise ValueError("got one chain; a spread needs at least two: run more chains, or use evidence_variance")
    ratio = b * normalise(log_z)
    return ratio.std() / math.sqrt(b)


def evidence_variance(result: FilterResult, lag: int | None = None) -> Tensor:
    """Variance of log Z of each chain from its own genealogy, (b,), float64; an estimate, and negative at times.

    Args:
        result: of a filter with multinomial resampling that kept its ancestors, and its log-weights if a lag is given.
        lag: steps after which a generation is taken to be forgotten, at least 1; None for the whole run.

    Raises:
        ValueError: if theory does not cover the run: another resampling scheme, fewer than two particles, or all
            particles of a chain descending from one, over the run or over the lag.
    """
    records = _covered(result)
    if lag is None:
        parents = _ancestors(records, 0, records.ess.shape[0] - 1)
        _refuse_coalesced(parents, "the initial step; give a lag or use more particles")
        return relative_variance(result.w, parents, records.resampled.sum(0))
    if lag < 1 or records.log_w is None:
        raise ValueError(f"got lag {lag}; expected at least 1, and a run made with Records(log_weights=True)")
    last = records.ess.shape[0] - 1
    total = torch.zeros_like(records.log_z[0])
    for p in range(last + 1):
        q = min(p + lag, last)
        w = normalise(records.log_w[q])
        parents = _ancestors(records, p, q)
        _refuse_coalesced(parents, f"step {p} at step {q}; take a shorter lag or more particles")
        part = relative_variance(w, parents, records.resampled[p:q].sum(0))
        if p < last:
            later = relative_variance(w, _ancestors(records, p + 1, q), records.resampled[p + 1 : q].sum(0))
            part = part - later
        total = total + part
    return total


def expectation_variance(result: FilterResult, values: Tensor, lag: int | None = None) -> Tensor:
    """Variance of each chain's weighted mean of ``values`` over its final particles.

    With h_j the value less the weighted mean and E_j the ancestor ``lag`` steps back, it is estimated by
    (n / (n - 1))^{r+1} sum_e (sum_{j : E_j = e} W_j h_j)^2, r the number of resamplings since then.

    Args:
        result: of a filter with multinomial resampling that kept its ancestors.
        values: of the final particles, (b, n, *event).
        lag: steps to look back, at least 1; None for the whole run.

    Returns:
        (b, *event), float64.

    Raises:
        ValueError: as for :func:`evidence_variance`.
    """
    records = _covered(result)
    last = records.ess.shape[0] - 1
    since = 0 if lag is None else max(0, last - lag)
    if lag is not None and lag < 1:
        raise ValueError(f"got lag {lag}; expected at least 1")
    parents = _ancestors(records, since, last)
    _refuse_coalesced(parents, f"step {since}; take a shorter lag or more particles")
    b, n = parents.shape
    flat = values.to(torch.float64).reshape(b, n, -1)
    w = result.w[..., None]
    part = w * (flat - (w * flat).sum(1, keepdim=True))
    by_root = torch.zeros_like(part).scatter_add_(1, parents[..., None].expand_as(part), part)
    factor = (n / (n - 1)) ** (records.resampled[since:].sum(0) + 1).to(torch.float64)
    return (factor[:, None] * by_root.square().sum(1)).reshape(b, *values.shape[2:])


def relative_variance(w: Tensor, roots: Tensor, num_resamplings: Tensor) -> Tensor:
    """V of Lee and Whiteley for normalised weights w (b, n), roots (b, n) and numbers of resamplings (b,)."""
    n = w.shape[-1]
    by_root = torch.zeros_like(w).scatter_add_(-1, roots, w)
    factor = (n / (n - 1)) ** (num_resamplings + 1).to(torch.float64)
    return 1 - factor * (1 - by_root.square().sum(-1))


def _covered(result: FilterResult) -> History:
    """The records of a run for which the estimators hold."""
    resampler, records = result.settings.resampler, result.records
    if not isinstance(resampler, Multinomial) and bool(records.resampled.any()):
        raise ValueError(
            f"got a run with {type(resampler).__name__} resampling; the variance from one run is known for Multinomial "
            "alone: use that, or several chains and error_over_chains"
        )
    if result.log_w.shape[1] < 2:
        raise ValueError("got one particle; the variance from one run needs at least two")
    if records.ancestors is None:
        raise ValueError("got a run that did not keep its ancestors; run with Records(ancestors=True)")
    return records


def _ancestors(records: History, since: int, at: int) -> Tensor:
    """Index, after move ``since``, of the ancestor of each particle after move ``at``, (b, n)."""
    assert records.ancestors is not None
    n = records.ancestors.shape[-1]
    back = torch.arange(n, device=records.ancestors.device).expand(records.ancestors.shape[1:])
    for parents in records.ancestors[since:at].flip(0):
        back = parents.gather(-1, back)
    return back


def _refuse_coalesced(roots: Tensor, remedy: str) -> None:
    one = (roots == roots[:, :1]).all(-1)
    if bool(one.any()):
        chains = one.nonzero()[:, 0].tolist()
        raise ValueError(f"got chains {chains[:8]} whose particles all descend from one particle of {remedy}")
