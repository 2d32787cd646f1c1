"""MMPS against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.base import Prediction
from smcdiff.guidance.mmps import MMPS, MMPSTwist, conjugate_gradients
from smcdiff.guidance.program import Program
from tests.guidance import published as pub

STEPS, SIGMA = 50, 0.1


def published_loop(noise: torch.Tensor, iterations: int) -> torch.Tensor:
    """2405.13712: x0_hat is moved by C_t A^T u with u from conjugate gradients, then the chain's own step."""
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    for i in range(STEPS, 0, -1):
        bar, before = bars[i], bars[i - 1]
        x0_hat = pub.denoise(x, bar)
        covariance = (1 - bar) / bar.sqrt() * pub.jacobian(bar)
        matrix = SIGMA**2 * torch.eye(2, dtype=pub.F64) + pub.A @ covariance @ pub.A.T
        residual = pub.Y - pub.A @ x0_hat
        u, r, p = torch.zeros(2, dtype=pub.F64), residual, residual
        for _ in range(iterations):  # textbook conjugate gradients
            step = (r @ r) / (p @ matrix @ p)
            u, r_next = u + step * p, r - step * matrix @ p
            p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
        mean, scale = pub.ancestral(x, x0_hat + covariance @ pub.A.T @ u, bar, before)
        x = mean + scale * noise[STEPS + 1 - i]
    return x


@pytest.mark.parametrize("iterations", [1, 2])
def test_path_is_the_published_loop(iterations: int) -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Matrix(pub.A), SIGMA)
    pub.check_loop(
        lambda model: MMPS(model, iterations),
        model,
        pub.Y,
        lambda noise: published_loop(noise, iterations),
        STEPS + 1,
        1e-8,
    )


def test_conjugate_gradients_solve_each_system() -> None:
    """As many steps as unknowns solve it; more than that do no harm, and a solved system stays solved."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 4, 4, generator=generator, dtype=pub.F64)
    matrices = root @ root.mT + torch.eye(4, dtype=pub.F64)
    b = torch.randn(5, 4, generator=generator, dtype=pub.F64)
    b[3] = 0
    for iterations in (4, 9):
        u = conjugate_gradients(lambda v: (matrices @ v[..., None])[..., 0], b, iterations)
        torch.testing.assert_close(u, torch.linalg.solve(matrices, b), rtol=1e-8, atol=1e-10)
    negative = conjugate_gradients(lambda v: -v, b, 3)
    assert torch.equal(negative, torch.zeros_like(b))


def test_twist_is_the_quadratic_form_and_fewer_steps_make_it_wider() -> None:
    prior = pub.gaussian_prior()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=pub.F64).requires_grad_()
    program = Program(pub.measured(prior, sd.Matrix(pub.A), 0.3), (pub.Y,))
    for k in (1, 20, 50):
        level, estimate = prior.chain.levels[k], prior.chain.estimate(k, x)
        jacobian = pub.jacobian(torch.tensor(level.alpha**2, dtype=pub.F64))
        covariance = level.sigma**2 / level.alpha * pub.A @ jacobian @ pub.A.T + 0.09 * torch.eye(2, dtype=pub.F64)
        residual = pub.Y - estimate.mean @ pub.A.T
        expected = -0.5 * (residual @ torch.linalg.inv(covariance) * residual).sum(1)
        prediction = Prediction(program, k, {"x": x}, {"x": estimate})
        solved, one = MMPSTwist(2).log_psi(prediction), MMPSTwist(1).log_psi(prediction)
        torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-10)
        assert bool((one > solved).all()) and bool((one < 0).all())
        (gradient,) = torch.autograd.grad(solved.sum(), x, retain_graph=True)
        slope = (residual @ torch.linalg.inv(covariance) @ pub.A @ jacobian).detach()
        torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_many_particles_are_exact(variance: str, iterations: int) -> None:
    pub.check_gaussian_posterior(
        lambda model: MMPS(model, iterations), sd.Matrix(pub.A), pub.A, pub.Y, 500, pub.karras(variance)
    )


def test_twist_alone_is_exact() -> None:
    pub.check_gaussian_posterior(
        lambda model: sd.TDS(model, MMPSTwist(2)), sd.Matrix(pub.A), pub.A, pub.Y, 500, pub.karras("optimal")
    )


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(MMPS, 400, grid=sd.KarrasGrid())


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(lambda model: MMPS(model, 2))


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(
    ("method", "back"),
    [
        (lambda model: MMPS(model, 5), 6),  # one a step of conjugate gradients, one for the proposal
        (lambda model: sd.TDS(model, sd.TweedieTwist()), 1 + len(pub.A)),  # a row of the Jacobian each
        (sd.TMPD, 2),
        (sd.TDS, 1),
        (sd.Bootstrap, 0),
    ],
    ids=["MMPS", "Tweedie", "TMPD", "TDS", "Bootstrap"],
)
def test_every_pass_back_is_counted(method: Callable[..., Any], back: int, batch: int | None) -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=4), sd.Matrix(pub.A), SIGMA)
    smc = sd.SMC(method(model), 5, 2, seed=0, max_batch=batch, progress=False).run(pub.Y)
    assert smc.network_evaluations == (4 * 5 * 2, back * 4 * 5 * 2)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(lambda model: MMPS(model, 2))


def test_refusals() -> None:
    pub.check_refusals(MMPS, "MMPS", needs_svd=False)
    with pytest.raises(ValueError, match="iterations 0"):
        MMPS(pub.measured(pub.gaussian_prior(), sd.Matrix(pub.A), 1.0), iterations=0)
