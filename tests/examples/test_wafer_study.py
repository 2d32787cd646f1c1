"""The wafer study's measures, on cases with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.wafer_study.measurements import gaussian, measure, noise
from examples.wafer_study.problems import CONTRAST, SETTINGS, Problem, problem
from examples.wafer_study.scores import Posterior, exact_coverage, score
from smcdiff.zoo.wafer import WaferPicture


def posterior(x: Tensor, kernel: Tensor | None = None) -> Posterior:
    """Equal weights."""
    return Posterior(x, torch.full((len(x),), 1 / len(x), dtype=torch.float64), kernel, 1, 0, {})


def test_the_true_picture_scores_full_marks() -> None:
    given = problem(0)
    row = score(given, posterior(given.clean.repeat(3, 1, 1, 1), given.kernel))
    assert row["retention"] == pytest.approx(1)
    assert row["probability"] == 1 and row["probability at the defect"] == 1
    assert row["kernel error"] == 0
    assert score(given, posterior(given.x.repeat(3, 1, 1, 1)))["coverage 0.9"] == 1


def test_a_picture_without_the_defect_retains_none() -> None:
    given = problem(0)
    row = score(given, posterior(given.normal.repeat(3, 1, 1, 1)))
    assert row["retention"] == pytest.approx(0, abs=1e-6)
    assert row["probability"] == 0 and row["truth differs"]


def test_half_of_the_draws_are_half_of_the_probability_and_of_the_contrast() -> None:
    given = problem(0)
    row = score(given, posterior(torch.stack([given.clean, given.normal])))
    assert row["probability"] == pytest.approx(0.5)
    assert row["retention"] == pytest.approx(0.5)


def with_defect() -> Problem:
    """16 x 16 pixels of an uneven background, grain on all of them, and a defect of 4 pixels.

    Three of the defect's pixels are brighter by 0.6 than without it and one is darker by 0.2: |clean - normal|^2 is
    1.12 over them. One pixel beside them is brighter by 0.05, too little to be among the defect's.
    """
    rows, columns = np.mgrid[:16, :16]
    normal = -0.9 + 0.1 * rows + 0.3 * (columns % 4 < 2)
    clean, mask = normal.copy(), np.zeros((16, 16), dtype=bool)
    clean[5, 4:7] += 0.6
    clean[6, 4] -= 0.2
    clean[6, 5] += 0.05
    mask[5, 4:7] = mask[6, 4] = True
    grain = 0.2 * np.random.default_rng(0).standard_normal((16, 16))
    return Problem(0, WaferPicture(clean + grain, clean, normal, mask, "lines", "bridge"), SETTINGS[0], 0)


@pytest.mark.parametrize("kept", [0.5, 0.0, 1.0, 1.3, -0.2], ids=["half", "none", "all", "overshoot", "reversed"])
def test_retention_is_the_share_of_the_contrast(kept: float) -> None:
    """Whatever the mean is elsewhere, and however the draws spread about it."""
    given = with_defect()
    mean = given.normal + kept * (given.clean - given.normal)
    mean[~given.mask] = 0.7
    spread = 0.3 * torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    row = score(given, posterior(torch.stack([mean - spread, mean + spread])))
    assert row["retention"] == pytest.approx(kept, abs=1e-5)


def test_retention_counts_a_pixel_by_its_squared_contrast() -> None:
    """Kept in the bright pixels and not in the dark one, 3 * 0.6^2 of 1.12 are; draws count by their weights.

    A grey level that is added everywhere counts by its product with the contrast, 0.1 * (3 * 0.6 - 0.2).
    """
    given = with_defect()
    bright = torch.where(given.clean > given.normal, given.clean, given.normal)
    assert score(given, posterior(bright[None]))["retention"] == pytest.approx(1.08 / 1.12, abs=1e-5)
    added = score(given, posterior((given.clean + 0.1)[None]))["retention"]
    assert added == pytest.approx(1 + 0.1 * (3 * 0.6 - 0.2) / 1.12, abs=1e-5)
    w = torch.tensor([0.25, 0.125, 0.625], dtype=torch.float64)
    draws = Posterior(torch.stack([given.clean, bright, given.normal]), w, None, 1, 0, {})
    assert score(given, draws)["retention"] == pytest.approx(0.25 + 0.125 * 1.08 / 1.12, abs=1e-5)


def test_a_picture_without_a_defect_has_no_retention() -> None:
    given = with_defect()
    healthy = replace(
        given, picture=replace(given.picture, clean=given.picture.normal, mask=given.picture.mask & False)
    )
    assert not {"retention", "probability at the defect"} & set(score(healthy, posterior(given.normal[None])))


def test_problems_are_what_they_say() -> None:
    for number in range(20):
        given = problem(number)
        assert given.setting == SETTINGS[number % 5]
        assert given.differs == (given.defect != "none")
    assert [problem(number).defect for number in (0, 5, 10, 15)] == ["unseen", "none", "seen", "none"]
    assert CONTRAST > 0


def test_the_measurement_has_its_law() -> None:
    """Mean k * x and standard deviation sigma; 64 x 64 x 200 values, so the deviation is within 5 / sqrt(2 N)."""
    given = problem(5)
    sigma = noise(given.setting.dose)
    y = measure(given.x.repeat(200, 1, 1, 1), given.kernel, sigma, torch.Generator().manual_seed(0))
    mean = measure(given.x[None], given.kernel, 0.0, torch.Generator())
    spread = float((y - mean).square().mean().sqrt())
    assert spread == pytest.approx(sigma, rel=5 / math.sqrt(2 * y.numel()))
    assert sigma == pytest.approx(2 * math.sqrt(0.5 / given.setting.dose + 0.03**2))


def test_a_kernel_error_is_the_light_in_the_wrong_place() -> None:
    given = problem(0)
    moved = torch.zeros(28, 28)
    moved[0, 0] = 1.0
    assert score(given, posterior(given.clean[None], moved))["kernel error"] == pytest.approx(1, abs=1e-6)
    wide = gaussian(torch.tensor(2.0))
    row = score(given, posterior(given.clean[None], wide))
    assert row["kernel error"] == pytest.approx(float((wide - given.kernel).abs().sum() / 2), abs=1e-6)


def test_quantiles_of_even_draws() -> None:
    values = torch.arange(10.0)[:, None, None, None]
    assert float(posterior(values).quantile(0.5)) == pytest.approx(4.5)
    assert float(posterior(values).quantile(0.05)) == pytest.approx(0.0)


def test_the_cover_of_exact_draws() -> None:
    """With the middle-of-weight rule the ends of 90 % of 10 draws are the least and the largest: 9 / 11 is covered.

    20 000 trials have the standard deviation 0.0027; five of them.
    """
    assert exact_coverage(10, 0.9) == pytest.approx(9 / 11, abs=0.014)
