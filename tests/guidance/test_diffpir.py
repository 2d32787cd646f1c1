"""DiffPIR against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.diffpir import DiffPIR
from tests.guidance.linear_problems import (
    EYE,
    STEPS,
    A,
    Y,
    check_gaussian,
    check_last_step,
    check_mixture,
    check_neighbours,
    check_path,
    check_refusals,
    gaussian_prior,
    linspace_levels,
    x0_hat,
)


def published_loop(noise: torch.Tensor, sigma_y: float, weight: float, zeta: float) -> torch.Tensor:
    """2305.08995, algorithm 1, with the data step solved as a linear system."""
    levels = linspace_levels(STEPS)
    x = noise[0]
    for k in range(STEPS, 0, -1):
        (alpha, sigma), (alpha_s, sigma_s) = levels[k], levels[k - 1]
        bar_sigma = sigma / alpha
        rho = weight * sigma_y**2 / bar_sigma**2
        clean = torch.linalg.solve(A.T @ A + rho * EYE, A.T @ Y + rho * x0_hat(alpha, sigma, x))
        effective = (x - alpha * clean) / sigma
        x = alpha_s * clean + sigma_s * ((1 - zeta) ** 0.5 * effective + zeta**0.5 * noise[STEPS + 1 - k])
    return x


@pytest.mark.parametrize("sigma", [0.05, 1.0])
@pytest.mark.parametrize("weight, zeta", [(1.0, 0.1), (7.0, 1.0)])
def test_path_is_the_published_loop(sigma: float, weight: float, zeta: float) -> None:
    check_path(lambda m: DiffPIR(m, weight, zeta), lambda noise: published_loop(noise, sigma, weight, zeta), sigma)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("zeta", [0.1, 0.5])
def test_gaussian_prior(variance: str, zeta: float) -> None:
    prior = gaussian_prior(20, variance, grid=sd.KarrasGrid())
    check_gaussian(lambda m: DiffPIR(m, zeta=zeta, min_variance=1.0), prior, 1.0, 2000)


def test_published_variance() -> None:
    """Without a least variance the weights are right too, where it is wide enough for the chain's steps."""
    check_gaussian(lambda m: DiffPIR(m, zeta=0.5), gaussian_prior(20, grid=sd.KarrasGrid()), 1.0, 2000)


def test_mixture_prior() -> None:
    check_mixture(lambda m: DiffPIR(m, min_variance=1.0), 1.0, 2000)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    check_neighbours(DiffPIR)


def test_the_last_step() -> None:
    check_last_step(DiffPIR)


def test_refusals() -> None:
    check_refusals(DiffPIR, "DiffPIR")
    with pytest.raises(ValueError, match="lambda_ 0.0; expected a positive"):
        DiffPIR(None, lambda_=0.0)
    with pytest.raises(ValueError, match=r"got zeta 0.0; expected a share in \(0, 1\].*density"):
        DiffPIR(None, zeta=0.0)
    with pytest.raises(ValueError, match="min_variance"):
        DiffPIR(None, min_variance=-1.0)
