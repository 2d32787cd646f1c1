"""Weights from log-weights, against numbers worked out with fractions."""

import math
from fractions import Fraction

import pytest
import torch

from smcdiff.smc.weights import effective_sample_size, log_mean_exp, normalise, weigh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, -20000.0, 20000.0, 300.0])
def test_against_fractions(dtype: torch.dtype, shift: float) -> None:
    # Powers of two, so that their logarithms' rounding is the only error; a shift must change log_mean alone.
    powers = torch.tensor([[0, 1, 3, -2], [5, 5, 5, 5], [0, -10, -20, -30]])
    log_w = (powers.to(torch.float64) * math.log(2) + shift).to(dtype)
    # rounding of a log-weight of magnitude |shift| to dtype is a relative error of that size in the weight
    tol = 2 * (abs(shift) + 30) * torch.finfo(dtype).eps
    got = weigh(log_w)
    assert got.w.dtype == got.ess.dtype == got.log_mean.dtype == torch.float64
    for row, p in enumerate(powers.tolist()):
        w = [Fraction(2) ** k for k in p]
        for j in range(4):
            assert got.w[row, j].item() == pytest.approx(float(w[j] / sum(w)), rel=tol)
        assert got.ess[row].item() == pytest.approx(float(sum(w) ** 2 / sum(v * v for v in w)), rel=2 * tol)
        assert got.log_mean[row].item() == pytest.approx(shift + math.log(sum(w) / 4), rel=1e-15, abs=tol)


def test_rows_without_weight_are_marked_and_alone() -> None:
    inf = torch.inf
    log_w = torch.tensor([[-inf, -inf, -inf], [-inf, 0.0, -inf], [0.0, math.log(3.0), -inf]], dtype=torch.float64)
    got = weigh(log_w)
    expected = torch.tensor([[0, 0, 0], [0, 1, 0], [0.25, 0.75, 0]], dtype=torch.float64)
    torch.testing.assert_close(got.w, expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(got.ess, torch.tensor([0, 1, 1.6], dtype=torch.float64), rtol=1e-15, atol=0)
    expected = torch.tensor([-inf, -math.log(3), math.log(4 / 3)], dtype=torch.float64)
    torch.testing.assert_close(got.log_mean, expected, rtol=1e-15, atol=0)


def test_a_nan_stays_in_its_row() -> None:
    log_w = torch.tensor([[torch.nan, 0.0], [0.0, 0.0], [torch.inf, 0.0]])
    got = weigh(log_w)
    assert got.log_mean.isnan().tolist() == [True, False, True]
    assert got.ess.isnan().tolist() == [True, False, True]


def test_the_shorthands_are_the_same_numbers() -> None:
    log_w = torch.randn((2, 3, 5), generator=torch.Generator().manual_seed(0))
    got = weigh(log_w)
    assert torch.equal(normalise(log_w), got.w)
    assert torch.equal(effective_sample_size(log_w), got.ess)
    assert torch.equal(log_mean_exp(log_w), got.log_mean)
