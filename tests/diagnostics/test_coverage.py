"""Coverage curves, TARP and coverage maps, against closed forms of posteriors that are too narrow."""

from __future__ import annotations

import math

import pytest
import torch

from smcdiff.diagnostics.calibration import Calibration
from smcdiff.diagnostics.coverage import central_coverage, coverage_map, highest_coverage, tarp_curve, tarp_pit

F64 = torch.float64
N = 4000
#: Quantiles of a standard normal, one for each of N equal shares.
Z = torch.special.ndtri((torch.arange(N, dtype=F64) + 0.5) / N)


def test_central_coverage_of_a_narrow_posterior() -> None:
    """Intervals of level a from draws c times as wide hold the truth with probability 2 Phi(c Phi^-1((1 + a) / 2)) -
    1."""
    c = 0.9
    curve = central_coverage(torch.special.ndtr(Z / c), points=20)
    exact = 2 * torch.special.ndtr(c * torch.special.ndtri((1 + curve.z) / 2)) - 1
    torch.testing.assert_close(curve.ecdf, exact, atol=1 / N, rtol=0)
    assert not curve.inside and bool((curve.ecdf < curve.z).all())
    assert central_coverage(torch.special.ndtr(Z), points=20).inside


def test_highest_coverage_of_a_narrow_posterior() -> None:
    """With -x^2 / 2 as the quantity, the region of the highest values is the central interval."""
    c = 0.9
    central = torch.special.ndtr(Z / c)
    of_log_density = 1 - (2 * central - 1).abs()  # P(-X^2 < -z^2) for X ~ N(0, c^2)
    found, exact = highest_coverage(of_log_density, points=20), central_coverage(central, points=20)
    torch.testing.assert_close(found.ecdf, exact.ecdf)


def test_tarp_counts_draws_nearer_to_the_reference() -> None:
    reference = torch.tensor([1.0, 1.0])
    draws = torch.tensor([[1.0, 2.0], [4.0, 1.0], [1.0, -1.5], [0.0, 1.0]])  # at distances 1, 3, 2.5, 1
    u = tarp_pit(torch.tensor([1.0, 3.0]), draws, reference, torch.tensor(0.5))  # at distance 2
    assert float(u) == pytest.approx((2 + 0.5) / 5)


def test_tarp_curve_of_a_shifted_posterior() -> None:
    """Truth N(0, 1), draws N(b, 1), reference far to the left: nearer means smaller, P(u < a) = Phi(Phi^-1(a) + b)."""
    b = 0.4
    curve = tarp_curve(torch.special.ndtr(Z - b), points=20)
    torch.testing.assert_close(curve.ecdf, torch.special.ndtr(torch.special.ndtri(curve.z) + b), atol=1 / N, rtol=0)


def test_coverage_map() -> None:
    pit = torch.tensor([[0.5, 0.01], [0.1, 0.5], [0.94, 0.5], [0.96, 0.5]], dtype=F64)
    found = coverage_map(pit, 0.9)
    assert found.coverage.tolist() == [0.75, 0.75]
    torch.testing.assert_close(found.z_score, torch.full((2,), -0.15 / math.sqrt(0.09 / 4), dtype=F64))
    each = torch.tensor([0.5, 1.0, 1.0, 0.5])
    assert found.mean == 0.75 and found.mean_error == pytest.approx(float(each.std()) / 2)


def test_coverage_map_error_counts_entries_that_go_together_once() -> None:
    """Copies of one entry add nothing to what is known of the mean."""
    pit = torch.rand(50, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    one, many = coverage_map(pit, 0.5), coverage_map(pit.expand(50, 100), 0.5)
    assert many.mean_error == pytest.approx(one.mean_error) and many.mean == pytest.approx(one.mean)


def test_calibration_names_ranks_and_curves() -> None:
    generator = torch.Generator().manual_seed(0)
    pit = torch.rand(40, 2, 2, dtype=F64, generator=generator)
    picture = torch.rand(40, 1, 5, 5, dtype=F64, generator=generator)
    fit = torch.rand(40, dtype=F64, generator=generator)
    found = Calibration({"x": pit, "picture": picture, "log_likelihood": fit}, {"x": fit}, 9)
    assert list(found.scalars) == ["x[0]", "x[1]", "x[2]", "x[3]", "log_likelihood", "x tarp"]
    assert torch.equal(found.ranks("x"), (pit * 10).long())
    assert torch.equal(found.coverage_map("picture", 0.5).coverage, ((2 * picture - 1).abs() <= 0.5).double().mean(0))
    assert found.expected_coverage().ecdf.tolist() == highest_coverage(fit).ecdf.tolist()
    assert found.central_coverage("x[2]").ecdf.tolist() == central_coverage(pit[:, 1, 0]).ecdf.tolist()
    assert found.tarp_curve("x").ecdf.tolist() == found.ecdf("log_likelihood").ecdf.tolist()
    assert int(found.histogram("x[0]").counts.sum()) == 40
    assert found.p_value == min(1.0, 6 * min(test.p_value for test in found.tests().values()))
    assert "log_likelihood" in str(found) and "40 replications" in str(found)
    with pytest.raises(ValueError, match="25 entries"):
        found.ecdf("picture")
    with pytest.raises(KeyError, match="expected one of"):
        found.ecdf("nothing")


def test_calibration_refuses_different_numbers_of_replications() -> None:
    with pytest.raises(ValueError, match="one number"):
        Calibration({"x": torch.zeros(3), "y": torch.zeros(4)}, {}, 1)
