"""DDNM, DDNM+ and BO-DDNM against loops of the published algorithms, and their weights against closed forms."""

from __future__ import annotations

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.ddnm import BODDNM, DDNM, DDNMPlus
from tests.guidance.linear_problems import (
    EYE,
    F64,
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
    svd_of,
    x0_hat,
)

PINV = A.T @ torch.linalg.inv(A @ A.T)
ONE = torch.tensor([[0.6, 0.5, 0.0]], dtype=F64)
METHODS = {"DDNM": DDNM, "DDNM+": DDNMPlus, "BO-DDNM": BODDNM}


def ddnm_loop(noise: torch.Tensor, eta: float) -> torch.Tensor:
    """The authors' simplified loop: range by y, null space by the network, eta of the noise new."""
    levels = linspace_levels(STEPS)
    x = noise[0]
    for k in range(STEPS, 0, -1):
        (alpha, sigma), (alpha_s, sigma_s) = levels[k], levels[k - 1]
        clean = x0_hat(alpha, sigma, x)
        eps = (x - alpha * clean) / sigma
        rectified = clean - PINV @ (A @ clean - Y)
        x = alpha_s * rectified + sigma_s * (eta * noise[STEPS + 1 - k] + (1 - eta**2) ** 0.5 * eps)
    return x


def ddnm_plus_loop(noise: torch.Tensor, sigma_y: float, eta: float) -> torch.Tensor:
    """The same with Sigma_t = V diag(lambda) V^T before the correction and V diag(phi) V^T on the noise."""
    levels = linspace_levels(STEPS)
    _, s, vt = svd_of(A)
    x = noise[0]
    for k in range(STEPS, 0, -1):
        (alpha, sigma), (a, sigma_s) = levels[k], levels[k - 1]
        clean = x0_hat(alpha, sigma, x)
        eps = (x - alpha * clean) / sigma
        scaling, fresh, kept = torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
        for i, value in enumerate(s.tolist()):
            if sigma_s < a * sigma_y / value:
                scaling[i] = value * sigma_s * (1 - eta**2) ** 0.5 / (a * sigma_y)
                fresh[i] = sigma_s * eta
            else:
                fresh[i] = (sigma_s**2 - a**2 * sigma_y**2 / value**2) ** 0.5
        fresh[2], kept[2] = sigma_s * eta, sigma_s * (1 - eta**2) ** 0.5
        rectified = clean - vt.T @ (scaling * (vt @ PINV @ (A @ clean - Y)))
        x = a * rectified + vt.T @ (fresh * noise[STEPS + 1 - k] + kept * (vt @ eps))
    return x


def bias_optimal_loop(noise: torch.Tensor, sigma_y: float) -> torch.Tensor:
    """2410.13746 in the rates beta of the sub-sampled schedule, with the ancestral variance and the score itself."""
    levels = linspace_levels(STEPS)
    x = noise[0]
    for k in range(STEPS, 0, -1):
        (alpha, sigma), (alpha_s, sigma_s) = levels[k], levels[k - 1]
        beta = 1 - alpha**2 / alpha_s**2
        score = (alpha * x0_hat(alpha, sigma, x) - x) / sigma**2
        covariance = alpha**2 * sigma_y**2 * PINV @ PINV.T + sigma**2 * EYE
        guided = (EYE - PINV @ A) @ score + torch.linalg.inv(covariance) @ (alpha * PINV @ Y - PINV @ A @ x)
        variance = beta * sigma_s**2 / sigma**2
        x = (x + beta * guided) / (1 - beta) ** 0.5 + variance**0.5 * noise[STEPS + 1 - k]
    return x


@pytest.mark.parametrize("eta", [0.85, 0.5])
def test_ddnm_is_the_published_loop(eta: float) -> None:
    check_path(lambda m: DDNM(m, eta), lambda noise: ddnm_loop(noise, eta), 0.3)


@pytest.mark.parametrize("sigma", [0.05, 1.0])
@pytest.mark.parametrize("eta", [0.85, 0.5])
def test_ddnm_plus_is_the_published_loop(sigma: float, eta: float) -> None:
    check_path(lambda m: DDNMPlus(m, eta), lambda noise: ddnm_plus_loop(noise, sigma, eta), sigma)


@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_bias_optimal_is_the_published_loop(sigma: float) -> None:
    check_path(BODDNM, lambda noise: bias_optimal_loop(noise, sigma), sigma)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_ddnm_gaussian_prior(variance: str) -> None:
    """DDNM takes y for exact, which weights can undo only where the last noise level covers that of y."""
    prior = gaussian_prior(8, variance, sd.VESchedule(1.0, 10.0))
    check_gaussian(lambda m: DDNM(m, min_variance=1.0), prior, 0.3, 2000, ONE, Y[:1])


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_ddnm_plus_gaussian_prior(variance: str) -> None:
    prior = gaussian_prior(8, variance, grid=sd.KarrasGrid())
    check_gaussian(lambda m: DDNMPlus(m, min_variance=1.0), prior, 1.0, 2000)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_bias_optimal_gaussian_prior(variance: str, sigma: float) -> None:
    check_gaussian(BODDNM, gaussian_prior(20, variance, grid=sd.KarrasGrid()), sigma, 1000)


def test_mixture_prior() -> None:
    check_mixture(lambda m: DDNMPlus(m, min_variance=1.0), 1.0, 2000)
    check_mixture(BODDNM, 1.0, 1000)
    check_mixture(lambda m: DDNM(m, min_variance=1.0), 0.5, 2000, 8, sd.VESchedule(2.0, 10.0))


@pytest.mark.parametrize("name", METHODS)
def test_a_particle_does_not_depend_on_its_neighbours(name: str) -> None:
    check_neighbours(METHODS[name])


@pytest.mark.parametrize("name", ["DDNM", "BO-DDNM"])
def test_the_last_step(name: str) -> None:
    check_last_step(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_refusals(name: str) -> None:
    check_refusals(METHODS[name], name)


@pytest.mark.parametrize("method", [DDNM, DDNMPlus])
def test_settings_out_of_range(method) -> None:
    with pytest.raises(ValueError, match=r"got eta 0.0; expected a share in \(0, 1\].*density"):
        method(None, eta=0.0)
    with pytest.raises(ValueError, match="min_variance"):
        method(None, min_variance=-1.0)
