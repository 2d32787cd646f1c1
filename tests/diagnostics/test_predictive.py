"""Predictive p-values, held-out scores and splits, against closed forms."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from smcdiff.diagnostics.predictive import (
    held_out_score,
    posterior_predictive_p,
    split_gaussian,
    split_poisson,
)

F64 = torch.float64


def test_p_value_counts_weights_and_ties() -> None:
    observed, replicated = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 1.0, 9.0])
    log_w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64).log() + 7
    found = posterior_predictive_p(observed, replicated, log_w)
    p = 0.1 + 0.5 * 0.2 + 0.4
    assert found.p_value == pytest.approx(p)
    assert found.error == pytest.approx(math.sqrt(p * (1 - p) * (0.01 + 0.04 + 0.09 + 0.16)))
    assert posterior_predictive_p(observed, replicated).p_value == pytest.approx(2.5 / 4)


def test_held_out_score_and_its_error() -> None:
    log_likelihood = torch.tensor([-1.0, -2.0, -0.5], dtype=F64)
    w = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    found = held_out_score(log_likelihood, w.log() - 3)
    values = log_likelihood.exp()
    mean = (w * values).sum()
    assert found.log_density == pytest.approx(float(mean.log()))
    assert found.error == pytest.approx(float((w * (values / mean - 1)).square().sum().sqrt()))


def test_held_out_error_is_that_of_the_score() -> None:
    """Over 400 sets of 400 draws the score's spread is the mean of the stated errors; the ratio has a relative standard
    error of about 1 / sqrt(800) = 3.5 %, and 20 % is beyond 5 of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 400, dtype=F64, generator=generator)
    scores = [held_out_score(-0.5 * row.square()) for row in x]
    spread = float(torch.tensor([score.log_density for score in scores]).std())
    stated = sum(score.error for score in scores) / len(scores)
    assert stated / spread == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_gaussian_parts_are_independent_with_their_variances(share: float) -> None:
    """n = 200 000 pairs. A sample correlation of independent normals has standard deviation 1 / sqrt(n) = 0.0022, and 5
    of them are exceeded with probability 6e-7; variances have relative standard deviation sqrt(2 / n) = 0.0032."""
    n, sigma, mean = 200_000, 0.7, 1.5
    generator = torch.Generator().manual_seed(0)
    y = mean + sigma * torch.randn(n, dtype=F64, generator=generator)
    first, second = split_gaussian(y, sigma, share, generator)
    torch.testing.assert_close(share * first + (1 - share) * second, y)
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 5 / math.sqrt(n)
    for part, own in ((first, share), (second, 1 - share)):
        assert float(part.var()) == pytest.approx(sigma**2 / own, rel=5 * math.sqrt(2 / n))
        assert float(part.mean()) == pytest.approx(mean, abs=5 * sigma / math.sqrt(own * n))


def test_poisson_parts_are_independent_poisson() -> None:
    """Means and variances 5 standard errors wide (probability below 1e-5 in all), and chi-square of the joint table of
    small counts against the product of Poisson laws with p-value above 1e-6."""
    n, rate, share = 100_000, 3.0, 0.3
    generator = torch.Generator().manual_seed(0)
    y = torch.poisson(torch.full((n,), rate), generator=generator)
    first, second = split_poisson(y, share, generator)
    assert torch.equal(first + second, y) and first.dtype == y.dtype and bool((first >= 0).all())
    laws = [scipy.stats.poisson(rate * share), scipy.stats.poisson(rate * (1 - share))]
    table = torch.zeros(4, 7, dtype=F64)
    table.index_put_((first.clamp(max=3).long(), second.clamp(max=6).long()), torch.ones(n, dtype=F64), accumulate=True)
    edges = [
        [float(law.pmf(k)) for k in range(top)] + [float(law.sf(top - 1))]
        for law, top in zip(laws, (3, 6), strict=True)
    ]
    expected = n * torch.tensor(edges[0], dtype=F64)[:, None] * torch.tensor(edges[1], dtype=F64)
    statistic = float(((table - expected).square() / expected).sum())
    assert scipy.stats.chi2(27).sf(statistic) > 1e-6


def test_refusals() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="share"):
        split_gaussian(torch.zeros(3), 1.0, 1.0, generator)
    with pytest.raises(ValueError, match="share"):
        split_poisson(torch.zeros(3), 0.0, generator)
    with pytest.raises(ValueError, match="NaN"):
        posterior_predictive_p(torch.zeros(3), torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match="expected both"):
        held_out_score(torch.zeros(3), torch.zeros(4))
