"""Calibration: a measured covariance against the exact one, and what is said of residuals that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.adapters.calibrated import load_covariance, save_covariance
from smcdiff.diffusion.calibration import Calibration, calibrate
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.diffusion.smoothing import smoothed
from smcdiff.transforms import DCT, HARTLEY, PIXELS, Basis

F64 = torch.float64
SIZE, NUMBER = 16, 256
EVENT = (1, SIZE, SIZE)


class Plain:
    """A denoiser that does not say what it knows of its errors."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.event_shape, self.dtype, self.device = denoiser.event_shape, denoiser.dtype, denoiser.device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(self._denoiser(x_t, level).mean)


def spectrum(basis: Basis) -> Tensor:
    """A power law, as pictures have, over 2.4 decades; and no law at all in pixels."""
    if basis is PIXELS:
        return torch.linspace(0.1, 2.0, SIZE, dtype=F64).expand(EVENT).contiguous()
    f = torch.arange(SIZE, dtype=F64) / 2 if basis is DCT else torch.fft.fftfreq(SIZE, dtype=F64) * SIZE
    return (1 / (1 + (f[:, None] ** 2 + f**2) / 4) ** 1.5)[None]


def draws(basis: Basis, number: int = NUMBER, seed: int = 0) -> Tensor:
    noise = torch.randn(number, *EVENT, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return basis.from_spectral(spectrum(basis).sqrt() * noise)


def prior(basis: Basis, steps: int = 5) -> sd.DiffusionPrior:
    denoiser = Plain(sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), spectrum(basis), basis))
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), steps, grid=sd.LogGrid())


BASES = {"dct": DCT, "fft": HARTLEY, "pixels": PIXELS}


@pytest.mark.parametrize("name", BASES)
def test_the_spectrum_of_a_gaussian_field(name: str) -> None:
    """A mean of N squares is off by sqrt(2 / N) = 0.088 of itself. Averaged over 256 coordinates the squared error is
    within 40 % of its mean beyond doubt (it has 256 terms at least 64 of them independent, of relative variance 2;
    5 deviations would be 88 %); smoothing may only lower it. The mean of all has the error 0.088 / 16, times 5."""
    basis = BASES[name]
    measured = prior(basis).calibrate(draws(basis), basis=name, seed=1, progress=False)  # type: ignore[arg-type]
    assert measured.calibration is not None and measured.calibration.num_images == NUMBER
    assert isinstance(measured.covariance, sd.SpectralCovariance)
    for level in measured.chain.levels[1:]:
        exact = level.sigma**2 * spectrum(basis) / (level.alpha**2 * spectrum(basis) + level.sigma**2)
        like = torch.zeros(1, *EVENT, dtype=F64)
        error = measured.covariance.at(level, {}, like).variance[0] / exact - 1
        assert float(error.square().mean().sqrt()) < 0.088 * 1.4
        assert float(error.abs().max()) < 6 * 0.088
        assert abs(float(error.mean())) < 5 * 0.088 / 16 + 0.01


@pytest.mark.parametrize("name", ["dct", "fft"])
def test_residuals_of_a_gaussian_field_fit(name: str) -> None:
    """Kurtosis 0 within 5 sqrt(96 / (N d)) (the variance of a normal's fourth power is 96), picture spread 1 within
    5 sqrt(2 / N); the pixel spread's square has no mean and the deviation 2 / N sqrt(2 / d_free), of which five with
    d_free >= 16 free pixels are 0.12^2."""
    report = calibrate(prior(BASES[name]).chain, draws(BASES[name]), basis=name, progress=False)  # type: ignore[arg-type]
    assert bool((report.excess_kurtosis.abs() < 5 * (96 / (NUMBER * SIZE**2)) ** 0.5).all()), report.excess_kurtosis
    assert bool(((report.picture_spread - 1).abs() < 5 * (2 / NUMBER) ** 0.5).all()), report.picture_spread
    if name == "fft":  # a field that is independent in cosines is not stationary
        assert bool((report.pixel_spread < 0.12).all()), report.pixel_spread


def test_residuals_of_a_field_that_is_not_stationary() -> None:
    """Independent pixels of unequal variance, measured in the Fourier basis: the spread is that of their v_t."""
    report = calibrate(prior(PIXELS).chain, draws(PIXELS, 4 * NUMBER), basis="fft", progress=False)
    levels = prior(PIXELS).chain.levels[1:]
    for level, found in zip(levels, report.pixel_spread.tolist(), strict=True):
        v = level.sigma**2 * spectrum(PIXELS) / (level.alpha**2 * spectrum(PIXELS) + level.sigma**2)
        assert found == pytest.approx(float(v.std() / v.mean()), abs=0.05)
    assert float(report.pixel_spread[-1]) > 0.4


def test_residuals_of_a_mixture_of_easy_and_hard_pictures() -> None:
    """Half of the pictures vary little, half a lot: kurtosis and picture spread tell. At high noise, where x0_hat is
    about 0, r^2 is v_1 or v_2 times a chi-squared: kurtosis 3 (2 (v_1^2 + v_2^2) / (v_1 + v_2)^2 - 1)."""
    d, small, large = 64, 0.1, 1.9
    denoiser = sd.GaussianMixtureDenoiser(
        torch.zeros(2, 1, 8, 8, dtype=F64),
        torch.stack([small * torch.eye(d, dtype=F64), large * torch.eye(d, dtype=F64)]),
        torch.ones(2, dtype=F64),
    )
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(512) % 2
    scale = torch.tensor([small, large], dtype=F64).sqrt()[which].reshape(-1, 1, 1, 1)
    images = scale * torch.randn(512, 1, 8, 8, generator=generator, dtype=F64)
    chain = sd.DiffusionPrior(Plain(denoiser), sd.VPSchedule(), 3, grid=sd.LogGrid()).chain
    report = calibrate(chain, images, progress=False)
    kurtosis = 3 * (2 * (small**2 + large**2) / (small + large) ** 2 - 1)
    assert float(report.excess_kurtosis[-1]) == pytest.approx(kurtosis, rel=0.15)
    assert float(report.picture_spread[-1]) > 10
    assert float(report.pixel_spread.max()) < 0.15


def test_the_report_in_words() -> None:
    report = calibrate(prior(DCT).chain, draws(DCT, 4), progress=False)
    lines = str(report).splitlines()
    assert lines[0] == "spectral covariance (dct) from 4 pictures" and len(lines) == 2 + 5
    assert next(field.name for field in dataclasses.fields(Calibration)) == "covariance"


def test_chunks_and_seeds() -> None:
    chain, images = prior(DCT).chain, draws(DCT, 10)

    def run(**settings: int) -> Tensor:
        return calibrate(chain, images, progress=False, **settings).covariance.table.variances  # type: ignore[arg-type]

    torch.testing.assert_close(run(batch=3), run(batch=64), rtol=1e-10, atol=0)
    assert not torch.equal(run(seed=1), run(seed=2))


def test_a_coordinate_that_never_varies_keeps_a_variance() -> None:
    """A denoiser that is right to the last bit in one half of the picture."""

    class Half:
        event_shape, dtype, device = torch.Size(EVENT), F64, torch.device("cpu")

        def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
            return Estimate(torch.cat([torch.zeros_like(x_t[..., :8]), x_t[..., 8:] / level.alpha], -1))

    images = torch.zeros(5, *EVENT, dtype=F64)
    chain = sd.DiffusionPrior(Half(), sd.VPSchedule(), 3).chain
    variances = calibrate(chain, images, basis="pixels", progress=False).covariance.table.variances
    assert bool((variances > 0).all())


def test_what_cannot_be_measured_on_is_refused() -> None:
    chain = prior(DCT).chain
    with pytest.raises(ValueError, match=r"images of shape \(1, 1, 16, 16\); expected two"):
        calibrate(chain, draws(DCT, 1), progress=False)
    with pytest.raises(ValueError, match=r"images of shape \(4, 1, 8, 16\)"):
        calibrate(chain, draws(DCT, 4)[..., :8, :], progress=False)
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(chain, draws(DCT, 4) * torch.inf, progress=False)
    with pytest.raises(ValueError, match="basis 'haar'"):
        calibrate(chain, draws(DCT, 4), basis="haar", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BASES)
def test_smoothing_takes_noise_down_and_keeps_what_stands_out(name: str) -> None:
    """On a flat spectrum the error falls below 0.6 of what it was (9 neighbours would make it a third); a single
    coordinate of a hundred times the power is kept to within 6 of its deviations."""
    number, levels = 64, 4
    flat = torch.ones(levels, 1, 32, 32, dtype=F64)
    flat[..., 9, 20] = 100.0
    flat[..., -9, -20] = 100.0  # the same frequency in the Fourier basis
    generator = torch.Generator().manual_seed(0)
    raw = flat * torch.randn(number, *flat.shape, generator=generator, dtype=F64).square().mean(0)
    found = smoothed(raw, number, BASES[name])
    away = torch.ones(32, 32, dtype=torch.bool)
    for row, column in ((9, 20), (-9, -20)):
        away[row + torch.arange(-2, 3)[:, None], column + torch.arange(-2, 3)] = False
    error, before = ((part / flat - 1)[..., away] for part in (found, raw))
    assert float(error.square().mean()) < 0.6**2 * float(before.square().mean())
    assert abs(float(error.mean())) < 5 * (2 / (number * error.numel())) ** 0.5 + 2e-3
    assert float((found / flat - 1)[..., 9, 20].abs().max()) < 6 * (2 / number) ** 0.5


def test_smoothing_leaves_small_tables_alone() -> None:
    values = torch.rand(3, 7, dtype=F64) + 0.1
    assert torch.equal(smoothed(values, 10, PIXELS), values)


def test_covariances_are_kept_beside_the_weights(tmp_path: Path) -> None:
    """As float32, at the shape they were measured at and at another one; absent, unknown and unlike ones are told."""
    assert load_covariance(tmp_path, "dct", EVENT) is None
    kept = [
        calibrate(prior(basis).chain, draws(basis, 8), basis=name, progress=False).covariance  # type: ignore[arg-type]
        for name, basis in BASES.items()
        if name != "pixels"
    ]
    save_covariance(tmp_path, kept)
    for covariance in kept:
        found = load_covariance(tmp_path, covariance.basis_name, EVENT)
        assert found is not None and found.basis_name == covariance.basis_name
        torch.testing.assert_close(found.table.variances, covariance.table.variances, rtol=1e-6, atol=0)
        assert torch.equal(found.table.ratios, covariance.table.ratios)
        larger = load_covariance(tmp_path, covariance.basis_name, (1, 32, 32))
        assert larger is not None and larger.event_shape == (1, 32, 32)
    with pytest.raises(ValueError, match=r"basis 'pixels'; covariance.safetensors has \['dct', 'fft'\]"):
        load_covariance(tmp_path, "pixels", EVENT)
    with pytest.raises(ValueError, match=r"bases \['dct', 'dct'\]; expected one per basis"):
        save_covariance(tmp_path, [kept[0], kept[0]])
    other = sd.SpectralCovariance(kept[1].table.variances, "fft", 2 * kept[1].table.ratios)
    with pytest.raises(ValueError, match="all at the same noise levels"):
        save_covariance(tmp_path, [kept[0], other])
