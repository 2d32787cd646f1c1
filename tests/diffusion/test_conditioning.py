"""Classifier and classifier-free guidance against the exact formulas of Gaussian priors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diffusion.conditioning import ClassifierFree, ClassifierGuided
from smcdiff.diffusion.denoiser import NetworkDenoiser, from_clean
from smcdiff.diffusion.schedule import NoiseLevel
from tests.diffusion.exact import assert_normal_moments, clean_given_noisy, example_covariance
from tests.guidance.exact import NormalLaw

F64 = torch.float64
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
COVARIANCE = example_covariance(3)
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]], dtype=F64)
Y, SIGMA = torch.tensor([0.4, 1.1], dtype=F64), 0.7
GIVEN, _ = NormalLaw(MEAN, COVARIANCE).given(A, Y, SIGMA)
PLAIN, CONDITIONAL = sd.GaussianDenoiser(MEAN, COVARIANCE), sd.GaussianDenoiser(GIVEN.mean, GIVEN.covariance)
LEVELS = [sd.VPSchedule().level(300.0), sd.VESchedule(0.01, 50.0).level(2.0), sd.FlowSchedule().level(0.6)]
X_T = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def log_prob(x_t: Tensor, level: NoiseLevel) -> Tensor:
    """log p(y given x_t), from the law of A x_0 + noise given x_t."""
    laws = [clean_given_noisy(MEAN, COVARIANCE, level, x) for x in x_t]
    eye = torch.eye(2, dtype=F64)
    return torch.stack([MultivariateNormal(A @ m, A @ C @ A.T + SIGMA**2 * eye).log_prob(Y) for m, C in laws])


@pytest.mark.parametrize("level", LEVELS, ids=["vp", "ve", "flow"])
def test_the_exact_classifier_gives_the_conditional_denoiser(level: NoiseLevel) -> None:
    guided = ClassifierGuided(PLAIN, log_prob)
    expected = torch.stack([clean_given_noisy(GIVEN.mean, GIVEN.covariance, level, x)[0] for x in X_T])
    with torch.no_grad():
        estimate = guided(X_T, level)
    torch.testing.assert_close(estimate.mean, expected)
    assert not estimate.mean.requires_grad and estimate.variance is None
    # half the scale goes half the way
    half = ClassifierGuided(PLAIN, log_prob, 0.5)(X_T, level).mean
    torch.testing.assert_close(half, 0.5 * (expected + PLAIN(X_T, level).mean))


def test_its_derivative_is_the_conditional_denoisers() -> None:
    """sigma^2 / alpha d x0_hat / d x_t is the conditional covariance, through the classifier's second derivative."""
    level = LEVELS[0]
    x = X_T.clone().requires_grad_()
    mean = ClassifierGuided(PLAIN, log_prob)(x, level).mean
    rows = torch.stack([torch.autograd.grad(mean[:, i].sum(), x, retain_graph=True)[0] for i in range(3)], 1)
    _, within = clean_given_noisy(GIVEN.mean, GIVEN.covariance, level, X_T[0])
    torch.testing.assert_close(level.sigma**2 / level.alpha * rows, within.expand(6, 3, 3))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("level", LEVELS, ids=["vp", "ve", "flow"])
def test_classifier_free_is_the_score_of_the_tilted_marginal(level: NoiseLevel, scale: float) -> None:
    """p_u(x_t)^(1 - w) p_c(x_t)^w of two normal marginals, differentiated by torch; x0_hat by Tweedie."""
    eye = torch.eye(3, dtype=F64)

    def marginal(mean: Tensor, covariance: Tensor) -> MultivariateNormal:
        return MultivariateNormal(level.alpha * mean, level.alpha**2 * covariance + level.sigma**2 * eye)

    x = X_T.clone().requires_grad_()
    without, given = marginal(MEAN, COVARIANCE), marginal(GIVEN.mean, GIVEN.covariance)
    tilted = (1 - scale) * without.log_prob(x) + scale * given.log_prob(x)
    (score,) = torch.autograd.grad(tilted.sum(), x)
    expected = (X_T + level.sigma**2 * score) / level.alpha
    estimate = ClassifierFree(CONDITIONAL, PLAIN, scale)(X_T, level)
    torch.testing.assert_close(estimate.mean, expected)
    if scale == 1:
        torch.testing.assert_close(estimate.variance, CONDITIONAL(X_T, level).variance)
    else:
        assert estimate.variance is None


def test_a_prior_of_the_guided_denoiser_draws_from_the_posterior() -> None:
    """400 fine steps of the exactly guided chain; fails by chance with probability at most 4e-6.

    Its discretisation error is far below the test's resolution: the moments of the conditional denoiser's own chain
    are compared with those of the posterior first.
    """
    schedule, grid = sd.VPSchedule(), sd.KarrasGrid()
    white = sd.DiffusionPrior(CONDITIONAL, schedule, 400, grid=grid).chain
    guided = sd.DiffusionPrior(ClassifierFree(CONDITIONAL, PLAIN, 1.0), schedule, 400, grid=grid)
    draws = guided.chain.sample(2000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, white.sample(2000, torch.Generator().manual_seed(0)))
    assert_normal_moments(draws, GIVEN.mean, GIVEN.covariance)


def test_in_a_program_it_is_a_prior_like_any_other() -> None:
    """TDS differentiates through the guided denoiser; its clean estimate at the first level is the conditional one."""
    prior = sd.DiffusionPrior(ClassifierGuided(PLAIN, log_prob), sd.VPSchedule(), 5)
    same = sd.DiffusionPrior(CONDITIONAL, sd.VPSchedule(), 5)

    def evidence(prior: sd.DiffusionPrior) -> Tensor:
        def model(z: Tensor) -> None:
            x = pyro.sample("x", prior)
            pyro.sample("z", dist.Normal(x.sum(), 1.0), obs=z)

        return sd.SMC(sd.TDS(model), 8, seed=0, progress=False).run(torch.tensor(1.5, dtype=F64)).log_evidence

    torch.testing.assert_close(evidence(prior), evidence(same))


def test_learned_variances_go_through() -> None:
    """The network's own interpolation of the step's variance is kept by both."""

    def network(x_t: Tensor, time: float) -> Tensor:
        return torch.cat([0.5 * x_t, torch.full_like(x_t, 0.2)], 1)

    denoiser = NetworkDenoiser(network, (3,), from_clean, learned_variance=True, dtype=F64, device=torch.device("cpu"))
    level = LEVELS[0]
    for guided in (ClassifierGuided(denoiser, log_prob), ClassifierFree(denoiser, PLAIN, 2.0)):
        torch.testing.assert_close(guided(X_T, level).fraction, torch.full((6, 3), 0.6, dtype=F64))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="got scale nan"):
        ClassifierGuided(PLAIN, log_prob, float("nan"))
    with pytest.raises(ValueError, match="got scale inf"):
        ClassifierFree(CONDITIONAL, PLAIN, float("inf"))
    with pytest.raises(ValueError, match=r"log_prob of shape \(\) for 6 events; expected \(6,\)"):
        ClassifierGuided(PLAIN, lambda x, level: x.sum())(X_T, LEVELS[0])
    with pytest.raises(ValueError, match=r"events \(3,\) and an unconditional one of \(1,\)"):
        ClassifierFree(PLAIN, sd.GaussianDenoiser(torch.zeros(1), torch.ones(1)), 1.0)
