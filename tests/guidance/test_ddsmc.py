"""DDSMC against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.guidance.base import Prediction
from smcdiff.guidance.ddsmc import DDSMC, DDSMCTwist
from smcdiff.guidance.program import Program
from tests.guidance import published as pub

STEPS, SIGMA = 50, 0.3
SEEN = torch.tensor([1.0, 0.5, 0.0], dtype=pub.F64)
Y = torch.tensor([0.4, 1.1, 0.0], dtype=pub.F64)


def published_loop(noise: torch.Tensor, eta: float) -> torch.Tensor:
    """2502.06379 for a diagonal operator: M = A^T A / sigma_y^2 + I / rho^2, x_0 ~ N(M^-1 b, M^-1), then noise to s."""
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    for i in range(STEPS, 0, -1):
        bar, before = bars[i], bars[i - 1]
        beta, rho2 = 1 - bar / before, (1 - bar) / 2
        m_inverse = 1 / (SEEN**2 / SIGMA**2 + 1 / rho2)
        centre = m_inverse * (SEEN * Y / SIGMA**2 + pub.denoise(x, bar) / rho2)
        total = eta * (1 - beta - bar) + beta
        of_clean = before.sqrt() * beta / total
        of_x = eta * (1 - beta).sqrt() * (1 - before) / total
        own = beta * (1 - before) / total
        variance = (own - of_clean**2 * rho2).clamp(min=0) + of_clean**2 * m_inverse
        x = of_clean * centre + of_x * x
        if i > 1:
            x = x + variance.sqrt() * noise[STEPS + 1 - i]
    return x


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_path_is_the_published_loop(eta: float) -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Mask(SEEN), SIGMA)
    pub.check_loop(lambda model: DDSMC(model, eta), model, Y, lambda noise: published_loop(noise, eta), STEPS + 1, 1e-9)


def test_twist_is_its_formula() -> None:
    prior = pub.gaussian_prior()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=pub.F64)
    program = Program(pub.measured(prior, sd.Matrix(pub.A), 0.3), (pub.Y,))
    for k in (1, 20, 50):
        level, estimate = prior.chain.levels[k], prior.chain.estimate(k, x)
        covariance = 0.5 * level.sigma**2 * pub.A @ pub.A.T + 0.09 * torch.eye(2, dtype=pub.F64)
        expected = MultivariateNormal(estimate.mean @ pub.A.T, covariance).log_prob(pub.Y)
        log_psi = DDSMCTwist().log_psi(Prediction(program, k, {"x": x}, {"x": estimate}))
        torch.testing.assert_close(log_psi, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_many_particles_are_exact(variance: str) -> None:
    pub.check_gaussian_posterior(DDSMC, sd.Matrix(pub.A), pub.A, pub.Y, 500, pub.karras(variance))


def test_decoupled_proposals_are_exact() -> None:
    pub.check_gaussian_posterior(
        lambda model: DDSMC(model, eta=0.0),
        sd.Matrix(pub.A),
        pub.A,
        pub.Y,
        4000,
        pub.gaussian_prior("optimal", 5, schedule=pub.LONG_STEPS),
    )


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(DDSMC, 400, grid=sd.KarrasGrid())


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(DDSMC)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(DDSMC)


def test_refusals() -> None:
    pub.check_refusals(DDSMC, "DDSMC", needs_svd=True)
    model = pub.measured(pub.gaussian_prior(), sd.Matrix(pub.A), 1.0)
    with pytest.raises(ValueError, match="eta 1.5"):
        DDSMC(model, eta=1.5)
    with pytest.raises(ValueError, match="spread 0"):
        DDSMC(model, spread=0.0)
