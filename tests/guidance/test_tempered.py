"""Tempered twists: still unbiased, and more even weights where the twist is too sure."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from tests.guidance.exact import chain_law, check_evidence

F64 = torch.float64
MEAN = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
COVARIANCE = torch.eye(3, dtype=F64) + 0.5
A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]], dtype=F64)
Y = torch.tensor([2.5, 1.0], dtype=F64)
STEPS = 30


def model(y=None):
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), STEPS, variance="optimal", grid=sd.KarrasGrid())
    x = pyro.sample("x", prior)
    return pyro.sample("y", dist.Normal(A @ x, 0.6).to_event(1), obs=y)


def sharp(y=None):
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), STEPS, variance="optimal", grid=sd.KarrasGrid())
    x = pyro.sample("x", prior)
    return pyro.sample("y", dist.Normal(A @ x, 0.15).to_event(1), obs=y)


def exact_log_z() -> float:
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), STEPS, variance="optimal", grid=sd.KarrasGrid())
    return chain_law(prior, MEAN, COVARIANCE).given(A, Y, 0.6)[1]


def test_exponents_keep_every_step_of_a_sharp_problem_even() -> None:
    """At sigma = 0.15 the plain point twist diverges. The pilot's own run, repeated with the exponents it chose, has
    the effective sample size it promised at every step at which it was free to choose."""
    share, n = 0.9, 64
    kernel = sd.tempered(sd.TDS(sharp), Y, ess_share=share, num_particles=n, num_chains=4, seed=100)
    exponents = kernel.twist.exponents  # k = 1 ... K
    assert len(exponents) == STEPS
    assert all(low >= high for low, high in itertools.pairwise(exponents))  # they fall with the noise
    assert exponents[-1] < 0.9

    def run(method: sd.TDS) -> sd.SMC:
        every_step = sd.ParticleFilter(ess_threshold=1.0)
        return sd.SMC(method, num_particles=n, num_chains=4, seed=100, filter=every_step, progress=False).run(Y)

    repeated, plain = run(kernel), run(sd.TDS(sharp))
    ess = repeated.records.ess.min(1).values  # i = 0 ... K is level k = K - i
    rising = [True] + [exponents[k - 1] > exponents[k] for k in range(STEPS - 1, 0, -1)]
    free = [float(ess[i]) for i in range(STEPS) if rising[i]]
    assert len(free) >= 3 and min(free) > share * n - 1e-6
    assert float(plain.records.ess[:-1].min()) < 0.1 * n
    assert float(repeated.log_evidence) > float(plain.log_evidence) + 1000


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_any_exponents_are_unbiased(power: float) -> None:
    exponents = tuple((1 - k / (STEPS + 1)) ** power for k in range(1, STEPS + 1))
    kernel = sd.TDS(model, sd.TemperedTwist(sd.TweedieTwist(), exponents))
    smc = sd.SMC(kernel, num_particles=300, num_chains=32, seed=2, progress=False).run(Y)
    check_evidence(smc, exact_log_z())


def test_exponents_of_a_pilot_serve_a_run_with_another_seed() -> None:
    """A chain that begins at sigma = 1.5 alpha, where the twist already tells particles apart: the pilot's exponents
    keep the main run's weights as even as promised, up to the noise of 300 particles, and its evidence exact."""
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    prior = sd.DiffusionPrior(denoiser, sd.FlowSchedule(1e-3, 0.6), STEPS, variance="optimal", grid=sd.KarrasGrid())

    def early(y=None):
        return pyro.sample("y", dist.Normal(A @ pyro.sample("x", prior), 0.6).to_event(1), obs=y)

    plain = sd.TDS(early, sd.TweedieTwist())
    kernel = sd.tempered(plain, Y, ess_share=0.8, num_particles=64, num_chains=4, seed=100)
    assert kernel.twist.exponents[-1] < 0.6 < 0.99 < kernel.twist.exponents[0]

    def run(method: sd.TDS) -> sd.SMC:
        every_step = sd.ParticleFilter(ess_threshold=1.0)
        return sd.SMC(method, num_particles=300, num_chains=32, seed=2, filter=every_step, progress=False).run(Y)

    smc = run(kernel)
    check_evidence(smc, chain_law(prior, MEAN, COVARIANCE).given(A, Y, 0.6)[1])
    assert float(smc.records.ess[:-1].min()) > 0.7 * 300 > 0.5 * 300 > float(run(plain).records.ess[:-1].min())


def test_errors() -> None:
    with pytest.raises(ValueError, match="exponents"):
        sd.TemperedTwist(sd.PointTwist(), (0.5, 1.5))
    with pytest.raises(ValueError, match="ess_share"):
        sd.tempered(sd.TDS(model), Y, ess_share=1.0)
    kernel = sd.TDS(model, sd.TemperedTwist(sd.PointTwist(), (1.0, 1.0)))
    with pytest.raises(ValueError, match="2 exponents for a chain of 30 steps"):
        sd.SMC(kernel, num_particles=2, progress=False).run(Y)
