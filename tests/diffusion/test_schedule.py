"""Noise schedules against their formulas written out, one factor at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smcdiff.diffusion.schedule import (
    CosineSchedule,
    FlowSchedule,
    NoiseLevel,
    Schedule,
    TabulatedSchedule,
    VESchedule,
    VPSchedule,
)

SCHEDULES = [VPSchedule(), CosineSchedule(), VESchedule(0.01, 50.0), FlowSchedule(0.002, 0.99)]
NAMES = ["vp", "cosine", "ve", "flow"]


def ddpm_alpha_bar(beta_min: float, beta_max: float, number: int) -> list[float]:
    """prod_{j <= i} (1 - beta_j) with rates linear in j."""
    product, table = 1.0, []
    for j in range(number):
        product *= 1 - (beta_min + (beta_max - beta_min) * j / (number - 1))
        table.append(product)
    return table


@pytest.mark.parametrize("number", [2, 10, 1000])
def test_vp_is_the_product_of_one_minus_beta(number: int) -> None:
    schedule = VPSchedule(1e-4, 0.02, number)
    table = ddpm_alpha_bar(1e-4, 0.02, number)
    assert schedule.alphas_cumprod == pytest.approx(table, rel=1e-12)
    assert (schedule.t_min, schedule.t_max, schedule.num_train_steps) == (1, number, number)
    for index in {0, number // 3, number - 1}:
        level = schedule.level(index + 1)
        assert level.alpha == pytest.approx(math.sqrt(table[index]), rel=1e-12)
        assert level.sigma == pytest.approx(math.sqrt(1 - table[index]), rel=1e-12)


def test_vp_has_the_published_ends() -> None:
    """The first rate is 1e-4, and at the last step next to nothing is left: sum log(1 - beta) = -10.12."""
    schedule = VPSchedule()
    assert schedule.level(1).sigma == pytest.approx(0.01, rel=1e-12)
    assert schedule.level(1000).alpha == pytest.approx(math.sqrt(4.0358e-5), rel=1e-4)


def test_cosine_is_the_squared_cosine_with_bounded_rates() -> None:
    def f(i: int) -> float:
        return math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = CosineSchedule()
    for i in (1, 2, 250, 500, 999):  # alpha_bar_i = f(i) / f(0), as long as no rate was bounded
        assert schedule.level(i).alpha ** 2 == pytest.approx(f(i) / f(0), rel=1e-9)
    assert f(1000) / f(999) < 1e-3  # the last rate is bounded
    assert schedule.level(1000).alpha ** 2 == pytest.approx(1e-3 * f(999) / f(0), rel=1e-9)


def test_cosine_takes_offset_and_number() -> None:
    schedule = CosineSchedule(offset=0.1, num_train_steps=40)
    expected = (math.cos((0.25 + 0.1) / 1.1 * math.pi / 2) / math.cos(0.1 / 1.1 * math.pi / 2)) ** 2
    assert schedule.level(10).alpha ** 2 == pytest.approx(expected, rel=1e-12)
    assert schedule.t_max == 40


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=NAMES[:2])
def test_variance_preserving_at_all_times(schedule: Schedule) -> None:
    for t in [*range(1, 1001), 1.5, 77.25, 999.999]:
        level = schedule.level(t)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14)


def test_between_training_steps_the_log_ratio_is_linear() -> None:
    schedule = TabulatedSchedule([0.9, 0.5, 0.1])
    low, high = math.log(0.1 / 0.9) / 2, 0.0  # log(sigma / alpha) at t = 1 and 2
    level = schedule.level(1.25)
    assert math.log(level.ratio) == pytest.approx(0.75 * low + 0.25 * high, rel=1e-13)
    assert schedule.level(2) == NoiseLevel(2, math.sqrt(0.5), math.sqrt(0.5))


def test_exploding_and_flow_levels() -> None:
    assert VESchedule(0.01, 50.0).level(3.5) == NoiseLevel(3.5, 1.0, 3.5)
    assert FlowSchedule().level(0.25) == NoiseLevel(0.25, 0.75, 0.25)
    assert FlowSchedule().level(0.25).ratio == pytest.approx(1 / 3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_time_inverts_the_ratio(schedule: Schedule) -> None:
    for share in (0.0, 0.1, 0.37, 0.8, 1.0):
        t = schedule.t_min + share * (schedule.t_max - schedule.t_min)
        assert schedule.time(schedule.level(t).ratio) == pytest.approx(t, rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_ratio_rises_and_time_zero_is_clean(schedule: Schedule) -> None:
    times = np.linspace(schedule.t_min, schedule.t_max, 301)
    assert (np.diff([schedule.level(t).ratio for t in times]) > 0).all()
    assert schedule.level(0) == NoiseLevel(0.0, 1.0, 0.0)


def test_small_noise_keeps_its_digits() -> None:
    """sigma from 1 - alpha_bar would have 8 digits here."""
    alpha_bar = 1 - 2.0**-28
    assert TabulatedSchedule([alpha_bar, 0.5]).level(1).sigma == pytest.approx(2.0**-14, rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_times_outside_are_refused(schedule: Schedule) -> None:
    for t in (-1.0, 0.999 * schedule.t_min, 1.001 * schedule.t_max):
        with pytest.raises(ValueError, match=r"got noise time .*; expected 0 or a time in \["):
            schedule.level(t)


@pytest.mark.parametrize(
    "table", [[0.5], [[0.9, 0.5]], [0.5, 0.9], [0.9, 0.9], [1.0, 0.5], [0.9, 0.0], [0.9, float("nan")]]
)
def test_a_table_that_does_not_fall_within_zero_and_one_is_refused(table: list[float]) -> None:
    with pytest.raises(ValueError, match="each smaller than the one before"):
        TabulatedSchedule(table)


def test_parameters_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="0 < beta_min <= beta_max < 1"):
        VPSchedule(beta_min=0.02, beta_max=1e-4)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        VESchedule(sigma_min=0.0)
    with pytest.raises(ValueError, match="0 < t_min < t_max < 1"):
        FlowSchedule(t_max=1.0)
