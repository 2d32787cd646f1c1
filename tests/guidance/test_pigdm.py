"""PiGDM against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.guidance.base import Prediction
from smcdiff.guidance.pigdm import PiGDM, PiGDMTwist
from smcdiff.guidance.program import Program
from tests.guidance import published as pub

STEPS, SIGMA = 50, 0.1


def published_loop(noise: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 for a variance-preserving chain, with the network's Jacobian by automatic differentiation."""
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    for i in range(STEPS, 0, -1):
        bar, before = bars[i], bars[i - 1]
        x = x.clone().requires_grad_()
        x0_hat = pub.denoise(x, bar)
        r2 = 1 - bar  # sigma^2 / (1 + sigma^2) with sigma^2 = (1 - abar) / abar
        inverse = torch.linalg.inv(pub.A @ pub.A.T + SIGMA**2 / r2 * torch.eye(2, dtype=pub.F64))
        weighted = (inverse @ (pub.Y - pub.A @ x0_hat)).detach()
        (g,) = torch.autograd.grad((pub.A @ x0_hat) @ weighted, x, retain_graph=True)
        eps = (x - bar.sqrt() * x0_hat) / (1 - bar).sqrt()
        c1 = ((1 - bar / before) * (1 - before) / (1 - bar)).sqrt()
        c2 = (1 - before - c1**2).clamp(min=0).sqrt()
        x = before.sqrt() * x0_hat + c1 * noise[STEPS + 1 - i] + c2 * eps + before.sqrt() * bar.sqrt() * g
        x = x.detach()
    return x


def test_path_is_the_published_loop() -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Matrix(pub.A), SIGMA)
    pub.check_loop(PiGDM, model, pub.Y, published_loop, STEPS + 1, 1e-8)


def test_twist_is_its_formula() -> None:
    """With more measured values than entries too, where part of y is nothing that an x could give."""
    matrix = torch.cat((pub.A, torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0]], dtype=pub.F64)))
    y = torch.tensor([0.4, 1.1, -2.0, 0.7], dtype=pub.F64)
    prior = pub.gaussian_prior()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=pub.F64)
    for k in (1, 20, 50):
        estimate, level = prior.chain.estimate(k, x), prior.chain.levels[k]
        program = Program(pub.measured(prior, sd.Matrix(matrix), 0.3), (y,))
        r2 = level.sigma**2 / (level.alpha**2 + level.sigma**2)
        covariance = r2 * matrix @ matrix.T + 0.09 * torch.eye(4, dtype=pub.F64)
        expected = MultivariateNormal(estimate.mean @ matrix.T, covariance).log_prob(y)
        log_psi = PiGDMTwist().log_psi(Prediction(program, k, {"x": x}, {"x": estimate}))
        torch.testing.assert_close(log_psi, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("build", [PiGDM, lambda model: sd.TDS(model, PiGDMTwist())], ids=["PiGDM", "TDS"])
def test_many_particles_are_exact(variance: str, build: pub.Build) -> None:
    pub.check_gaussian_posterior(build, sd.Matrix(pub.A), pub.A, pub.Y, 500, pub.karras(variance))


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(PiGDM, 400, grid=sd.KarrasGrid())


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(PiGDM)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(PiGDM)


def test_refusals() -> None:
    pub.check_refusals(PiGDM, "PiGDM", needs_svd=True)
