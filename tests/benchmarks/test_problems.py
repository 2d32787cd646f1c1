"""The comparison's own answers against direct computation: posterior, evidence, and the floor of exact draws."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from benchmarks.problems import MixtureProblem, Yardstick, sliced_wasserstein

NAMES = ["unit", "correlated"]


def joint(problem: MixtureProblem) -> MixtureSameFamily:
    """The law of (x, y), written from the law of the pair and not by conditioning."""
    d, rows = problem.d, problem.A
    up = torch.cat([torch.eye(d, dtype=torch.float64), rows])  # (x, y) = up x + (0, noise)
    C = torch.eye(d, dtype=torch.float64) if problem.covariance is None else problem.covariance
    covariance = up @ C @ up.mT
    covariance[d:, d:] += problem.sigma_y**2 * torch.eye(len(rows), dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(problem.weights),
        MultivariateNormal(problem.means @ up.mT, covariance.expand(len(problem.means), -1, -1)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_public_problem_is_as_described(seed: int) -> None:
    problem = MixtureProblem.public(8, 4, seed)
    corners = {(float(m[0]), float(m[1])) for m in problem.means}
    assert corners == {(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)}
    assert all(torch.equal(problem.means[:, i], problem.means[:, i % 2]) for i in range(8))
    sizes = torch.linalg.svdvals(problem.A)
    assert problem.A.shape == (4, 8) and 0 < problem.sigma_y < float(sizes[0]) < 1
    assert float(problem.weights.sum()) == pytest.approx(1) and float(problem.weights.min()) > 0


def correlated(d: int, seed: int) -> MixtureProblem:
    """The public problem with components that are correlated within."""
    one = MixtureProblem.public(d, d // 2, seed)
    factor = torch.eye(d, dtype=torch.float64) + 0.4 * torch.ones((d, d), dtype=torch.float64).triu(1)
    return replace(one, covariance=factor.mT @ factor)


@pytest.mark.parametrize("problem", [MixtureProblem.public(2, 1, 0), correlated(2, 0)], ids=NAMES)
def test_evidence_is_the_integral_of_the_joint_density(problem: MixtureProblem) -> None:
    """In two dimensions, by quadrature; the trapezium rule is exact to rounding for such smooth functions."""
    line = torch.arange(-24.0, 24.0, 0.125, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    log_density = joint(problem).log_prob(torch.cat([grid, problem.y.expand(len(grid), 1)], 1))
    log_area = 2 * math.log(0.125)
    assert problem.log_evidence == pytest.approx(float(log_density.logsumexp(0)) + log_area, abs=1e-10)
    w = log_density.softmax(0)
    mean, covariance = problem.posterior_moments()
    torch.testing.assert_close(w @ grid, mean, rtol=1e-9, atol=1e-9)
    away = grid - mean
    torch.testing.assert_close((w[:, None] * away).mT @ away, covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(problem.mode_weights(grid, w), problem.posterior_weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "problem", [replace(one, sigma_y=0.8) for one in (MixtureProblem.public(4, 2, 1), correlated(4, 1))], ids=NAMES
)
def test_exact_draws_have_the_posterior_moments(problem: MixtureProblem) -> None:
    """n = 200 000: each of 4 + 10 moments within 6 standard errors; P < 14 * 2e-9."""
    n = 200_000
    x = problem.posterior_draws(n, torch.Generator().manual_seed(0))
    mean, covariance = problem.posterior_moments()
    for value, truth in (
        (x, mean),
        ((x[:, :, None] - mean[:, None]) * (x - mean)[:, None], covariance),
    ):
        error = value.std(0) / math.sqrt(n)
        assert bool(((value.mean(0) - truth).abs() < 6 * error).all())


def test_sliced_wasserstein_of_a_shift_is_its_length_along_the_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, shift = torch.randn((50, 3), dtype=torch.float64, generator=generator), torch.tensor([1.0, -2.0, 0.5]).double()
    directions = torch.eye(3, dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, directions) == pytest.approx(3.5 / 3, abs=1e-12)
    assert sliced_wasserstein(x, x.flip(0), directions) == 0


def test_floor_of_exact_draws() -> None:
    """Exact draws are a floor away, and posterior draws of a problem with a shifted measurement are farther.

    For two sets of n draws of a normal law of variance v along a direction, the expected distance is, to first order
    in 1 / n, sqrt(2 v / n) times the integral of sqrt(2 F (1 - F) / pi) over the line.
    Here the posterior is one component, so v is known; means over 8 sets and 500 directions are within 15 % of it.
    """
    one = MixtureProblem.public(8, 2, 0)
    problem = MixtureProblem(one.means[:1], torch.ones(1, dtype=torch.float64), one.A, one.y, one.sigma_y)
    x = problem.posterior_draws(1000, torch.Generator().manual_seed(1))
    yardstick = Yardstick(problem, 1000, seed=0)
    _, covariance = problem.posterior_moments()
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    F = torch.special.ndtr(line)
    integral = float(torch.trapezoid((2 * F * (1 - F) / math.pi).sqrt(), line))
    directions = torch.randn((8, 20_000), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    width = float((directions * (covariance @ directions)).sum(0).sqrt().mean())
    expected = integral * width * math.sqrt(2 / 1000)
    assert yardstick.floor == pytest.approx(expected, rel=0.15)
    assert yardstick.distance(x) == pytest.approx(expected, rel=0.4)
    assert yardstick.distance(x + 0.5) > 3 * yardstick.floor
