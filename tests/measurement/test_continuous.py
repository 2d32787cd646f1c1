"""Laplace, log-normal and mixed noise against torch.distributions, their draws, and inside Pyro programs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.measurement import (
    Blur,
    Identity,
    LaplaceMeasurement,
    LogNormalMeasurement,
    Measurement,
    MixedMeasurement,
    gaussian_moments,
    poisson_moments,
)
from tests.guidance.exact import chain_density, check_evidence

F64 = torch.float64
KERNEL = torch.tensor([[0.1, 0.2, 0.1], [0.0, 0.4, 0.2]], dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, WIDTH = normal(2, 1, 4, 5).abs() + 0.1, normal(1, 4, 5).abs() + 0.05
BLURRED = Blur(KERNEL)(X)
LAWS: dict[str, tuple[Callable[..., Measurement], torch.distributions.Distribution]] = {
    "laplace": (lambda **kw: LaplaceMeasurement(Blur(KERNEL), X, WIDTH, **kw), dist.Laplace(BLURRED, WIDTH)),
    "log-normal": (
        lambda **kw: LogNormalMeasurement(Blur(KERNEL), X, WIDTH, floor=1e-9, **kw),
        dist.LogNormal(BLURRED.log(), WIDTH),
    ),
    "mixed": (
        lambda **kw: MixedMeasurement(Blur(KERNEL), X, 0.3, WIDTH, **kw),
        dist.Normal(BLURRED, (WIDTH**2 + 0.3 * BLURRED).sqrt()),
    ),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("event_dim", [None, 0, 2])
def test_against_torch(name: str, event_dim: int | None) -> None:
    make, base = LAWS[name]
    law, y = make(event_dim=event_dim), normal(2, 1, 4, 5, seed=1).abs() + 0.01
    expected = torch.distributions.Independent(base, 4 if event_dim is None else event_dim)
    assert (law.batch_shape, law.event_shape) == (expected.batch_shape, expected.event_shape)
    torch.testing.assert_close(law.log_prob(y), expected.log_prob(y))
    torch.testing.assert_close(law.log_prob_pointwise(y), base.log_prob(y))
    torch.testing.assert_close(law.mean, base.mean)
    torch.testing.assert_close(law.variance, base.variance)
    assert law.x is X and isinstance(law.operator, Blur)
    assert bool(law.support.check(y).all()) and law.support.check(y).shape == expected.support.check(y).shape
    larger = law.expand(torch.Size((3, *law.batch_shape)))
    torch.testing.assert_close(larger.log_prob(y), law.log_prob(y).expand(larger.batch_shape))
    assert larger.sample().shape == (3, 2, 1, 4, 5)


@pytest.mark.parametrize("name", LAWS)
def test_draws(name: str) -> None:
    """Probabilities of three half-lines and the mean of 100 000 draws of a pixel, each within 5.5 standard errors.

    A count of n draws has variance n p (1 - p) and the mean of draws variance Var / n; with 4 values each, the normal
    limit makes the test fail with probability 4 * 3.8e-8 = 1.5e-7 per law.
    """
    n = 100_000
    make = {
        "laplace": lambda x: LaplaceMeasurement(Identity(), x, 0.7),
        "log-normal": lambda x: LogNormalMeasurement(Identity(), x, 0.4, floor=1e-9),
        "mixed": lambda x: MixedMeasurement(Identity(), x, 0.5, 0.3),
    }[name]
    base = {
        "laplace": dist.Laplace(torch.tensor(1.3, dtype=F64), 0.7),
        "log-normal": dist.LogNormal(torch.tensor(1.3, dtype=F64).log(), 0.4),
        "mixed": dist.Normal(torch.tensor(1.3, dtype=F64), math.sqrt(0.09 + 0.65)),
    }[name]
    draws = make(torch.tensor([1.3], dtype=F64)).sample(torch.Size((n,)))[:, 0]
    assert not draws.requires_grad
    for p in (0.1, 0.5, 0.95):
        share = float((draws < base.icdf(torch.tensor(p, dtype=F64))).double().mean())
        assert abs(share - p) < 5.5 * math.sqrt(p * (1 - p) / n), (share, p)
    assert abs(float(draws.mean() - base.mean)) < 5.5 * float(base.stddev) / math.sqrt(n)


def test_the_mixed_law_has_the_moments_of_counts_and_read_out_noise() -> None:
    """y = gain N + sigma noise, N ~ Poisson(A / gain): its first two moments by summing over N."""
    clean, gain, sigma = torch.tensor([0.4, 2.0, 7.0], dtype=F64), 0.5, 0.3
    counts = torch.arange(0.0, 80.0, dtype=F64)
    p = dist.Poisson(clean[:, None] / gain).log_prob(counts).exp()
    mean = (p * gain * counts).sum(1)
    variance = (p * ((gain * counts - mean[:, None]) ** 2 + sigma**2)).sum(1)
    law = MixedMeasurement(Identity(), clean, gain, sigma)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.variance, variance)
    below = MixedMeasurement(Identity(), -clean, gain, sigma)
    torch.testing.assert_close(below.variance, torch.full((3,), sigma**2, dtype=F64))


def test_the_log_normal_median_is_positive_and_smooth() -> None:
    """(u)_+ solves r^2 - u r - f^2 = 0; A(x) far below zero still has a gradient of log r, 1 / |u|."""
    u = torch.tensor([-30.0, -1.0, 0.0, 1e-3, 5.0], dtype=F64)
    law = LogNormalMeasurement(Identity(), u, 0.4, floor=0.5)
    median = law.loc.exp()
    torch.testing.assert_close(median - 0.25 / median, u)
    gradient = torch.func.grad(lambda u: LogNormalMeasurement(Identity(), u, 0.4, floor=0.5).loc.sum())(u)
    torch.testing.assert_close(gradient, median / (median**2 + 0.25))


def test_gradients_in_x_and_parameters() -> None:
    x, y = X.clone().requires_grad_(), normal(2, 1, 4, 5, seed=1).abs() + 0.01
    width = torch.tensor(0.7, dtype=F64).requires_grad_()
    gain = torch.tensor(0.4, dtype=F64).requires_grad_()
    for law in (LaplaceMeasurement, LogNormalMeasurement):
        assert torch.autograd.gradcheck(lambda x, w, law=law: law(Blur(KERNEL), x, w).log_prob(y), (x, width))
    assert torch.autograd.gradcheck(
        lambda x, g, w: MixedMeasurement(Blur(KERNEL), x, g, w).log_prob(y), (x, gain, width)
    )
    for draws in (
        LaplaceMeasurement(Identity(), x, width).rsample(),
        MixedMeasurement(Identity(), x, 0.0, 1.0).rsample(),
    ):
        assert torch.equal(torch.autograd.grad(draws.sum(), x)[0], torch.ones_like(x))
    draws = LogNormalMeasurement(Identity(), x, 0.5, floor=1e-9).rsample()
    torch.testing.assert_close(torch.autograd.grad(draws.sum(), x)[0], (draws / x).detach())


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", ["laplace", "log-normal", "mixed"])
def test_vmap_equals_a_loop(name: str, validate: bool) -> None:
    x, scales, y = normal(5, 1, 3, 4), torch.linspace(0.2, 2.0, 5, dtype=F64), normal(1, 3, 4, seed=1).abs() + 0.1

    def log_prob(x: Tensor, scale: Tensor) -> Tensor:
        if name == "mixed":
            return MixedMeasurement(Blur(KERNEL), x, 0.2, scale, validate_args=validate).log_prob(y)
        law = LaplaceMeasurement if name == "laplace" else LogNormalMeasurement
        return law(Blur(KERNEL), x, scale, validate_args=validate).log_prob(y)

    expected = torch.stack([log_prob(one, scale) for one, scale in zip(x, scales, strict=True)])
    torch.testing.assert_close(torch.func.vmap(log_prob)(x, scales), expected)
    by_x, by_scale = torch.func.vmap(torch.func.grad(log_prob, argnums=(0, 1)))(x, scales)
    for i in range(5):
        gradients = torch.func.grad(log_prob, argnums=(0, 1))(x[i], scales[i])
        torch.testing.assert_close((by_x[i], by_scale[i]), gradients)


def test_moments() -> None:
    """The mixed law is normal given x; the other two are not, and their moments are nobody's Gaussian."""
    moments = gaussian_moments(LAWS["mixed"][0](event_dim=0).to_event(2))
    assert moments is not None
    torch.testing.assert_close(moments.loc, BLURRED)
    torch.testing.assert_close(moments.variance, WIDTH**2 + 0.3 * BLURRED)
    for name in ("laplace", "log-normal"):
        assert gaussian_moments(LAWS[name][0]()) is None
    for make, _ in LAWS.values():
        assert poisson_moments(make()) is None


@pytest.mark.parametrize("name", ["laplace", "log-normal", "mixed"])
def test_posterior_in_a_program(name: str) -> None:
    """Evidence and posterior mean of a scalar mixture prior under each law, against the density of the chain."""
    denoiser = sd.GaussianMixtureDenoiser(
        torch.tensor([[0.6], [2.0]], dtype=F64), torch.full((2, 1, 1), 0.04, dtype=F64), torch.ones(2, dtype=F64)
    )
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 25, variance="optimal", grid=sd.KarrasGrid())
    y = torch.tensor([1.4], dtype=F64)
    law = {
        "laplace": lambda x: LaplaceMeasurement(Identity(), x, 0.6),
        "log-normal": lambda x: LogNormalMeasurement(Identity(), x, 0.5),
        "mixed": lambda x: MixedMeasurement(Identity(), x, 0.3, 0.3),
    }[name]

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", law(x), obs=y)

    grid = torch.linspace(-4, 7, 1601, dtype=F64)
    likelihood = torch.stack([law(value[None]).log_prob(y) for value in grid])
    joint = chain_density(prior, grid) * likelihood.exp()
    log_z = float((joint.sum() * (grid[1] - grid[0])).log())
    mean = float((joint * grid).sum() / joint.sum())
    smc = sd.SMC(sd.TDS(model, max_shift=1.0), 400, num_chains=24, seed=0, progress=False).run(y)
    check_evidence(smc, log_z)
    samples = smc.weighted_samples()
    w, x = samples.log_w.exp(), samples.values["x"][..., 0]
    estimate = float((w * x).sum())
    error = float((w * (x - estimate)).sum(1).square().sum().sqrt())  # over chains
    assert error < 0.03 and abs(estimate - mean) < 5 * error


Y = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LaplaceMeasurement(Identity(), Y, 0.0), "scale as low as 0.0; expected greater than 0"),
        (lambda: LaplaceMeasurement(Identity(), Y, torch.ones(2)), r"scale of shape \(2,\)"),
        (lambda: LogNormalMeasurement(Identity(), Y, -1.0), "sigma as low as -1.0"),
        (lambda: LogNormalMeasurement(Identity(), Y, 1.0, floor=0.0), "floor 0.0"),
        (lambda: LogNormalMeasurement(Identity(), Y, 1.0).log_prob(0 * Y), "at or below 0"),
        (lambda: MixedMeasurement(Identity(), Y, -0.1, 1.0), "gain as low as -0.1.*; expected at least 0"),
        (lambda: MixedMeasurement(Identity(), Y, 0.1, 0.0), "sigma as low as 0.0"),
        (lambda: MixedMeasurement(Identity(), Y, 0.1, 1.0).log_prob(Y[0]), r"measurement of shape \(2, 3\)"),
    ],
)
def test_wrong_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
