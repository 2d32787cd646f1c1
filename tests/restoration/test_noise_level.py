"""Noise of known law: the map that makes it white, and estimates of its level and correlation."""

import math

import pytest
import torch

from smcdiff.restoration.noise_level import Noise, estimate_row_correlation, estimate_sigma, whiten


def correlated(shape, rho, seed=0):
    """Stationary autoregression of variance 1 along the last axis, by its definition."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = [eps[..., 0]]
    for j in range(1, shape[-1]):
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * eps[..., j])
    return torch.stack(rows, -1), eps


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_whitening_undoes_the_autoregression(rho):
    noise, eps = correlated((2, 1, 5, 9), rho)
    torch.testing.assert_close(whiten(noise, rho), eps)


# The relative standard error of a median of N absolute normal values is 1.17 / sqrt(N) (the asymptotic variance of a
# median, pi-free for |z|: 1 / (4 f(m)^2 N) with f(m) = 2 phi(0.674) = 0.6355, over m = 0.6745, gives 1.166 / sqrt(N)).
# The differences share pixels: each is correlated with its 8 neighbours, by 1/2 or 1/4, and |z| by the square of it
# roughly, so N counts for at least N / (1 + 4/4 + 4/16) = N / 2.25. On 300 x 300 pixels the error is then below 0.0059;
# 5 of it, 0.03, is passed with probability below 1e-6 per estimate.
SIZE = (1, 300, 300)


@pytest.mark.parametrize("rho", [0.0, 0.55])
@pytest.mark.parametrize("shot", [False, True])
def test_sigma_and_correlation_of_a_structured_picture(rho, shot):
    row, column = torch.meshgrid(torch.arange(300.0), torch.arange(300.0), indexing="ij")
    lines = torch.where((column % 20 < 8) != (row > 150), 0.5, -0.6)[None].double()  # edges along both axes
    noise, _ = correlated(SIZE, rho, seed=1)
    sigma = 0.2
    y = lines + sigma * Noise(sigma, shot=shot).relative_scale(lines) * noise
    found = estimate_row_correlation(y, shot)
    # 1 - s_1^2 / s_8^2 errs by twice the relative error of each; correlated differences count for less: 0.08
    assert found == pytest.approx(rho, abs=0.08)
    assert estimate_sigma(y, shot, rho) == pytest.approx(sigma, rel=0.05 if shot else 0.03)


def test_masked_pixels_do_not_count():
    noise, _ = correlated(SIZE, 0.0, seed=2)
    mask = torch.ones(SIZE)
    mask[:, 40:80] = 0
    mask[:, :, ::5] = 0
    y = torch.where(mask > 0, 0.1 * noise, 1e3)
    assert estimate_sigma(y, mask=mask) == pytest.approx(0.1, rel=0.05)


def test_scale_of_shot_noise():
    brightness = torch.tensor([-1.0, -0.95, 0.0, 1.0])
    expected = torch.tensor([0.1, 0.1, 1.0, 2.0]).sqrt()
    torch.testing.assert_close(Noise(0.3, shot=True).relative_scale(brightness), expected)
    assert Noise(0.3).relative_scale(brightness).tolist() == [1, 1, 1, 1]


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="cannot be read off"):
        estimate_sigma(torch.zeros(1, 9, 9))
    with pytest.raises(ValueError, match="at least 2 rows and 9 columns"):
        estimate_row_correlation(torch.randn(1, 20, 8))
    with pytest.raises(ValueError, match="cannot be read off"):
        estimate_sigma(torch.randn(1, 9, 9), mask=torch.zeros(1, 9, 9))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sigma": 0.0}, "sigma 0.0"),
        ({"sigma": math.nan}, "sigma nan"),
        ({"sigma": 1.0, "width": -1.0}, "width"),
        ({"sigma": 1.0, "row_correlation": 1.0}, "row_correlation 1.0"),
    ],
)
def test_impossible_noise_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Noise(**values)
