r"""Coverage of credible regions, from the randomised ranks of a calibration study.

With u the probability integral transform of a truth among its draws (:mod:`smcdiff.diagnostics.ranks`), which is
exactly uniform for exact draws, the truth lies

    in the central interval of level a         if |2 u - 1| <= a,
    in the region of the highest values        if 1 - u <= a,

so that the share of truths covered, as a function of a, is the ECDF of |2 u - 1| or of 1 - u, and the ECDF's band is
the band of the coverage curve. Where the quantity is a log-density of the posterior, the second region is the one of
highest density. The test of accuracy with random points (TARP) takes the distance to a reference point r(y) as the
quantity:

    u = share of draws nearer to r than the truth,        expected coverage at level a = P(u < a).

A reference that does not depend on y cannot tell a posterior from the prior; one that does can.

References:
    P. Lemos, A. Coogan, Y. Hezaveh, L. Perreault-Levasseur, "Sampling-Based Accuracy Testing of Posterior Estimators
    for General Inference" (2023), arXiv 2302.03026: TARP.
    J. Hermans, A. Delaunoy, F. Rozet, A. Wehenkel, V. Begy, G. Louppe, "A Trust Crisis In Simulation-Based Inference?
    Your Posterior Approximations Can Be Unfaithful" (2022), arXiv 2110.06581: expected coverage of highest-density
    regions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diagnostics.ranks import EcdfCurve, ecdf_curve, randomised_pit

__all__ = ["CoverageMap", "central_coverage", "coverage_map", "highest_coverage", "tarp_curve", "tarp_pit"]


@dataclass(frozen=True)
class CoverageMap:
    """How often the central interval of one level held the truth, entry by entry.

    Args:
        level: of the intervals.
        coverage: (*event), share of N replications.
        z_score: (*event), (coverage - level) / sqrt(level (1 - level) / N): nearly standard normal if calibrated.
        mean: coverage over all entries.
        mean_error: its standard error over replications, whatever the correlations between entries.
        num_replications: N.
    """

    level: float
    coverage: Tensor
    z_score: Tensor
    mean: float
    mean_error: float
    num_replications: int


def central_coverage(pit: Tensor, points: int | None = None, confidence: float = 0.95) -> EcdfCurve:
    """Coverage of central intervals against their level, ``pit`` (N,); the curve's z are the levels."""
    return ecdf_curve((2 * pit - 1).abs(), points, confidence)


def highest_coverage(pit: Tensor, points: int | None = None, confidence: float = 0.95) -> EcdfCurve:
    """Coverage of the region where the quantity is highest against its level, ``pit`` (N,)."""
    return ecdf_curve(1 - pit, points, confidence)


def tarp_curve(pit: Tensor, points: int | None = None, confidence: float = 0.95) -> EcdfCurve:
    """TARP: expected coverage against credibility level, ``pit`` (N,) from :func:`tarp_pit`."""
    return ecdf_curve(pit, points, confidence)


def tarp_pit(truth: Tensor, draws: Tensor, reference: Tensor, uniform: Tensor) -> Tensor:
    """The randomised share of draws that are nearer to the reference than the truth is, 0-d.

    Args:
        truth: (*event).
        draws: (L, *event), equally weighted.
        reference: (*event), drawn independently of the truth given the measurement.
        uniform: 0-d, uniform on [0, 1).
    """
    both = torch.cat((truth[None], draws)).to(torch.float64)
    distance = (both - reference.to(both)).reshape(len(both), -1).square().sum(1)
    return randomised_pit(distance[0], distance[1:], uniform)


def coverage_map(pit: Tensor, level: float = 0.9) -> CoverageMap:
    """How often the central interval of ``level`` held each entry's truth, ``pit`` (N, *event).

    Raises:
        ValueError: for a level outside (0, 1), or fewer than two replications.
    """
    if not 0 < level < 1 or len(pit) < 2:
        raise ValueError(f"got level {level} and {len(pit)} replications; expected a level in (0, 1) and at least 2")
    held = ((2 * pit.to(torch.float64) - 1).abs() <= level).to(torch.float64)
    coverage, each = held.mean(0), held.reshape(len(held), -1).mean(1)
    return CoverageMap(
        level=level,
        coverage=coverage,
        z_score=(coverage - level) / math.sqrt(level * (1 - level) / len(held)),
        mean=float(each.mean()),
        mean_error=float(each.std()) / math.sqrt(len(held)),
        num_replications=len(held),
    )
