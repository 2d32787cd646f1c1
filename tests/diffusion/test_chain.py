"""The reverse chain of a Gaussian prior against its closed form, number by number and in law."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from smcdiff.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser, StandardNormalDenoiser
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.denoiser import NetworkDenoiser, from_clean
from smcdiff.diffusion.kernels import Variance
from smcdiff.diffusion.schedule import (
    CosineSchedule,
    FlowSchedule,
    KarrasGrid,
    LogGrid,
    Schedule,
    TrailingGrid,
    VESchedule,
    VPSchedule,
)
from tests.diffusion.exact import (
    assert_normal_moments,
    bridge,
    chain_law,
    clean_given_noisy,
    example_covariance,
    library_law,
)

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
COVARIANCE = example_covariance(3)
VARIANCES: list[Variance] = ["posterior", "fixed_large", "optimal"]
SCHEDULES = [VPSchedule(), CosineSchedule(), VESchedule(0.01, 50.0), FlowSchedule(0.002, 0.99)]


def start(chain: ReverseChain) -> tuple[Tensor, Tensor]:
    """The law of x_{t_K}."""
    d = chain.shape.numel()
    return torch.zeros(d, dtype=torch.float64), chain.initial_scale**2 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("variance", VARIANCES)
def test_law_of_x_0_is_the_linear_recursion(schedule: Schedule, variance: Variance) -> None:
    for num_steps, grid in ((1, None), (2, KarrasGrid()), (9, TrailingGrid()), (60, LogGrid())):
        chain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), schedule, num_steps, variance=variance, grid=grid)
        mean, covariance = library_law(chain, *start(chain))
        exact_mean, exact = chain_law(MEAN, COVARIANCE, chain.levels, variance)
        torch.testing.assert_close(mean, exact_mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(covariance, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variance", VARIANCES)
def test_draws_have_that_law(variance: Variance) -> None:
    """Fails by chance with probability at most 4e-6 (assert_normal_moments)."""
    chain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), VPSchedule(), 5, variance=variance)
    draws = chain.sample(20_000, torch.Generator().manual_seed(0))
    assert_normal_moments(draws, *chain_law(MEAN, COVARIANCE, chain.levels, variance))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
def test_optimal_variance_is_exact_at_any_number_of_steps(schedule: Schedule, num_steps: int) -> None:
    """For an isotropic Gaussian prior: N(0, I) as it stands, any other when x_{t_K} starts from its own law."""
    eye = torch.eye(3, dtype=torch.float64)
    for m, v in ((0 * MEAN, 1.0), (MEAN, 0.3)):
        denoiser = GaussianDenoiser(m, v * eye)
        chain = ReverseChain(denoiser, schedule, num_steps, variance="optimal", grid=KarrasGrid())
        top = chain.levels[-1]
        first = start(chain) if v == 1 else (top.alpha * m, (top.alpha**2 * v + top.sigma**2) * eye)
        mean, covariance = library_law(chain, *first)
        torch.testing.assert_close(mean, m, rtol=0, atol=1e-10)
        torch.testing.assert_close(covariance, v * eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", [VPSchedule(), VESchedule()], ids=["vp", "ve"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_covariance_converges_at_first_order(schedule: Schedule, variance: Variance) -> None:
    """The error of the chain's covariance falls as 1 / K; measured slopes lie in [0.94, 1.06]."""
    steps = [50, 100, 200, 400, 800]
    errors = []
    for num_steps in steps:
        denoiser = GaussianDenoiser(0 * MEAN, COVARIANCE)
        chain = ReverseChain(denoiser, schedule, num_steps, variance=variance, grid=KarrasGrid())
        errors.append(float((library_law(chain, *start(chain))[1] - COVARIANCE).norm()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.08)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_joint_density_of_a_path(variance: Variance, eta: float) -> None:
    """The Pyro trace of the chain against the sum of normal log-densities written out."""
    chain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), VPSchedule(), 8, eta, variance)
    trace = pyro.poutine.trace(chain).get_trace("x")
    path = [trace.nodes[f"x_{k}"]["value"] for k in range(9)]
    top = chain.levels[8]
    total = Normal(0.0, math.sqrt(top.alpha**2 + top.sigma**2)).log_prob(path[8]).sum()
    for k in range(8, 0, -1):
        t, s = chain.levels[k], chain.levels[k - 1]
        x0_hat, within = clean_given_noisy(MEAN, COVARIANCE, t, path[k])
        kappa2 = eta**2 * bridge(t, s)[2]
        eps_hat = (path[k] - t.alpha * x0_hat) / t.sigma
        along = math.sqrt(s.sigma**2 - kappa2)
        mean = s.alpha * x0_hat + along * eps_hat
        c = s.alpha - along * t.alpha / t.sigma
        step = kappa2 + (c**2 * float(within.trace()) / 3 if variance == "optimal" else 0.0)
        if step > 0:
            total = total + Normal(mean, math.sqrt(step)).log_prob(path[k - 1]).sum()
        else:
            torch.testing.assert_close(path[k - 1], mean, rtol=1e-9, atol=1e-9)
    assert float(trace.log_prob_sum()) == pytest.approx(float(total), abs=1e-10 * max(1, abs(float(total))))
    assert all(trace.nodes[f"x_{k}"]["fn"].event_shape == (3,) for k in range(9))


def test_pyro_draws_have_the_same_law_as_sample() -> None:
    """20000 independent events as one batch of the Pyro model; fails by chance with probability at most 4e-6."""
    chain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), VPSchedule(), 5)
    draws = chain.expand((20_000,))("x")
    assert_normal_moments(draws, *chain_law(MEAN, COVARIANCE, chain.levels, "posterior"))


def test_deterministic_chain_is_a_function_of_its_start() -> None:
    """eta = 0: every step is a Delta site, and x_0 the affine map of x_T that the DDIM recursion gives."""
    chain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), VPSchedule(), 6, eta=0.0)
    trace = pyro.poutine.trace(chain).get_trace("x")
    x = trace.nodes["x_6"]["value"]
    for k in range(6, 0, -1):
        t, s = chain.levels[k], chain.levels[k - 1]
        x0_hat, _ = clean_given_noisy(MEAN, COVARIANCE, t, x)
        x = s.alpha * x0_hat + s.sigma * (x - t.alpha * x0_hat) / t.sigma
    torch.testing.assert_close(trace.nodes["x_0"]["value"], x, rtol=1e-9, atol=1e-9)
    assert float(trace.log_prob_sum()) == pytest.approx(
        float(Normal(0.0, 1.0).log_prob(trace.nodes["x_6"]["value"]).sum()), rel=1e-12
    )


@pytest.mark.parametrize("variance", VARIANCES)
def test_events_of_a_batch_do_not_meet(variance: Variance) -> None:
    """A chain with batch shape (2, 4) treats eight events as eight particles of the chain without one."""
    means = torch.stack([MEAN, -2 * MEAN])
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    single = ReverseChain(GaussianMixtureDenoiser(means, COVARIANCE, weights), VPSchedule(), 3, variance=variance)
    batch = single.expand((2, 4))
    assert batch.shape == (2, 4, 3) and batch.levels == single.levels
    x_t = torch.randn(5, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (3, 2, 1):
        flat = x_t.reshape(40, 3)
        together, apart = batch.estimate(k, x_t), single.estimate(k, flat)
        assert apart.variance is not None and together.variance is not None
        torch.testing.assert_close(together.mean.reshape(40, 3), apart.mean, rtol=0, atol=0)
        torch.testing.assert_close(together.variance.reshape(40, 1), apart.variance, rtol=0, atol=0)
        law, alone = batch.transition(k, x_t, together), single.transition(k, flat, apart)
        torch.testing.assert_close(law.mean.reshape(40, 3), alone.mean, rtol=0, atol=0)
        if alone.variance is None:
            assert law.variance is None
        else:
            assert law.variance is not None
            spread = law.variance.expand(law.mean.shape).reshape(40, 3)
            torch.testing.assert_close(spread, alone.variance.expand(40, 3), rtol=0, atol=0)


def test_a_variance_common_to_all_events_has_an_axis_for_each_of_theirs() -> None:
    """So that it can be spread over particles, batch and event: N(0, I) with K = 3, two particles of four events."""
    denoiser = StandardNormalDenoiser(torch.Size([3]), torch.float64, torch.device("cpu"))
    chain = ReverseChain(denoiser, VPSchedule(), 3, variance="optimal", batch_shape=(4,))
    for k in (3, 2, 1):
        estimate = chain.estimate(k, torch.zeros(2, 4, 3, dtype=torch.float64))
        level = chain.levels[k]
        assert estimate.variance is not None and estimate.variance.ndim == 3
        expected = torch.full((2, 4, 3), level.sigma**2 / (level.alpha**2 + level.sigma**2), dtype=torch.float64)
        torch.testing.assert_close(estimate.variance.expand(2, *estimate.variance.shape[1:]).expand(2, 4, 3), expected)


def test_noise_comes_from_the_generator_alone() -> None:
    chain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), VPSchedule(), 4)
    torch.manual_seed(1)
    one = chain.sample(3, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    two = chain.sample(3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    for k in range(4, 0, -1):
        law = chain.transition(k, x, chain.estimate(k, x))
        x = law.sample(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    torch.testing.assert_close(one, x, rtol=0, atol=0)


def test_clipping_is_part_of_the_step() -> None:
    """The mean is b x_t + c clip(x0_hat); the variance of x_0 is left as the denoiser gives it."""
    plain = ReverseChain(GaussianDenoiser(MEAN, COVARIANCE), VPSchedule(), 4, variance="optimal")
    clipped = ReverseChain(plain.denoiser, plain.schedule, 4, variance="optimal", clip=(-0.5, 0.4))
    x_t = 2 * torch.randn(50, 3, dtype=torch.float64)
    for k in (4, 3, 2, 1):
        x0_hat = torch.stack([clean_given_noisy(MEAN, COVARIANCE, plain.levels[k], x)[0] for x in x_t])
        assert (x0_hat > 0.4).any() and (x0_hat < -0.5).any()
        b, c, _, _ = bridge(plain.levels[k], plain.levels[k - 1])
        law = clipped.transition(k, x_t, clipped.estimate(k, x_t))
        torch.testing.assert_close(law.mean, b * x_t + c * x0_hat.clamp(-0.5, 0.4), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(law.variance, plain.transition(k, x_t, plain.estimate(k, x_t)).variance)


def test_learned_variances_reach_the_step() -> None:
    """A network that says v = 1 gives the chain of fixed-large steps, v = -1 that of posterior ones."""
    levels = VPSchedule().levels(5)
    eye = torch.eye(2, dtype=torch.float64)
    for v, name in ((1.0, "fixed_large"), (-1.0, "posterior")):

        def network(x_t: Tensor, time: float, v: float = v) -> Tensor:
            level = VPSchedule().level(time + 1)
            mean = level.alpha * x_t / (level.alpha**2 + level.sigma**2)
            return torch.cat([mean, torch.full_like(mean, v)], 1)

        denoiser = NetworkDenoiser(
            network, (2,), from_clean, learned_variance=True, dtype=torch.float64, device=torch.device("cpu")
        )
        chain = ReverseChain(denoiser, VPSchedule(), 5, variance="learned")
        _, covariance = library_law(chain, torch.zeros(2, dtype=torch.float64), eye)
        torch.testing.assert_close(covariance, chain_law(0 * MEAN[:2], eye, levels, name)[1], rtol=1e-8, atol=1e-10)


def test_events_without_axes() -> None:
    """A scalar event: five steps of the optimal chain leave N(0, 1) as it is."""

    denoiser = StandardNormalDenoiser(torch.Size([]), torch.float64, torch.device("cpu"))
    chain = ReverseChain(denoiser, VESchedule(0.01, 50.0), 5, variance="optimal")
    variance = chain.initial_scale**2
    for k in range(5, 0, -1):
        probes = torch.tensor([0.0, 1.0], dtype=torch.float64)
        law = chain.transition(k, probes, chain.estimate(k, probes))
        assert law.variance is not None
        variance = float(law.mean[1] - law.mean[0]) ** 2 * variance + float(law.variance)
    assert variance == pytest.approx(1, abs=1e-10)
    trace = pyro.poutine.trace(chain.expand((3,))).get_trace("z")
    assert trace.nodes["z_0"]["value"].shape == (3,)
    trace.compute_log_prob()
    assert trace.nodes["z_2"]["log_prob"].shape == (3,)


def test_settings_outside_their_range_are_refused() -> None:
    denoiser = GaussianDenoiser(MEAN, COVARIANCE)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"expected a share of the ancestral noise in \[0, 1\]"):
            ReverseChain(denoiser, VPSchedule(), 5, eta=eta)
    with pytest.raises(ValueError, match="got variance 'fixed'; expected one of"):
        ReverseChain(denoiser, VPSchedule(), 5, variance="fixed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a chain needs at least 1"):
        ReverseChain(denoiser, VPSchedule(), 0)
    with pytest.raises(ValueError, match="got num_steps 2000, more than LinspaceGrid has distinct noise times"):
        ReverseChain(denoiser, VPSchedule(), 2000)
