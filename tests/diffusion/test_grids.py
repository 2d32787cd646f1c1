"""Time grids: the training indices that diffusers takes, written out, and the formulas of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smcdiff.diffusion.schedule import (
    CosineSchedule,
    FlowSchedule,
    Grid,
    KarrasGrid,
    LeadingGrid,
    LinspaceGrid,
    LogGrid,
    Schedule,
    SinhGrid,
    TrailingGrid,
    VESchedule,
    VPSchedule,
)

SCHEDULES = [VPSchedule(), CosineSchedule(), VESchedule(0.01, 50.0), FlowSchedule(0.002, 0.99)]
GRIDS = [LinspaceGrid(), LeadingGrid(), TrailingGrid(), KarrasGrid(), LogGrid(), SinhGrid(), SinhGrid(20.0, 0.3)]


@pytest.mark.parametrize(
    ("grid", "indices"),
    [
        (LinspaceGrid(), [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
        (LeadingGrid(), [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        (TrailingGrid(), [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]),
        # halves, as numpy rounds them: 499.5 to 500; 333 1/3 and 666 2/3
        (LinspaceGrid(), [0, 500, 999]),
        (LeadingGrid(), [0, 333, 666]),
        (TrailingGrid(), [332, 666, 999]),
        (LinspaceGrid(), [0, 143, 285, 428, 571, 714, 856, 999]),
        (TrailingGrid(), [61, 124, 187, 249, 311, 374, 437, 499, 561, 624, 687, 749, 811, 874, 937, 999]),
    ],
)
def test_training_indices(grid: Grid, indices: list[int]) -> None:
    levels = VPSchedule().levels(len(indices), grid)
    assert [level.t - 1 for level in levels[1:]] == indices


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: type(g).__name__)
def test_levels_rise_from_clean_within_the_schedule(schedule: Schedule, grid: Grid) -> None:
    for num_steps in (1, 2, 7, 100):
        levels = schedule.levels(num_steps, grid)
        times = [level.t for level in levels]
        assert len(levels) == num_steps + 1
        assert times[0] == 0 and (levels[0].alpha, levels[0].sigma) == (1, 0)
        assert (np.diff(times) > 0).all()
        assert schedule.t_min * (1 - 1e-9) <= times[1] and times[-1] <= schedule.t_max * (1 + 1e-9)
        assert levels[1:] == tuple(schedule.level(t) for t in times[1:])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: type(g).__name__)
def test_ends(schedule: Schedule, grid: Grid) -> None:
    """Leading leaves the noisy end out and trailing the clean one; the others take both."""
    times = grid.times(schedule, 10)
    assert (times[0] == pytest.approx(schedule.t_min, rel=1e-9)) is not isinstance(grid, TrailingGrid)
    assert (times[-1] == pytest.approx(schedule.t_max, rel=1e-9)) is not isinstance(grid, LeadingGrid)
    if not isinstance(grid, LeadingGrid):
        assert grid.times(schedule, 1) == pytest.approx([schedule.t_max], rel=1e-9)


def test_karras_formula() -> None:
    """2206.00364, eq. 5 with rho = 7, from the small end."""
    levels = VESchedule(0.002, 80.0).levels(5, KarrasGrid())
    root_min, root_max = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    expected = [(root_min + i / 4 * (root_max - root_min)) ** 7 for i in range(5)]
    assert [level.sigma for level in levels[1:]] == pytest.approx(expected, rel=1e-10)
    even = VESchedule(1.0, 9.0).levels(5, KarrasGrid(rho=1))
    assert [level.sigma for level in even[1:]] == pytest.approx([1, 3, 5, 7, 9], rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_karras_and_log_are_even_in_their_own_units(schedule: Schedule) -> None:
    for grid, unit in ((KarrasGrid(5.0), lambda ratio: ratio ** (1 / 5)), (LogGrid(), math.log)):
        steps = np.diff([unit(level.ratio) for level in schedule.levels(12, grid)[1:]])
        assert steps == pytest.approx(np.full(11, steps.mean()), rel=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_sinh_gathers_its_steps(schedule: Schedule) -> None:
    """asinh(log(ratio / center) / width) is even; so a step is du sqrt(width^2 + distance^2)."""
    logs = np.log([level.ratio for level in schedule.levels(40, SinhGrid(2.0, 0.5))[1:]]) - math.log(2.0)
    steps = np.diff(np.arcsinh(logs / 0.5))
    assert steps == pytest.approx(np.full(39, steps.mean()), rel=1e-7)
    lengths, middles = np.diff(logs), (logs[1:] + logs[:-1]) / 2
    assert lengths == pytest.approx(steps.mean() * np.hypot(0.5, middles), rel=0.02)


def test_sinh_gathers_about_a_half_unless_told_otherwise() -> None:
    assert SinhGrid() == SinhGrid(center=0.5, width=1.0)


@pytest.mark.parametrize(("center", "width"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_sinh_refuses_what_is_not_positive(center: float, width: float) -> None:
    with pytest.raises(ValueError, match="expected positive finite numbers"):
        SinhGrid(center, width)


def test_linspace_of_a_continuous_schedule_is_not_rounded() -> None:
    assert LinspaceGrid().times(FlowSchedule(0.1, 0.9), 3) == pytest.approx([0.1, 0.5, 0.9])
    assert TrailingGrid().times(FlowSchedule(0.1, 0.9), 3) == pytest.approx([0.3, 0.6, 0.9])
    assert LeadingGrid().times(FlowSchedule(0.1, 0.9), 3) == pytest.approx([0.1, 0.4, 0.7])


def test_default_grids() -> None:
    assert VPSchedule().levels(10) == VPSchedule().levels(10, LinspaceGrid())
    assert VESchedule().levels(10) == VESchedule().levels(10, KarrasGrid())
    assert FlowSchedule().levels(10) == FlowSchedule().levels(10, LinspaceGrid())


def test_wide_ranges_reach_their_own_ends() -> None:
    """The ends come back from logarithms and powers a rounding off, which must not count as outside."""
    for high in (80.0, 1348.0, 1e5, 1e7):
        for grid in (KarrasGrid(), LogGrid(), SinhGrid(0.1, 3.0)):
            assert VESchedule(0.002, high).levels(20, grid)[-1].sigma == pytest.approx(high, rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS[:3], ids=lambda g: type(g).__name__)
def test_more_steps_than_training_times_are_refused(grid: Grid) -> None:
    assert [level.t for level in VPSchedule(num_train_steps=50).levels(50, grid)] == list(range(51))
    with pytest.raises(ValueError, match=r"got num_steps 51, more than \w+Grid has distinct noise times; take fewer"):
        VPSchedule(num_train_steps=50).levels(51, grid)


def test_karras_goes_between_training_times() -> None:
    levels = VPSchedule(num_train_steps=50).levels(200, KarrasGrid())
    assert len({level.t for level in levels}) == 201


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="got num_steps 0; a chain needs at least 1"):
        VPSchedule().levels(0)
