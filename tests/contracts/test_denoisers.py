"""What every denoiser must do, one row each; a new denoiser adds a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from smcdiff.diffusion.adapters.diffusers import SpaceToDepth
from smcdiff.diffusion.analytic import (
    EmpiricalDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    StandardNormalDenoiser,
)
from smcdiff.diffusion.denoiser import (
    Denoiser,
    NetworkDenoiser,
    WithVariance,
    from_clean,
    from_epsilon,
    from_flow,
    from_velocity,
)
from smcdiff.diffusion.schedule import NoiseLevel, VPSchedule

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)
LEVELS = [VPSchedule().level(t) for t in (40, 400, 950)]


class TinyNetwork(nn.Module):
    """Two convolutions with a time-dependent bias: smooth, and with a group norm as U-Nets have."""

    def __init__(self, out_channels: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x_t: Tensor, time: float) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x_t)) + time / 1000))


@dataclass(frozen=True)
class Blocks:
    """The output type of a U-Net of the diffusers library."""

    sample: Tensor


class TinyUNet(nn.Module):
    """Takes what a U-Net behind a space-to-depth step takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, blocks: Tensor, index: Tensor) -> Blocks:
        return Blocks(torch.tanh(self.layer(blocks) + index.to(blocks.dtype) / 1000))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in every dtype."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(kind: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def covariance(dtype: torch.dtype) -> Tensor:
    factor = draw(16, 16)
    return (factor @ factor.T / 16 + 0.1 * torch.eye(16)).to(dtype)


def gaussian(dtype: torch.dtype) -> Denoiser:
    return GaussianDenoiser(draw(*SHAPE, dtype=dtype), covariance(dtype))


DENOISERS: dict[str, Callable[[torch.dtype], Denoiser]] = {
    "gaussian": gaussian,
    "mixture": lambda dtype: GaussianMixtureDenoiser(
        draw(3, *SHAPE, dtype=dtype), covariance(dtype), torch.tensor([1.0, 2.0, 1.0], dtype=dtype)
    ),
    "empirical": lambda dtype: EmpiricalDenoiser(draw(6, *SHAPE, dtype=dtype)),
    "standard normal": lambda dtype: StandardNormalDenoiser(torch.Size(SHAPE), dtype, CPU),
    "measured variance": lambda dtype: WithVariance(
        gaussian(dtype), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0.01, 0.3, 0.5])
    ),
    "epsilon network": lambda dtype: NetworkDenoiser(network(TinyNetwork, dtype), SHAPE, from_epsilon),
    "clean network": lambda dtype: NetworkDenoiser(network(TinyNetwork, dtype), SHAPE, from_clean),
    "velocity network": lambda dtype: NetworkDenoiser(network(TinyNetwork, dtype), SHAPE, from_velocity),
    "flow network": lambda dtype: NetworkDenoiser(network(TinyNetwork, dtype), SHAPE, from_flow),
    "learned variance": lambda dtype: NetworkDenoiser(
        network(lambda: TinyNetwork(2), dtype), SHAPE, learned_variance=True
    ),
    "space to depth": lambda dtype: NetworkDenoiser(
        network(lambda: SpaceToDepth(TinyUNet(), 2), dtype), SHAPE, from_velocity
    ),
}

each_denoiser = pytest.mark.parametrize("make", DENOISERS.values(), ids=DENOISERS.keys())
each_level = pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"t={level.t:g}")


def parts(denoiser: Denoiser, x_t: Tensor, level: NoiseLevel) -> dict[str, Tensor]:
    """Everything an estimate holds, spread over the events."""
    estimate = denoiser(x_t, level)
    named = {"mean": estimate.mean, "variance": estimate.variance, "fraction": estimate.fraction}
    return {name: value.expand(x_t.shape) for name, value in named.items() if value is not None}


@each_denoiser
@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_says_what_it_works_on_and_keeps_to_it(
    make: Callable[[torch.dtype], Denoiser], level: NoiseLevel, dtype: torch.dtype
) -> None:
    denoiser = make(dtype)
    assert (tuple(denoiser.event_shape), denoiser.dtype, denoiser.device) == (SHAPE, dtype, CPU)
    x_t = draw(5, *SHAPE, dtype=dtype)
    estimate = denoiser(x_t, level)
    assert estimate.mean.shape == x_t.shape
    for value in parts(denoiser, x_t, level).values():
        assert (value.dtype, value.device) == (dtype, CPU)
        assert torch.isfinite(value).all()
    if estimate.variance is not None:
        assert (estimate.variance >= 0).all()


@each_denoiser
@each_level
def test_float32_is_float64_rounded(make: Callable[[torch.dtype], Denoiser], level: NoiseLevel) -> None:
    """The mean to 1e-4 in units of x_0; rounding of x_t alone is 6e-8 sigma_t / alpha_t, at most 5e-6 here."""
    x_t = level.alpha * draw(5, *SHAPE, seed=1) + level.sigma * draw(5, *SHAPE, seed=2)
    coarse, fine = parts(make(torch.float32), x_t.float(), level), parts(make(torch.float64), x_t, level)
    for name, value in fine.items():
        torch.testing.assert_close(coarse[name].double(), value, rtol=1e-3, atol=1e-4)


@each_denoiser
@each_level
def test_an_event_does_not_see_its_neighbours(make: Callable[[torch.dtype], Denoiser], level: NoiseLevel) -> None:
    denoiser = make(torch.float64)
    x_t = draw(6, *SHAPE)
    together = parts(denoiser, x_t, level)
    crowd = parts(denoiser, torch.cat([x_t[:1], 100 * draw(5, *SHAPE, seed=3)]), level)
    cut = [parts(denoiser, piece, level) for piece in x_t.split(4)]
    turned = parts(denoiser, x_t.flip(0), level)
    for name, value in together.items():
        torch.testing.assert_close(crowd[name][0], value[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.cat([piece[name] for piece in cut]), value, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(turned[name].flip(0), value, rtol=1e-11, atol=1e-11)


@each_denoiser
@each_level
def test_the_gradient_is_the_difference_quotient(make: Callable[[torch.dtype], Denoiser], level: NoiseLevel) -> None:
    """Vector-Jacobian products of everything an estimate holds, by central differences; none leaks to a neighbour."""
    denoiser = make(torch.float64)
    x_t, direction, h = draw(3, *SHAPE), draw(3, *SHAPE, seed=4), 1e-5
    direction[1:] = 0
    for name in parts(denoiser, x_t, level):
        weights = draw(3, *SHAPE, seed=5)

        def value(x: Tensor, name: str = name, weights: Tensor = weights) -> Tensor:
            return (weights * parts(denoiser, x, level)[name]).flatten(1).sum(1)

        x = x_t.clone().requires_grad_()
        total = value(x)
        if not total.requires_grad:  # a variance that does not depend on x_t
            torch.testing.assert_close(value(x_t + direction), value(x_t), rtol=0, atol=0)
            continue
        (gradient,) = torch.autograd.grad(total[0], x)
        quotient = (value(x_t + h * direction) - value(x_t - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), quotient[0], rtol=1e-5, atol=1e-6)
        assert (gradient[1:] == 0).all() and (quotient[1:] == 0).all()


@each_denoiser
def test_the_estimate_is_a_function(make: Callable[[torch.dtype], Denoiser]) -> None:
    """Called twice, and after another level, it says the same; it changes neither x_t nor the random state."""
    denoiser, x_t = make(torch.float64), draw(4, *SHAPE)
    kept, state = x_t.clone(), torch.get_rng_state()
    first = parts(denoiser, x_t, LEVELS[1])
    parts(denoiser, x_t, LEVELS[2])
    for name, value in parts(denoiser, x_t, LEVELS[1]).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)
    assert torch.equal(x_t, kept) and torch.equal(torch.get_rng_state(), state)
