"""DiffusionPrior in Pyro programs: plates, Predictive, its law, and the variance measured for it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

from smcdiff.diffusion.analytic import GaussianDenoiser
from smcdiff.diffusion.denoiser import WithVariance
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import KarrasGrid, VPSchedule
from tests.diffusion.exact import assert_normal_moments, chain_law, clean_given_noisy, example_covariance

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
COVARIANCE = example_covariance(3)
DENOISER = GaussianDenoiser(MEAN, COVARIANCE)
PRIOR = DiffusionPrior(DENOISER, VPSchedule(), num_steps=4)


def law(prior: DiffusionPrior) -> tuple[Tensor, Tensor]:
    return chain_law(MEAN, COVARIANCE, prior.chain.levels, prior.chain.variance)


def test_draws_have_the_chains_law() -> None:
    """Fails by chance with probability at most 4e-6 (assert_normal_moments), and so do those below."""
    draws = PRIOR.sample((100, 200))
    assert draws.shape == (100, 200, 3)
    assert_normal_moments(draws.reshape(-1, 3), *law(PRIOR))


def test_a_plate_draws_independent_events() -> None:
    """Eight events in two plates: each has the chain's law, and they are uncorrelated with one another."""

    def model() -> Tensor:
        with pyro.plate("rows", 4, dim=-1), pyro.plate("images", 2, dim=-2):
            return pyro.sample("x", PRIOR)

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["x"]["fn"].batch_shape == (2, 4)
    assert trace.nodes["x"]["value"].shape == (2, 4, 3)
    draws = PRIOR.expand((2, 4)).sample((20_000,))
    mean, covariance = law(PRIOR)
    for i, j in ((0, 0), (1, 3)):
        assert_normal_moments(draws[:, i, j], mean, covariance)
    pair = torch.stack([draws[:, 0, 1, 0], draws[:, 1, 2, 0]], 1)
    assert_normal_moments(pair, mean[0].expand(2), covariance[0, 0] * torch.eye(2, dtype=torch.float64))


def test_the_sites_of_a_plates_chain_have_its_batch_shape() -> None:
    """And the log-density of each event is that of the chain alone on it."""

    def model() -> Tensor:
        with pyro.plate("images", 3):
            return PRIOR.expand(torch.Size([3])).chain("x")

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    for i in range(3):
        path = {f"x_{k}": trace.nodes[f"x_{k}"]["value"][i] for k in range(5)}
        alone = pyro.poutine.trace(pyro.poutine.condition(PRIOR.chain, data=path)).get_trace("x")
        alone.compute_log_prob()
        for name in path:
            site = trace.nodes[name]
            assert site["fn"].batch_shape == (3,)
            torch.testing.assert_close(site["log_prob"][i], alone.nodes[name]["log_prob"], rtol=1e-12, atol=1e-12)


def test_predictive_in_parallel_has_the_chains_law() -> None:
    """Prior predictive of a noisy measurement of x_0: N(mean, covariance + 0.3^2) of the chain's own x_0."""

    def model() -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x, 0.3).to_event(1))

    draws = Predictive(model, {}, num_samples=20_000, parallel=True)()
    mean, covariance = law(PRIOR)
    assert_normal_moments(draws["x"].reshape(-1, 3), mean, covariance)
    noise = 0.09 * torch.eye(3, dtype=torch.float64)
    assert_normal_moments(draws["y"].reshape(-1, 3), mean, covariance + noise)


def test_predictive_one_by_one_has_the_chains_law() -> None:
    def model() -> Tensor:
        return pyro.sample("x", PRIOR)

    draws = Predictive(model, {}, num_samples=1000)()["x"]
    assert draws.shape == (1000, 3)
    assert_normal_moments(draws, *law(PRIOR))


def test_expand_and_replace_keep_all_other_settings() -> None:
    prior = DiffusionPrior(
        DENOISER, VPSchedule(), 5, 0.7, variance="optimal", grid=KarrasGrid(), clip=(-1.0, 2.0), batch_shape=(2,)
    )
    assert (prior.batch_shape, prior.event_shape, prior.chain.shape) == ((2,), (3,), (2, 3))
    for other, changed in (
        (prior.expand(torch.Size([4, 2])), {"batch_shape": (4, 2)}),
        (prior.replace(num_steps=9), {"num_steps": 9}),
        (prior.replace(variance="posterior"), {"variance": "posterior"}),
        (prior.replace(grid=KarrasGrid(3.0)), {"grid": KarrasGrid(3.0)}),
    ):
        for name in ("denoiser", "schedule", "num_steps", "eta", "variance", "grid", "clip", "batch_shape"):
            assert getattr(other.chain, name) == changed.get(name, getattr(prior.chain, name))
        assert other.batch_shape == other.chain.batch_shape
    with pytest.raises(ValueError, match="got num_steps 0; a chain needs at least 1"):
        prior.replace(num_steps=0)


def test_a_density_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"run smcdiff\.SMC on the program, .* trace smcdiff\.unroll"):
        PRIOR.log_prob(MEAN)


def test_measured_variance_is_that_of_x_0_given_x_t() -> None:
    """On the exact denoiser, the mean of (x_0 - x0_hat)^2 is a weighted sum of chi-squared variables.

    With weights a (each eigenvalue of Cov[x_0 given x_t] over n d, n times) and x = 15 it leaves its mean by more than
    2 |a|_2 sqrt(x) + 2 |a|_max x with probability at most 2 exp(-15) = 6.2e-7 (Laurent and Massart 2000, lemma 1);
    6 levels: 3.7e-6.
    """
    n, d, x = 20_000, 3, 15.0
    images = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((n,))
    prior = DiffusionPrior(DENOISER, VPSchedule(), 6, grid=KarrasGrid())
    measured = prior.with_measured_variance(images, seed=1, batch=512)
    assert measured.chain.variance == "optimal"
    for level in measured.chain.levels[1:]:
        eigenvalues = torch.linalg.eigvalsh(clean_given_noisy(MEAN, COVARIANCE, level, MEAN)[1])
        bound = 2 * math.sqrt(x * float((eigenvalues**2).sum()) / n) / d + 2 * x * float(eigenvalues.max()) / (n * d)
        variance = measured.chain.denoiser(MEAN[None], level).variance
        assert variance is not None
        assert float(variance.squeeze()) == pytest.approx(float(eigenvalues.mean()), abs=bound)
    torch.testing.assert_close(measured.chain.estimate(3, MEAN[None]).mean, prior.chain.estimate(3, MEAN[None]).mean)


def test_measured_variance_is_the_mean_square_written_out() -> None:
    """Of the estimate that the chain uses: clipped, whatever the batch size and the prior's own batch shape."""
    images = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((10,))
    prior = DiffusionPrior(DENOISER, VPSchedule(), 3, clip=(-0.4, 0.4), batch_shape=(7,))
    generator = torch.Generator().manual_seed(5)
    for batch in (3, 64):
        denoiser = prior.with_measured_variance(images, seed=5, batch=batch).chain.denoiser
        assert isinstance(denoiser, WithVariance)
        generator.manual_seed(5)
        for level in prior.chain.levels[1:]:
            noise = torch.randn(10, 3, dtype=torch.float64, generator=generator)
            noisy = level.alpha * images + level.sigma * noise
            clean = torch.stack([clean_given_noisy(MEAN, COVARIANCE, level, one)[0] for one in noisy])
            expected = (clean.clamp(-0.4, 0.4) - images).square().mean()
            variance = denoiser(MEAN[None], level).variance
            assert variance is not None
            assert float(variance.squeeze()) == pytest.approx(float(expected), rel=1e-8)


def test_images_of_another_shape_are_refused() -> None:
    for images in (torch.zeros(3), torch.zeros(5, 4), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"got images of shape .*; expected \(number, \*\(3,\)\)"):
            PRIOR.with_measured_variance(images)


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="got eta 2; expected a share"):
        DiffusionPrior(DENOISER, VPSchedule(), eta=2)
    with pytest.raises(ValueError, match="got variance 'large'; expected one of"):
        DiffusionPrior(DENOISER, VPSchedule(), variance="large")  # type: ignore[arg-type]
