"""Expansions of programs that are not linear and Gaussian: residuals, derivatives, and the way to the mode."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diffusion.covariance import Dense, Diagonal
from smcdiff.guidance.conjugate_gradients import ConjugateGradients, IterativeExpansion
from smcdiff.guidance.elementwise import DiagonalExpansion
from smcdiff.guidance.gauss_newton import few_measurements, whitened_residual
from smcdiff.guidance.information import Conditioning
from smcdiff.guidance.program import Program
from smcdiff.transforms import DCT, PIXELS

F64 = torch.float64
EYE = torch.eye(3, dtype=F64)
PRIOR = sd.DiffusionPrior(sd.GaussianDenoiser(torch.zeros(3, dtype=F64), EYE), sd.VPSchedule(), 4)
COVARIANCE = torch.tensor([[0.6, 0.2, 0.0], [0.2, 0.5, -0.1], [0.0, -0.1, 0.4]], dtype=F64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bilinear(y=None):
    x = pyro.sample("x", PRIOR)
    gain = pyro.sample("gain", dist.LogNormal(torch.tensor(0.2, dtype=F64), 0.3))
    return pyro.sample("y", dist.Normal(gain * x[:2], 0.5).to_event(1), obs=y)


def test_derivatives_of_a_bilinear_program() -> None:
    """r = (y - g x) / sigma with g = exp(0.2 + 0.3 z): dr/dx = -g / sigma and dr/dz = -0.3 g x / sigma."""
    y, m = torch.tensor([1.0, -0.5], dtype=F64), 4
    program = Program(bilinear, (y,))
    at = {"x": random(m, 3), "gain": random(m, seed=1)}
    found = few_measurements(program, at, {})
    gain = torch.exp(0.2 + 0.3 * at["gain"])[:, None]
    residual = (y - gain * at["x"][:, :2]) / 0.5
    torch.testing.assert_close(found.residual, residual)
    torch.testing.assert_close(found.rows["x"], 2 * gain[..., None] * EYE[:2].expand(m, 2, 3))
    torch.testing.assert_close(found.rows["gain"], 0.6 * gain * at["x"][:, :2])
    # the constant makes the quadratic the log-likelihood itself where it was expanded
    torch.testing.assert_close(found.constant - 0.5 * residual.square().sum(1), program.log_prob(at))
    only = few_measurements(program, {"x": at["x"]}, {"gain": at["gain"]})
    assert set(only.rows) == {"x"}
    torch.testing.assert_close(only.rows["x"], found.rows["x"])


@pytest.mark.parametrize(
    ("law", "exact"),
    [
        (lambda x: dist.Normal(x, 0.5).to_event(1), lambda x, y: (y - x) / 0.5),
        (lambda x: dist.Laplace(x, 0.5).to_event(1), lambda x, y: (y - x) / (0.5 * 2**0.5)),
        (lambda x: dist.StudentT(5.0, x, 0.5).to_event(1), lambda x, y: (y - x) / (0.5 * (5 / 3) ** 0.5)),
        (lambda x: dist.Poisson(x + 4).to_event(1), lambda x, y: (y - x - 4) / (x + 4).sqrt()),
        (lambda x: dist.Bernoulli(logits=x).to_event(1),
         lambda x, y: (y - x.sigmoid()) / (x.sigmoid() * (1 - x.sigmoid())).sqrt()),
        (lambda x: dist.MultivariateNormal(x, COVARIANCE),
         lambda x, y: torch.linalg.solve(torch.linalg.cholesky(COVARIANCE), y - x)),
    ],
    ids=["Normal", "Laplace", "Student", "Poisson", "Bernoulli", "MultivariateNormal"],
)  # fmt: skip
def test_residuals_are_white(law, exact) -> None:
    y, x = torch.tensor([1.0, 0.0, 1.0], dtype=F64), torch.tensor([0.4, -0.3, 1.1], dtype=F64)

    def model(y=None):
        pyro.sample("y", law(pyro.sample("x", PRIOR)), obs=y)

    torch.testing.assert_close(whitened_residual(Program(model, (y,)), {"x": x}), exact(x, y))


def test_counts_are_not_promised_more_than_they_can_hold() -> None:
    """Where 0.01 counts are expected and 16 were seen, the variance is a quarter of 16."""

    def model(y=None):
        pyro.sample("y", dist.Poisson(pyro.sample("x", PRIOR).abs()).to_event(1), obs=y)

    y, x = torch.tensor([16.0, 9.0, 0.0], dtype=F64), torch.tensor([0.01, 25.0, 0.01], dtype=F64)
    found = whitened_residual(Program(model, (y,)), {"x": x})
    expected = [(16 - 0.01) / 2, -16 / 5, -0.01 / 0.5]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))


def test_a_factor_measures_nothing_and_counts() -> None:
    """It is in the constant, and has no row."""
    y = torch.tensor([0.3], dtype=F64)

    def model(y=None):
        x = pyro.sample("x", PRIOR)
        pyro.factor("smooth", -x.square().sum())
        pyro.sample("y", dist.Normal(x[:1], 0.5).to_event(1), obs=y)

    found = few_measurements(Program(model, (y,)), {"x": random(4, 3)}, {})
    x = found.at["x"]
    exact = dist.Normal(x[:, 0], 0.5).log_prob(y) - x.square().sum(1)
    torch.testing.assert_close(found.constant - 0.5 * found.residual.square().sum(1), exact)
    assert found.residual.shape == (4, 1)


def laplace(program: Program, covariance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The mode of N(x; mean, C) p(y given x) by Newton's method on a fine objective, and its height."""
    x = mean.clone()
    prior = MultivariateNormal(mean, covariance)

    def height(x: Tensor) -> Tensor:
        return prior.log_prob(x) + program.log_prob({"x": x[None]})[0]

    for _ in range(100):
        gradient = torch.func.grad(height)(x)
        hessian = torch.func.jacrev(torch.func.grad(height))(x)
        x = x - 0.5 * torch.linalg.solve(hessian, gradient)
    return x, height(x)


def test_expansions_reach_the_mode() -> None:
    """y = exp(x) + noise, sigma 0.2, from a mean that is far away: each further expansion is nearer, and the last has
    the Laplace approximation's mode as its conditioned mean."""
    y, mean = torch.tensor([2.5, 0.4, 1.0], dtype=F64), torch.tensor([-1.0, 1.0, 0.0], dtype=F64)

    def model(y=None):
        pyro.sample("y", dist.Normal(pyro.sample("x", PRIOR).exp(), 0.2).to_event(1), obs=y)

    program = Program(model, (y,))
    mode, _ = laplace(program, COVARIANCE, mean)
    distances = []
    for expansions in (1, 2, 4, 12):
        how = Conditioning(64, expansions, ConjugateGradients())
        states, covariances = {"x": mean[None]}, {"x": Dense(COVARIANCE[None])}
        information = how.information(program, states, {}, covariances, lambda: y)
        again = information.condition(states, covariances).mean()["x"][0]
        distances.append(float((again - mode).norm()))
    assert distances[0] > distances[1] > distances[2] > distances[3], distances
    # Gauss-Newton leaves out the curvature of exp, which vanishes only with the residual: it stops near the mode
    assert distances[3] < 0.02


@pytest.mark.parametrize("in_pixels", [True, False])
def test_poisson_pictures_are_expanded_about_their_mode(in_pixels: bool) -> None:
    """Counts of intensities, in pixels elementwise, in cosines by conjugate gradients. The pixels are independent, so
    the mode of x_0 given y and Laplace's approximation of the log-integral are those of one pixel at a time."""
    event, gain, v = (1, 3, 3), 60.0, 0.02
    mean_of_all = torch.full(event, 0.6, dtype=F64)
    denoiser = sd.GaussianFieldDenoiser(mean_of_all, torch.full(event, 0.05, dtype=F64), PIXELS)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 3)

    def law(x: Tensor) -> sd.PoissonMeasurement:  # the same rate, gain * x, by an operator with an svd and one without
        operator = sd.Identity() if in_pixels else lambda v: 2 * v + 0.5
        return sd.PoissonMeasurement(operator, x, gain if in_pixels else gain / 2)

    def model(y=None):
        pyro.sample("y", law(pyro.sample("x", prior)), obs=y)

    offset = 0.0 if in_pixels else 0.25 * gain  # rate = gain x + offset
    y = 0.6 * gain + offset + torch.tensor([7, -6, -14, 0, -9, 15, -3, 2, 5], dtype=F64).reshape(event)
    program = Program(model, (y,))
    mean = {"x": mean_of_all + 0.1 * random(2, *event, seed=3)}
    covariances = {"x": Diagonal(torch.full((1, *event), v, dtype=F64), PIXELS if in_pixels else DCT)}
    how = Conditioning(4, 1, ConjugateGradients(tolerance=1e-12))
    information = how.information(program, mean, {}, covariances, lambda: covariances["x"].variance)
    assert isinstance(information, DiagonalExpansion if in_pixels else IterativeExpansion)

    m, u = mean["x"].flatten(1), mean["x"].flatten(1)
    for _ in range(100):
        rate = gain * u + offset
        slope = gain * (y.flatten() / rate - 1) - (u - m) / v
        u = u + 0.5 * slope / (y.flatten() * (gain / rate).square() + 1 / v)
    rate = gain * u + offset
    at = information.expanded_at["x"].flatten(1)
    assert float((at - u).abs().max()) < 0.03  # a third of a pixel's posterior deviation
    exact = dist.Poisson(gain * at + offset).log_prob(y.flatten()).sum(1)
    torch.testing.assert_close(information.value, exact, rtol=0, atol=0.01)  # less the floor of the rate
    height = dist.Poisson(rate).log_prob(y.flatten()).sum(1) - 0.5 * ((u - m).square() / v).sum(1)
    laplace_integral = height - 0.5 * torch.log1p(v * y.flatten() * (gain / rate).square()).sum(1)
    found = information.condition(mean, covariances).log_integral()
    torch.testing.assert_close(found, laplace_integral, rtol=0, atol=0.5)  # of -35; the curvature is that foretold by y


def test_conditioning_asks_for_no_more_expansions_than_a_linear_program_needs() -> None:
    """One: y = x + noise with another latent's values written out, whatever the number asked for."""
    calls = 0
    y = torch.tensor([0.5, 0.2, 0.1], dtype=F64)

    def model(y=None):
        nonlocal calls
        calls += 1
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", PRIOR), 0.5), obs=y)

    program = Program(model, (y,))
    states, covariances = {"x": random(2, 3)}, {"x": Dense(COVARIANCE[None])}
    how = Conditioning(64, 9, ConjugateGradients())
    how.information(program, states, {}, covariances, lambda: y)
    before = calls
    how.information(program, states, {}, covariances, lambda: y)
    assert calls - before == 2  # one for H and one for the log-likelihood
    assert math.isfinite(float(program.log_prob(states).sum()))
