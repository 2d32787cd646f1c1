"""RePaint, with and without jumps, against loops of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.repaint import RePaint
from smcdiff.guidance.time_travel import TimeTravel
from tests.guidance import published as pub

STEPS = 20
SEEN = torch.tensor([True, False, True])
Y = torch.tensor([0.4, 1.1], dtype=pub.F64)
ROWS = torch.eye(3, dtype=pub.F64)[SEEN]


def one_step(x: torch.Tensor, i: int, white: torch.Tensor) -> torch.Tensor:
    """2201.09865, algorithm 1, lines 4 to 8: known pixels from y, the others from the chain."""
    bars = pub.alpha_bars(STEPS)
    mean, scale = pub.ancestral(x, pub.denoise(x, bars[i]), bars[i], bars[i - 1])
    x = mean + scale * white
    x[SEEN] = bars[i - 1].sqrt() * Y + (1 - bars[i - 1]).sqrt() * white[SEEN]
    return x


def published_loop(noise: torch.Tensor, resamplings: int) -> torch.Tensor:
    """2201.09865, algorithm 1: U passes over each step."""
    bars, noises = pub.alpha_bars(STEPS), iter(noise)
    x = next(noises)
    for i in range(STEPS, 0, -1):
        for u in range(1, resamplings + 1):
            x_before = one_step(x, i, next(noises))
            if u < resamplings and i > 1:
                beta = 1 - bars[i] / bars[i - 1]
                x = (1 - beta).sqrt() * x_before + beta.sqrt() * next(noises)
            else:
                break
        x = x_before
    return x


def jumping_loop(noise: torch.Tensor, length: int, passes: int) -> torch.Tensor:
    """The schedule of jumps as the authors give it: times go down, and up by ``length`` where jumps are left."""
    bars, noises = pub.alpha_bars(STEPS), iter(noise)
    left = {time: passes - 1 for time in range(0, STEPS - length, length)}
    x, time = next(noises), STEPS - 1  # time: the index of the next step, whose input is at the level time + 1
    while time >= 0:
        x = one_step(x, time + 1, next(noises))
        time -= 1
        if left.get(time, 0) > 0:
            left[time] -= 1
            keep = bars[time + 1 + length] / bars[time + 1]
            x = keep.sqrt() * x + (1 - keep).sqrt() * next(noises)
            time += length
    return x


def repaint(length: int, passes: int):
    return lambda model: RePaint(model, length, passes)


def model() -> pub.Model:
    """The published method knows no measurement noise; 1e-9 of it moves no number by more than a few times that."""
    return pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Select(SEEN), 1e-9)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_path_is_the_published_loop(passes: int) -> None:
    draws = 1 + STEPS + 2 * (passes - 1) * (STEPS - 1)
    pub.check_loop(repaint(1, passes), model(), Y, lambda noise: published_loop(noise, passes), draws, 1e-6)


@pytest.mark.parametrize(("length", "passes"), [(1, 2), (3, 4), (10, 2)])
def test_jumps_are_the_published_schedule(length: int, passes: int) -> None:
    jumps = (passes - 1) * len(range(0, STEPS - length, length))
    draws = 1 + STEPS + jumps * (1 + length)
    loop = lambda noise: jumping_loop(noise, length, passes)  # noqa: E731
    pub.check_loop(repaint(length, passes), model(), Y, loop, draws, 1e-6)


def test_jumps_of_the_paper() -> None:
    """250 steps with jumps of 10 and 10 passes, counted by hand: 24 places, 9 jumps at each, 10 more steps for each."""
    moves = TimeTravel(10, 10).moves(250)
    assert len(moves) == 250 + 24 * 9 * 10
    assert moves[0] == (250, 249) and moves[-1] == (1, 0)
    assert [k for k, landing in moves if landing > k][:9] == [232] * 9  # from level 231, the step from 232 reaches it
    assert all(moves[i][1] == moves[i + 1][0] for i in range(len(moves) - 1))
    assert TimeTravel(3, 1).moves(4) == [(4, 3), (3, 2), (2, 1), (1, 0)]


def test_one_evaluation_per_move() -> None:
    smc = sd.SMC(RePaint(model(), 5, 3), num_particles=1, num_chains=2, seed=0, progress=False)
    with pytest.warns(UserWarning, match="jumps back in time"):
        smc.run(Y)
    moves = STEPS + 2 * len(range(0, STEPS - 5, 5)) * 5
    assert smc.network_evaluations == (2 * moves, 0)
    assert bool(smc.log_evidence.isnan())
    assert smc.get_samples()["x"].shape == (2, 3)


def test_jumps_are_for_one_particle() -> None:
    smc = sd.SMC(RePaint(model(), 5, 3), num_particles=2, progress=False)
    with pytest.raises(ValueError, match=r"got 2 particles and RePaint with jumps.*num_particles=1"):
        smc.run(Y)


def test_a_fault_is_named_by_its_level() -> None:
    prior = pub.gaussian_prior(num_steps=STEPS)
    denoiser = prior.chain.denoiser

    class Broken:
        event_shape, dtype, device = denoiser.event_shape, denoiser.dtype, denoiser.device

        def __call__(self, x_t, level):
            estimate = denoiser(x_t, level)
            return sd.Estimate(estimate.mean * (torch.nan if level.t < 2 else 1.0))

    broken = pub.measured(sd.DiffusionPrior(Broken(), sd.VPSchedule(), STEPS), sd.Select(SEEN), 0.1)
    with pytest.raises(sd.FilterError, match=r"step k = 1 of K = 20, .*denoiser of 'x'"):
        sd.SMC(RePaint(broken, 5, 2), num_particles=1, progress=False).run(Y)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_many_particles_are_exact(variance: str) -> None:
    pub.check_gaussian_posterior(
        RePaint, sd.Select(SEEN), ROWS, Y, 4000, pub.gaussian_prior(variance, 6, schedule=pub.LONG_STEPS)
    )


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(RePaint, 4000, 6, pub.LONG_STEPS)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(RePaint)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(RePaint)


def test_refusals() -> None:
    pub.check_refusals(RePaint, "RePaint", needs_svd=True)
    with pytest.raises(ValueError, match="jumps of 0 levels"):
        RePaint(model(), 0, 2)
