"""ILVR against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

import smcdiff as sd
from smcdiff.guidance.base import SiteStep
from smcdiff.guidance.ilvr import ILVR
from smcdiff.guidance.program import Program
from tests.guidance import published as pub

STEPS = 50
SEEN = torch.tensor([1.0, 0.0, 1.0], dtype=pub.F64)
Y = torch.tensor([0.4, -0.2, 1.1], dtype=pub.F64)
SHAPE = (1, 4, 4)


def picture_prior() -> tuple[sd.DiffusionPrior, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(SHAPE, generator=generator, dtype=pub.F64)
    root = torch.randn(16, 16, generator=generator, dtype=pub.F64) / 4
    covariance = root @ root.mT + 0.3 * torch.eye(16, dtype=pub.F64)
    return sd.DiffusionPrior(sd.GaussianDenoiser(mean, covariance), sd.VPSchedule(), STEPS), mean, covariance


def low_pass(x: torch.Tensor) -> torch.Tensor:
    """phi: down-sampling by 2 and up again."""
    return interpolate(avg_pool2d(x[None], 2), scale_factor=2.0, mode="nearest")[0]


def published_loop(noise: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """2108.02938, algorithm 1, with one white noise for x_s' and for y_s, of which phi keeps different parts."""
    _, mean0, covariance = picture_prior()
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    to_white = sd.Downsample(2).svd(x).from_spectral  # any orthonormal map leaves white noise white
    for i in range(STEPS, 0, -1):
        bar, before, white = bars[i], bars[i - 1], to_white(noise[STEPS + 1 - i])
        x0_hat = pub.denoise(x.flatten(), bar, mean0.flatten(), covariance).reshape(SHAPE)
        mean, scale = pub.ancestral(x, x0_hat, bar, before)
        proposed = mean + scale * white
        noised = before.sqrt() * reference + (1 - before).sqrt() * white
        x = proposed - low_pass(proposed) + low_pass(noised)
    return x


def test_path_is_the_published_loop() -> None:
    """The published method knows no measurement noise; 1e-9 of it moves no number by more than a few times that."""
    reference = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=pub.F64)
    y = sd.Downsample(2)(reference)
    model = pub.measured(picture_prior()[0], sd.Downsample(2), 1e-9)
    pub.check_loop(ILVR, model, y, lambda noise: published_loop(noise, reference), STEPS + 1, 1e-6)


def test_measurement_noise_widens_the_noised_measurement() -> None:
    """V^T y_s has the variance sigma_s^2 + (alpha_s sigma_y / s)^2, and the unseen coordinates are the chain's."""
    prior, _, _ = picture_prior()
    y = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=pub.F64)
    program = Program(pub.measured(prior, sd.Downsample(2), 0.2), (y,))
    x, k = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=pub.F64), 20
    estimate = prior.chain.estimate(k, x)
    p, move = prior.chain.transition(k, x, estimate), prior.chain.step(k)
    q = ILVR(lambda y: y).proposal.q(SiteStep(program, "x", k, move, x, estimate, p, None))
    # The covariance of q in pixels: phi projects, and y_bar of a block of four has the variance 4 sigma_y^2.
    basis = torch.eye(16, dtype=pub.F64).reshape(16, *SHAPE)
    deviations = torch.stack([q.sample(e.expand(2, *SHAPE)) - q.mean for e in basis])[:, 0].flatten(1)
    phi = torch.stack([low_pass(e).flatten() for e in basis])
    seen = move.s.sigma**2 + move.s.alpha**2 * 4 * 0.2**2
    expected = seen * phi + move.kappa**2 * (torch.eye(16, dtype=pub.F64) - phi)
    torch.testing.assert_close(deviations.T @ deviations, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_many_particles_are_exact(variance: str) -> None:
    pub.check_gaussian_posterior(
        ILVR, sd.Mask(SEEN), SEEN.diag(), Y, 4000, pub.gaussian_prior(variance, 6, schedule=pub.LONG_STEPS)
    )


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(ILVR, 4000, 6, pub.LONG_STEPS)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(ILVR)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(ILVR)


def test_refusals() -> None:
    pub.check_refusals(ILVR, "ILVR", needs_svd=True)
