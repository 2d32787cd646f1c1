"""The wafer study's measures and its quadrature, on cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.wafer_study.measurements import gaussian, measure, noise
from examples.wafer_study.problems import CONTRAST, SETTINGS, problem
from examples.wafer_study.quadrature import parabola
from examples.wafer_study.scores import Posterior, exact_coverage, score


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


def test_a_parabola_is_found_exactly() -> None:
    u = np.linspace(-1, 1, 7)
    mean, spread = parabola(u, -0.5 * ((u - 0.2) / 0.3) ** 2 + 5)
    assert mean == pytest.approx(0.2) and spread == pytest.approx(0.3)


def test_a_best_node_at_the_end_is_kept() -> None:
    u = np.linspace(-1, 1, 5)
    assert parabola(u, u) == (1.0, 0.5)
