"""FPS against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.base import SiteStep
from smcdiff.guidance.fps import FPS
from smcdiff.guidance.program import Program
from tests.guidance.linear_problems import (
    EYE,
    F64,
    STEPS,
    A,
    Y,
    check_gaussian,
    check_mixture,
    check_neighbours,
    check_path,
    check_refusals,
    gaussian_prior,
    linspace_levels,
    program,
    svd_of,
    x0_hat,
)

U, S, VT = svd_of(A)
ROOT = torch.cat((U * S, torch.zeros(2, 1, dtype=F64)), 1)  # A V
ONE = torch.tensor([[0.6, 0.5, 0.0]], dtype=F64)


def ancestral(k: int) -> tuple[float, float, float]:
    """Coefficients of x_t and x0_hat and the variance of the ancestral step, in the rates of the schedule."""
    (alpha, sigma), (alpha_s, sigma_s) = linspace_levels(STEPS)[k], linspace_levels(STEPS)[k - 1]
    rate = (alpha / alpha_s) ** 2
    share = (1 - rate) / sigma**2
    return rate**0.5 * sigma_s**2 / sigma**2, alpha_s * share, share * sigma_s**2


def published_loop(noise: torch.Tensor, sigma_y: float, seed: int) -> torch.Tensor:
    """The path of y first, then one particle through the exact conditionals, as dense matrices."""
    generator = torch.Generator().manual_seed(seed)
    y = {STEPS: ROOT @ torch.randn(3, generator=generator, dtype=F64)}
    for k in range(STEPS, 1, -1):
        b, c, variance = ancestral(k)
        y[k - 1] = b * y[k] + c * Y + variance**0.5 * ROOT @ torch.randn(3, generator=generator, dtype=F64)
    x = noise[0]
    for k in range(STEPS, 0, -1):
        (alpha, sigma), (alpha_s, _) = linspace_levels(STEPS)[k], linspace_levels(STEPS)[k - 1]
        b, c, variance = ancestral(k)
        mean = b * x + c * x0_hat(alpha, sigma, x)
        if k == 1:
            return mean
        spread = (alpha_s * sigma_y) ** 2
        covariance = torch.linalg.inv(EYE / variance + A.T @ A / spread)
        mean = covariance @ (mean / variance + A.T @ y[k - 1] / spread)
        root = VT.T @ (VT @ covariance @ VT.T).diagonal().sqrt().diag()  # diagonal in the singular basis
        x = mean + root @ noise[STEPS + 1 - k]
    raise AssertionError


@pytest.mark.parametrize("sigma, seed", [(0.05, 0), (1.0, 5)])
def test_path_is_the_published_loop(sigma: float, seed: int) -> None:
    check_path(lambda m: FPS(m, seed), lambda noise: published_loop(noise, sigma, seed), sigma)


@pytest.mark.parametrize("k", [1, 3, STEPS])
def test_paths_of_their_own_are_integrated_out(k: int) -> None:
    """q without a seed is the mean over y_s of q given y_s, as dense matrices."""
    sigma_y = 0.4
    prior = gaussian_prior(variance="optimal")
    joint = Program(program(prior, sigma_y), (Y,))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    chain = prior.chain
    estimate = chain.estimate(k, x)
    p, coefficients = chain.transition(k, x, estimate), chain.step(k)
    q = FPS(None, None).proposal.q(SiteStep(joint, "x", k, coefficients, x, estimate, p, None))
    variance = float(p.variance.mean())
    spread = (coefficients.s.alpha * sigma_y) ** 2
    total = variance * A @ A.T + spread * torch.eye(2, dtype=F64)
    gain = variance * A.T @ torch.linalg.inv(total)
    y_s = coefficients.b * x @ A.T + coefficients.c * Y
    torch.testing.assert_close(q.mean, p.mean + (y_s - p.mean @ A.T) @ gain.T)
    expected = variance * EYE - gain @ A * variance + coefficients.kappa**2 * gain @ A @ A.T @ gain.T
    torch.testing.assert_close(VT.T @ q.variance[0].diag() @ VT, expected)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_shared_path_gaussian_prior(variance: str) -> None:
    """The published path, where kappa s is below sqrt(3) sigma_y at all levels, so that its weights have a variance."""
    prior = gaussian_prior(20, variance, sd.VESchedule(0.1, 4.0))
    for k in range(20, 0, -1):
        assert prior.chain.step(k).kappa * float(torch.linalg.svdvals(ONE)) < 3**0.5 * 4.0
    check_gaussian(lambda m: FPS(m, seed=3), prior, 4.0, 2000, ONE, 3 * Y[:1])


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_own_paths_gaussian_prior(variance: str, sigma: float) -> None:
    check_gaussian(lambda m: FPS(m, None), gaussian_prior(20, variance, grid=sd.KarrasGrid()), sigma, 1000)


def test_mixture_prior() -> None:
    check_mixture(lambda m: FPS(m, None), 1.0, 1000)
    check_mixture(FPS, 8.0, 2000, 12, sd.VESchedule(0.3, 5.0))


@pytest.mark.parametrize("seed", [0, None])
def test_a_particle_does_not_depend_on_its_neighbours(seed: int | None) -> None:
    check_neighbours(lambda m: FPS(m, seed))


@pytest.mark.parametrize("seed", [0, None])
def test_refusals(seed: int | None) -> None:
    check_refusals(lambda m: FPS(m, seed), "FPS")
