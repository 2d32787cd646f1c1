"""Parametrisations on an exact denoiser, and the network and variance wrappers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smcdiff.diffusion.analytic import GaussianDenoiser
from smcdiff.diffusion.denoiser import (
    NetworkDenoiser,
    Parametrisation,
    WithVariance,
    from_clean,
    from_epsilon,
    from_flow,
    from_velocity,
)
from smcdiff.diffusion.schedule import FlowSchedule, NoiseLevel, Schedule, VESchedule, VPSchedule
from tests.diffusion.exact import example_covariance

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


#: The regression targets in x_0 and eps: what each kind of network is trained to predict.
TARGETS: list[tuple[Parametrisation, Callable[[Tensor, Tensor, NoiseLevel], Tensor]]] = [
    (from_epsilon, lambda x_0, eps, level: eps),
    (from_clean, lambda x_0, eps, level: x_0),
    (from_velocity, lambda x_0, eps, level: level.alpha * eps - level.sigma * x_0),
    (from_flow, lambda x_0, eps, level: eps - x_0),
]


@pytest.mark.parametrize("schedule", [VPSchedule(), VESchedule(0.01, 50.0), FlowSchedule()], ids=["vp", "ve", "flow"])
@pytest.mark.parametrize(("parametrisation", "target"), TARGETS, ids=["eps", "x0", "v", "flow"])
def test_parametrisations_agree_on_the_exact_denoiser(
    parametrisation: Parametrisation, target: Callable[[Tensor, Tensor, NoiseLevel], Tensor], schedule: Schedule
) -> None:
    exact = GaussianDenoiser(draw(4), example_covariance(4))
    for level in schedule.levels(6)[1:]:

        def network(x_t: Tensor, time: float, level: NoiseLevel = level) -> Tensor:
            x0_hat = exact(x_t, level).mean
            return target(x0_hat, (x_t - level.alpha * x0_hat) / level.sigma, level)

        denoiser = NetworkDenoiser(network, (4,), parametrisation, dtype=torch.float64, device=CPU)
        x_t = draw(5, 4, seed=2)
        torch.testing.assert_close(denoiser(x_t, level).mean, exact(x_t, level).mean, rtol=1e-8, atol=1e-8)


def test_a_network_sees_the_training_index() -> None:
    seen = []

    def network(x_t: Tensor, time: float) -> Tensor:
        seen.append(time)
        return x_t

    denoiser = NetworkDenoiser(network, (2,), from_clean, dtype=torch.float64, device=CPU)
    for t in (1.0, 7.5, 1000.0):
        denoiser(draw(3, 2), VPSchedule().level(t))
    assert seen == [0.0, 6.5, 999.0]
    noisy = NetworkDenoiser(
        network, (2,), from_clean, lambda level: math.log(level.ratio), dtype=torch.float64, device=CPU
    )
    noisy(draw(3, 2), VESchedule().level(math.e))
    assert seen[3] == pytest.approx(1)


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    level = VPSchedule().level(400)
    eps, v = draw(3, 2, 4, 4), torch.tanh(draw(3, 2, 4, 4, seed=2))
    denoiser = NetworkDenoiser(
        lambda x_t, time: torch.cat([eps, v], 1), (2, 4, 4), learned_variance=True, dtype=torch.float64, device=CPU
    )
    x_t = draw(3, 2, 4, 4, seed=3)
    estimate = denoiser(x_t, level)
    torch.testing.assert_close(estimate.mean, (x_t - level.sigma * eps) / level.alpha)
    torch.testing.assert_close(estimate.fraction, (v + 1) / 2)
    assert estimate.variance is None


def test_dtype_and_device_are_the_networks() -> None:
    denoiser = NetworkDenoiser(nn.Linear(3, 3).double(), (3,))
    assert (denoiser.dtype, denoiser.device, denoiser.event_shape) == (torch.float64, CPU, torch.Size([3]))


def test_a_network_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="without parameters; give dtype and device"):
        NetworkDenoiser(lambda x_t, time: x_t, (2,))
    wide = NetworkDenoiser(lambda x_t, time: torch.cat([x_t, x_t], 1), (2,), dtype=torch.float64, device=CPU)
    with pytest.raises(
        ValueError, match=r"output of shape \(3, 4\); expected \(3, 2\)\. Check event_shape, and learned"
    ):
        wide(draw(3, 2), VPSchedule().level(3))


def test_measured_variance_is_log_linear_in_the_log_ratio_and_flat_beyond() -> None:
    ratios, variances = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0.01, 0.2, 0.5])
    denoiser = WithVariance(GaussianDenoiser(draw(4), example_covariance(4)), ratios, variances)
    expected = {0.1: 0.01, 1.0: 0.2, 10.0: 0.5, 0.001: 0.01, 70.0: 0.5}
    expected |= {math.sqrt(0.1): math.sqrt(0.01 * 0.2), 10**0.25: 0.2**0.75 * 0.5**0.25}
    x_t = draw(2, 4)
    for ratio, variance in expected.items():
        level = VESchedule(1e-4, 100.0).level(ratio)
        estimate = denoiser(x_t, level)
        assert estimate.variance is not None
        assert float(estimate.variance.squeeze()) == pytest.approx(variance, rel=1e-6)
        torch.testing.assert_close(estimate.mean, denoiser.denoiser(x_t, level).mean, rtol=0, atol=0)


@pytest.mark.parametrize("ratios", [[1.0, 0.1], [0.1, 0.1], [0.1, 1.0, 2.0], [[0.1, 1.0]]])
def test_measured_levels_must_rise(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="two vectors of one length, the ratios rising"):
        WithVariance(GaussianDenoiser(draw(4), example_covariance(4)), torch.tensor(ratios), torch.tensor([0.1, 0.2]))


def test_measured_variances_must_be_positive() -> None:
    with pytest.raises(ValueError, match="a variance that is not positive"):
        WithVariance(GaussianDenoiser(draw(2), torch.eye(2)), torch.tensor([0.1, 1.0]), torch.tensor([0.0, 0.2]))
