"""MCGDiff against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

import smcdiff as sd
from smcdiff.guidance.mcgdiff import MCGDiff
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from tests.guidance.linear_problems import (
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


def meeting_levels(sigma_y: float) -> list[int]:
    """Per measured coordinate the step whose alpha_bar sigma_y^2 is nearest to (1 - alpha_bar) s^2."""
    bars = [alpha**2 for alpha, _ in linspace_levels(STEPS)]
    return [
        min(range(1, STEPS + 1), key=lambda k: abs(bars[k] * sigma_y**2 - (1 - bars[k]) * s**2)) for s in S.tolist()
    ]


def potential(k: int, i: int, tau: int, variance: float) -> Normal:
    """g_k of coordinate i in the paper's variance-preserving letters."""
    bars = [alpha**2 for alpha, _ in linspace_levels(STEPS)]
    mean = bars[k] ** 0.5 * float((U.T @ Y)[i] / S[i])
    return Normal(torch.tensor(mean, dtype=F64), (1 - (1 - variance) * bars[k] / bars[tau]) ** 0.5)


def mean_and_deviation(k: int, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of the ancestral step, in the singular basis."""
    (alpha, sigma), (alpha_s, sigma_s) = linspace_levels(STEPS)[k], linspace_levels(STEPS)[k - 1]
    rate = (alpha / alpha_s) ** 2
    mean = rate**0.5 * sigma_s**2 / sigma**2 * x + alpha_s * (1 - rate) / sigma**2 * x0_hat(alpha, sigma, x)
    return VT @ mean, ((1 - rate) * sigma_s**2 / sigma**2) ** 0.5


def published_loop(noise: torch.Tensor, sigma_y: float, variance: float) -> torch.Tensor:
    """2308.07983, algorithm 1, with one particle: free coordinates from the chain, the others led to y / s."""
    tau = meeting_levels(sigma_y)
    assert min(tau) < max(tau) < STEPS
    x = noise[0]
    for k in range(STEPS, 0, -1):
        mean, deviation = mean_and_deviation(k, x)
        z = noise[STEPS + 1 - k]
        new = mean + VT @ (deviation * (VT.T @ z))
        if k == 1:
            return VT.T @ mean
        for i in range(2):
            if tau[i] <= k - 1:
                g = potential(k - 1, i, tau[i], variance)
                gain = deviation**2 / (deviation**2 + g.variance)
                new[i] = gain * g.mean + (1 - gain) * mean[i] + (gain * g.variance) ** 0.5 * z[i]
        x = VT.T @ new
    raise AssertionError


@pytest.mark.parametrize("sigma, variance", [(0.3, 1e-4), (0.3, 0.1), (1.0, 1e-4)])
def test_path_is_the_published_loop(sigma: float, variance: float) -> None:
    check_path(lambda m: MCGDiff(m, variance), lambda noise: published_loop(noise, sigma, variance), sigma)


def test_weights_are_the_published_ones() -> None:
    """Each step's weight is the normalising constant of p g_s over g_t; what is left of a coordinate is divided out at
    its level, and the end brings the likelihood."""
    sigma, variance, b = 0.3, 0.05, 3
    tau = meeting_levels(sigma)
    model = program(gaussian_prior(), sigma)
    feynman_kac = TwistedModel(Program(model, (Y,)), MCGDiff(model, variance))
    states = list(ParticleFilter(ess_threshold=0).iterate(feynman_kac, num_particles=1, num_chains=b, seed=2))
    # the library's potentials are densities of y, s_i / alpha_k times narrower than those of x
    levels = linspace_levels(STEPS)

    def active(k: int) -> list[int]:
        return [i for i in range(2) if tau[i] <= k] if k else []

    def units(k: int) -> float:
        return sum(float((levels[k][0] / S[i]).log()) for i in active(k))

    for chain in range(b):
        for k in range(STEPS, 0, -1):
            before, after = states[STEPS - k], states[STEPS - k + 1]
            x = before.particles["x"][chain, 0]
            mean, deviation = mean_and_deviation(k, x)
            expected = units(k - 1) - units(k)
            if k == 1:
                expected += float(Normal(A @ after.particles["x"][chain, 0], sigma).log_prob(Y).sum())
            for i in active(k - 1):
                g = potential(k - 1, i, tau[i], variance)
                total = (deviation**2 + g.variance) ** 0.5
                expected += float(Normal(mean[i], total).log_prob(g.mean))
            for i in active(k):
                g = potential(k, i, tau[i], variance)
                expected -= float(g.log_prob((VT @ x)[i]))
            got = float(after.log_w[chain, 0] - before.log_w[chain, 0])
            assert abs(got - expected) < 1e-8 * max(1.0, abs(expected)), k


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_gaussian_prior(variance: str, sigma: float) -> None:
    check_gaussian(lambda m: MCGDiff(m, 1.0), gaussian_prior(10, variance, grid=sd.KarrasGrid()), sigma, 3000)


def test_mixture_prior() -> None:
    check_mixture(lambda m: MCGDiff(m, 1.0), 1.0, 2000)


def test_a_measurement_noisier_than_the_chain_is_left_to_the_likelihood() -> None:
    """sigma_y / s above every sigma / alpha: the proposal is the chain itself, and the weights are still right."""
    check_gaussian(MCGDiff, gaussian_prior(8, "optimal", sd.VESchedule(0.1, 4.0)), 15.0, 1000)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    check_neighbours(MCGDiff)


def test_refusals() -> None:
    check_refusals(MCGDiff, "MCGDiff")
    with pytest.raises(ValueError, match="variance 0.0; expected a positive"):
        MCGDiff(None, variance=0.0)
