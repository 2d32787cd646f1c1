"""A chain that begins at a noised picture: its law, its Pyro trace and its posterior against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import smcdiff as sd
from smcdiff.diffusion.start import Start
from smcdiff.guidance.program import Program
from tests.diffusion.exact import assert_normal_moments, bridge, clean_given_noisy, example_covariance, library_law
from tests.guidance.exact import NormalLaw, check_evidence, weighted_moments

F64 = torch.float64
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
COVARIANCE = example_covariance(3)
IMAGE = torch.tensor([1.5, 0.3, -0.7], dtype=F64)
EYE = torch.eye(3, dtype=F64)


def prior_with(start: Start | None, variance: str = "optimal", num_steps: int = 6) -> sd.DiffusionPrior:
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, variance=variance, start=start)


def law_from(prior: sd.DiffusionPrior) -> NormalLaw:
    """The recursion of the moments from N(alpha image, sigma^2 I), written out."""
    levels = prior.chain.levels
    m, P = levels[-1].alpha * IMAGE, levels[-1].sigma ** 2 * EYE
    for t, s in zip(levels[:0:-1], levels[-2::-1], strict=True):
        b, c, small, _ = bridge(t, s)
        gain = t.alpha * COVARIANCE @ torch.linalg.inv(t.alpha**2 * COVARIANCE + t.sigma**2 * EYE)
        _, within = clean_given_noisy(MEAN, COVARIANCE, t, MEAN)
        forward = b * EYE + c * gain
        m = forward @ m + c * (MEAN - t.alpha * gain @ MEAN)
        spread = small + (c**2 * float(within.trace()) / 3 if prior.chain.variance == "optimal" else 0.0)
        P = forward @ P @ forward.T + spread * EYE
    return NormalLaw(m, P)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("grid", [None, sd.KarrasGrid(), sd.TrailingGrid(), sd.LogGrid()], ids=str)
def test_the_law_is_the_recursion_from_the_noised_picture(variance: str, grid) -> None:
    prior = prior_with(Start(IMAGE, 300.0), variance).replace(grid=grid)
    chain = prior.chain
    assert chain.levels[-1].t == pytest.approx(300.0) and len(chain.levels) == 7
    top = sd.VPSchedule().level(300.0)
    torch.testing.assert_close(chain.initial_mean, top.alpha * IMAGE)
    assert chain.initial_scale == pytest.approx(top.sigma)
    expected = law_from(prior)
    mean, covariance = library_law(chain, top.alpha * IMAGE, top.sigma**2 * EYE)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(covariance, expected.covariance, rtol=1e-6, atol=1e-8)


def test_an_isotropic_prior_gives_one_noising_and_one_exact_step_back() -> None:
    """At any number of steps x_0 is drawn from p(x_0 given x_{t_0}) with x_{t_0} ~ N(alpha image, sigma^2)."""
    v = 0.3
    for num_steps in (1, 2, 9):
        for schedule, t_0 in ((sd.VPSchedule(), 400.0), (sd.VESchedule(0.01, 50.0), 2.0), (sd.FlowSchedule(), 0.4)):
            denoiser = sd.GaussianDenoiser(MEAN, v * EYE)
            prior = sd.DiffusionPrior(denoiser, schedule, num_steps, variance="optimal", start=Start(IMAGE, t_0))
            level = schedule.level(t_0)
            pull = level.alpha * v / (level.alpha**2 * v + level.sigma**2)
            mean, covariance = library_law(prior.chain, level.alpha * IMAGE, level.sigma**2 * EYE)
            torch.testing.assert_close(mean, MEAN + pull * level.alpha * (IMAGE - MEAN))
            spread = level.sigma**2 * v / (level.alpha**2 * v + level.sigma**2) + (pull * level.sigma) ** 2
            torch.testing.assert_close(covariance, spread * EYE)


def test_draws_have_that_law() -> None:
    """By the sampler and by Pyro; fails by chance with probability at most 8e-6 (assert_normal_moments, twice)."""
    prior = prior_with(Start(IMAGE, 300.0), num_steps=4)
    law = law_from(prior)
    assert_normal_moments(prior.chain.sample(20_000, torch.Generator().manual_seed(0)), law.mean, law.covariance)
    assert_normal_moments(prior.chain.expand((20_000,))("x"), law.mean, law.covariance)


def test_the_unrolled_program_has_the_same_joint_density() -> None:
    prior = prior_with(Start(IMAGE, 300.0), num_steps=4)
    y = torch.tensor(0.4, dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        pyro.sample("y", dist.Normal(x.sum(), scale), obs=y)

    trace = pyro.poutine.trace(sd.unroll(model)).get_trace(y)
    path = [trace.nodes[f"x_{k}"]["value"] for k in range(5)]
    levels = prior.chain.levels
    total = Normal(levels[4].alpha * IMAGE, levels[4].sigma).log_prob(path[4]).sum()
    for k in range(4, 0, -1):
        t, s = levels[k], levels[k - 1]
        x0_hat, within = clean_given_noisy(MEAN, COVARIANCE, t, path[k])
        b, c, small, _ = bridge(t, s)
        scale = math.sqrt(small + c**2 * float(within.trace()) / 3)
        total = total + Normal(b * path[k] + c * x0_hat, scale).log_prob(path[k - 1]).sum()
    got = sum(trace.nodes[f"x_{k}"]["fn"].log_prob(path[k]) for k in range(5))
    torch.testing.assert_close(got, total)
    first = trace.nodes["scale_4"]["fn"]  # other latents keep their own chain, which is exact from its standard normal
    assert float(first.mean) == 0 and float(first.stddev) == pytest.approx(1)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_posterior_and_evidence_are_those_of_the_changed_prior(variance: str) -> None:
    prior = prior_with(Start(IMAGE, 300.0), variance, num_steps=12)
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]], dtype=F64)
    y, sigma = torch.tensor([0.4, 1.1], dtype=F64), 0.7

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)

    posterior, log_z = law_from(prior).given(A, y, sigma)
    smc = sd.SMC(sd.TDS(model, sd.TweedieTwist()), 300, num_chains=24, seed=0, progress=False).run(y)
    check_evidence(smc, log_z)
    mean, error, _ = weighted_moments(smc, "x")
    assert bool(((mean - posterior.mean).abs() < 5 * error + 1e-6).all())
    assert bool((error < 0.05 * posterior.covariance.diagonal().sqrt()).all())
    without = prior_with(None, variance, num_steps=12).chain
    assert without.start is None and prior.chain.start is not None
    assert "started at noise time 300" in str(prior.chain.start)


def test_a_run_from_another_picture_is_another_run() -> None:
    """What a checkpoint is recognised by tells starts apart that differ in the picture alone."""

    def identity(image: Tensor) -> dict[str, str]:
        prior = prior_with(Start(image, 300.0))

        def model(y: Tensor) -> None:
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

        return Program(model, (IMAGE,)).identity()

    assert identity(IMAGE) == identity(IMAGE.clone())
    assert identity(IMAGE)["latents"] != identity(IMAGE + 1)["latents"]


def test_replace_and_plates_keep_the_start() -> None:
    start = Start(IMAGE, 300.0)
    prior = prior_with(None).replace(start=start, num_steps=3)
    assert prior.chain.start is start and len(prior.chain.levels) == 4
    assert prior.replace(num_steps=8).chain.start is start
    assert prior.expand((5,)).chain.initial_mean.shape == (5, 3)
    each = prior_with(None).expand((2,)).replace(start=Start(torch.stack([IMAGE, -IMAGE]), 300.0))
    torch.testing.assert_close(each.chain.initial_mean[1], -each.chain.initial_mean[0])
    assert not torch.equal(each.chain.initial_mean[0], IMAGE)


def test_starts_that_do_not_fit_are_refused() -> None:
    for t_0 in (0.0, 1.0, 1001.0, float("nan")):
        with pytest.raises(ValueError, match=r"got a start at noise time .* expected one above 1 and at most 1000"):
            prior_with(Start(IMAGE, t_0))
    with pytest.raises(ValueError, match=r"got a start from a picture of shape \(4,\); a draw has shape \(3,\)"):
        prior_with(Start(torch.zeros(4), 300.0))
    with pytest.raises(ValueError, match=r"shape \(2, 3\); a draw has shape \(3,\)"):
        prior_with(Start(torch.zeros(2, 3), 300.0))
    with pytest.raises(ValueError, match="more than LinspaceGrid has distinct noise times"):
        prior_with(Start(IMAGE, 5.0), num_steps=10)
