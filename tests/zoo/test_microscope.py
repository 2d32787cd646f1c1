"""The microscope against the formulas its module states.

Statistical tests fail by chance with probability at most 1e-5 each; the seeds are fixed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

import smcdiff as sd
from smcdiff.restoration.noise_level import whiten
from smcdiff.zoo.microscope import Charging, Microscope, probe
from smcdiff.zoo.wafer import Wafer

SILENT = {"dose": math.inf}


def covariance(kernel: np.ndarray) -> np.ndarray:
    """Of (row, column) under the kernel as a probability."""
    places = [np.arange(side) - side // 2 for side in kernel.shape]
    rows, columns = np.meshgrid(*places, indexing="ij")
    assert abs((kernel * rows).sum()) < 1e-6 and abs((kernel * columns).sum()) < 1e-6
    cross = (kernel * rows * columns).sum()
    return np.array([[(kernel * rows**2).sum(), cross], [cross, (kernel * columns**2).sum()]])


@pytest.mark.parametrize("angle", [0.0, 0.4, -1.1])
@pytest.mark.parametrize(("major", "minor", "defocus"), [(1.2, 1.2, 0.0), (2.0, 1.0, 0.0), (1.5, 0.8, 3.0)])
def test_a_probe_has_the_stated_second_moments(major: float, minor: float, defocus: float, angle: float) -> None:
    kernel = probe(major, minor, angle, defocus)
    turn = np.array([[math.sin(angle), math.cos(angle)], [math.cos(angle), -math.sin(angle)]])
    expected = turn.T @ np.diag([major**2, minor**2]) @ turn + defocus**2 / 4 * np.eye(2)
    # Sampling a Gaussian at the pixels changes its moments by exp(-2 (pi minor)^2) < 1e-5 relative to
    # (2 pi minor^2)^2 of them, and the cut at five standard deviations by 2e-5 of them.
    assert np.abs(covariance(kernel) - expected).max() < 3e-4
    assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1, abs=1e-12)


def test_a_probe_far_out_of_focus_is_a_disc() -> None:
    kernel = probe(1.0, defocus=8.0)
    rows, columns = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
    radius = np.hypot(rows, columns)
    assert np.abs(kernel[radius < 4] * math.pi * 8.0**2 - 1).max() < 0.05
    # The edge of a disc blurred by a normal law is at half height; the curvature takes s / (2 r sqrt(2 pi)) = 0.025.
    assert np.abs(kernel[np.abs(radius - 8) < 0.05] * math.pi * 8.0**2 - 0.475).max() < 0.04
    assert kernel[radius > 12].max() * math.pi * 8.0**2 < 1e-3


@pytest.mark.parametrize("shape", [(5, 7), (4, 5), (6, 6), (1, 3)])
def test_the_blur_is_that_of_the_library_continued_by_reflection(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.random(shape)
    kernel /= kernel.sum()
    pictures = rng.uniform(-1, 1, (2, 3, 20, 24))
    found = Microscope(kernel, **SILENT).image(pictures, rng)
    around = [((side - 1) // 2, side // 2) for side in shape]
    padded = np.pad(pictures, [(0, 0), (0, 0), *around], mode="reflect")
    theirs = sd.Blur(torch.from_numpy(kernel))(torch.from_numpy(padded)).numpy()
    down, right = around[0][0], around[1][0]
    assert np.abs(found - theirs[..., down : down + 20, right : right + 24]).max() < 1e-12
    if all(side % 2 for side in shape):
        assert np.abs(found[1, 2] - ndimage.convolve(pictures[1, 2], kernel, mode="mirror")).max() < 1e-12


@pytest.mark.parametrize("row_correlation", [0.0, 0.6])
@pytest.mark.parametrize(("dose", "read_noise"), [(30.0, 0.0), (200.0, 0.05), (math.inf, 0.1)])
def test_variance_against_brightness(dose: float, read_noise: float, row_correlation: float) -> None:
    """Five flat halves of brightness 0.1 to 0.9: mean I and variance I / dose + read_noise^2, in the first column too.

    Over m draws of rows of c pixels, z = noise / deviation has the fourth moment 3 + 1 / (dose I) at most (that of the
    Poisson law, weighed by correlation), so that the mean of z^2 has a variance of at most
    (2 + 1 / (dose I)) (1 + 2 sum rho^{2k}) / (m c). Five levels, three statistics each: 5.2 standard deviations of
    each are passed by chance with probability 15 * 2e-7 = 3e-6.
    """
    number, columns = 3000, 16
    microscope = Microscope(dose=dose, read_noise=read_noise, row_correlation=row_correlation)
    rng = np.random.default_rng(1)
    for brightness in (0.1, 0.3, 0.5, 0.7, 0.9):
        y = microscope.image(np.full((number, columns), 2 * brightness - 1), rng)
        noise = (y + 1) / 2 - brightness
        variance = brightness / dose + read_noise**2
        z = noise / math.sqrt(variance)
        poisson = 1 / (dose * brightness)
        squares = (1 + row_correlation**2) / (1 - row_correlation**2)
        lags = (1 + row_correlation) / (1 - row_correlation)
        assert abs(z.mean()) < 5.2 * math.sqrt(lags / z.size)
        assert abs((z**2).mean() - 1) < 5.2 * math.sqrt((2 + poisson) * squares / z.size)
        assert abs((z[:, 0] ** 2).mean() - 1) < 5.2 * math.sqrt((2 + poisson) / number)


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_the_noise_is_correlated_along_rows_alone(rho: float) -> None:
    """Corr at lag m is rho^m. Whitened as the library does, the noise is white: with N products of independent
    standardised values their mean is within 4.6 / sqrt(N) but for 4e-6 each, two statistics."""
    microscope = Microscope(dose=400.0, read_noise=0.02, row_correlation=rho)
    shape, brightness = (600, 100), 0.5
    y = microscope.image(np.full(shape, 2 * brightness - 1), np.random.default_rng(2))
    deviation = math.sqrt(brightness / 400 + 0.02**2)
    n = ((y + 1) / 2 - brightness) / deviation
    for lag in (1, 3):
        # By Bartlett's formula the sample autocovariance has variance <= 2 (1 + rho^2) / (1 - rho^2) / N.
        bound = 4.8 * math.sqrt(2 * (1 + rho**2) / (1 - rho**2) / (shape[0] * (shape[1] - lag)))
        assert abs((n[:, lag:] * n[:, :-lag]).mean() - rho**lag) < bound
    white = whiten(torch.from_numpy(n), rho).numpy()
    assert abs((white[:, 1:] * white[:, :-1]).mean()) < 4.6 / math.sqrt(white[:, 1:].size)
    assert abs((n[1:] * n[:-1]).mean()) < 4.6 * math.sqrt((1 + rho**2) / (1 - rho**2) / n[1:].size)


def test_whitened_noise_is_counts_of_the_picture() -> None:
    """On any picture, whitening gives back the counts less their rate, number for number."""
    clean = Wafer(size=32, dose=math.inf).draw(np.random.default_rng(3)).clean
    scene = {"kernel": probe(1.1, 0.7, 0.3), "charging": Charging(slow=0.05, fast=-0.08, tail=-0.2), "dose": 80.0}
    plain = Microscope(**scene)
    smeared = Microscope(**scene, row_correlation=0.7)
    counts, y = (m.image(clean, np.random.default_rng(4)) for m in (plain, smeared))
    assert np.abs((counts + 1) / 2 * 80 - ((counts + 1) / 2 * 80).round()).max() < 1e-9
    expected = plain.expected(clean)
    white = whiten(torch.from_numpy(y - expected), 0.7).numpy()
    assert np.abs(white - (counts - expected)).max() < 1e-12


def test_the_slopes_of_charging_are_found_by_regression() -> None:
    """Least squares on (1, u_i, u_j) over repeated noisy pictures of a flat wafer. The estimate of a slope has the
    variance s^2 / sum u^2; 4.7 standard deviations of each of three coefficients: 8e-6."""
    rows, columns, number, dose = 24, 40, 50, 300.0
    microscope = Microscope(dose=dose, read_noise=0.03, charging=Charging(slow=0.10, fast=-0.16))
    y = microscope.image(np.zeros((number, rows, columns)), np.random.default_rng(5))
    u, v = np.meshgrid(np.linspace(-0.5, 0.5, rows), np.linspace(-0.5, 0.5, columns), indexing="ij")
    design = np.stack([np.ones(u.size), u.ravel(), v.ravel()], 1)
    found = np.linalg.lstsq(design, ((y + 1) / 2).mean(0).ravel(), rcond=None)[0]
    variance = (0.5 + 0.13) / dose + 0.03**2  # at most
    bound = 4.7 * np.sqrt(variance / number / (design**2).sum(0))
    assert (np.abs(found - [0.5, 0.10, -0.16]) < bound).all()
    assert bound.max() < 0.005


def test_the_tail_behind_a_bright_line_decays() -> None:
    clean = np.full((3, 30), -0.5)
    clean[:, 5:8] = 0.6
    length, tail = 4.0, -0.4
    found = (Microscope(charging=Charging(tail=tail, tail_length=length), **SILENT).expected(clean) + 1) / 2
    brightness, decay = (clean + 1) / 2, math.exp(-1 / length)
    charge = np.zeros_like(brightness)
    for j in range(30):
        for m in range(1, j + 1):
            charge[:, j] += tail * (1 - decay) * decay ** (m - 1) * brightness[:, j - m]
    assert np.abs(found - brightness - charge).max() < 1e-14
    flat = Microscope(charging=Charging(tail=0.25, tail_length=2.0), **SILENT).expected(np.zeros((1, 60)))
    assert flat[0, -1] == pytest.approx(2 * 0.5 * 1.25 - 1, abs=1e-12)


def test_no_electrons_come_from_below_zero() -> None:
    dark = Microscope(charging=Charging(fast=-1.0), dose=50.0).image(np.full((8, 21), -0.9), np.random.default_rng(6))
    expected = np.maximum(0.05 - np.linspace(-0.5, 0.5, 21), 0)
    assert (dark[:, expected == 0] == -1).all() and expected[0] == 0.55
    assert stats.poisson(50 * 0.55 * 8).cdf((dark[:, 0] + 1).sum() * 25) > 1e-6


def test_order_blur_then_charge_then_noise() -> None:
    """Only the counts know the dose, the drift is not blurred, and a float32 picture is measured in float64."""
    rng = np.random.default_rng(7)
    clean = rng.uniform(-0.8, 0.8, (32, 32)).astype(np.float32)
    kernel, charging = probe(1.5), Charging(slow=0.1)
    both = Microscope(kernel, charging=charging).expected(clean)
    blurred = Microscope(kernel).expected(clean)
    assert np.abs(both - blurred - 0.2 * np.linspace(-0.5, 0.5, 32)[:, None]).max() < 1e-12
    assert both.dtype == np.float64
    assert np.array_equal(Microscope(kernel, math.inf).image(clean, rng), blurred)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": np.ones(3) / 3}, r"got a kernel of shape \(3,\); expected \(rows, columns\)"),
        ({"kernel": np.ones((3, 3))}, "sum 9; expected a point-spread function.*Divide it by its sum"),
        ({"kernel": np.array([[1.5, -0.5, 0.0]])}, "lowest value -0.5"),
        ({"dose": 0.0}, "got dose 0.0"),
        ({"dose": math.nan}, "got dose nan"),
        ({"read_noise": -0.1}, "got read_noise -0.1"),
        ({"row_correlation": 1.0}, "got row_correlation 1.0; expected at least 0 and less than 1"),
    ],
)
def test_impossible_microscopes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Microscope(**arguments)


def test_impossible_pictures_probes_and_charges_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"largest absolute value 255; expected \(..., rows, columns\) on the scale"):
        Microscope().image(np.full((4, 4), 255.0), rng)
    with pytest.raises(ValueError, match="absolute value nan"):
        Microscope().image(np.full((4, 4), math.nan), rng)
    with pytest.raises(ValueError, match=r"picture of \(5, 9\) pixels and a kernel of \(11, 11\)"):
        Microscope(probe(1.0)).image(np.zeros((5, 9)), rng)
    with pytest.raises(ValueError, match="got a probe of 1.0 by 0.1 pixels"):
        probe(1.0, 0.1)
    with pytest.raises(ValueError, match="got defocus -1.0"):
        probe(1.0, defocus=-1.0)
    with pytest.raises(ValueError, match="tail_length=0.0.*expected finite numbers"):
        Charging(tail_length=0.0)
