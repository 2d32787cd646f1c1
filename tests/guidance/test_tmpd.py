"""TMPD against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.guidance.base import Prediction
from smcdiff.guidance.program import Program
from smcdiff.guidance.tmpd import TMPD, TMPDTwist
from tests.guidance import published as pub

STEPS, SIGMA = 50, 0.1


def published_loop(noise: torch.Tensor) -> torch.Tensor:
    """2310.06721 for a variance-preserving chain: x0_hat is moved by the row-sum covariance, then DDPM's step."""
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    for i in range(STEPS, 0, -1):
        bar, before = bars[i], bars[i - 1]
        x0_hat = pub.denoise(x, bar)
        covariance = (1 - bar) / bar.sqrt() * pub.jacobian(bar)
        c_yy = (pub.A @ covariance @ pub.A.T).sum(1).clamp(min=0) + SIGMA**2
        moved = x0_hat + covariance @ pub.A.T @ ((pub.Y - pub.A @ x0_hat) / c_yy)
        mean, scale = pub.ancestral(x, moved, bar, before)
        x = mean + scale * noise[STEPS + 1 - i]
    return x


def test_path_is_the_published_loop() -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Matrix(pub.A), SIGMA)
    pub.check_loop(TMPD, model, pub.Y, published_loop, STEPS + 1, 1e-8)


def test_twist_is_its_formula() -> None:
    prior = pub.gaussian_prior()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=pub.F64).requires_grad_()
    program = Program(pub.measured(prior, sd.Matrix(pub.A), 0.3), (pub.Y,))
    for k in (1, 20, 50):
        level, estimate = prior.chain.levels[k], prior.chain.estimate(k, x)
        jacobian = pub.jacobian(torch.tensor(level.alpha**2, dtype=pub.F64))
        covariance = level.sigma**2 / level.alpha * pub.A @ jacobian @ pub.A.T
        noise = (covariance.sum(1).clamp(min=0) + 0.09).diag()
        expected = MultivariateNormal(estimate.mean @ pub.A.T, noise).log_prob(pub.Y)
        log_psi = TMPDTwist().log_psi(Prediction(program, k, {"x": x}, {"x": estimate}))
        torch.testing.assert_close(log_psi, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("build", [TMPD, lambda model: sd.TDS(model, TMPDTwist())], ids=["TMPD", "TDS"])
def test_many_particles_are_exact(variance: str, build: pub.Build) -> None:
    pub.check_gaussian_posterior(build, sd.Matrix(pub.A), pub.A, pub.Y, 1000, pub.karras(variance))


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(TMPD, 400, grid=sd.KarrasGrid())


def test_one_value_is_the_exact_covariance() -> None:
    """A single measured value has one row, so TMPD's twist is the Tweedie twist."""
    row = pub.A[:1]
    model = pub.measured(pub.gaussian_prior("optimal", 20), sd.Matrix(row), 0.5)
    runs = [
        sd.SMC(sd.TDS(model, twist), num_particles=20, seed=0, progress=False).run(pub.Y[:1])
        for twist in (TMPDTwist(), sd.TweedieTwist())
    ]
    torch.testing.assert_close(runs[0].log_evidence, runs[1].log_evidence, rtol=1e-9, atol=1e-9)


def test_each_measured_value_may_have_its_own_noise_and_no_svd_is_needed() -> None:
    levels = torch.tensor([0.5, 2.0], dtype=pub.F64)
    composed = sd.Compose(sd.Mask(torch.tensor([2.0, 1.0], dtype=pub.F64)), sd.Matrix(pub.A))
    smc = sd.SMC(
        TMPD(pub.measured(pub.gaussian_prior("optimal"), composed, levels)), num_particles=500, num_chains=24, seed=0,
        progress=False,
    ).run(pub.Y)  # fmt: skip
    white = torch.tensor([[4.0], [0.5]], dtype=pub.F64)  # the same problem with both rows divided by their noise
    law = pub.chain_law(pub.gaussian_prior("optimal"), pub.MEAN, pub.COVARIANCE)
    _, log_z = law.given(white * pub.A, pub.Y / levels, 1.0)
    pub.check_evidence(smc, log_z - float(levels.log().sum()), worst=0.1)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(TMPD)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(TMPD)


def test_refusals() -> None:
    pub.check_refusals(TMPD, "TMPD", needs_svd=False)
