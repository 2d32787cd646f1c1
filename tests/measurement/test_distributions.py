"""The noise laws against torch.distributions, and inside Pyro programs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from smcdiff.measurement import (
    Blur,
    Downsample,
    GaussianMeasurement,
    Identity,
    PoissonMeasurement,
    gaussian_moments,
    poisson_moments,
)

KERNEL = torch.tensor([[0.1, 0.2, 0.1], [0.0, 0.4, 0.2]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3, dtype=torch.float64), normal(1, 4, 5).abs()], ids=str)
@pytest.mark.parametrize("event_dim", [None, 0, 2, 3])
def test_gaussian_against_torch(sigma: Tensor | float, event_dim: int | None) -> None:
    x, y = normal(2, 1, 4, 5), normal(2, 1, 4, 5, seed=1)
    law = GaussianMeasurement(Blur(KERNEL), x, sigma, event_dim)
    dim = 4 if event_dim is None else event_dim
    expected = torch.distributions.Independent(torch.distributions.Normal(Blur(KERNEL)(x), sigma), dim)
    assert (law.batch_shape, law.event_shape) == (expected.batch_shape, expected.event_shape)
    torch.testing.assert_close(law.log_prob(y), expected.log_prob(y), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(law.log_prob_pointwise(y), expected.base_dist.log_prob(y), rtol=1e-13, atol=1e-12)
    assert torch.equal(law.mean, expected.mean)
    assert torch.equal(law.loc, expected.mean)
    assert torch.equal(law.scale, torch.as_tensor(sigma, dtype=torch.float64).expand(2, 1, 4, 5))
    torch.testing.assert_close(law.variance, expected.variance)
    assert law.support.check(y).shape == expected.support.check(y).shape
    assert law.x is x
    assert isinstance(law.operator, Blur)


def test_gaussian_measurement_may_be_of_another_shape_than_x() -> None:
    x, y = normal(3, 4, 4), normal(3, 2, 2, seed=1)
    law = GaussianMeasurement(Downsample(2), x, 0.5, event_dim=2)
    expected = dist.Normal(Downsample(2)(x), 0.5).log_prob(y).sum((-2, -1))
    torch.testing.assert_close(law.log_prob(y), expected)
    assert law.sample(torch.Size((7,))).shape == (7, 3, 2, 2)


def test_a_function_is_an_operator() -> None:
    x, y = normal(4), normal(4, seed=1)
    law = GaussianMeasurement(torch.tanh, x, 0.1)
    torch.testing.assert_close(law.log_prob(y), dist.Normal(torch.tanh(x), 0.1).log_prob(y).sum())


@pytest.mark.parametrize("batch", [(6,), (5, 6), (5, 1, 6)])
def test_expand(batch: tuple[int, ...]) -> None:
    x, sigma, y = normal(6, 2, 3), normal(6, 1, 1).abs(), normal(6, 2, 3, seed=1)
    gaussian = GaussianMeasurement(Identity(), x, sigma, event_dim=2)
    poisson = PoissonMeasurement(Identity(), x, 5.0, event_dim=2)
    for law, value in ((gaussian, y), (poisson, y.abs().round())):
        larger = law.expand(torch.Size(batch))
        assert (larger.batch_shape, larger.event_shape) == (batch, (2, 3))
        assert larger.sample().shape == (*batch, 2, 3)
        torch.testing.assert_close(larger.log_prob(value), law.log_prob(value).expand(batch))
        assert law.batch_shape == (6,)
        assert larger.operator is law.operator


def test_gradients_in_x_and_sigma() -> None:
    x, sigma, y = (
        normal(1, 3, 4).requires_grad_(),
        torch.tensor(0.7, dtype=torch.float64).requires_grad_(),
        normal(1, 3, 4),
    )
    assert torch.autograd.gradcheck(lambda x, s: GaussianMeasurement(Blur(KERNEL), x, s).log_prob(y), (x, sigma))
    counts = torch.arange(12.0, dtype=torch.float64).reshape(1, 3, 4)
    gain, background = (torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (3.0, 0.4))
    assert torch.autograd.gradcheck(
        lambda x, g, b: PoissonMeasurement(Blur(KERNEL), x, g, b).log_prob(counts), (x, gain, background)
    )
    draws = GaussianMeasurement(Identity(), x, sigma).rsample(torch.Size((3,)))
    by_x, by_sigma = torch.autograd.grad(draws.sum(), (x, sigma))
    assert torch.equal(by_x, torch.full_like(x, 3.0))
    torch.testing.assert_close(by_sigma, ((draws - x) / sigma).sum())


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("law", ["gaussian", "poisson"])
def test_vmap_equals_a_loop(law: str, validate: bool) -> None:
    """Values are hidden under vmap, so nothing is checked and nothing fails, whether validation is on or off."""
    x, scales = normal(5, 1, 3, 4), torch.linspace(0.2, 2.0, 5, dtype=torch.float64)
    y = torch.arange(12.0, dtype=torch.float64).reshape(1, 3, 4)

    def log_prob(x: Tensor, scale: Tensor) -> Tensor:
        if law == "gaussian":
            return GaussianMeasurement(Blur(KERNEL), x, scale, validate_args=validate).log_prob(y)
        return PoissonMeasurement(Blur(KERNEL), x, scale, 0.1, validate_args=validate).log_prob(y)

    expected = torch.stack([log_prob(one, scale) for one, scale in zip(x, scales, strict=True)])
    torch.testing.assert_close(torch.func.vmap(log_prob)(x, scales), expected)
    by_x, by_scale = torch.func.vmap(torch.func.grad(log_prob, argnums=(0, 1)))(x, scales)
    for i in range(5):
        gradients = torch.func.grad(log_prob, argnums=(0, 1))(x[i], scales[i])
        torch.testing.assert_close((by_x[i], by_scale[i]), gradients)


def test_gaussian_draws() -> None:
    """Mean and variance of 100 000 draws of 6 pixels, each within 5.5 standard errors.

    The sample mean is normal with variance sigma^2 / n and the sample variance, a chi-square with n - 1 degrees of
    freedom, normal to a good approximation with variance 2 sigma^4 / (n - 1): a test of 12 values fails with
    probability 12 * 3.8e-8 = 4.6e-7.
    """
    n, sigma = 100_000, torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    law = GaussianMeasurement(Identity(), normal(2, 3), sigma)
    draws = law.sample(torch.Size((n,)))
    assert not draws.requires_grad
    assert ((draws.mean(0) - law.mean).abs() < 5.5 * sigma / math.sqrt(n)).all()
    assert ((draws.var(0) - sigma**2).abs() < 5.5 * sigma**2 * math.sqrt(2 / (n - 1))).all()


@pytest.mark.parametrize("background", [0.0, 2.5])
def test_poisson_against_torch(background: float) -> None:
    x = torch.linspace(0.05, 3.0, 12, dtype=torch.float64).reshape(1, 3, 4)
    law = PoissonMeasurement(Blur(KERNEL), x, 40.0, background, floor=1e-9)
    rate = 40.0 * Blur(KERNEL)(x) + background
    expected = torch.distributions.Independent(torch.distributions.Poisson(rate), 3)
    counts = torch.poisson(rate)
    torch.testing.assert_close(law.log_prob(counts), expected.log_prob(counts))
    torch.testing.assert_close(law.log_prob_pointwise(counts), expected.base_dist.log_prob(counts))
    torch.testing.assert_close(law.rate, rate)
    assert torch.equal(law.mean, law.rate)
    assert torch.equal(law.variance, law.rate)
    assert law.event_shape == (1, 3, 4)
    assert bool(law.support.check(counts))
    assert not bool(law.support.check(counts + 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poisson_rate_is_positive_and_smooth(dtype: torch.dtype) -> None:
    """The positive part r of u solves r^2 - u r - f^2 = 0: r - f^2 / r = u."""
    u = torch.tensor([-1e4, -30.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 30.0, 1e4], dtype=dtype)
    law = PoissonMeasurement(Identity(), u / 2, 2.0, floor=0.5)
    rate = law.rate
    assert rate.dtype == dtype
    assert (rate > 0).all()
    assert rate[4] == 0.5
    torch.testing.assert_close(rate - 0.25 / rate, u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rate[0], torch.tensor(0.25 / 1e4, dtype=dtype))
    gradient = torch.func.vmap(torch.func.grad(lambda u: PoissonMeasurement(Identity(), u, 1.0, floor=0.5).rate))(u)
    torch.testing.assert_close(gradient, rate.square() / (rate.square() + 0.25))  # dr/du from the equation above


def test_poisson_draws() -> None:
    """Mean and variance of 100 000 draws of 4 pixels, each within 5.5 standard errors.

    Their variances are r / n and (r + 2 r^2) / n for a rate r; 8 values fail with probability 8 * 3.8e-8 = 3e-7.
    """
    n = 100_000
    law = PoissonMeasurement(Identity(), torch.tensor([0.2, 1.0, 4.0, 20.0], dtype=torch.float64), 3.0, 1.0)
    draws, rate = law.sample(torch.Size((n,))), law.rate
    assert torch.equal(draws, draws.round())
    assert ((draws.mean(0) - rate).abs() < 5.5 * (rate / n).sqrt()).all()
    assert ((draws.var(0) - rate).abs() < 5.5 * ((rate + 2 * rate**2) / n).sqrt()).all()


def test_in_a_pyro_program() -> None:
    prior, y = dist.Normal(torch.zeros(1, 3, 4, dtype=torch.float64), 1.0).to_event(3), normal(1, 3, 4, seed=1)
    counts = torch.arange(12.0, dtype=torch.float64).reshape(1, 3, 4)

    def model(y: Tensor | None = None, counts: Tensor | None = None) -> None:
        x = pyro.sample("x", prior)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
        pyro.sample("y", GaussianMeasurement(Blur(KERNEL), x, sigma), obs=y)
        pyro.sample("counts", PoissonMeasurement(torch.exp, x, 10.0), obs=counts)

    trace = pyro.poutine.trace(model).get_trace(y, counts)
    x, sigma = trace.nodes["x"]["value"], trace.nodes["sigma"]["value"]
    rate = 10 * x.exp()
    expected = (
        prior.log_prob(x)
        + dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5).log_prob(sigma)
        + dist.Normal(Blur(KERNEL)(x), sigma).log_prob(y).sum()
        + dist.Poisson(rate + 1e-4 / rate).log_prob(counts).sum()
    )
    # (u)_+ = u + f^2 / u up to f^4 / u^3 with f = 0.01: the rates here are above 0.5, so this is exact to 1e-7
    assert float(rate.min()) > 0.5
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=0, atol=1e-5)
    drawn = pyro.infer.Predictive(model, num_samples=4)()
    assert drawn["y"].shape == drawn["counts"].shape == (4, 1, 3, 4)


def test_in_a_plate() -> None:
    x, y = normal(5, 1, 2, 2), normal(5, 1, 2, 2, seed=1)

    def model() -> None:
        with pyro.plate("pictures", 5):
            pyro.sample("y", GaussianMeasurement(Identity(), x, 0.5, event_dim=3), obs=y)
        with pyro.plate("copies", 5):  # a law without a batch is expanded to the plate
            pyro.sample("z", GaussianMeasurement(Identity(), x[0], 0.5), obs=y)

    trace = pyro.poutine.trace(model).get_trace()
    expected = dist.Normal(x, 0.5).log_prob(y).sum() + dist.Normal(x[0], 0.5).log_prob(y).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_moments() -> None:
    x, sigma = normal(2, 3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    laws = [
        GaussianMeasurement(torch.exp, x, sigma),
        GaussianMeasurement(torch.exp, x, sigma, event_dim=0).to_event(1).to_event(1),
        dist.Normal(x.exp(), sigma),
        dist.Normal(x.exp(), sigma).to_event(1).to_event(1),
        torch.distributions.Independent(torch.distributions.Normal(x.exp(), sigma), 2),
    ]
    for law in laws:
        moments = gaussian_moments(law)
        assert moments is not None
        torch.testing.assert_close(moments.loc, x.exp())
        torch.testing.assert_close(moments.variance, (sigma**2).expand(2, 3))
        assert poisson_moments(law) is None
    for law in (PoissonMeasurement(torch.exp, x, 3.0, floor=1e-9), dist.Poisson(3 * x.exp()).to_event(2)):
        moments = poisson_moments(law)
        assert moments is not None
        torch.testing.assert_close(moments.loc, 3 * x.exp())
        torch.testing.assert_close(moments.variance, 3 * x.exp())
        assert gaussian_moments(law) is None
    mask = torch.tensor([True, False, True])
    for law in (dist.Laplace(x, 1.0), dist.LogNormal(x, 1.0), dist.Normal(x, 1.0).mask(mask)):
        assert gaussian_moments(law) is None
        assert poisson_moments(law) is None
    assert gaussian_moments(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))) is None


X = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMeasurement(Identity(), X, 0.0), "sigma as low as 0.0; expected greater than 0"),
        (lambda: GaussianMeasurement(Identity(), X, -0.5), "sigma as low as -0.5"),
        (lambda: GaussianMeasurement(Identity(), X, torch.tensor([0.1, -2.0, 0.3])), "sigma as low as -2.0"),
        (lambda: GaussianMeasurement(Identity(), X, torch.nan), "sigma with 1 NaN or infinite"),
        (
            lambda: GaussianMeasurement(Identity(), X, torch.ones(2)),
            r"sigma of shape \(2,\) and A\(x\) of shape \(1, 2, 3\)",
        ),
        (lambda: GaussianMeasurement(Identity(), X, torch.ones(4, 1, 1, 1)), r"sigma of shape \(4, 1, 1, 1\)"),
        (lambda: GaussianMeasurement(Identity(), X, 0.1, event_dim=4), "event_dim 4"),
        (lambda: GaussianMeasurement(Identity(), X * torch.nan, 0.1), r"A\(x\) with 6 NaN or infinite values of 6"),
        (lambda: GaussianMeasurement(torch.fft.fft, X, 0.1), "complex64 from the operator"),
        (lambda: GaussianMeasurement(lambda x: 1.0, X, 0.1), "float from the operator"),
        (lambda: GaussianMeasurement(Identity(), X, 0.1).log_prob(X[0]), r"measurement of shape \(2, 3\)"),
        (
            lambda: GaussianMeasurement(Identity(), X, 0.1).log_prob(X * torch.inf),
            "a measurement with 6 NaN or infinite",
        ),
        (lambda: PoissonMeasurement(Identity(), X, 0.0), "gain as low as 0.0"),
        (lambda: PoissonMeasurement(Identity(), X, 1.0, -1.0), "background as low as -1.0; expected at least 0"),
        (lambda: PoissonMeasurement(Identity(), X, 1.0, floor=0.0), "floor 0.0"),
        (lambda: PoissonMeasurement(Identity(), X, 1.0).log_prob(X + 0.5), "expects counts"),
        (lambda: PoissonMeasurement(Identity(), X, 1.0).log_prob(-X), "expects counts"),
    ],
)
def test_wrong_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_matrix_is_not_an_operator() -> None:
    with pytest.raises(TypeError, match=r"Matrix\(A\)"):
        GaussianMeasurement(torch.eye(2), torch.ones(2), 0.1)


@pytest.mark.parametrize("off", ["argument", "setting"])
def test_without_validation_no_value_is_looked_at(off: str) -> None:
    with pyro.validation_enabled(off == "argument"):
        law = GaussianMeasurement(Identity(), X, -1.0, validate_args=False if off == "argument" else None)
        assert law.log_prob(X).isnan()
        with pytest.raises(ValueError, match="measurement of shape"):  # shapes are always checked
            law.log_prob(X[0])
