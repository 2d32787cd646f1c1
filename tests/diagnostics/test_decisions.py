"""Decisions from a posterior against closed forms, on problems with two templates.

A picture is one of two templates plus white noise of deviation S, measured with noise of deviation R; what holds is
known by quadrature or in closed form. Statistical tests state the chance that they fail.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from scipy import stats
from torch import Tensor

from smcdiff.diagnostics.decisions import (
    PixelDeparture,
    RegionDeparture,
    defect_probability,
    program_probabilities,
    reliability,
)
from smcdiff.diagnostics.evidence import compare_evidence
from smcdiff.diagnostics.run import Run
from smcdiff.infer import WeightedSamples

F64 = torch.float64
S, R = 0.3, 0.8
TEMPLATES = torch.tensor([[[0.0, 0.1], [-0.2, 0.3]], [[0.9, 0.1], [0.5, 0.3]]], dtype=F64)
PRIOR = torch.tensor([0.7, 0.3], dtype=F64)


def log_density(x: Tensor, variance: float) -> Tensor:
    """log N(x; template, variance I) of each template, (..., 2)."""
    away = x[..., None, :, :] - TEMPLATES
    return -0.5 * away.square().sum((-1, -2)) / variance - 2 * math.log(2 * math.pi * variance)


def holds_defect(x: Tensor) -> Tensor:
    """P(second template given x), exact."""
    return (PRIOR.log() + log_density(x, S**2)).softmax(-1)[..., 1]


def sampled(y: Tensor, b: int, n: int, seed: int) -> WeightedSamples:
    """Importance sampling from the prior, b chains of n."""
    g = torch.Generator().manual_seed(seed)
    which = (torch.rand(b, n, generator=g, dtype=F64) < PRIOR[1]).long()
    x = TEMPLATES[which] + S * torch.randn(b, n, 2, 2, generator=g, dtype=F64)
    log_w = -0.5 * (y - x).square().sum((-1, -2)) / R**2
    return WeightedSamples({"x": x}, log_w - log_w.logsumexp((0, 1)))


def exact(y: Tensor) -> Tensor:
    return (PRIOR.log() + log_density(y, S**2 + R**2)).softmax(-1)[..., 1]


def test_the_probability_of_a_defect_is_that_of_the_template() -> None:
    """Posterior probability of the second template, closed form, from weighted draws. The error over 40 chains is
    close to the truth, so that 6 of it (Student's law with 39 degrees of freedom: 5e-7) bound the difference."""
    y = torch.tensor([[0.6, 0.0], [0.1, 0.4]], dtype=F64)
    found = defect_probability(sampled(y, 40, 2000, 0), "x", holds_defect)
    assert abs(float(found.probability - exact(y))) < 6 * float(found.error) < 0.02
    assert found.per_chain.shape == (40,)


def test_the_error_over_chains_is_the_spread_of_repetitions() -> None:
    """400 repetitions of 16 chains: the mean square deviation from the truth over the mean square error stated. Its
    numerator is 1 within sqrt(2 / 400), the denominator within sqrt(2 / 15 / 400) and chains of 200 leave a bias of a
    few per cent: 1 +- 0.36 is five deviations (6e-7)."""
    y = torch.tensor([[0.6, 0.0], [0.1, 0.4]], dtype=F64)
    runs = [defect_probability(sampled(y, 16, 200, 10 + seed), "x", holds_defect) for seed in range(400)]
    deviation = torch.stack([run.probability for run in runs]) - exact(y)
    ratio = deviation.square().mean() / torch.stack([run.error for run in runs]).square().mean()
    assert abs(float(ratio) - 1) < 0.36


def test_a_map_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    x = reference + torch.tensor([[[[0.5, 0.0], [0.0, 0.0]], [[0.5, 0.0], [-0.3, 0.1]]]] * 2)
    x[1] = reference
    x[1, 1, 0, 1] = 0.9
    log_w = torch.tensor([[0.1, 0.3], [0.25, 0.35]], dtype=F64).log()
    samples = WeightedSamples({"x": x}, log_w)
    found = defect_probability(samples, "x", PixelDeparture(reference, 0.2))
    torch.testing.assert_close(found.probability, torch.tensor([[0.4, 0.35], [0.3, 0.0]], dtype=F64))
    torch.testing.assert_close(found.per_chain[0], torch.tensor([[1.0, 0.0], [0.75, 0.0]], dtype=F64))
    share, per_chain, p = [0.4, 0.6], [1.0, 0.0], 0.4
    by_hand = math.sqrt(2 / 1 * sum(w**2 * (c - p) ** 2 for w, c in zip(share, per_chain, strict=True)))
    assert float(found.error[0, 0]) == pytest.approx(by_hand)
    region = torch.tensor([[True, False], [True, False]])
    for pixels, expected in ((1, 0.4), (2, 0.3)):
        one = defect_probability(samples, "x", RegionDeparture(reference, 0.2, region, pixels))
        assert float(one.probability) == pytest.approx(expected)


def test_one_chain_or_one_that_carries_all_has_no_error() -> None:
    y = TEMPLATES[1]
    assert bool(defect_probability(sampled(y, 1, 50, 1), "x", holds_defect).error.isnan())
    samples = sampled(y, 4, 50, 1)
    for shift in (9.0, math.inf):
        log_w = samples.log_w - torch.tensor([0.0, shift, shift, shift], dtype=F64)[:, None]
        found = defect_probability(WeightedSamples(samples.values, log_w), "x", holds_defect)
        assert bool(found.error.isnan()) and bool(found.per_chain.isfinite().all())
        assert float(found.probability) == pytest.approx(float(found.per_chain[0]), abs=1e-3)


def test_detectors_that_do_not_answer_are_refused() -> None:
    samples = sampled(TEMPLATES[0], 2, 5, 2)
    with pytest.raises(ValueError, match=r"between 0 and 2 from the detector; expected \(10, \*regions\)"):
        defect_probability(samples, "x", lambda x: 2 * (x[:, 0, 0] > x[:, 0, 0].median()))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        defect_probability(samples, "x", lambda x: holds_defect(x)[:5])
    with pytest.raises(ValueError, match="got threshold 0"):
        PixelDeparture(torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="expected bool of the reference's shape"):
        RegionDeparture(torch.zeros(3), 0.1, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="got pixels 0"):
        RegionDeparture(torch.zeros(3), 0.1, torch.ones(3, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match=r"got the site 'z'; expected one of \['x'\]"):
        defect_probability(samples, "z", holds_defect)


def chains(log_z: float, v: float, b: int, g: torch.Generator) -> Tensor:
    """Log-normal and unbiased: log Z_c ~ N(log Z - v / 2, v)."""
    return log_z - v / 2 + math.sqrt(v) * torch.randn(b, generator=g, dtype=F64)


def test_certain_evidence_gives_bayes_formula() -> None:
    z = {"a": torch.full((4,), math.log(3.0), dtype=F64), "b": torch.full((8,), math.log(0.5), dtype=F64)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = program_probabilities(z, {"a": 1.0, "b": 4.0})
    torch.testing.assert_close(found.probability, torch.tensor([0.6, 0.4], dtype=F64))
    torch.testing.assert_close(found.low, found.high)
    assert found.supported and found.reversal == 0 and found.decision == "a"


def test_uncertain_evidence_is_averaged_over_students_law() -> None:
    """Against quadrature, with one certain program and one of four chains; 20 000 draws of values in [0, 1] average to
    0.5 / sqrt(20 000) = 0.0035, and 0.017 is beyond 4.8 of it (2e-6, two of them)."""
    z = torch.tensor([0.4, -0.5, 0.3, -0.6], dtype=F64)
    sure = torch.zeros(3, dtype=F64) - 0.3
    with pytest.warns(UserWarning, match="no decision between .* more computing would overturn it with chance 0"):
        found = program_probabilities({"a": z, "b": sure})
    v = float(z.var())
    error = math.sqrt(math.expm1(v) / 4)
    assert found.error.tolist() == pytest.approx([error, 0.0])
    log_odds = float(z.logsumexp(0)) - math.log(4) + 0.3
    levels = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    t = torch.from_numpy(stats.t(3).ppf(levels.numpy()))
    assert float(found.probability[0]) == pytest.approx(float((log_odds + error * t).sigmoid().mean()), abs=0.017)
    assert found.reversal == pytest.approx(stats.t(3).cdf(-log_odds / error), abs=0.017)
    for end, level in ((found.low, 0.025), (found.high, 0.975)):
        expected = 1 / (1 + math.exp(-log_odds - error * stats.t(3).ppf(level)))
        assert stats.t(3).cdf((float(end[0].logit()) - log_odds) / error) == pytest.approx(level, abs=0.006)
        assert float(end[0]) == pytest.approx(expected, abs=0.05)


def test_small_errors_are_those_of_the_comparison() -> None:
    """For a small spread the log-normal error is that of the ratios, and the interval that of the delta method."""
    g = torch.Generator().manual_seed(3)
    z = {name: chains(value, 0.01, 400, g) for name, value in (("a", 1.0), ("b", 0.5), ("c", -0.4))}
    found = program_probabilities(z)

    def run(log_z: Tensor) -> Run:
        zeros = torch.zeros(len(log_z), 2, dtype=F64)
        return Run({"x": zeros}, zeros, log_z, torch.ones(1, len(log_z)), log_z[None])

    table = compare_evidence({name: run(value) for name, value in z.items()})
    assert table.names == found.names
    torch.testing.assert_close(found.error, table.error, rtol=0.02, atol=0)
    torch.testing.assert_close(found.probability, table.probability, rtol=0, atol=2e-4)
    width = (found.high - found.low) / (2 * 1.966)  # Student's 0.975 quantile with 399 degrees of freedom
    torch.testing.assert_close(width, table.probability_error, rtol=0.05, atol=0)


@pytest.mark.parametrize(("b", "v"), [(4, 0.05), (8, 0.8)])
def test_intervals_hold_the_exact_probability(b: int, v: float) -> None:
    """150 pairs of programs with log-normal evidence: if the 95 % intervals hold the exact probability with 95 %, fewer
    than 129 of 150 come with probability 6e-6 (they may be too wide)."""
    g = torch.Generator().manual_seed(4)
    held, number = 0, 150
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(number):
            log_odds = float(torch.randn((), generator=g))
            found = program_probabilities({"a": chains(log_odds, v, b, g), "b": chains(0.0, v, b, g)})
            held += bool(found.low[0] <= 1 / (1 + math.exp(-log_odds)) <= found.high[0])
    assert held >= 129


def test_wide_spreads_support_no_decision() -> None:
    """At v = log(1 + b / 4) the relative error of the mean of b log-normal values is 1/2."""
    b = 12
    unit = torch.linspace(-1, 1, b, dtype=F64)
    unit = unit / unit.std()
    assert math.sqrt(math.expm1(math.log1p(b / 4)) / b) == pytest.approx(0.5)
    far = torch.full((b,), -50.0, dtype=F64)
    supported = program_probabilities({"a": math.sqrt(math.log(4.0) - 0.01) * unit, "b": far})
    assert supported.supported and float(supported.error[0]) == pytest.approx(0.5, abs=0.01)
    with pytest.warns(UserWarning, match=r"spreads too widely in 'a' \(1.4 nats\^2 over 12 chains, at most 1.4\)"):
        assert not program_probabilities({"a": math.sqrt(math.log(4.0) + 0.01) * unit, "b": far}).supported
    for lost in (-math.inf, -1e6):
        with pytest.warns(UserWarning, match="spreads too widely"):
            found = program_probabilities({"a": torch.tensor([0.0, lost], dtype=F64), "b": torch.zeros(2)})
        assert bool(found.probability.isfinite().all()) and float(found.high[0] - found.low[0]) > 0.99
    with pytest.warns(UserWarning, match=r"one chain of \['a'\]"):
        single = program_probabilities({"a": torch.zeros(1), "b": torch.ones(2)})
    assert bool(single.error[0].isnan()) and float(single.probability[1]) == pytest.approx(1 / (1 + math.exp(-1)))
    assert "Not supported: one chain" in str(single) and "reversal: 0.000" in str(supported)


def test_evidence_that_cannot_be_compared_is_refused() -> None:
    z = torch.zeros(2)
    with pytest.raises(ValueError, match="expected at least two programs, and a positive number for each"):
        program_probabilities({"a": z})
    with pytest.raises(ValueError, match="expected at least two programs"):
        program_probabilities({"a": z, "b": z}, {"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match="Use a method with weights"):
        program_probabilities({"a": z, "b": z + math.nan})
    with pytest.raises(ValueError, match="got level 0.3"):
        program_probabilities({"a": z, "b": z}, level=0.3)


def test_claims_from_draws_come_true_as_often_as_claimed() -> None:
    """2000 simulated problems. If the claims are right, chi_square over at most five bins is about chi-square with five
    degrees of freedom: above 34 with probability 2e-6; brier_z is standard normal: beyond 4.9 with 1e-6. 16 chains of
    100 draws move a claim by about 0.01. Claims that forget half of the noise are found out."""
    g = torch.Generator().manual_seed(5)
    number = 2000
    defect = torch.rand(number, generator=g, dtype=F64) < PRIOR[1]
    x = TEMPLATES[defect.long()] + S * torch.randn(number, 2, 2, generator=g, dtype=F64)
    y = x + R * torch.randn(number, 2, 2, generator=g, dtype=F64)
    claims = [defect_probability(sampled(y[i], 16, 100, 1000 + i), "x", holds_defect) for i in range(number)]
    found = reliability(torch.stack([claim.probability for claim in claims]), defect)
    assert found.chi_square < 34 and abs(found.brier_z) < 4.9
    assert int(found.count.sum()) == number and int((found.count > 90).sum()) == 5
    proud = (PRIOR.log() + log_density(y, (S**2 + R**2) / 2)).softmax(-1)[..., 1]
    table = reliability(proud, defect)
    assert table.chi_square > 34 and table.brier_z > 4.9


def test_a_reliability_table_by_hand() -> None:
    p = torch.tensor([0.1, 0.1, 0.7, 0.9, 1.0])
    o = torch.tensor([False, True, True, True, True])
    found = reliability(p, o, bins=2)
    assert found.count.tolist() == [2, 3]
    assert found.claimed.tolist() == pytest.approx([0.1, 2.6 / 3]) and found.observed.tolist() == [0.5, 1.0]
    for i, (k, n) in enumerate([(1, 2), (3, 3)]):
        interval = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert (float(found.low[i]), float(found.high[i])) == pytest.approx(interval)
    assert found.brier == pytest.approx((0.01 + 0.81 + 0.09 + 0.01 + 0) / 5)
    assert found.brier_expected == pytest.approx((0.09 + 0.09 + 0.21 + 0.09 + 0) / 5)
    variance = (0.64 * 0.09 * 3 + 0.16 * 0.21) / 25
    assert found.brier_z == pytest.approx((0.184 - 0.096) / math.sqrt(variance))
    assert found.chi_square == pytest.approx(0.8**2 / 0.18 + 0.4**2 / 0.30)
    assert "2     0.10      0.50" in str(found)
    assert reliability(torch.ones(3), torch.ones(3)).brier_z == 0 and not math.isnan(reliability(p[-1:], o[:1]).brier_z)
    with pytest.raises(ValueError, match=r"got claims \(5,\), outcomes \(4,\)"):
        reliability(p, o[:4])
    with pytest.raises(ValueError, match="claims between 0 and 1"):
        reliability(p + 0.1, o)
