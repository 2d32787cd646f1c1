"""Posterior moments and evidence against closed forms: linear-Gaussian problems and one-dimensional mixtures."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from tests.guidance.exact import chain_density, chain_law, check_evidence, weighted_moments

F64 = torch.float64


def gaussian_problem(d: int, variance: str, num_steps: int = 30):
    generator = torch.Generator().manual_seed(d)
    mean = torch.randn(d, generator=generator, dtype=F64)
    root = torch.randn(d, d, generator=generator, dtype=F64) / d**0.5
    covariance = root @ root.mT + 0.3 * torch.eye(d, dtype=F64)
    A = torch.randn(max(1, d - 1), d, generator=generator, dtype=F64)
    y = A @ mean + torch.randn(len(A), generator=generator, dtype=F64)
    denoiser = sd.GaussianDenoiser(mean, covariance)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, variance=variance, grid=sd.KarrasGrid())
    return prior, chain_law(prior, mean, covariance), A, y


METHODS = {
    "bootstrap": (lambda model: sd.Bootstrap(model), 800),
    "point": (lambda model: sd.TDS(model), 1000),
    "point, limited shift": (lambda model: sd.TDS(model, max_shift=1.0), 1000),
    "widened": (lambda model: sd.TDS(model, sd.WidenedTwist(0.5)), 500),
    "Tweedie": (lambda model: sd.TDS(model, sd.TweedieTwist()), 100),
}


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("method", METHODS)
def test_linear_gaussian(d: int, variance: str, method: str) -> None:
    prior, law, A, y = gaussian_problem(d, variance)
    sigma = 1.0
    posterior, log_z = law.given(A, y, sigma)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)

    kernel, n = METHODS[method]
    smc = sd.SMC(kernel(model), num_particles=n, num_chains=24, seed=d, progress=False).run(y)
    check_evidence(smc, log_z, worst=0.1)
    mean, error, covariance = weighted_moments(smc, "x")
    sd_posterior = posterior.covariance.diagonal().sqrt()
    assert bool(((mean - posterior.mean).abs() < 5 * error + 1e-3 * sd_posterior).all())
    assert bool((error < 0.1 * sd_posterior).all())
    scale = sd_posterior[:, None] * sd_posterior
    assert bool(((covariance - posterior.covariance).abs() < 0.15 * scale).all())


def test_get_samples_are_posterior_draws() -> None:
    prior, law, A, y = gaussian_problem(2, "optimal")
    posterior, _ = law.given(A, y, 1.0)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(A @ x, 1.0).to_event(1), obs=y)

    smc = sd.SMC(sd.TDS(model, sd.TweedieTwist()), num_particles=2000, num_chains=5, seed=0, progress=False).run(y)
    draws = smc.get_samples()["x"]
    assert draws.shape == (10_000, 2)
    # an effective size over 5000: 5 standard errors are 7 % of a standard deviation (failure 2 * 3e-7 per entry)
    sd_posterior = posterior.covariance.diagonal().sqrt()
    assert bool(((draws.mean(0) - posterior.mean).abs() < 0.07 * sd_posterior).all())
    assert bool((draws.std(0) / sd_posterior - 1).abs().max() < 0.05)
    assert smc.get_samples(100)["x"].shape == (100, 2)


def test_evidence_pools_chains_by_the_mean_of_their_evidence() -> None:
    prior, _, A, y = gaussian_problem(2, "optimal")

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(A @ x, 1.0).to_event(1), obs=y)

    smc = sd.SMC(sd.TDS(model), num_particles=50, num_chains=5, seed=0, progress=False).run(y)
    per_chain = smc.log_evidence_per_chain
    assert per_chain.shape == (5,) and smc.log_evidence.shape == ()
    torch.testing.assert_close(smc.log_evidence, per_chain.exp().mean().log())
    log_w = smc.weighted_samples().log_w
    torch.testing.assert_close(log_w.exp().sum(), torch.ones((), dtype=F64))
    torch.testing.assert_close(log_w.logsumexp(1), per_chain - per_chain.logsumexp(0))


@pytest.mark.parametrize("twist", [sd.PointTwist(), sd.WidenedTwist(), sd.TweedieTwist()], ids=lambda twist: str(twist))
def test_mixture_modes_and_evidence(twist) -> None:
    means = torch.tensor([[-4.0], [0.5], [5.0]], dtype=F64)
    covariances = torch.tensor([0.5, 1.0, 0.25], dtype=F64).reshape(3, 1, 1)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    denoiser = sd.GaussianMixtureDenoiser(means, covariances, weights)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 30, variance="optimal", grid=sd.KarrasGrid())
    sigma, y = 3.0, torch.tensor([0.8], dtype=F64)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

    grid = torch.linspace(-12, 12, 1501, dtype=F64)
    joint = chain_density(prior, grid) * torch.exp(dist.Normal(grid, sigma).log_prob(y))
    width = float(grid[1] - grid[0])
    log_z = float((joint.sum() * width).log())
    posterior = joint / joint.sum()
    left, right = float(posterior[grid < -2].sum()), float(posterior[grid > 3].sum())

    smc = sd.SMC(sd.TDS(model, twist), num_particles=400, num_chains=32, seed=3, progress=False).run(y)
    check_evidence(smc, log_z)
    samples = smc.weighted_samples()
    w, x = samples.log_w.exp(), samples.values["x"][..., 0]
    for exact, where in ((left, x < -2), (right, x > 3), (1 - left - right, (x >= -2) & (x <= 3))):
        share = float((w * where).sum())
        chain = (w * where).sum(1) - share * w.sum(1)
        error = float(chain.square().sum().sqrt())
        assert error < 0.04
        assert abs(share - exact) < 5 * error, (share, exact, error)
