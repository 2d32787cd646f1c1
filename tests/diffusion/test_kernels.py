"""Reverse transitions against DDPM's formulas in betas, Bayes' rule, and the exact reverse law of a Gaussian prior."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from smcdiff.diffusion.analytic import GaussianDenoiser
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.kernels import Gaussian, ReverseStep, transition
from smcdiff.diffusion.schedule import CosineSchedule, FlowSchedule, KarrasGrid, Schedule, VESchedule, VPSchedule
from tests.diffusion.exact import bridge, clean_given_noisy, conditional, example_covariance

SCHEDULES = [VPSchedule(), CosineSchedule(), VESchedule(0.01, 50.0), FlowSchedule(0.002, 0.99)]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", [1, 2, 500, 999])
def test_ancestral_step_is_ddpm(index: int) -> None:
    """2006.11239, eq. 6 and 7, in betas and alpha_bar."""
    schedule = VPSchedule()
    beta = 1e-4 + (0.02 - 1e-4) * index / 999
    bar, bar_before = schedule.alphas_cumprod[index], schedule.alphas_cumprod[index - 1]
    step = ReverseStep(schedule.level(index + 1), schedule.level(index), eta=1.0)
    assert step.c == pytest.approx(math.sqrt(bar_before) * beta / (1 - bar), rel=1e-9)
    assert step.b == pytest.approx(math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar), rel=1e-9)
    assert step.kappa**2 == pytest.approx((1 - bar_before) / (1 - bar) * beta, rel=1e-9)
    assert step.beta == pytest.approx(beta, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("num_steps", [2, 25])
def test_ancestral_step_is_bayes_rule(schedule: Schedule, num_steps: int) -> None:
    """q(x_s given x_t, x_0) of any schedule; at s = 0 it is the point x_0."""
    levels = schedule.levels(num_steps, KarrasGrid())
    for k in range(1, num_steps + 1):
        step = ReverseStep(levels[k], levels[k - 1], eta=1.0)
        b, c, small, large = bridge(levels[k], levels[k - 1])
        assert step.b == pytest.approx(b, rel=1e-9, abs=1e-11)
        assert step.c == pytest.approx(c, rel=1e-9)
        assert step.kappa**2 == pytest.approx(small, rel=1e-9, abs=1e-15)
        assert step.beta == pytest.approx(large, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.85, 1.0])
def test_ddim_family_keeps_the_marginals(schedule: Schedule, eta: float) -> None:
    """2010.02502: N(alpha_t x_0, sigma_t^2) goes to N(alpha_s x_0, sigma_s^2), with eta of the ancestral deviation."""
    levels = schedule.levels(9, KarrasGrid())
    for k in range(2, 10):
        t, s = levels[k], levels[k - 1]
        step = ReverseStep(t, s, eta)
        assert step.b * t.alpha + step.c == pytest.approx(s.alpha, rel=1e-12)
        assert step.b**2 * t.sigma**2 + step.kappa**2 == pytest.approx(s.sigma**2, rel=1e-12)
        assert step.kappa == pytest.approx(eta * math.sqrt(bridge(t, s)[2]), rel=1e-9, abs=0)
        assert step.b > 0


def test_ddim_written_out() -> None:
    """2010.02502, eq. 12 and 16, from eps_hat, in alpha_bar."""
    schedule, eta = VPSchedule(), 0.4
    bar_t, bar_s = schedule.alphas_cumprod[699], schedule.alphas_cumprod[499]
    x_t, x0_hat = draw(4, 3), draw(4, 3, seed=2)
    kappa = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    eps_hat = (x_t - math.sqrt(bar_t) * x0_hat) / math.sqrt(1 - bar_t)
    expected = math.sqrt(bar_s) * x0_hat + math.sqrt(1 - bar_s - kappa**2) * eps_hat
    step = ReverseStep(schedule.level(700), schedule.level(500), eta)
    law = transition(step, x_t, Estimate(x0_hat), "posterior")
    torch.testing.assert_close(law.mean, expected, rtol=1e-12, atol=1e-12)
    assert law.variance is not None
    assert float(law.variance) == pytest.approx(kappa**2, rel=1e-10)


def test_step_variances() -> None:
    """Fixed-large is beta; the learned one is beta_tilde at v = -1, beta at v = 1, their geometric mean at v = 0."""
    schedule = VPSchedule()
    step = ReverseStep(schedule.level(31), schedule.level(11), eta=1.0)
    _, _, small, large = bridge(step.t, step.s)
    x_t, v = draw(3, 2), torch.tensor([[-1.0, 1.0], [0.0, 0.5], [-0.2, 1.0]], dtype=torch.float64)
    estimate = Estimate(draw(3, 2, seed=2), variance=torch.full((1, 1), 0.3, dtype=torch.float64), fraction=(v + 1) / 2)

    def of(variance: str) -> Tensor:
        law = transition(step, x_t, estimate, variance)  # type: ignore[arg-type]
        assert law.variance is not None
        torch.testing.assert_close(law.mean, step.b * x_t + step.c * estimate.mean, rtol=0, atol=0)
        return law.variance.expand(3, 2)

    for name, expected in (("posterior", small), ("fixed_large", large), ("optimal", small + step.c**2 * 0.3)):
        torch.testing.assert_close(of(name), torch.full((3, 2), expected, dtype=torch.float64), rtol=1e-9, atol=0)
    exponent = (v + 1) / 2
    torch.testing.assert_close(of("learned"), large**exponent * small ** (1 - exponent), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", ["posterior", "fixed_large", "learned"])
def test_last_step_is_the_point_x0_hat(variance: str) -> None:
    step = ReverseStep(VPSchedule().level(5), VPSchedule().level(0), eta=1.0)
    estimate = Estimate(draw(3, 2, seed=2), fraction=torch.full((1, 1), 0.5))
    law = transition(step, draw(3, 2), estimate, variance)  # type: ignore[arg-type]
    assert law.variance is None
    torch.testing.assert_close(law.mean, estimate.mean, rtol=0, atol=0)
    torch.testing.assert_close(law.sample(draw(3, 2, seed=3)), estimate.mean, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_optimal_variance_is_the_exact_reverse_law(schedule: Schedule) -> None:
    """p(x_s given x_t) of a Gaussian prior by conditioning the joint normal of x_s and x_t = r x_s + noise.

    The mean is exact for any covariance, the variance is the mean over the entries, and exact for an isotropic prior.
    """
    levels = schedule.levels(7, KarrasGrid())
    mean, eye = draw(3), torch.eye(3, dtype=torch.float64)
    for covariance in (example_covariance(3), 0.7 * eye):
        denoiser = GaussianDenoiser(mean, covariance)
        for k in range(1, 8):
            t, s = levels[k], levels[k - 1]
            r = t.alpha / s.alpha
            before = s.alpha**2 * covariance + s.sigma**2 * eye
            after = t.alpha**2 * covariance + t.sigma**2 * eye
            joint = torch.cat([torch.cat([before, r * before], 1), torch.cat([r * before, after], 1)])
            x_t = draw(3, seed=k)
            exact_mean, exact = conditional(torch.cat([s.alpha * mean, t.alpha * mean]), joint, x_t)
            law = transition(ReverseStep(t, s, 1.0), x_t[None], denoiser(x_t[None], t), "optimal")
            assert law.variance is not None
            torch.testing.assert_close(law.mean[0], exact_mean, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(law.variance.squeeze(), exact.trace() / 3, rtol=1e-7, atol=1e-10)


def test_optimal_variance_at_the_last_step_is_that_of_x_0() -> None:
    covariance = 0.7 * torch.eye(2, dtype=torch.float64)
    t = VPSchedule().level(300)
    mean, x_t = draw(2), draw(2, seed=2)
    exact_mean, exact = clean_given_noisy(mean, covariance, t, x_t)
    estimate = GaussianDenoiser(mean, covariance)(x_t[None], t)
    law = transition(ReverseStep(t, VPSchedule().level(0), 1.0), x_t[None], estimate, "optimal")
    assert law.variance is not None
    torch.testing.assert_close(law.mean[0], exact_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(law.variance.squeeze(), exact[0, 0], rtol=1e-12, atol=0)


def test_no_density_without_noise() -> None:
    step = ReverseStep(VPSchedule().level(500), VPSchedule().level(300), eta=0.0)
    assert transition(step, draw(2, 2), Estimate(draw(2, 2)), "posterior").variance is None


@pytest.mark.parametrize("event_shape", [(), (4,), (2, 3, 1)])
def test_log_density_ratio_is_the_difference_of_normal_log_densities(event_shape: tuple[int, ...]) -> None:
    """Per particle, whatever the event; for an event without axes the particles must not be summed."""
    m, dim = 5, len(event_shape)
    x, first, second = (draw(m, *event_shape, seed=i) for i in range(3))
    variance = 0.5 + draw(m, *event_shape, seed=3).square()
    common = torch.full((1,) * (dim + 1), 0.8, dtype=torch.float64)
    for one, other in ((variance, common), (common, variance), (common, common)):
        expected = Normal(first, one.sqrt()).log_prob(x) - Normal(second, other.sqrt()).log_prob(x)
        got = Gaussian(first, one).log_density_ratio(Gaussian(second, other), x, event_dim=dim)
        torch.testing.assert_close(got, expected.reshape(m, -1).sum(1), rtol=1e-12, atol=1e-12)


def test_log_density_ratio_adds_up_in_float64() -> None:
    """A million entries of float32 whose log-ratio is 1/2 each."""
    x, variance = torch.zeros(1, 1_000_001), torch.ones(1, 1)
    ratio = Gaussian(x, variance).log_density_ratio(Gaussian(x + 1, variance), x, event_dim=1)
    assert ratio.dtype == torch.float64
    assert float(ratio) == 500_000.5


def test_sample_moves_and_scales_the_noise() -> None:
    law = Gaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0]]))
    assert law.sample(torch.tensor([[0.5, 1.0]])).tolist() == [[2.0, 0.0]]


def test_variances_that_the_denoiser_does_not_give_are_refused() -> None:
    step = ReverseStep(VPSchedule().level(500), VPSchedule().level(300), eta=1.0)
    with pytest.raises(
        ValueError, match=r"knows no variance of x_0; measure it once with prior.with_measured_variance"
    ):
        transition(step, draw(2, 2), Estimate(draw(2, 2)), "optimal")
    with pytest.raises(ValueError, match="build the denoiser with learned_variance=True"):
        transition(step, draw(2, 2), Estimate(draw(2, 2)), "learned")
