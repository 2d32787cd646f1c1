"""Exact denoisers against brute-force conditioning, quadrature, direct sums, and the score of log p_t."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from smcdiff.diffusion.analytic import (
    EmpiricalDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    StandardNormalDenoiser,
)
from smcdiff.diffusion.denoiser import Denoiser
from smcdiff.diffusion.schedule import NoiseLevel
from tests.diffusion.exact import clean_given_noisy, example_covariance

LEVELS = [
    NoiseLevel(0.0, 0.999, math.sqrt(1 - 0.999**2)),
    NoiseLevel(0.0, 0.6, 0.8),
    NoiseLevel(0.0, 0.05, math.sqrt(1 - 0.05**2)),
    NoiseLevel(0.0, 1.0, 3.0),  # exploding
    NoiseLevel(0.0, 0.7, 0.3),  # flow
]
each_level = pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"{level.alpha}-{level.sigma:.2g}")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@each_level
@pytest.mark.parametrize("singular", [False, True])
def test_gaussian_is_conditioning(level: NoiseLevel, singular: bool) -> None:
    covariance = example_covariance(6)
    if singular:
        factor = draw(6, 2)
        covariance = factor @ factor.T
    mean, x_t = draw(6), 2 * draw(4, 6, seed=2)
    estimate = GaussianDenoiser(mean.reshape(2, 3), covariance)(x_t.reshape(4, 2, 3), level)
    assert estimate.variance is not None
    for i in range(4):
        exact_mean, exact = clean_given_noisy(mean, covariance, level, x_t[i])
        torch.testing.assert_close(estimate.mean[i].reshape(-1), exact_mean, rtol=1e-9, atol=1e-9)
        variance = estimate.variance.expand(4, 2, 3)[i, 0, 0]
        torch.testing.assert_close(variance, exact.trace() / 6, rtol=1e-7, atol=1e-12)


@each_level
def test_gaussian_with_independent_entries(level: NoiseLevel) -> None:
    mean, variances, x_t = draw(2, 3), 0.1 + draw(2, 3, seed=2).square(), draw(4, 2, 3, seed=3)
    short = GaussianDenoiser(mean, variances)(x_t, level)
    precision = 1 / variances + level.alpha**2 / level.sigma**2
    expected = (mean / variances + level.alpha * x_t / level.sigma**2) / precision
    torch.testing.assert_close(short.mean, expected, rtol=1e-10, atol=1e-12)
    assert short.variance is not None
    torch.testing.assert_close(short.variance.reshape(-1)[0], (1 / precision).mean(), rtol=1e-10, atol=0)


@each_level
def test_standard_normal(level: NoiseLevel) -> None:
    for shape in [(), (3,), (1, 2)]:
        x_t = draw(4, *shape)
        estimate = StandardNormalDenoiser(torch.Size(shape), torch.float64, torch.device("cpu"))(x_t, level)
        precision = 1 + level.alpha**2 / level.sigma**2
        torch.testing.assert_close(estimate.mean, level.alpha * x_t / level.sigma**2 / precision)
        assert estimate.variance is not None
        assert float(estimate.variance.squeeze()) == pytest.approx(1 / precision, rel=1e-12)


@each_level
def test_mixture_in_one_dimension_is_quadrature(level: NoiseLevel) -> None:
    means, variances = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64), [0.09, 0.5, 0.2]
    weights = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)  # normalised by the denoiser
    x_t = torch.linspace(-3, 3, 5, dtype=torch.float64)
    x_0 = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    density = sum(
        w / math.sqrt(v) * (-0.5 * (x_0 - m) ** 2 / v).exp() for w, m, v in zip(weights, means, variances, strict=True)
    )
    posterior = density * (-0.5 * ((x_t[:, None] - level.alpha * x_0) / level.sigma) ** 2).exp()
    share = posterior / posterior.sum(1, keepdim=True)
    mean = (share * x_0).sum(1)
    variance = (share * (x_0 - mean[:, None]) ** 2).sum(1)
    covariances = torch.tensor(variances, dtype=torch.float64)[:, None, None]
    estimate = GaussianMixtureDenoiser(means[:, None], covariances, weights)(x_t[:, None], level)
    assert estimate.variance is not None
    torch.testing.assert_close(estimate.mean[:, 0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimate.variance[:, 0], variance, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("level", [LEVELS[1], LEVELS[3], LEVELS[4]], ids=["vp", "ve", "flow"])
def test_mixture_in_two_dimensions_is_quadrature(level: NoiseLevel) -> None:
    """Two correlated components; the rectangle rule is exact to rounding for densities this smooth and this far in."""
    means = torch.tensor([[-1.0, 0.5], [1.2, -0.4]], dtype=torch.float64)
    covariances = torch.tensor([[[0.4, 0.25], [0.25, 0.3]], [[0.3, -0.1], [-0.1, 0.6]]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    x_0 = torch.cartesian_prod(axis, axis)
    prior = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    x_t = torch.tensor([[0.1, 0.2], [-1.0, 0.9]], dtype=torch.float64)
    fit = -0.5 * ((x_t[:, None] - level.alpha * x_0) / level.sigma).square().sum(-1)
    share = (prior.log_prob(x_0) + fit).softmax(-1)
    mean = share @ x_0
    variance = (share * (x_0 - mean[:, None]).square().sum(-1)).sum(1) / 2
    estimate = GaussianMixtureDenoiser(means, covariances, weights)(x_t, level)
    assert estimate.variance is not None
    torch.testing.assert_close(estimate.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(estimate.variance[:, 0], variance, rtol=1e-9, atol=1e-9)


def test_mixture_with_a_shared_covariance() -> None:
    means, shared, weights, x_t = draw(3, 4), example_covariance(4), torch.ones(3).double(), draw(5, 4, seed=2)
    one = GaussianMixtureDenoiser(means, shared, weights)(x_t, LEVELS[1])
    each = GaussianMixtureDenoiser(means, shared.expand(3, 4, 4), weights)(x_t, LEVELS[1])
    torch.testing.assert_close(one.mean, each.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.variance, each.variance, rtol=1e-12, atol=1e-12)


@each_level
def test_empirical_is_the_direct_sum(level: NoiseLevel) -> None:
    samples, x_t = draw(7, 2, 2), draw(3, 2, 2, seed=2)
    estimate = EmpiricalDenoiser(samples)(x_t, level)
    assert estimate.variance is not None
    for i in range(3):
        distances = [float(((x_t[i] - level.alpha * x) ** 2).sum()) for x in samples]
        weights = [math.exp(-(d - min(distances)) / (2 * level.sigma**2)) for d in distances]
        mean = sum(w * x for w, x in zip(weights, samples, strict=True)) / sum(weights)
        squares = [w * float(((x - mean) ** 2).sum()) for w, x in zip(weights, samples, strict=True)]
        torch.testing.assert_close(estimate.mean[i], mean, rtol=1e-9, atol=1e-9)
        assert float(estimate.variance[i]) == pytest.approx(sum(squares) / sum(weights) / 4, rel=1e-7, abs=1e-12)


def exact_priors(level: NoiseLevel) -> dict[str, tuple[Denoiser, MultivariateNormal | MixtureSameFamily]]:
    """Denoisers with the law of x_t under their prior, at this level."""
    noise = level.sigma**2 * torch.eye(3, dtype=torch.float64)
    mean, means, covariance = draw(3), draw(2, 3, seed=2), example_covariance(3)
    covariances = torch.stack([covariance, example_covariance(3, seed=1)])
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    samples = draw(4, 3, seed=3)

    def mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> MixtureSameFamily:
        return MixtureSameFamily(
            Categorical(weights), MultivariateNormal(level.alpha * means, level.alpha**2 * covariances + noise)
        )

    return {
        "gaussian": (
            GaussianDenoiser(mean, covariance),
            MultivariateNormal(level.alpha * mean, level.alpha**2 * covariance + noise),
        ),
        "mixture": (
            GaussianMixtureDenoiser(means, covariances, weights),
            mixture(weights, means, covariances),
        ),
        "empirical": (
            EmpiricalDenoiser(samples),
            mixture(torch.full((4,), 0.25, dtype=torch.float64), samples, torch.zeros(4, 3, 3, dtype=torch.float64)),
        ),
        "standard normal": (
            StandardNormalDenoiser(torch.Size([3]), torch.float64, torch.device("cpu")),
            MultivariateNormal(torch.zeros(3, dtype=torch.float64), (level.alpha**2 * noise / level.sigma**2) + noise),
        ),
    }


@each_level
@pytest.mark.parametrize("name", ["gaussian", "mixture", "empirical", "standard normal"])
def test_tweedie(name: str, level: NoiseLevel) -> None:
    """(alpha_t x0_hat - x_t) / sigma_t^2 is the score of log p_t; its divergence gives the variance.

    Cov[x_0 given x_t] = (sigma_t^2 / alpha_t) d x0_hat / d x_t, of which the denoiser reports the mean diagonal.
    """
    denoiser, law = exact_priors(level)[name]
    x_t = (level.alpha * draw(5, 3, seed=4) + level.sigma * draw(5, 3, seed=5)).requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x_t).sum(), x_t)
    estimate = denoiser(x_t, level)
    torch.testing.assert_close((level.alpha * estimate.mean - x_t) / level.sigma**2, score, rtol=1e-8, atol=1e-8)
    rows = [torch.autograd.grad(estimate.mean[:, j].sum(), x_t, retain_graph=True)[0] for j in range(3)]
    trace = sum(rows[j][:, j] for j in range(3))
    assert estimate.variance is not None
    expected = level.sigma**2 / level.alpha * torch.as_tensor(trace) / 3
    torch.testing.assert_close(estimate.variance.expand(5, 1)[:, 0], expected, rtol=1e-7, atol=1e-10)


def test_a_far_point_still_has_its_nearest_component() -> None:
    """Densities that underflow: responsibilities must come from their logarithms."""
    means = torch.tensor([[-1.0], [1.0]])
    estimate = GaussianMixtureDenoiser(means, 1e-4 * torch.eye(1), torch.ones(2))(
        torch.tensor([[1e3], [-1e3]]), NoiseLevel(0, 1.0, 0.01)
    )
    gain = 1e-4 / (1e-4 + 1e-4)
    expected = torch.tensor([[1 + gain * (1e3 - 1)], [-1 - gain * (1e3 - 1)]])
    torch.testing.assert_close(estimate.mean, expected, rtol=1e-5, atol=0)
    far = EmpiricalDenoiser(means)(torch.tensor([[1e3], [-1e3]]), NoiseLevel(0, 1.0, 0.01))
    assert far.mean.tolist() == [[1.0], [-1.0]]


def test_wrong_shapes_and_covariances_are_refused() -> None:
    mean, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"expected \(1, 3, 3\), or \(3, 3\) for all"):
        GaussianDenoiser(mean, torch.eye(4))
    with pytest.raises(ValueError, match="not symmetric"):
        GaussianDenoiser(mean, eye + torch.tensor([0.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match="not symmetric"):
        GaussianDenoiser(mean, eye * float("nan"))
    with pytest.raises(ValueError, match="eigenvalue -1; expected none below zero"):
        GaussianDenoiser(mean, torch.tensor([1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match=r"expected \(components, \*event\) and \(components,\)"):
        GaussianMixtureDenoiser(torch.zeros(2, 3), eye, torch.ones(3))
    with pytest.raises(ValueError, match="a mixture weight that is not positive; leave that component out"):
        GaussianMixtureDenoiser(torch.zeros(2, 3), eye, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"got samples of shape \(3,\); expected \(number, \*event\)"):
        EmpiricalDenoiser(mean)
