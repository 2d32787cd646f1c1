"""Numbers about weights against closed forms, against ArviZ's own fit, and against laws with a known tail."""

import math

import numpy as np
import pytest
import torch

from smcdiff.diagnostics import effective_sample_size, entropy, pareto_k, perplexity, tempered


def test_effective_sample_size_and_perplexity_by_hand():
    w = torch.tensor([[0.5, 0.25], [0.125, 0.125]], dtype=torch.float64)
    log_w = w.log() + 700  # unnormalised, and out of the range of exp
    assert effective_sample_size(log_w) == pytest.approx(1 / (0.25 + 0.0625 + 2 * 0.015625), rel=1e-12)
    assert perplexity(log_w) == pytest.approx(2**1.75, rel=1e-12)  # entropy 1/2 + 1/2 + 3/8 + 3/8 bits
    equal = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    assert effective_sample_size(equal) == pytest.approx(3) and perplexity(equal) == pytest.approx(3)
    nothing = torch.full((4,), -math.inf)
    assert effective_sample_size(nothing) == 0 and perplexity(nothing) == 0


@pytest.mark.parametrize("size", [30, 200, 5000])
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_pareto_k_is_that_of_arviz(size, scale):
    arviz = pytest.importorskip("arviz", minversion="0.23")
    if not hasattr(arviz, "InferenceData"):
        pytest.skip("ArviZ 1 has no psislw for log-weights")
    log_w = scale * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    assert pareto_k(log_w) == pytest.approx(float(arviz.psislw(log_w.numpy())[1]), rel=1e-8)


@pytest.mark.parametrize("k", [-0.3, 0.3, 0.7, 1.2])
def test_pareto_k_finds_the_tail_of_a_generalised_pareto_law(k):
    # Weights at the quantiles of the law, no chance in it. A generalised Pareto tail is one again, with the same k.
    size = 100_000
    u = (np.arange(size) + 0.5) / size
    w = ((1 - u) ** -k - 1) / k
    tail = math.ceil(3 * math.sqrt(size))
    shrunk = (tail * k + 5) / (tail + 10)
    assert pareto_k(torch.from_numpy(np.log(w))) == pytest.approx(shrunk, abs=0.03)


@pytest.mark.parametrize("rate", [0.8, 0.5, 0.25])
def test_pareto_k_of_importance_weights_with_a_known_tail(rate):
    # Draws of Exp(1) for the target Exp(rate): w = rate exp((1 - rate) x), so P(w > u) ~ u^(-1 / k) with k = 1 - rate.
    size = 200_000
    x = torch.empty(size, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    tail = math.ceil(3 * math.sqrt(size))  # 1342 of them; the fit's standard error is about (1 + k) / sqrt(tail)
    k = 1 - rate
    shrunk = (tail * k + 5) / (tail + 10)
    assert pareto_k((1 - rate) * x) == pytest.approx(shrunk, abs=5 * (1 + k) / math.sqrt(tail))
    # the other way about the weights are bounded: w = exp(-(1 - rate) x / rate) / rate, and k is negative or near zero
    assert pareto_k(-(1 - rate) * x) < 0.1


def test_entropy_of_chains_by_hand():
    w = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25] * 4], dtype=torch.float64)
    expected = [1.5 * math.log(2), 0.0, math.log(4)]
    torch.testing.assert_close(entropy(w), torch.tensor(expected, dtype=torch.float64))


def test_pareto_k_of_equal_and_of_too_few_weights():
    assert pareto_k(torch.zeros(100)) == -math.inf
    assert math.isnan(pareto_k(torch.arange(10.0)))
    two_values = torch.cat([torch.zeros(97), torch.ones(3)])
    assert math.isnan(pareto_k(two_values))


@pytest.mark.parametrize("wanted", [1.2, 1.5, 1.9])
def test_tempering_of_two_weights_in_closed_form(wanted):
    # ESS = (1 + u)^2 / (1 + u^2) with u = exp(-9 tau); wanted (1 + u^2) = (1 + u)^2 is a quadratic in u.
    c = wanted - 1
    u = (1 - math.sqrt(1 - c**2)) / c
    log_w, exponent = tempered(torch.tensor([[3.0], [-6.0]]), wanted)
    assert exponent == pytest.approx(-math.log(u) / 9, rel=1e-9)
    expected = torch.tensor([[1 / (1 + u)], [u / (1 + u)]], dtype=torch.float64)
    torch.testing.assert_close(log_w.exp(), expected)


def test_tempering_leaves_good_weights_alone():
    log_w = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
    result, exponent = tempered(log_w, 3.0)
    assert exponent == 1.0
    torch.testing.assert_close(result, log_w - log_w.logsumexp(0))


def test_tempering_keeps_zero_weights_and_meets_the_target():
    log_w = torch.cat([torch.tensor([-math.inf, -math.inf]), 300 * torch.linspace(-1, 1, 50) ** 2])
    result, exponent = tempered(log_w, 20.0)
    assert 0 < exponent < 1
    assert effective_sample_size(result) == pytest.approx(20.0, rel=1e-9)
    assert result[:2].tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(result[2:].diff(), (exponent * log_w[2:].double()).diff())
    everyone, exponent = tempered(log_w, 50)
    assert exponent == pytest.approx(0.0, abs=1e-9) and effective_sample_size(everyone) == pytest.approx(50)
    for impossible in (0.5, 51):
        with pytest.raises(ValueError, match="expected between 1 and 50"):
            tempered(log_w, impossible)
