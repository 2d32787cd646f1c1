"""Averages of a run against sums written out by hand, and the verdict on runs made to deserve it."""

import dataclasses
import math
import re

import pyro
import pytest
import torch

import smcdiff as sd
from smcdiff.diagnostics import Run, diagnose, summarise
from smcdiff.smc.resampling import Multinomial
from tests.diagnostics.models import GAIN, Y, model


def make_run(log_w, values=None, log_z=None, ess=None, roots=None):
    log_w = torch.as_tensor(log_w, dtype=torch.float64)
    b, n = log_w.shape
    ess = torch.full((3, b), float(n)) if ess is None else torch.as_tensor(ess)
    log_z = torch.zeros(b) if log_z is None else torch.as_tensor(log_z)
    return Run(
        values={"x": torch.arange(float(b * n)).reshape(b, n)} if values is None else values,
        log_w=log_w,
        log_z=log_z,
        ess=ess,
        log_z_path=torch.zeros(len(ess), b),
        roots=roots,
    )


def test_weights_of_chains_and_within_chains():
    w = torch.tensor([[0.1, 0.3], [0.6, 0.0]], dtype=torch.float64)
    run = make_run(w.log() + 5)
    torch.testing.assert_close(run.log_w.exp(), w)
    torch.testing.assert_close(run.chain_log_w.exp(), torch.tensor([0.4, 0.6], dtype=torch.float64))
    within = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(run.within_chain_log_w.exp(), within)
    dead = make_run(torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]]))
    torch.testing.assert_close(dead.within_chain_log_w.exp(), torch.full((2, 2), 0.5, dtype=torch.float64))


def test_mean_sd_and_quantiles_by_hand():
    w = torch.tensor([[0.1, 0.3], [0.4, 0.2]])
    values = torch.tensor([[[1.0, 8.0], [2.0, 6.0]], [[3.0, 4.0], [10.0, 2.0]]])
    run = make_run(w.log(), {"x": values})
    mean = [0.1 + 0.6 + 1.2 + 2.0, 0.8 + 1.8 + 1.6 + 0.4]
    square = [0.1 + 1.2 + 3.6 + 20.0, 6.4 + 10.8 + 6.4 + 0.8]
    sd = [math.sqrt(s - m**2) for s, m in zip(square, mean, strict=True)]
    torch.testing.assert_close(run.mean("x"), torch.tensor(mean, dtype=torch.float64))
    torch.testing.assert_close(run.sd("x"), torch.tensor(sd, dtype=torch.float64))
    # first entry: 1, 2, 3, 10 with cumulative weights 0.1, 0.4, 0.8, 1; second: 2, 4, 6, 8 with 0.2, 0.6, 0.9, 1
    for level, expected in {0.05: [1, 2], 0.3: [2, 4], 0.5: [3, 4], 0.79: [3, 6], 0.95: [10, 8]}.items():
        assert run.quantile("x", level).tolist() == expected
    with pytest.raises(ValueError, match="between 0 and 1"):
        run.quantile("x", 1.0)


def test_a_tempered_run_keeps_everything_but_the_weights():
    run = make_run([[0.0, -40.0], [-20.0, -60.0]])
    flat, exponent = run.tempered(2.0)
    assert 0 < exponent < 1
    torch.testing.assert_close(flat.log_w[0, 0] - flat.log_w[1, 1], torch.tensor(60 * exponent, dtype=torch.float64))
    assert flat.values is run.values and flat.log_z is run.log_z
    torch.testing.assert_close(flat.exact.log_w, run.log_w)
    assert flat.exponent == exponent and flat.exact.exponent == 1
    again, second = flat.tempered(2.0)  # from the exact weights, not from weights tempered before
    assert second == exponent
    torch.testing.assert_close(again.log_w, flat.log_w)
    same, one = run.tempered(1.0)
    assert one == 1 and same.exact_log_w is None
    assert str(diagnose(flat)) == str(diagnose(run))  # judged by the exact ones


def test_many_chains_are_written_as_their_range():
    few, more, many = (str(diagnose(make_run(torch.zeros(b, 4), log_z=torch.arange(float(b))))) for b in (16, 17, 301))
    assert "of each chain  0.0 1.0 2.0" in few and "15.0\n" in few
    assert "of each chain  0.0 to 16.0, median 8.0, 17 chains\n" in more
    assert "of each chain  0.0 to 300.0, median 150.0, 301 chains\n" in many
    lost = torch.arange(20.0).index_fill(0, torch.tensor([3]), -math.inf)
    assert "-inf to 19.0" in str(diagnose(make_run(torch.zeros(20, 4), log_z=lost)))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got log_z of shape \(3,\); expected \(2,\)"):
        make_run(torch.zeros(2, 4), log_z=torch.zeros(3))
    with pytest.raises(ValueError, match=r"got 'x' of shape \(2, 5\)"):
        make_run(torch.zeros(2, 4), {"x": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"got ancestors of shape \(3, 2\); expected \(3, 2, 4\)"):
        dataclasses.replace(make_run(torch.zeros(2, 4)), ancestors=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="all zero"):
        make_run(torch.full((2, 4), -math.inf))


def test_evidence_and_its_error():
    z = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    result = diagnose(make_run(torch.zeros(4, 8), log_z=z.log() - 900))
    assert result.log_evidence == pytest.approx(math.log(3) - 900, rel=1e-14)
    sd = math.sqrt(((z - 3) ** 2).sum() / 3)
    assert result.log_evidence_error == pytest.approx(sd / (2 * 3), rel=1e-12)
    assert result.log_z_spread == pytest.approx(float(z.log().std()))


def test_equal_weights_that_agree_are_good():
    result = diagnose(make_run(torch.zeros(4, 100), roots=torch.full((3, 4), 60)))
    assert result.verdict == "good" and result.findings == ()
    assert result.pooled_ess == pytest.approx(400) and result.perplexity == pytest.approx(400)
    assert result.roots.tolist() == [60, 60, 60, 60] and result.k_hat == -math.inf


def test_one_chain_has_the_error_of_its_genealogy():
    one = make_run(torch.zeros(1, 100))
    assert math.isnan(diagnose(one).log_evidence_error)
    told = dataclasses.replace(one, log_z_variance=torch.tensor([0.04]))
    assert diagnose(told).log_evidence_error == pytest.approx(0.2)
    for useless in (-0.01, 0.0, 4.0):  # an estimate may be negative, and one of a nat or more is not to be believed
        told = dataclasses.replace(one, log_z_variance=torch.tensor([useless]))
        assert math.isnan(diagnose(told).log_evidence_error)


def test_the_error_of_a_single_chain_is_the_spread_of_many():
    def run(chains, seed):
        kernel = sd.TDS(model, sd.TweedieTwist())
        many = sd.ParticleFilter(Multinomial(), 0.5)
        return sd.SMC(kernel, 64, chains, filter=many, seed=seed, progress=False).run(Y, gain=GAIN)

    spread = float(run(32, 0).log_evidence_per_chain.std())
    errors = [run(1, seed).diagnostics().log_evidence_error for seed in range(1, 6)]
    known = [error for error in errors if not math.isnan(error)]
    # An estimate from one genealogy is good to a factor of about two here; the median of several is asked for less.
    assert len(known) >= 3 and 0.4 * spread < sorted(known)[len(known) // 2] < 2.5 * spread
    systematic = sd.SMC(sd.TDS(model, sd.TweedieTwist()), 64, 1, seed=0, progress=False).run(Y, gain=GAIN)
    resampled = bool(systematic.records.resampled.any())
    assert math.isnan(systematic.diagnostics().log_evidence_error) == resampled  # theory covers Multinomial alone


def test_the_verdict_follows_the_truth_on_an_exact_problem():
    law = sd.GaussianDenoiser(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    prior = sd.DiffusionPrior(law, sd.VPSchedule(), 15, variance="optimal")  # exactly standard normal at any K

    def program(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, 0.6), obs=y)

    y = torch.tensor([0.5, -1.0, 1.5, 0.0], dtype=torch.float64)
    # y ~ N(0, 1 + 0.36); the error is that of 24 chains, and 6 of them are exceeded with P(|t_23| > 6) = 4e-6
    good = sd.SMC(sd.TDS(program, sd.TweedieTwist()), 64, 24, seed=0, progress=False).run(y).diagnostics()
    exact = float(torch.distributions.Normal(0.0, math.sqrt(1.36)).log_prob(y).sum())
    assert good.verdict == "good", str(good)
    assert abs(good.log_evidence - exact) < 6 * good.log_evidence_error < 0.5
    bad = sd.SMC(sd.Bootstrap(program), 8, 4, seed=0, progress=False).run(20 * y).diagnostics()
    exact = float(torch.distributions.Normal(0.0, math.sqrt(1.36)).log_prob(20 * y).sum())
    assert bad.verdict == "bad" and abs(bad.log_evidence - exact) > 100


def test_the_step_of_the_smallest_ess_is_named_with_its_own_remedy():
    ess = torch.full((6, 4), 100.0)
    ess[3, 2] = 1.5
    result = diagnose(make_run(torch.zeros(4, 100), ess=ess))
    assert (result.min_ess, result.min_ess_step) == (1.5, 3)
    assert "At step 3 of 5" in result.findings[0].reason and "sd.tempered" in result.findings[0].remedy
    ess[3, 2], ess[5, 0] = 100, 1.5
    result = diagnose(make_run(torch.zeros(4, 100), ess=ess))
    assert "At step 5 of 5" in result.findings[0].reason and "last step" in result.findings[0].remedy


def test_every_remedy_names_what_exists():
    names = set()
    for finding in diagnose(make_run(worst(), log_z=[0.0, 9.0, 2.0, 4.0], roots=torch.ones(3, 4))).findings:
        names |= set(re.findall(r"sd\.(\w+)", finding.remedy))
    heavy = -0.9 * torch.log1p(-(torch.arange(400) + 0.5) / 400).reshape(4, 100)
    for finding in diagnose(make_run(heavy)).findings:
        names |= set(re.findall(r"sd\.(\w+)", finding.remedy))
    assert {"ParticleGibbs", "tempered", "TweedieTwist"} <= names <= set(sd.__all__)


def worst():
    log_w = torch.full((4, 100), -100.0)
    log_w[0, 0] = 0
    return log_w


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"log_z": [0.0, 1.0, 2.0, 4.0]}, "doubtful", "spreads by 1.7 nats"),
        ({"log_z": [0.0, 5.0, 10.0, 20.0]}, "bad", "spreads by 8.5 nats"),
        ({"ess": [[50.0] * 4, [1.5, 50, 50, 50]]}, "doubtful", "counted for 1.5"),
        ({"roots": torch.tensor([[100] * 4, [1, 5, 1, 7]])}, "doubtful", "In 2 of 4 chains"),
        ({"log_z": [math.nan] * 4}, "doubtful", "no evidence"),
    ],
)
def test_each_fault_is_named(changes, verdict, words):
    if "roots" in changes:
        changes = {**changes, "ess": torch.full((2, 4), 100.0)}
    result = diagnose(make_run(torch.zeros(4, 100), **changes))
    assert result.verdict == verdict
    assert len(result.findings) == 1 and words in result.findings[0].reason
    assert words in str(result)


def test_collapsed_and_heavy_weights_are_named():
    collapsed = torch.full((4, 100), -100.0)
    collapsed[0, 0] = 0
    result = diagnose(make_run(collapsed))
    assert result.verdict == "bad" and "count for 1.0" in result.findings[0].reason
    heavy = -1.5 * torch.log1p(-(torch.arange(400) + 0.5) / 400).reshape(4, 100).neg()  # k = -1.5 (bounded): no tail
    assert diagnose(make_run(heavy)).verdict == "good"
    heavy = -0.9 * torch.log1p(-(torch.arange(400) + 0.5) / 400).reshape(4, 100)  # Pareto weights, k = 0.9
    result = diagnose(make_run(heavy))
    assert [f.level for f in result.findings] == ["doubtful"] and "heavy tail" in result.findings[0].reason


def test_the_worst_finding_comes_first():
    collapsed = torch.full((4, 100), -100.0)
    collapsed[0, 0] = 0
    result = diagnose(make_run(collapsed, log_z=[0.0, 1.0, 2.0, 4.0], roots=torch.ones(3, 4)))
    assert [f.level for f in result.findings] == sorted(f.level for f in result.findings)
    assert result.verdict == "bad" and len(result.findings) >= 3


def test_summary_states_the_posterior():
    w = torch.tensor([[0.25, 0.75], [0.0, 0.0]])
    values = {
        "sigma": torch.tensor([[1.0, 5.0], [9.0, 9.0]]),
        "pair": torch.tensor([[[1.0, -1.0], [1.0, -1.0]]] * 2),
        "x": torch.zeros(2, 2, 1, 8, 8),
    }
    text = summarise(make_run(w.log(), values))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert [float(v) for v in rows["sigma"]] == pytest.approx([4.0, math.sqrt(3), 1.0, 5.0], rel=1e-3)
    assert [float(v) for v in rows["pair[1]"]] == [-1, 0, -1, -1]
    assert rows["x"][:2] == ["64", "entries:"]
    assert "verdict" in rows
