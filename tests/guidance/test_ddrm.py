"""DDRM against a loop of the published transition, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.ddrm import DDRM
from tests.guidance.linear_problems import (
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
    svd_of,
    x0_hat,
)


def published_loop(noise: torch.Tensor, sigma_y: float, eta: float, eta_b: float) -> torch.Tensor:
    """2201.11793, section 3.2, one coordinate at a time, with x / alpha as the paper's variance-exploding picture."""
    levels = linspace_levels(STEPS)
    u, s, vt = svd_of(A)
    y_bar = [*(u.T @ Y / s).tolist(), 0.0]
    singular = [*s.tolist(), 0.0]
    x = noise[0]
    for k in range(STEPS, 0, -1):
        (alpha, sigma), (alpha_s, sigma_s) = levels[k], levels[k - 1]
        clean = x0_hat(alpha, sigma, x)
        ratio = sigma_s / alpha_s
        x_bar, eps_bar = vt @ clean, vt @ ((x - alpha * clean) / sigma)
        new = []
        for i in range(3):
            z = float(noise[STEPS + 1 - k][i])
            if singular[i] == 0:
                value = x_bar[i] + (1 - eta**2) ** 0.5 * ratio * eps_bar[i] + eta * ratio * z
            elif ratio < sigma_y / singular[i]:
                pull = (y_bar[i] - x_bar[i]) / (sigma_y / singular[i])
                value = x_bar[i] + (1 - eta**2) ** 0.5 * ratio * pull + eta * ratio * z
            else:
                spread = (ratio**2 - (sigma_y / singular[i]) ** 2 * eta_b**2) ** 0.5
                value = (1 - eta_b) * x_bar[i] + eta_b * y_bar[i] + spread * z
            new.append(value)
        x = alpha_s * (vt.T @ torch.stack(new))
    return x


@pytest.mark.parametrize("sigma", [0.05, 1.0])
@pytest.mark.parametrize("eta, eta_b", [(0.85, 1.0), (0.6, 0.5)])
def test_path_is_the_published_loop(sigma: float, eta: float, eta_b: float) -> None:
    check_path(lambda m: DDRM(m, eta, eta_b), lambda noise: published_loop(noise, sigma, eta, eta_b), sigma)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("eta_b", [1.0, 0.7])
def test_gaussian_prior(variance: str, eta_b: float) -> None:
    prior = gaussian_prior(8, variance, grid=sd.KarrasGrid())
    check_gaussian(lambda m: DDRM(m, eta_b=eta_b, min_variance=1.0), prior, 1.0, 2000)


def test_published_variance() -> None:
    """Without a least variance the weights are right too, where the grid is fine enough for a narrow proposal."""
    check_gaussian(lambda m: DDRM(m, eta_b=0.7), gaussian_prior(12, eta=0.7, grid=sd.KarrasGrid()), 1.0, 4000)


def test_mixture_prior() -> None:
    check_mixture(lambda m: DDRM(m, min_variance=1.0), 1.0, 2000)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    check_neighbours(DDRM)


def test_refusals() -> None:
    check_refusals(DDRM, "DDRM")
    with pytest.raises(ValueError, match=r"got eta 0.0; expected a share in \(0, 1\].*density"):
        DDRM(None, eta=0.0)
    with pytest.raises(ValueError, match=r"got eta_b 1.5; expected a share in \[0, 1\]"):
        DDRM(None, eta_b=1.5)
    with pytest.raises(ValueError, match="min_variance"):
        DDRM(None, min_variance=-1.0)
