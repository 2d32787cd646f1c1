"""Randomised ranks and the tests of their uniformity, against enumeration and scipy."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch

from smcdiff.diagnostics.ranks import (
    ecdf_band,
    ecdf_curve,
    randomised_pit,
    rank_histogram,
    uniformity,
)

F64 = torch.float64


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_randomised_pit_is_uniform_whatever_the_ties(p: float) -> None:
    """Truth and two draws from one Bernoulli law, all eight outcomes: u is uniform, with its integer part exactly
    so."""
    share = torch.zeros(3, dtype=F64)
    grid = (torch.arange(300, dtype=F64) + 0.5) / 300  # of v
    for outcome in itertools.product((0, 1), repeat=3):
        weight = math.prod(p if value else 1 - p for value in outcome)
        truth = torch.full((300,), float(outcome[0]), dtype=F64)
        draws = torch.tensor(outcome[1:], dtype=F64)[:, None].expand(2, 300)
        u = randomised_pit(truth, draws, grid)
        share += weight * torch.stack([((3 * u).long() == rank).double().mean() for rank in range(3)])
    torch.testing.assert_close(share, torch.full((3,), 1 / 3, dtype=F64))


def test_randomised_pit_counts() -> None:
    truth = torch.tensor([0.5, 2.0])
    draws = torch.tensor([[0.1, 2.0], [0.6, 2.0], [0.2, 1.0]])
    u = randomised_pit(truth, draws, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(u, torch.tensor([(2 + 0.5) / 4, (1 + 3 * 0.25) / 4], dtype=F64))


def test_randomised_pit_refuses_nan_and_shapes() -> None:
    with pytest.raises(ValueError, match="NaN"):
        randomised_pit(torch.tensor([torch.nan]), torch.zeros(3, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="expected"):
        randomised_pit(torch.zeros(2), torch.zeros(3, 1), torch.zeros(2))


def paths(n: int) -> list[tuple[int, int, float]]:
    """All counts up to 1/3 and up to 2/3 of n uniform values, with their probability."""
    law = scipy.stats.multinomial(n, [1 / 3] * 3)
    return [(a, b, float(law.pmf([a, b - a, n - b]))) for a in range(n + 1) for b in range(a, n + 1)]


def smallest_tail(n: int, a: int, b: int) -> float:
    """2 min over both points of min(F(r), 1 - F(r - 1))."""
    laws = ((scipy.stats.binom(n, 1 / 3), a), (scipy.stats.binom(n, 2 / 3), b))
    return 2 * min(min(law.cdf(r), law.sf(r - 1)) for law, r in laws)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_band_holds_the_path_with_its_probability_by_enumeration(confidence: float) -> None:
    """At least the confidence, and less with the next larger gamma: the narrowest band of this form."""
    n = 25
    z, lower, upper = ecdf_band(n, 3, confidence)
    torch.testing.assert_close(z, torch.tensor([1 / 3, 2 / 3], dtype=F64))
    low, high = (lower * n).round().tolist(), (upper * n).round().tolist()
    tails = {(a, b): smallest_tail(n, a, b) for a, b, _ in paths(n)}
    inside = {(a, b) for a, b, _ in paths(n) if low[0] <= a <= high[0] and low[1] <= b <= high[1]}
    assert sum(p for a, b, p in paths(n) if (a, b) in inside) >= confidence
    gamma = min(tails[path] for path in inside)
    assert all(tails[path] < gamma for path in tails.keys() - inside)
    assert sum(p for a, b, p in paths(n) if tails[a, b] > gamma * (1 + 1e-9)) < confidence


def test_ecdf_p_value_by_enumeration() -> None:
    n = 25
    tails = {(a, b): smallest_tail(n, a, b) for a, b, _ in paths(n)}
    for a, b in [(8, 17), (3, 17), (8, 23), (13, 14), (2, 9), (0, 25), (25, 25)]:
        pit = torch.tensor([0.1] * a + [0.5] * (b - a) + [0.9] * (n - b), dtype=F64)
        exact = sum(p for x, y, p in paths(n) if tails[x, y] <= tails[a, b] * (1 + 1e-9))
        found = uniformity(pit, bins=2, points=3).ecdf_p
        if exact > 1e-9:
            assert found == pytest.approx(exact, rel=1e-6)
        else:  # a union bound takes over
            assert exact <= found < 1e-8


def test_band_at_many_points_by_simulation() -> None:
    """The share of 4000 uniform samples inside is Bin(4000, c) / 4000. The recursion itself gives c = 0.9026; for c
    between 0.9 and 0.91 the share is outside 0.9 - 0.022 ... 0.91 + 0.022, 4.6 and 4.9 standard errors away, with
    probability below 5e-6."""
    z, lower, upper = ecdf_band(150, 75, 0.9)
    x = torch.rand(4000, 150, dtype=F64, generator=torch.Generator().manual_seed(1))
    ecdf = (x[:, None] <= z[:, None]).double().mean(-1)
    share = float(((lower <= ecdf) & (ecdf <= upper)).all(1).double().mean())
    assert 0.878 < share < 0.932


def test_chi_square_is_scipys() -> None:
    pit = torch.rand(230, dtype=F64, generator=torch.Generator().manual_seed(0)) ** 1.2
    found = uniformity(pit, bins=13)
    counts = torch.histc(pit, 13, 0, 1)
    exact = scipy.stats.chisquare(counts.numpy())
    assert found.chi_square == pytest.approx(exact.statistic) and found.chi_square_p == pytest.approx(exact.pvalue)
    assert found.mean == pytest.approx(float(pit.mean()))


def test_histogram_and_its_interval() -> None:
    pit = torch.arange(100, dtype=F64) / 100
    histogram = rank_histogram(pit, bins=5)
    assert histogram.counts.tolist() == [20] * 5 and histogram.expected == 20
    law = scipy.stats.binom(100, 0.2)
    assert histogram.lower == law.ppf(0.005) and histogram.upper == law.isf(0.005)


def test_curve_inside_and_outside() -> None:
    even = (torch.arange(60, dtype=F64) + 0.5) / 60
    assert ecdf_curve(even).inside
    assert not ecdf_curve(even**2).inside
    assert uniformity(even).p_value == 1.0
    assert uniformity(even**3).p_value < 1e-6
    assert uniformity(even).spread == pytest.approx(1.0, abs=0.02)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        uniformity(torch.zeros(5))
    with pytest.raises(ValueError, match="outside"):
        uniformity(torch.full((30,), 1.5))
    with pytest.raises(ValueError, match="bins"):
        uniformity(torch.rand(30), bins=10)
    with pytest.raises(ValueError, match="confidence"):
        ecdf_band(30, confidence=1.0)
