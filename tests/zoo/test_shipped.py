"""The priors that ship: small, on the scale [-1, 1], and far better denoisers than any that look at one pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import KarrasGrid
from smcdiff.zoo import FOLDER, load_prior, shipped_priors
from smcdiff.zoo.wafer import Wafer
from tests.diffusion.adapters.pipelines import DDPMScheduler

each_prior = pytest.mark.parametrize("name", shipped_priors())


def share_of_linear_error(prior: DiffusionPrior, x_0: Tensor, t: float) -> float:
    """Mean squared error of x0_hat over that of the best estimate linear in the pixel itself.

    The latter is the variance of a normal with the pixels' mean and variance v given x_t,
    v sigma_t^2 / (alpha_t^2 v + sigma_t^2).
    """
    level = prior.chain.schedule.level(t)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (prior.chain.denoiser(level.alpha * x_0 + level.sigma * noise, level).mean - x_0).square().mean()
    v = x_0.var()
    return float(error / (v * level.sigma**2 / (level.alpha**2 * v + level.sigma**2)))


@each_prior
def test_size_and_kind(name: str) -> None:
    assert sum(path.stat().st_size for path in (FOLDER / name).rglob("*")) <= 8_000_000
    prior = load_prior(name)
    assert prior.event_shape == (1, 64, 64)
    assert prior.chain.clip is None
    theirs = DDPMScheduler(1000, 1e-4, 2e-2, "linear").alphas_cumprod
    for index in (0, 500, 999):
        assert prior.chain.schedule.level(index + 1).alpha ** 2 == pytest.approx(float(theirs[index]), rel=1e-6)


@each_prior
def test_draws_are_pictures_that_the_prior_denoises(name: str) -> None:
    """Draws lie on the picture scale, and noise of 0.3 and 1.2 times their scale is taken off them."""
    prior = load_prior(name, num_steps=25, grid=KarrasGrid())
    draws = prior.chain.sample(4, torch.Generator().manual_seed(0))
    assert -1.5 < float(draws.min()) < float(draws.max()) < 1.5
    for t in (100, 300):
        assert share_of_linear_error(prior, draws, t) < 0.25


@pytest.mark.skipif("wafer64" not in shipped_priors(), reason="wafer64 does not ship with this copy")
def test_wafer_pictures_of_another_seed_are_denoised() -> None:
    pictures = torch.from_numpy(Wafer().draw_images(np.random.default_rng(1_000_000), 16))
    for t in (100, 300):
        assert share_of_linear_error(load_prior("wafer64"), pictures, t) < 0.25
