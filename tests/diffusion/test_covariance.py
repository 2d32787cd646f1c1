"""Covariances against dense matrices, and their models against Tweedie's identity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diffusion.analytic import StandardNormalDenoiser
from smcdiff.diffusion.covariance import Covariance, Dense, Diagonal, LowRank
from smcdiff.diffusion.covariance_models import KnowsCovariance
from smcdiff.transforms import DCT, HARTLEY, PIXELS

D = torch.float64
EVENT, M = (1, 3, 4), 5
SIZE = math.prod(EVENT)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=D)


def columns(function: object, particles: int) -> Tensor:
    """The dense matrices (particles, d, d) of a linear function of events."""
    eye = torch.eye(SIZE, dtype=D).reshape(SIZE, 1, *EVENT).expand(SIZE, particles, *EVENT)
    return torch.stack([function(unit).flatten(1) for unit in eye], -1)  # type: ignore[operator]


SQUARE = random(M, SIZE, SIZE, seed=1)
CASES: dict[str, Covariance] = {
    "pixels": Diagonal(random(M, *EVENT).square() + 0.1, PIXELS),
    "cosines": Diagonal(random(M, *EVENT).square() + 0.1, DCT),
    "one for all": Diagonal(random(1, *EVENT).square() + 0.1, HARTLEY),
    "low rank": LowRank(random(M, *EVENT).square() + 0.1, random(M, 2, *EVENT, seed=2), DCT),
    "low rank, even": LowRank(torch.full((1, 1, 1, 1), 0.3, dtype=D), random(M, 3, *EVENT, seed=2), PIXELS),
    "dense": Dense(SQUARE @ SQUARE.mT / SIZE + 0.1 * torch.eye(SIZE, dtype=D)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_covariance_is_its_matrix(name: str) -> None:
    c, r = CASES[name], random(M, *EVENT, seed=3)
    matrix = columns(c.apply, M)
    torch.testing.assert_close(matrix, matrix.mT)
    root = columns(c.draw, M)
    torch.testing.assert_close(root @ root.mT, matrix, atol=1e-10, rtol=0)
    law = MultivariateNormal(torch.zeros(SIZE, dtype=D), matrix)
    torch.testing.assert_close(c.log_prob(r), law.log_prob(r.flatten(1)), atol=1e-6, rtol=0)
    eye = torch.eye(SIZE, dtype=D)
    torch.testing.assert_close(columns(c.affine(0.3, 0.2).apply, M), 0.3 * matrix + 0.2 * eye)
    given = torch.linalg.inv(torch.linalg.inv(matrix) + 2.5 * eye)
    torch.testing.assert_close(columns(c.given(2.5).apply, M), given, atol=1e-9, rtol=0)
    assert float(columns(c.given(math.inf).apply, M).abs().max()) == 0.0


SPREAD = SQUARE[0] @ SQUARE[0].mT / SIZE + 0.2 * torch.eye(SIZE, dtype=D)
MEANS = 2 * random(3, *EVENT, seed=5)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=D)
OWN = torch.stack([SPREAD, 0.5 * SPREAD, torch.eye(SIZE, dtype=D)])
EXACT = {
    "Gaussian": sd.GaussianDenoiser(MEANS[0], SPREAD),
    "Gaussian, independent": sd.GaussianDenoiser(MEANS[0], SPREAD.diagonal().reshape(EVENT)),
    "field": sd.GaussianFieldDenoiser(MEANS[0], random(*EVENT, seed=6).square() + 0.1, HARTLEY),
    "mixture": sd.GaussianMixtureDenoiser(MEANS, 0.5 * torch.eye(SIZE, dtype=D), WEIGHTS),
    "mixture, one covariance": sd.GaussianMixtureDenoiser(MEANS, SPREAD, WEIGHTS),
    "mixture, three covariances": sd.GaussianMixtureDenoiser(MEANS, OWN, WEIGHTS),
    "sample": sd.EmpiricalDenoiser(random(9, *EVENT, seed=7)),
    "standard normal": StandardNormalDenoiser(torch.Size(EVENT), D, torch.device("cpu")),
}


@pytest.mark.parametrize("t", [30.0, 300.0])
@pytest.mark.parametrize("name", EXACT)
def test_exact_denoisers_have_tweedies_covariance(name: str, t: float) -> None:
    denoiser, level = EXACT[name], sd.VPSchedule().level(t)
    assert isinstance(denoiser, KnowsCovariance)
    x = level.alpha * random(2, *EVENT, seed=8) + level.sigma * random(2, *EVENT, seed=9)
    jacobian = torch.autograd.functional.jacobian(lambda z: denoiser(z, level).mean.sum(0), x)
    expected = level.sigma**2 / level.alpha * jacobian.reshape(SIZE, 2, SIZE).movedim(1, 0)
    for model in (denoiser.covariance, sd.JacobianCovariance()):
        found = model.at(level, model.parts(denoiser, x, level, denoiser(x, level)), x)
        torch.testing.assert_close(columns(found.apply, 2), expected.mT, atol=1e-6, rtol=0)


def test_tables_are_exact_where_measured_and_between_for_a_gaussian_prior() -> None:
    spectrum = random(*EVENT, seed=6).square() + 0.1
    field, schedule = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=D), spectrum, DCT), sd.VPSchedule()
    like = torch.zeros(1, *EVENT, dtype=D)
    ratios = torch.tensor([0.05, 0.4, 3.0, 40.0], dtype=D)
    levels = [schedule.level(schedule.time(float(r))) for r in ratios]
    exact = torch.stack([field.covariance.at(level, {}, like).variance[0] for level in levels])
    measured = sd.SpectralCovariance(exact, "dct", torch.tensor([level.ratio for level in levels], dtype=D))
    prior = sd.SpectralCovariance(spectrum, "dct")
    for r in (0.02, 0.05, 0.13, 0.4, 1.1, 3.0, 17.0, 40.0, 120.0):
        level = schedule.level(schedule.time(r))
        expected = field.covariance.at(level, {}, like).variance
        for model in (measured, prior):
            torch.testing.assert_close(model.at(level, {}, like).variance, expected, rtol=1e-6, atol=0)


def test_another_size_keeps_the_variance_of_a_frequency() -> None:
    table = torch.rand(2, 1, 4, 4, generator=generator(), dtype=D) + 0.5
    small = sd.SpectralCovariance(table, "dct", torch.tensor([0.1, 1.0], dtype=D))
    large = small.resized((1, 8, 8))
    torch.testing.assert_close(large.table.variances[:, :, ::2, ::2], table)
    torch.testing.assert_close(large.resized((1, 4, 4)).table.variances, table)


def test_calibration_of_a_gaussian_field_is_its_covariance() -> None:
    """2000 pictures: a variance is measured to sqrt(2 / 2000) = 0.032 of itself; 12 coordinates at 4 levels, 6 of these
    standard errors are passed with probability 1e-7."""
    spectrum = random(*EVENT, seed=6).square() + 0.1
    field = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=D), spectrum, DCT)
    prior = sd.DiffusionPrior(field, sd.VPSchedule(), num_steps=4)
    images = DCT.from_spectral(spectrum.sqrt() * random(2000, *EVENT, seed=10))
    calibrated = prior.calibrate(images, basis="dct", progress=False)
    report = calibrated.calibration
    assert report is not None
    like = torch.zeros(1, *EVENT, dtype=D)
    for k, level in enumerate(prior.chain.levels[1:], start=1):
        ratio = calibrated.chain.covariance.at(level, {}, like).variance / field.covariance.at(level, {}, like).variance
        assert float((ratio - 1).abs().max()) < 6 * 0.032, k
    assert float(report.excess_kurtosis.abs().max()) < 0.3  # 24 000 numbers: standard error sqrt(96 / 24 000) = 0.06
    assert float((report.picture_spread - 1).abs().max()) < 0.2  # standard error sqrt(2 / 2000) = 0.03


def test_what_cannot_be_calibrated_is_said() -> None:
    prior = sd.DiffusionPrior(EXACT["field"], sd.VPSchedule(), num_steps=4)
    with pytest.raises(ValueError, match="two or more"):
        prior.calibrate(torch.zeros(1, *EVENT), progress=False)
    with pytest.raises(ValueError, match="NaN"):
        prior.calibrate(torch.full((3, *EVENT), torch.nan), progress=False)
    with pytest.raises(ValueError, match='basis="pixels"'):
        sd.SpectralCovariance(torch.ones(4), "dct")
    with pytest.raises(ValueError, match="calibrate"):
        sd.DiffusionPrior(
            sd.WithVariance(EXACT["field"], torch.ones(1), torch.ones(1)), sd.VPSchedule(), variance="full"
        )
