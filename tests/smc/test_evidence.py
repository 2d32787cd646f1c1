"""The variance of the evidence from one run, against the exact identity of its theory and against many runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from smcdiff.smc import ParticleFilter, Records
from smcdiff.smc.evidence import error_over_chains, evidence_variance, expectation_variance, relative_variance
from smcdiff.smc.genealogy import roots
from smcdiff.smc.resampling import Killing, Multinomial, Resampler, Residual, Stratified, Systematic
from smcdiff.smc.ssp import SSP
from tests.smc.models import Bootstrap, HiddenMarkov, LinearGaussian

KEEP = Records(log_weights=True)


def test_by_hand() -> None:
    w = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64)
    got = relative_variance(w, torch.tensor([[2, 0, 2], [1, 1, 1]]), torch.tensor([1, 0]))
    # S = (3/4)^2 + (1/4)^2 = 5/8 and 1; (3/2)^2 and 3/2
    assert got.tolist() == pytest.approx([1 - 9 / 4 * 3 / 8, 1.0], abs=1e-15)


@pytest.mark.parametrize(("n", "threshold"), [(3, 1.0), (4, 1.0), (3, 0.0)])
def test_variance_of_lee_and_whiteley_is_exactly_unbiased(n: int, threshold: float) -> None:
    # E[Z_hat^2 (1 - V)] = Z^2 at any n with multinomial resampling at fixed times: 60 000 chains, 5 standard errors
    # (failure 6e-7). One power of n / (n - 1) more or less would be off by a third.
    model = HiddenMarkov.example()
    result = ParticleFilter(Multinomial(), threshold).run(model, num_particles=n, num_chains=60_000, seed=n)
    assert result.records.ancestors is not None
    V = relative_variance(result.w, roots(result.records.ancestors)[-1], result.records.resampled.sum(0))
    ratio = torch.exp(2 * (result.log_z - model.log_evidence)) * (1 - V)
    error = (ratio.std() / math.sqrt(60_000)).item()
    assert error < 0.04
    assert abs(ratio.mean().item() - 1) < 5 * error


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_calibrated_against_the_spread_of_many_runs(threshold: float) -> None:
    # 3000 chains: the spread's own relative error is sqrt(2 / 3000) = 2.6 %, five of which are 13 %; 5 % more for
    # terms of order 1 / n.
    model = Bootstrap(LinearGaussian.example(2, num_steps=6))
    result = ParticleFilter(Multinomial(), threshold).run(model, num_particles=300, num_chains=3000, seed=1)
    truth = model.model.kalman[2][-1]
    ratio = torch.exp(result.log_z - truth)
    spread = ratio.var().item()
    assert 0.005 < spread < 0.1
    V = evidence_variance(result)
    assert (ratio**2 * V).mean().item() == pytest.approx(spread, rel=0.18)
    x = result.particles["x"]
    means = (result.w[..., None] * x).sum(1)
    E = expectation_variance(result, x)
    assert E.shape == (3000, 2)
    assert E.mean(0).tolist() == pytest.approx(means.var(0).tolist(), rel=0.18)


def test_a_lag_of_the_whole_run_is_the_whole_run() -> None:
    model = Bootstrap(LinearGaussian.example(2, num_steps=5))
    result = ParticleFilter(Multinomial(), 0.6).run(model, num_particles=50, num_chains=20, seed=1, records=KEEP)
    mixed = result.records.resampled.any(1) & ~result.records.resampled.all(1)
    assert mixed.any()
    for lag in (5, 9):
        torch.testing.assert_close(evidence_variance(result, lag), evidence_variance(result), rtol=1e-11, atol=1e-13)
        x = result.particles["x"]
        torch.testing.assert_close(expectation_variance(result, x, lag), expectation_variance(result, x))


def test_a_lag_is_calibrated_where_the_whole_run_has_coalesced() -> None:
    # Z^2 V estimates the variance of Z; the chains of large Z have most of it. 1500 chains: 5 * sqrt(2 / 1500) = 18 %
    # for the spread, 9 % more for its skewness and for what is older than 10 steps.
    model = Bootstrap(LinearGaussian.example(1, num_steps=50))
    result = ParticleFilter(Multinomial(), 1.0).run(model, num_particles=100, num_chains=1500, seed=2, records=KEEP)
    with pytest.raises(ValueError, match="all descend from one particle of the initial step; give a lag"):
        evidence_variance(result)
    ratio = torch.exp(result.log_z - model.model.kalman[2][-1])
    V = evidence_variance(result, lag=10)
    assert (ratio**2 * V).mean().item() == pytest.approx(ratio.var().item(), rel=0.27)
    x = result.particles["x"]
    means = (result.w[..., None] * x).sum(1)
    E = expectation_variance(result, x, lag=10)
    assert E.mean(0).tolist() == pytest.approx(means.var(0).tolist(), rel=0.27)


def test_variance_of_an_expectation_by_loops() -> None:
    model = Bootstrap(LinearGaussian.example(2, num_steps=4))
    result = ParticleFilter(Multinomial(), 1.0).run(model, num_particles=6, num_chains=1, seed=3)
    x = result.particles["x"]
    got = expectation_variance(result, x, lag=2)
    parents = result.records.ancestors
    assert parents is not None
    mean = [sum(result.w[0, j].item() * x[0, j, d].item() for j in range(6)) for d in range(2)]
    for d in range(2):
        by_root = [0.0] * 6
        for j in range(6):
            root = parents[2, 0, parents[3, 0, j]]
            by_root[root] += result.w[0, j].item() * (x[0, j, d].item() - mean[d])
        assert got[0, d].item() == pytest.approx((6 / 5) ** 3 * sum(v * v for v in by_root), rel=1e-12)


def test_error_over_chains() -> None:
    log_z = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).log() - 1000
    # ratios 3/7, 6/7, 12/7 with variance (16 + 1 + 25) / 49 / 2
    assert error_over_chains(log_z).item() == pytest.approx(math.sqrt(42 / 49 / 2 / 3), rel=1e-12)
    with pytest.raises(ValueError, match="at least two"):
        error_over_chains(log_z[:1])


def test_refused_where_theory_does_not_cover_the_run() -> None:
    model = Bootstrap(LinearGaussian.example(1, num_steps=4))
    with pytest.raises(ValueError, match="got a run with Systematic resampling"):
        evidence_variance(ParticleFilter(Systematic(), 1.0).run(model, num_particles=30))
    never = ParticleFilter(Systematic(), 0.0).run(model, num_particles=30)
    assert evidence_variance(never).item() == pytest.approx((30 * never.w.square().sum().item() - 1) / 29, rel=1e-12)
    with pytest.raises(ValueError, match="one particle"):
        evidence_variance(ParticleFilter(Multinomial()).run(model, num_particles=1))
    light = ParticleFilter(Multinomial()).run(model, num_particles=30, records=Records(ancestors=False))
    with pytest.raises(ValueError, match=r"Records\(ancestors=True\)"):
        evidence_variance(light)
    result = ParticleFilter(Multinomial()).run(model, num_particles=30)
    with pytest.raises(ValueError, match=r"Records\(log_weights=True\)"):
        evidence_variance(result, lag=2)
    with pytest.raises(ValueError, match="got lag 0"):
        expectation_variance(result, result.particles["x"], lag=0)


@pytest.mark.parametrize(
    "scheme", [Systematic(), Stratified(), Residual(), SSP(), Killing()], ids=lambda s: type(s).__name__
)
def test_refused_for_every_other_scheme(scheme: Resampler) -> None:
    model = Bootstrap(LinearGaussian.example(1, num_steps=4))
    result = ParticleFilter(scheme, 1.0).run(model, num_particles=30, num_chains=3, records=KEEP)
    for lag in (None, 1, 2):
        refusal = f"got a run with {type(scheme).__name__} resampling; .* is known for Multinomial alone"
        with pytest.raises(ValueError, match=refusal):
            evidence_variance(result, lag)
        with pytest.raises(ValueError, match=refusal):
            expectation_variance(result, result.particles["x"], lag)


@pytest.mark.parametrize("survivors", [1, 2])
def test_refused_where_a_chain_has_coalesced_over_the_lag(survivors: int) -> None:
    """Ancestors of four steps by hand: those of chain 1 at step 3 have one or two parents, the others their own."""
    model = Bootstrap(LinearGaussian.example(1, num_steps=4))
    run = ParticleFilter(Multinomial(), 1.0).run(model, num_particles=6, num_chains=3, records=KEEP)
    ancestors = torch.arange(6).repeat(4, 3, 1)
    ancestors[2, 1] = 3
    ancestors[2, 1, 5] = 3 if survivors == 1 else 4
    result = replace(run, records=replace(run.records, ancestors=ancestors))
    x = result.particles["x"]
    assert expectation_variance(result, x, lag=1).isfinite().all()
    if survivors == 2:
        for lag in (None, 1, 2, 3, 4, 9):
            assert evidence_variance(result, lag).isfinite().all()
            assert expectation_variance(result, x, lag).isfinite().all()
        return
    by = r"got chains \[1\] whose particles all descend from one particle of "
    for lag, says in {
        1: "step 2 at step 3; take a shorter lag",
        2: "step 1 at step 3",
        3: "step 0 at step 3",
        9: "step 0 at step 4",
        None: "the initial step; give a lag",
    }.items():
        with pytest.raises(ValueError, match=by + says):
            evidence_variance(result, lag)
    for lag, step in {2: 2, 3: 1, 9: 0, None: 0}.items():
        with pytest.raises(ValueError, match=by + f"step {step}; take a shorter lag"):
            expectation_variance(result, x, lag)


def test_refused_where_the_particles_of_a_long_run_have_coalesced_over_the_lag() -> None:
    model = Bootstrap(LinearGaussian.example(1, num_steps=60))
    result = ParticleFilter(Multinomial(), 1.0).run(model, num_particles=20, num_chains=5, records=KEEP)
    with pytest.raises(ValueError, match="step 0 at step 59; take a shorter lag or more particles"):
        evidence_variance(result, lag=59)
    with pytest.raises(ValueError, match="step 1; take a shorter lag or more particles"):
        expectation_variance(result, result.particles["x"], lag=59)
    assert evidence_variance(result, lag=1).isfinite().all()
