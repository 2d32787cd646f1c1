r"""Decisions from a posterior: is there a defect, which program holds, and is that right as often as claimed?

*A defect.* Let P(D given x) say whether a noise-free picture x has a defect in a region, 0 or 1 or a probability, and
let D depend on the measurement y through x alone. By the tower law, with w_ci the pooled weights of b chains,

    P(D given y) = E[P(D given x) given y]  estimated by  p = sum_ci w_ci P(D given x_ci).

It is as right as the detector is on pictures drawn from the prior. With W_c the chains' shares of the evidence and p_c
their own answers, p = sum_c W_c p_c is a ratio of two means over chains, and its standard error by the delta method is
sqrt(b / (b - 1) sum_c W_c^2 (p_c - p)^2).

*A program.* The posterior probabilities of programs M_i are proportional to pi_i Z_i. In the limit of many steps and
particles a filter's estimates Z_c are log-normal. With v the variance of log Z_c over b chains, log mean_c Z_c has the
standard error

    e = sqrt((exp(v) - 1) / b),

and the probabilities are averaged over log Z_i + e_i T_i, with T_i of Student's law with b_i - 1 degrees of freedom.
This draws them away from 0 and 1 where the evidence is uncertain. The *reversal* is the share of these in which another
program is the most probable: the chance that more computing overturns the decision. A relative error above 1/2,

    v > log(1 + b / 4),

means that a few chains carry the mean; a mean of log-normal values needs about exp(v / 2) of them. Then no decision is
supported, and no error over chains is worth stating.

*Calibration.* Over simulated problems with outcomes o and claims p, the Brier score is mean (o - p)^2; for claims that
are right it has the mean  mean p (1 - p)  and the variance  mean (1 - 2 p)^2 p (1 - p) / N.

References:
    J. Bérard, P. Del Moral, A. Doucet, "A lognormal central limit theorem for particle approximations of normalizing
    constants" (2014), arXiv 1307.0181: the law of Z_c.
    S. Chatterjee, P. Diaconis, "The sample size required in importance sampling" (2018), arXiv 1511.01437: how many
    values a mean of widely spread ones needs.
    G. W. Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78 (1950).
    D. J. Spiegelhalter, "Probabilistic prediction in patient management and clinical trials", Statistics in Medicine 5
    (1986): the law of the Brier score.
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927): intervals of a frequency.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DefectProbability",
    "Detector",
    "PixelDeparture",
    "ProgramProbabilities",
    "RegionDeparture",
    "Reliability",
    "Weighted",
    "defect_probability",
    "program_probabilities",
    "reliability",
]

#: Pictures (m, *event) -> P(D given x), (m, *regions), between 0 and 1: one number a picture, a number a region, a map.
Detector = Callable[[Tensor], Tensor]


class Weighted(Protocol):
    """Particles with their pooled weights: ``smc.weighted_samples()``, or ``smc.posterior``."""

    @property
    def values(self) -> Mapping[str, Tensor]:
        """{site: (b, n, *event)}."""

    @property
    def log_w(self) -> Tensor:
        """(b, n), over all chains."""


_DRAWS = 20_000  # of the uncertain evidence; probabilities are averaged to 0.004
_WIDEST = 1e3  # nats; errors beyond it say the same and do not overflow


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"got threshold {threshold}; expected a number greater than 0, in units of x")


@dataclass(frozen=True)
class PixelDeparture:
    """The map 1[|x - reference| > threshold] of a picture with the shape of the reference, as a detector.

    Args:
        reference: (*event), the picture without a defect, such as the design or a neighbouring die.
        threshold: in units of x, greater than 0.

    Raises:
        ValueError: for a threshold that is not greater than 0.
    """

    reference: Tensor
    threshold: float

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def __call__(self, x: Tensor) -> Tensor:
        return ((x - self.reference).abs() > self.threshold).to(torch.float64)


@dataclass(frozen=True)
class RegionDeparture:
    """1 where at least ``pixels`` pixels of the region depart from the reference, one number a picture, as a detector.

    Args:
        reference: (*event), the picture without a defect.
        threshold: in units of x, greater than 0.
        region: (*event) of bool.
        pixels: least number of departing pixels that make a defect.

    Raises:
        ValueError: for a threshold or a number of pixels that is not greater than 0, or a region that is not bool, of
            the reference's shape.
    """

    reference: Tensor
    threshold: float
    region: Tensor
    pixels: int = 1

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        if self.region.dtype != torch.bool or self.region.shape != self.reference.shape:
            raise ValueError(
                f"got a region of shape {tuple(self.region.shape)} and dtype {self.region.dtype}; expected bool of the "
                f"reference's shape {tuple(self.reference.shape)}"
            )
        if self.pixels < 1:
            raise ValueError(f"got pixels {self.pixels}; expected at least 1")

    def __call__(self, x: Tensor) -> Tensor:
        departs = ((x - self.reference).abs() > self.threshold) & self.region
        return (departs.flatten(1).sum(1) >= self.pixels).to(torch.float64)


@dataclass(frozen=True)
class DefectProbability:
    """P(D given y) of each region.

    Args:
        probability: (*regions), float64.
        error: (*regions), its standard error over chains; NaN for one chain, and where a few chains carry the evidence.
        per_chain: (b, *regions), as each chain has it alone.
    """

    probability: Tensor
    error: Tensor
    per_chain: Tensor


def defect_probability(samples: Weighted, site: str, detector: Detector) -> DefectProbability:
    """The posterior probability of a defect, of one region, several, or every pixel, as the detector has it.

    Args:
        samples: particles and pooled weights, as ``smc.weighted_samples()`` gives them.
        site: the picture's, among them.
        detector: P(D given x).

    Raises:
        ValueError: for a site that is not there, or a detector whose answer is not (m, *regions) between 0 and 1.
    """
    if site not in samples.values:
        raise ValueError(f"got the site {site!r}; expected one of {sorted(samples.values)}")
    x, log_w = samples.values[site], samples.log_w.to(torch.float64)
    answer = detector(x.flatten(0, 1))
    if answer.shape[:1] != x.flatten(0, 1).shape[:1] or not bool(((answer >= 0) & (answer <= 1)).all()):
        raise ValueError(
            f"got answers of shape {tuple(answer.shape)} between {float(answer.min()):.3g} and "
            f"{float(answer.max()):.3g} from the detector; expected ({log_w.numel()}, *regions) between 0 and 1"
        )
    each = answer.detach().to(torch.float64).unflatten(0, x.shape[:2])
    log_share = log_w.logsumexp(1)
    share = log_share.softmax(0)
    within = torch.where(log_share.isfinite()[:, None], log_w, 0.0).softmax(1)
    per_chain = torch.einsum("bn,bn...->b...", within.to(each), each)
    probability = torch.einsum("b,b...->...", share.to(each), per_chain)
    b = len(share)
    error = torch.full_like(probability, math.nan)
    if _spread(log_share) <= _largest_spread(b):
        squares = torch.einsum("b,b...->...", share.to(each).square(), (per_chain - probability).square())
        error = (b / (b - 1) * squares).sqrt()
    return DefectProbability(probability, error, per_chain)


@dataclass(frozen=True)
class ProgramProbabilities:
    """Posterior probabilities of programs, with what is not known about their evidence.

    Args:
        names: of the M programs.
        log_evidence: (M,), pooled over chains, in nats.
        error: (M,), e; NaN for one chain.
        probability: (M,), averaged over the uncertain evidence; where an error is NaN, at the estimate.
        low, high: (M,), ends of the central interval of the stated level; NaN where an error is.
        reversal: chance that more computing makes another program the most probable; NaN where an error is.
        reason: why no decision is supported; empty if one is.
    """

    names: tuple[str, ...]
    log_evidence: Tensor
    error: Tensor
    probability: Tensor
    low: Tensor
    high: Tensor
    reversal: float
    reason: str

    @property
    def decision(self) -> str:
        """The most probable program."""
        return self.names[int(self.probability.argmax())]

    @property
    def supported(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        lines = [f"{'program':<20} {'log Z':>10} {'error':>7} {'probability':>12} {'interval':>16}"]
        for i, name in enumerate(self.names):
            lines.append(
                f"{name:<20} {float(self.log_evidence[i]):>10.2f} {float(self.error[i]):>7.2f} "
                f"{float(self.probability[i]):>12.3f} {float(self.low[i]):>7.3f} to {float(self.high[i]):.3f}"
            )
        lines.append(f"Not supported: {self.reason}." if self.reason else f"Chance of a reversal: {self.reversal:.3f}.")
        return "\n".join(lines)


def program_probabilities(
    log_z: Mapping[str, Tensor], prior: Mapping[str, float] | None = None, level: float = 0.95
) -> ProgramProbabilities:
    """Posterior probabilities of programs of one measurement from the evidence of their chains.

    :func:`smcdiff.diagnostics.evidence.compare_evidence` tabulates finished runs; this is for decisions. It warns where
    none is supported: a single chain, chains that spread too widely, or a reversal more likely than 1 - level.

    Args:
        log_z: {program: (b,)}, such as ``smc.log_evidence_per_chain``; at least two programs.
        prior: {program: prior probability}, up to a factor; equal by default.
        level: of the intervals, and of the confidence that a decision needs, in (0.5, 1).

    Raises:
        ValueError: for a program without evidence, a prior that does not fit, or a level outside its range.
    """
    odds = dict.fromkeys(log_z, 1.0) if prior is None else dict(prior)
    if len(log_z) < 2 or odds.keys() != log_z.keys() or not all(0 < weight < math.inf for weight in odds.values()):
        raise ValueError(
            f"got the evidence of {sorted(log_z)} and prior probabilities {odds}; expected at least two programs, and "
            "a positive number for each"
        )
    if not 0.5 < level < 1:
        raise ValueError(f"got level {level}; expected a probability between 0.5 and 1")
    names = tuple(log_z)
    chains = [log_z[name].detach().cpu().to(torch.float64) for name in names]
    for name, z in zip(names, chains, strict=True):
        if z.ndim != 1 or not bool(z.isfinite().any()) or bool((z.isnan() | (z == math.inf)).any()):
            raise ValueError(
                f"got log_z {z.tolist()} of {name!r}; expected (chains,), numbers. Use a method with weights, such as "
                "sd.TDS"
            )
    pooled = torch.stack([z.logsumexp(0) - math.log(len(z)) for z in chains])
    spreads = [_spread(z) for z in chains]
    error = torch.tensor([_log_normal_error(v, len(z)) for v, z in zip(spreads, chains, strict=True)]).double()
    log_posterior = pooled + torch.tensor([odds[name] for name in names], dtype=torch.float64).log()
    probability, reversal, reason = log_posterior.softmax(0), math.nan, ""
    low = high = torch.full_like(probability, math.nan)
    alone = [name for name, z in zip(names, chains, strict=True) if len(z) < 2]
    if alone:
        reason = f"one chain of {alone} says nothing of its error; run several"
    else:
        rng = np.random.default_rng(0)
        noise = np.stack([rng.standard_t(len(z) - 1, _DRAWS) for z in chains], 1)
        draws = (log_posterior + error * torch.from_numpy(noise)).softmax(1)
        probability = draws.mean(0)
        low, high = draws.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double(), dim=0)
        reversal = float((draws.argmax(1) != probability.argmax()).double().mean())
        wide = [
            f"{name!r} ({v:.2g} nats^2 over {len(z)} chains, at most {_largest_spread(len(z)):.2g})"
            for name, z, v in zip(names, chains, spreads, strict=True)
            if not v <= _largest_spread(len(z))
        ]
        if wide:
            reason = f"the log-evidence spreads too widely in {', '.join(wide)}; run more particles, or more chains"
        elif reversal > 1 - level:
            reason = f"more computing would overturn it with chance {reversal:.2g}; run more particles, or more chains"
    if reason:
        warnings.warn(f"no decision between {list(names)} is supported: {reason}", stacklevel=2)
    return ProgramProbabilities(names, pooled, error, probability, low, high, reversal, reason)


@dataclass(frozen=True)
class Reliability:
    """How often what was claimed with probability p came true, over N problems.

    Args:
        count: (bins,), problems whose claim lies in the bin.
        claimed: (bins,), mean of their claims; NaN in an empty bin.
        observed: (bins,), share of those that came true.
        low, high: (bins,), Wilson's 95 % interval of that share.
        brier: mean (o - p)^2.
        brier_expected: its mean if all claims are right.
        brier_z: (brier - brier_expected) over its standard deviation if all claims are right; standard normal then, and
            large for claims that are too confident.
        chi_square: sum over bins of (came true - claimed)^2 over its variance if all claims are right; about
            chi-square with as many degrees of freedom as bins are not empty.
    """

    count: Tensor
    claimed: Tensor
    observed: Tensor
    low: Tensor
    high: Tensor
    brier: float
    brier_expected: float
    brier_z: float
    chi_square: float

    def __str__(self) -> str:
        lines = [f"{'problems':>8} {'claimed':>8} {'observed':>9} {'95 % interval':>16}"]
        for row in zip(self.count, self.claimed, self.observed, self.low, self.high, strict=True):
            n, p, o, low, high = map(float, row)
            if n:
                lines.append(f"{n:>8.0f} {p:>8.2f} {o:>9.2f} {low:>7.2f} to {high:.2f}")
        lines.append(f"Brier score {self.brier:.4f}, expected {self.brier_expected:.4f} (z = {self.brier_z:.1f}).")
        return "\n".join(lines)


def reliability(probability: Tensor, outcome: Tensor, bins: int = 5) -> Reliability:
    """Claims against outcomes, in bins of equal width.

    Args:
        probability: p, (N,), between 0 and 1.
        outcome: o, (N,), whether it came true.
        bins: number of bins.

    Raises:
        ValueError: for no claims, shapes that differ, or a claim outside [0, 1].
    """
    p, o = probability.to(torch.float64).cpu(), outcome.to(torch.float64).cpu()
    if p.ndim != 1 or not len(p) or p.shape != o.shape or not bool(((p >= 0) & (p <= 1)).all()) or bins < 1:
        raise ValueError(
            f"got claims {tuple(p.shape)}, outcomes {tuple(o.shape)} and {bins} bins; expected as many outcomes as "
            "claims, at least one of each, claims between 0 and 1, and at least one bin"
        )
    inside = torch.nn.functional.one_hot((p * bins).long().clamp(max=bins - 1), bins).double()
    count, claimed, true, variance = inside.sum(0), p @ inside, o @ inside, (p * (1 - p)) @ inside
    square = (true - claimed).square()
    share, z = true / count, 1.959963984540054
    middle, reach = share + z**2 / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2).sqrt()
    brier, expected = float((o - p).square().mean()), float((p * (1 - p)).mean())
    deviation = float(((1 - 2 * p).square() * p * (1 - p)).mean() / len(p)) ** 0.5
    return Reliability(
        count=count.long(),
        claimed=claimed / count,
        observed=share,
        low=(middle - reach) / (1 + z**2 / count),
        high=(middle + reach) / (1 + z**2 / count),
        brier=brier,
        brier_expected=expected,
        brier_z=(brier - expected) / deviation if deviation else math.inf if brier > expected else 0.0,
        chi_square=float(torch.where(square > 0, square / variance, 0.0).sum()),
    )


def _spread(log_z: Tensor) -> float:
    """v, the variance over chains; NaN for one chain, and infinite if one of several has no weight at all."""
    if len(log_z) < 2:
        return math.nan
    return float(log_z.var()) if bool(log_z.isfinite().all()) else math.inf


def _largest_spread(b: int) -> float:
    """log(1 + b / 4), at which the relative error of the mean of b log-normal values is 1/2."""
    return math.log1p(b / 4)


def _log_normal_error(v: float, b: int) -> float:
    """e, at most 1000 nats."""
    return v if math.isnan(v) else min(math.sqrt(math.expm1(min(v, 2 * math.log(_WIDEST) + 50)) / b), _WIDEST)
