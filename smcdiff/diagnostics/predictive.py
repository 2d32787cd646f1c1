r"""Checks of a posterior against the measurement, without a ground truth.

With draws theta_i, weights w_i and a replicated measurement y_i from p(y given theta_i) each, the posterior predictive
p-value of a discrepancy T is

    p = sum_i w_i [T(y_i, theta_i) > T(y, theta_i)],    ties counting half.

Over measurements that the program itself makes its mean is 1/2 for exact draws; for a single measurement it is not
uniform but crowds around 1/2, so that only values near 0 or 1 say something. It uses the measurement twice, and sees
nothing of what the operator does not measure.

A measurement can also be split in two that are independent given the latents, the posterior drawn from the first and
judged by the second. With a share f of the information in the first and standard normal z,

    Gaussian   y_1 = y + sigma sqrt((1 - f) / f) z ~ N(A x, sigma^2 / f),
               y_2 = (y - f y_1) / (1 - f) ~ N(A x, sigma^2 / (1 - f)),
    Poisson    y_1 given y ~ Bin(y, f), so that y_1 ~ Pois(f rate),
               y_2 = y - y_1 ~ Pois((1 - f) rate).

The held-out score log sum_i w_i p(y_2 given theta_i) is proper: its mean over measurements is largest for the exact
posterior given y_1.

References:
    A. Gelman, X.-L. Meng, H. Stern, "Posterior predictive assessment of model fitness via realized discrepancies",
    Statistica Sinica 6 (1996).
    A. Neufeld, A. Dharamshi, L. L. Gao, D. Witten, "Data Thinning for Convolution-Closed Distributions", Journal of
    Machine Learning Research 25 (2024): the split of Gaussian and Poisson measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diagnostics.weights import effective_sample_size

__all__ = [
    "HeldOutScore",
    "PredictiveCheck",
    "held_out_score",
    "posterior_predictive_p",
    "split_gaussian",
    "split_poisson",
]


@dataclass(frozen=True)
class PredictiveCheck:
    """A posterior predictive p-value with what it was made of.

    Args:
        p_value: in [0, 1]; small if the measurement fits worse than replicated ones.
        error: its Monte-Carlo standard error.
        observed: (S,), T(y, theta_i).
        replicated: (S,), T(y_i, theta_i).
    """

    p_value: float
    error: float
    observed: Tensor
    replicated: Tensor


@dataclass(frozen=True)
class HeldOutScore:
    """log predictive density of a measurement that the posterior has not seen.

    Args:
        log_density: log sum_i w_i p(y_2 given theta_i), in nats; higher is better.
        error: its Monte-Carlo standard error.
    """

    log_density: float
    error: float


def posterior_predictive_p(observed: Tensor, replicated: Tensor, log_w: Tensor | None = None) -> PredictiveCheck:
    """The p-value from discrepancies (S,) at the measurement and at a replicated one of each draw.

    Raises:
        ValueError: for shapes that do not fit, or NaN.
    """
    log_w = _weights(observed, log_w)
    if replicated.shape != observed.shape or bool((observed + replicated).isnan().any()):
        raise ValueError(f"got discrepancies {tuple(observed.shape)} and {tuple(replicated.shape)}, or NaN among them")
    larger = (replicated > observed).double() + 0.5 * (replicated == observed).double()
    p = min(1.0, float((log_w.exp() * larger.to(log_w)).sum()))
    return PredictiveCheck(p, math.sqrt(p * (1 - p) / effective_sample_size(log_w)), observed, replicated)


def held_out_score(log_likelihood: Tensor, log_w: Tensor | None = None) -> HeldOutScore:
    """The score of draws from log p(y_2 given theta_i), (S,)."""
    log_w = _weights(log_likelihood, log_w)
    terms = log_w + log_likelihood.to(log_w)
    total = terms.logsumexp(0)
    # the weighted mean of r_i = p(y_2 given theta_i) / mean has variance sum w_i^2 (r_i - 1)^2
    error = (log_w.exp() * ((log_likelihood.to(log_w) - total).exp() - 1)).square().sum().sqrt()
    return HeldOutScore(float(total), float(error))


def split_gaussian(y: Tensor, sigma: Tensor | float, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """y_1 and y_2 of a Gaussian measurement with known ``sigma``; their standard deviations are sigma / sqrt(share) and
    sigma / sqrt(1 - share).

    Raises:
        ValueError: for a share outside (0, 1).
    """
    _check_share(share)
    z = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=generator.device).to(y.device)
    first = y + sigma * math.sqrt((1 - share) / share) * z
    return first, (y - share * first) / (1 - share)


def split_poisson(counts: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """y_1 and y_2 of counts; their rates are share and 1 - share of the whole.

    Raises:
        ValueError: for a share outside (0, 1).
    """
    _check_share(share)
    on_host = counts.to("cpu", torch.float64)
    first = torch.binomial(on_host, torch.full_like(on_host, share), generator=generator).to(counts)
    return first, counts - first


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"got share {share}; expected the first part's share of the information, in (0, 1)")


def _weights(like: Tensor, log_w: Tensor | None) -> Tensor:
    """Normalised log-weights, (S,), float64."""
    if like.ndim != 1 or len(like) == 0 or (log_w is not None and log_w.shape != like.shape):
        got = None if log_w is None else tuple(log_w.shape)
        raise ValueError(f"got values {tuple(like.shape)} and log_w {got}; expected both (S,)")
    log_w = torch.zeros(like.shape, dtype=torch.float64) if log_w is None else log_w.to(torch.float64)
    log_w = log_w.to(like.device)
    return log_w - log_w.logsumexp(0)
