"""DMPS against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.guidance.base import Prediction
from smcdiff.guidance.dmps import DMPS, DMPSTwist
from smcdiff.guidance.program import Program
from tests.guidance import published as pub

STEPS, SIGMA = 50, 0.5


def published_loop(noise: torch.Tensor) -> torch.Tensor:
    """2211.12343, algorithm 1: the ancestral step, then the pseudo-likelihood's score with gain 1.75."""
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    for i in range(STEPS, 0, -1):
        bar, before = bars[i], bars[i - 1]
        mean, scale = pub.ancestral(x, pub.denoise(x, bar), bar, before)
        total = SIGMA**2 * torch.eye(2, dtype=pub.F64) + (1 - bar) / bar * pub.A @ pub.A.T
        score = pub.A.T @ torch.linalg.inv(total) @ (pub.Y - pub.A @ x / bar.sqrt()) / bar.sqrt()
        alpha = bar / before
        x = mean + scale * noise[STEPS + 1 - i] + 1.75 * (1 - alpha) / alpha.sqrt() * score
    return x


def test_path_is_the_published_loop() -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Matrix(pub.A), SIGMA)
    pub.check_loop(DMPS, model, pub.Y, published_loop, STEPS + 1, 1e-8)


def test_twist_is_its_formula() -> None:
    prior = pub.gaussian_prior()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=pub.F64)
    for k in (1, 20, 50):
        level = prior.chain.levels[k]
        program = Program(pub.measured(prior, sd.Matrix(pub.A), 0.3), (pub.Y,))
        covariance = level.ratio**2 * pub.A @ pub.A.T + 0.09 * torch.eye(2, dtype=pub.F64)
        expected = MultivariateNormal(x @ pub.A.T / level.alpha, covariance).log_prob(pub.Y)
        log_psi = DMPSTwist().log_psi(Prediction(program, k, {"x": x}, {"x": prior.chain.estimate(k, x)}))
        torch.testing.assert_close(log_psi, expected, rtol=1e-10, atol=1e-10)


def test_no_pass_back_through_the_network() -> None:
    model = pub.measured(pub.gaussian_prior(), sd.Matrix(pub.A), 1.0)
    smc = sd.SMC(DMPS(model), num_particles=3, seed=0, progress=False).run(pub.Y)
    assert smc.network_evaluations == (150, 0)


def gentle(model: pub.Model) -> DMPS:
    return DMPS(model, gain=0.5)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize(
    "build", [gentle, lambda model: sd.TDS(model, DMPSTwist(), max_shift=1.0)], ids=["DMPS", "TDS"]
)
def test_many_particles_are_exact(variance: str, build: pub.Build) -> None:
    pub.check_gaussian_posterior(build, sd.Matrix(pub.A), pub.A, pub.Y, 1000, pub.karras(variance))


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(gentle, 1000, grid=sd.KarrasGrid())


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(DMPS)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(DMPS)


def test_refusals() -> None:
    pub.check_refusals(DMPS, "DMPS", needs_svd=True)
    with pytest.raises(ValueError, match="gain 0"):
        DMPS(pub.measured(pub.gaussian_prior(), sd.Matrix(pub.A), 1.0), gain=0.0)
