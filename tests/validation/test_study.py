"""Calibration studies: exact posteriors pass, known-bad ones fail, and a study that was killed resumes to the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.diagnostics.calibration import Calibration
from smcdiff.validation import CalibrationStudy, PosteriorDraws, SMCPosterior, StudyError
from tests.guidance.exact import chain_law
from tests.validation.gaussian import F64, from_prior, model, posterior


def study(method, number: int = 300, num_references: int = 1, **settings) -> Calibration:
    settings = {"num_references": num_references, "progress": False, **settings}
    return CalibrationStudy(model, method, number, **settings).run().result


def coordinates(result: Calibration) -> dict[str, float]:
    """ECDF p-values of what the coordinates alone say."""
    return {name: result.tests()[name].ecdf_p for name in ("x mean", "x rms")}


def test_the_exact_posterior_passes() -> None:
    """Each of the four ECDF p-values is exact: below 2.5e-6 with probability 2.5e-6. The map's mean coverage is within
    5 of its standard errors, over 300 independent replications (5e-7)."""
    result = study(posterior, num_references=4)
    tests = result.tests()
    assert set(tests) == {"x mean", "x rms", "log_likelihood", "x tarp"}
    assert all(test.ecdf_p > 2.5e-6 for test in tests.values())
    covered = result.coverage_map("x", 0.8)
    assert covered.coverage.shape == (64,)
    assert abs(covered.mean - 0.8) < 5 * covered.mean_error and covered.mean_error < 0.005
    assert result.num_draws == 19 and int(result.ranks("x").max()) == 19 and int(result.ranks("x").min()) == 0


def test_a_posterior_ten_percent_too_narrow_fails() -> None:
    """Of 100 000 simulated replications 49.5 % had u <= 1/4 for the log-likelihood. If at least 117 of 320 have, where
    80 are expected, a union bound over the 99 points gives p < 1e-3, and Bin(320, 0.487), five standard errors below
    what was measured, stays under 117 with probability 5e-6: the power at the level 1e-3 is above 1 - 1e-5."""
    result = study(lambda y: posterior(y, width=0.9), 320)
    test = result.tests()["log_likelihood"]
    assert test.ecdf_p < 1e-3 and test.mean < 0.5
    assert (
        result.coverage_map("x", 0.8).mean < 0.77
    )  # 2 Phi(0.9 Phi^-1(0.9)) - 1 = 0.751 with a standard error of 0.003


def test_the_prior_in_place_of_the_posterior_fails_by_the_log_likelihood_alone() -> None:
    """The coordinates pass, each with probability 1 - 2.5e-6. Of 100 000 simulated replications none had u <= 0.09 for
    the log-likelihood, so that its share is below 1.2e-4 but for a probability of 6e-6. At most 3 of 300, where 27 are
    expected, give p < 1e-6 by a union bound, and Bin(300, 1.2e-4) exceeds 3 with probability 7e-8."""
    result = study(from_prior)
    assert all(p > 2.5e-6 for p in coordinates(result).values())
    assert abs(result.coverage_map("x", 0.8).mean - 0.8) < 5 * result.coverage_map("x", 0.8).mean_error
    test = result.tests()["log_likelihood"]
    assert test.ecdf_p < 1e-6 and test.mean > 0.9
    assert not result.expected_coverage().inside


def test_tarp_sees_the_prior_with_a_reference_that_depends_on_the_measurement_alone() -> None:
    """With the likeliest of 8 prior draws as the reference the truth is nearer to it than prior draws are (p about
    1e-10 at this seed); with one prior draw the values are exactly uniform (p above 2.5e-6)."""
    assert study(from_prior, 100).tests()["x tarp"].ecdf_p > 2.5e-6
    seen = study(from_prior, 100, num_references=8).tests()["x tarp"]
    assert seen.ecdf_p < 1e-5 and seen.mean < 0.4


def test_a_wrong_noise_level_fails() -> None:
    """Noise of 1 taken to be 1.3. Of 100 000 simulated replications 0.05 % had u <= 0.18 for the log-likelihood. At
    most 8 of 300, where 54 are expected, give p < 1e-9 by a union bound; Bin(300, 0.001) exceeds 8 with probability
    4e-11."""
    test = study(lambda y: posterior(y, sigma=1.3)).tests()["log_likelihood"]
    assert test.ecdf_p < 1e-9 and test.mean > 0.8


A = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 1.0]], dtype=F64)


def three_pixels(sigma: float = 0.2):
    denoiser = sd.GaussianDenoiser(torch.zeros(3, dtype=F64), torch.tensor([1.0, 2.0, 0.5], dtype=F64))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 10, variance="optimal", grid=sd.KarrasGrid())

    def program(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)

    program.prior = prior
    return program


def test_a_twisted_filter_passes_and_dps_alone_fails() -> None:
    """Of 400 replications of DPS with its default step 5.5 % had u <= 0.8 for the log-likelihood. At most 19 of 40,
    where 32 are expected, give p < 1e-3 by a union bound over 99 points; Bin(40, 0.112), five standard errors above
    what was measured, exceeds 19 with probability 4e-9: that is what the power at the level 1e-3 lacks. The filter's
    p-values are exact up to its bias of order 1 / n; each is below 2e-6 with probability 2e-6."""
    program = three_pixels()
    twisted = SMCPosterior(sd.TDS(program, sd.TweedieTwist()), num_particles=16, num_draws=9)
    passed = CalibrationStudy(program, twisted, 40, progress=False).run().result
    assert all(test.ecdf_p > 2e-6 for test in passed.tests().values())
    alone = SMCPosterior(sd.DPS(program), num_particles=1, num_draws=9)
    failed = CalibrationStudy(program, alone, 40, progress=False).run().result
    assert failed.tests()["log_likelihood"].ecdf_p < 1e-3 and failed.tests()["log_likelihood"].mean > 0.8


def test_weighted_draws_and_latents_of_several_kinds() -> None:
    """Importance sampling from the prior of a program with a discrete latent, a scale and a site that is deterministic.
    1500 weighted draws resampled to 9: ranks are uniform up to the share of copies, a few percent, which 100
    replications cannot see (p-values above 1e-4)."""

    def program(y=None):
        group = pyro.sample("group", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("twice", 2 * x)
        return pyro.sample("y", dist.Normal(x + 2 * group, 1.0).to_event(1), obs=y)

    def importance(y: Mapping[str, Tensor]) -> PosteriorDraws:
        group, x = torch.bernoulli(torch.full((1500,), 0.3)), torch.randn(1500, 2)
        log_w = dist.Normal(x + 2 * group[:, None], 1.0).log_prob(y["y"]).sum(-1)
        return PosteriorDraws({"group": group, "x": x, "more": x}, log_w)

    def product(values: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
        return values["x"].prod() * y["y"].sum()

    settings = {"num_draws": 9, "quantities": {"product": product}, "progress": False}
    result = CalibrationStudy(program, importance, 100, **settings).run().result
    assert set(result.pit) == {"group", "x", "x mean", "x rms", "log_likelihood", "product"}
    assert set(result.tarp) == {"group", "x"}
    assert all(test.ecdf_p > 1e-4 for test in result.tests().values())
    with pytest.raises(ValueError, match="no num_draws"):
        CalibrationStudy(program, importance, 1, progress=False).run()


class Killed(Exception):
    """In place of a power cut."""


def equal(first: Calibration, second: Calibration) -> bool:
    pairs = [(first.pit, second.pit), (first.tarp, second.tarp)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def test_a_killed_study_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = study(posterior, 25)
    calls = 0

    def dies(y: Mapping[str, Tensor]) -> PosteriorDraws:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise Killed
        return posterior(y)

    folder = tmp_path / "study"
    with pytest.raises(Killed):
        study(dies, 25, folder=folder)
    (folder / "replication_000007.99.part").write_bytes(b"half a file")
    torch.rand(1000)  # the state of the global generator does not matter
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert len(finished) == 7
    time.sleep(0.01)
    resumed = study(posterior, 25, folder=folder)
    assert equal(resumed, whole)
    assert all((folder / name).stat().st_mtime_ns == written for name, written in finished.items())


def test_shares_in_any_order_make_the_whole(tmp_path: Path) -> None:
    whole = study(posterior, 25)
    settings = {"num_references": 1, "folder": tmp_path, "progress": False}
    parts = [CalibrationStudy(model, posterior, 25, **settings) for _ in range(2)]
    parts[1].run(range(24, 0, -2))
    assert parts[0].result.num_replications == 12
    parts[0].run()
    assert equal(parts[1].result, whole)


def test_the_global_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    study(posterior, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "another"}, {"num_references": 2}, {"num_draws": 9}])
def test_another_study_is_refused_with_the_reason(tmp_path: Path, change: dict) -> None:
    study(posterior, 2, folder=tmp_path)
    with pytest.raises(StudyError, match="another study.*there.*here"):
        study(posterior, 2, folder=tmp_path, **change)


def test_another_program_or_method_is_refused(tmp_path: Path) -> None:
    programs = [three_pixels(), three_pixels()]
    method = SMCPosterior(sd.TDS(programs[0], sd.WidenedTwist(1.0)), 2, 2)
    CalibrationStudy(programs[0], method, 1, folder=tmp_path, progress=False).run()
    again = SMCPosterior(sd.TDS(programs[1], sd.WidenedTwist(1.0)), 2, 2)
    CalibrationStudy(programs[1], again, 1, folder=tmp_path, progress=False).run()  # the same, made anew
    other = SMCPosterior(sd.TDS(programs[0], sd.WidenedTwist(0.5)), 2, 2)
    with pytest.raises(StudyError, match="posterior: TDS"):
        CalibrationStudy(programs[0], other, 1, folder=tmp_path, progress=False).run()
    with pytest.raises(StudyError, match="program"):
        CalibrationStudy(model, method, 1, folder=tmp_path, progress=False).run()


def test_draws_of_a_method_are_independent_and_of_its_posterior() -> None:
    """500 chains of 300 particles of the bootstrap filter, which weighs at its last step alone: draws are prior draws
    unless they are chosen by weight. None occurs twice, as each is from a chain of its own. Their mean is the exact
    posterior's within 5 standard errors (2e-6 in all) and a twentieth of the deviation for the bias of order 1 / n."""
    program = three_pixels(0.8)
    y = torch.tensor([2.0, -2.0], dtype=F64)
    law = chain_law(program.prior, torch.zeros(3, dtype=F64), torch.tensor([1.0, 2.0, 0.5], dtype=F64).diag())
    posterior, _ = law.given(A, y, 0.8)
    torch.manual_seed(0)
    draws = SMCPosterior(sd.Bootstrap(program), 300, 500)({"y": y}).values["x"]
    assert draws.shape == (500, 3) and len(draws.unique(dim=0)) == 500
    deviation = posterior.covariance.diagonal().sqrt()
    assert bool(((draws.mean(0) - posterior.mean).abs() < (5 / 500**0.5 + 0.05) * deviation).all())
    assert bool((posterior.mean.abs() > 0.5 * deviation).any())  # the prior's mean is told from it


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_replications"):
        CalibrationStudy(model, posterior, 0)
    with pytest.raises(ValueError, match="measured sites.*'z'"):
        CalibrationStudy(model, posterior, 1, observed=("z",), progress=False).run()
    with pytest.raises(ValueError, match="observed or weighed"):
        CalibrationStudy(lambda: model(torch.zeros(64, dtype=F64)), posterior, 1, progress=False).run()
    with pytest.raises(ValueError, match="without latents"):
        CalibrationStudy(lambda: pyro.sample("y", dist.Normal(0.0, 1.0)), posterior, 1, progress=False).run()
    with pytest.raises(ValueError, match="without the latents"):
        study(lambda y: PosteriorDraws({"z": torch.zeros(3)}), 1)
    with pytest.raises(ValueError, match="got draws of 'x' of shape"):
        study(lambda y: PosteriorDraws({"x": torch.zeros(3, 5)}), 1)
    with pytest.raises(ValueError, match="at least num_draws"):
        study(posterior, 1, num_draws=20)
    with pytest.raises(ValueError, match="the study has itself"):
        study(posterior, 1, quantities={"x": lambda values, y: torch.zeros(())})
    with pytest.raises(StudyError, match="no replication"):
        _ = CalibrationStudy(model, posterior, 1).result
    different = iter((3, 4))
    with pytest.raises(StudyError, match="draws"):
        study(lambda y: posterior(y, number=next(different)), 2)
