"""Simulated kernels against their moments in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from smcdiff.zoo.kernels import KINDS, Kernels


def moments(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the place, in pixels from the centre; (row, column)."""
    at = np.arange(len(kernel)) - len(kernel) // 2
    row, column = np.meshgrid(at, at, indexing="ij")
    mean = np.array([(kernel * row).sum(), (kernel * column).sum()])
    places = np.stack([row - mean[0], column - mean[1]])
    return mean, np.einsum("iab,jab,ab->ij", places, places, kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_is_one(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        kernel = Kernels().draw(rng, kind)
        assert kernel.min() >= 0
        assert kernel.sum() == pytest.approx(1)
        if kind not in ("shake", "drift"):  # their places are rounded
            assert np.abs(moments(kernel)[0]).max() < 1e-4  # what the grid cuts off


def test_a_gaussian_has_its_width() -> None:
    """Binning adds the variance of a pixel, 1/12, less that of a cell of the fine grid."""
    sigma = 1.5
    kernel = Kernels(widths=(sigma, sigma)).draw(np.random.default_rng(1), "gaussian")
    expected = sigma**2 + (1 - 1 / 25) / 12
    assert moments(kernel)[1] == pytest.approx(np.diag([expected] * 2), abs=1e-3)


def test_an_astigmatic_one_has_the_area_of_its_widths() -> None:
    rng = np.random.default_rng(2)
    kernel = Kernels(widths=(0.8, 2.0)).draw(rng, "astigmatic")
    again = np.random.default_rng(2)
    first, second = np.exp(again.uniform(*np.log((0.8, 2.0)), size=2))
    own = moments(kernel)[1] - (1 - 1 / 25) / 12 * np.eye(2)
    assert np.sort(np.linalg.eigvalsh(own)) == pytest.approx(np.sort([first**2, second**2]), rel=0.01)


def test_a_disc_has_its_radius() -> None:
    """The variance of a disc along an axis is R^2 / 4."""
    radius = 4.0
    kernel = Kernels(radii=(radius, radius)).draw(np.random.default_rng(3), "defocus")
    assert moments(kernel)[1][0, 0] == pytest.approx(radius**2 / 4 + 1 / 12, rel=0.01)


def test_a_drift_has_its_length() -> None:
    """The variance along a line of length L is L^2 / 12, besides that of the optics."""
    length, optics = 12.0, 0.5
    kernel = Kernels(widths=(optics, optics), lengths=(length, length)).draw(np.random.default_rng(4), "drift")
    largest = np.linalg.eigvalsh(moments(kernel)[1])[-1]
    assert largest == pytest.approx(length**2 / 12 + optics**2 + 1 / 12, rel=0.02)


def test_images_are_scaled_to_their_largest_value() -> None:
    images = Kernels(size=16).draw_images(np.random.default_rng(5), 4)
    assert images.shape == (4, 1, 16, 16) and images.dtype == np.float32
    assert images.max((1, 2, 3)) == pytest.approx(np.ones(4))
    kernel = Kernels(size=16).draw(np.random.default_rng(5))
    assert (images[0, 0] + 1) / (images[0, 0] + 1).sum() == pytest.approx(kernel, abs=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="size 4"):
        Kernels(size=4)
    with pytest.raises(ValueError, match="widths"):
        Kernels(widths=(2.0, 1.0))
    with pytest.raises(ValueError, match="the kind 'square'"):
        Kernels().draw(np.random.default_rng(0), "square")
