r"""Are values between 0 and 1 uniform? Randomised ranks, and two tests on them.

If a truth and L draws are exchangeable, as a parameter and independent draws from its exact posterior are once the
measurement is drawn from the program itself, then with v uniform on [0, 1)

    u = (#{draws < truth} + (#{draws = truth} + 1) v) / (L + 1)

is exactly uniform on [0, 1], for every L and whatever ties there are; the integer part of (L + 1) u is the rank of
simulation-based calibration, uniform on 0 ... L. Over N replications two tests look at N such values:

    chi-square    sum_j (n_j - N / B)^2 / (N / B) over B equal bins, against chi-square with B - 1 degrees of freedom;
    ECDF band     at z_i = i / K the counts R_i = #{u <= z_i} are Bin(N, z_i). With F_i its distribution function,
                  g = min_i 2 min(F_i(R_i), 1 - F_i(R_i - 1)) is the smallest pointwise tail. The band
                  {r : 2 min(F_i(r), 1 - F_i(r - 1)) >= gamma} holds the whole path with probability P(g >= gamma),
                  computed exactly by passing the law of R_i on from point to point,
                  R_{i+1} - R_i given R_i ~ Bin(N - R_i, (z_{i+1} - z_i) / (1 - z_i)).

gamma is the largest that gives the band its level, and P(g <= observed g) is the test's p-value.

References:
    S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman, "Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration" (2018), arXiv 1804.06788: the ranks.
    T. Sailynoja, P.-C. Burkner, A. Vehtari, "Graphical Test for Discrete Uniformity and its Applications in Goodness
    of Fit Evaluation and Multiple Sample Comparison" (2022), arXiv 2103.10522: the simultaneous band, by optimisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "EcdfCurve",
    "RankHistogram",
    "Uniformity",
    "ecdf_band",
    "ecdf_curve",
    "randomised_pit",
    "rank_histogram",
    "uniformity",
]

_FEWEST = 20


@dataclass(frozen=True)
class EcdfCurve:
    """An empirical distribution function of values that should be uniform, with its simultaneous band.

    Args:
        z: (K - 1,), where it is evaluated, inside (0, 1).
        ecdf: (K - 1,), the share of values up to z.
        lower, upper: (K - 1,), the band that holds the whole curve with probability ``confidence``; both ends inside.
        confidence: of the band.
        num_values: N.
    """

    z: Tensor
    ecdf: Tensor
    lower: Tensor
    upper: Tensor
    confidence: float
    num_values: int

    @property
    def inside(self) -> bool:
        """Whether the whole curve stays in the band."""
        return bool(((self.lower <= self.ecdf) & (self.ecdf <= self.upper)).all())


@dataclass(frozen=True)
class RankHistogram:
    """Counts of values that should be uniform.

    Args:
        counts: (B,), values in each of B equal bins of [0, 1].
        expected: N / B.
        lower, upper: counts between which a single bin lies with probability at least ``confidence``.
        confidence: of one bin, not of all together.
    """

    counts: Tensor
    expected: float
    lower: int
    upper: int
    confidence: float


@dataclass(frozen=True)
class Uniformity:
    """Both tests of one quantity.

    Args:
        chi_square: the statistic.
        bins: B.
        chi_square_p: its p-value, asymptotic in N / B.
        ecdf_p: the p-value of the ECDF band, exact.
        mean: of the values; 1/2 if uniform. Below it the truth lies low among the draws.
        spread: their standard deviation over that of a uniform law; above 1 the draws are too narrow.
    """

    chi_square: float
    bins: int
    chi_square_p: float
    ecdf_p: float
    mean: float
    spread: float

    @property
    def p_value(self) -> float:
        """Of both tests together: twice the smaller."""
        return min(1.0, 2 * min(self.chi_square_p, self.ecdf_p))


def randomised_pit(truth: Tensor, draws: Tensor, uniform: Tensor) -> Tensor:
    """u of the module's first formula, float64, in [0, 1).

    Args:
        truth: (*shape).
        draws: (L, *shape), equally weighted.
        uniform: v, (*shape), uniform on [0, 1).

    Raises:
        ValueError: for shapes that do not fit, or values that are NaN.
    """
    if draws.shape[1:] != truth.shape or uniform.shape != truth.shape or len(draws) == 0:
        raise ValueError(
            f"got truth {tuple(truth.shape)}, draws {tuple(draws.shape)} and uniform {tuple(uniform.shape)}; expected "
            "(*shape), (L, *shape) and (*shape) with L at least 1"
        )
    if bool(truth.isnan().any()) or bool(draws.isnan().any()):
        raise ValueError("got NaN among the truth or its draws; a rank among them means nothing")
    below = (draws < truth).sum(0).to(torch.float64)
    ties = (draws == truth).sum(0).to(torch.float64)
    return (below + (ties + 1) * uniform.to(torch.float64)) / (len(draws) + 1)


def rank_histogram(pit: Tensor, bins: int | None = None, confidence: float = 0.99) -> RankHistogram:
    """Counts of ``pit`` (N,) in equal bins; by default as many as give ten values each, between 2 and 20."""
    pit = _checked(pit)
    counts = _counts(pit, _num_bins(len(pit), bins))
    tail = _tails(len(pit), torch.tensor([1 / len(counts)], dtype=torch.float64))[0] >= 1 - confidence
    inside = tail.nonzero()[:, 0]
    return RankHistogram(counts, len(pit) / len(counts), int(inside[0]), int(inside[-1]), confidence)


def uniformity(pit: Tensor, bins: int | None = None, points: int | None = None) -> Uniformity:
    """Both tests of ``pit`` (N,).

    Args:
        bins: B of the chi-square test; by default as many as give ten values each, between 2 and 20.
        points: K of the ECDF test; by default N, at most 100.

    Raises:
        ValueError: for fewer than 20 values, or values outside [0, 1].
    """
    pit = _checked(pit)
    n = len(pit)
    counts = _counts(pit, _num_bins(n, bins)).to(torch.float64)
    expected = n / len(counts)
    statistic = float((counts - expected).square().sum() / expected)
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    chi_square_p = float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
    z = _points(n, points)
    reached = (pit <= z[:, None]).sum(1)
    tails = _tails(n, z)
    observed = float(tails.gather(1, reached[:, None]).min())
    outside = 1 - _coverage(n, z, tails > observed * (1 + 1e-9))
    bound = observed * len(z)  # of the union over the points; it takes over where the difference above has no digits
    return Uniformity(
        chi_square=statistic,
        bins=len(counts),
        chi_square_p=chi_square_p,
        ecdf_p=min(1.0, outside if outside > 1e-10 else bound),
        mean=float(pit.mean()),
        spread=float(pit.std()) * math.sqrt(12),
    )


def ecdf_curve(pit: Tensor, points: int | None = None, confidence: float = 0.95) -> EcdfCurve:
    """The ECDF of ``pit`` (N,) with its simultaneous band; arguments as for :func:`uniformity`."""
    pit = _checked(pit)
    z, lower, upper = ecdf_band(len(pit), points, confidence)
    return EcdfCurve(z, (pit <= z[:, None]).double().mean(1), lower, upper, confidence, len(pit))


def ecdf_band(num_values: int, points: int | None = None, confidence: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """z, lower and upper of the simultaneous band of ``num_values`` uniform values; ends are shares and inside.

    Raises:
        ValueError: for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"got confidence {confidence}; expected a probability between 0 and 1")
    z = _points(num_values, points)
    inside = _tails(num_values, z) >= _gamma(num_values, len(z) + 1, confidence)
    counts = torch.arange(num_values + 1, dtype=torch.float64)
    lower = torch.where(inside, counts, torch.inf).amin(1) / num_values
    upper = torch.where(inside, counts, -torch.inf).amax(1) / num_values
    return z, lower, upper


@lru_cache(maxsize=64)
def _gamma(n: int, points: int, confidence: float) -> float:
    """The largest gamma for which the band holds the path with at least this probability, by bisection."""
    z = _points(n, points)
    tails = _tails(n, z)
    low, high = math.log((1 - confidence) / len(z)), 0.0  # a union bound holds at the lower end
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = _coverage(n, z, tails >= math.exp(middle)) >= confidence
        low, high = (middle, high) if enough else (low, middle)
    return math.exp(low)


def _coverage(n: int, z: Tensor, inside: Tensor) -> float:
    """The probability that the counts of n uniform values up to each z stay inside (points, n + 1), a range at each."""
    log_factorial = torch.lgamma(torch.arange(n + 1, dtype=torch.float64) + 1)
    law, start, before = torch.ones(1, dtype=torch.float64), 0, 0.0  # P(R = start, start + 1, ...)
    for i, here in enumerate(z.tolist()):
        reached = inside[i].nonzero()[:, 0]
        if len(reached) == 0:
            return 0.0
        q = (here - before) / (1 - before)
        r = torch.arange(start, start + len(law))[:, None]
        more = reached - r
        log_p = log_factorial[n - r] - log_factorial[more.clamp(min=0)] - log_factorial[n - reached]
        log_p = log_p + more.double() * math.log(q) + (n - reached).double() * math.log1p(-q)
        law = (law[:, None] * torch.where(more >= 0, log_p.exp(), 0.0)).sum(0)
        start, before = int(reached[0]), here
    return float(law.sum())


def _tails(n: int, z: Tensor) -> Tensor:
    """2 min(F_i(r), 1 - F_i(r - 1)) for r = 0 ... n, (points, n + 1)."""
    r = torch.arange(n + 1, dtype=torch.float64)
    log_c = math.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)
    pmf = (log_c + r * z[:, None].log() + (n - r) * torch.log1p(-z[:, None])).exp()
    below, above = pmf.cumsum(1), pmf.flip(1).cumsum(1).flip(1)
    return 2 * torch.minimum(below, above)


def _points(n: int, points: int | None) -> Tensor:
    count = min(n, 100) if points is None else points
    if count < 2:
        raise ValueError(f"got {count} points for the ECDF; expected at least 2")
    return torch.arange(1, count, dtype=torch.float64) / count


def _num_bins(n: int, bins: int | None) -> int:
    count = max(2, min(20, n // 10)) if bins is None else bins
    if count < 2 or n / count < 5:
        raise ValueError(f"got {count} bins for {n} values; expected at least 2 bins, and 5 values in each")
    return count


def _counts(pit: Tensor, bins: int) -> Tensor:
    return torch.bincount((pit * bins).long().clamp(max=bins - 1), minlength=bins)


def _checked(pit: Tensor) -> Tensor:
    if pit.ndim != 1 or len(pit) < _FEWEST:
        raise ValueError(f"got values of shape {tuple(pit.shape)}; expected (N,) with N at least {_FEWEST}")
    pit = pit.to("cpu", torch.float64)
    if not bool(((pit >= 0) & (pit <= 1)).all()):
        raise ValueError("got values outside [0, 1] or NaN; expected probability integral transforms")
    return pit
