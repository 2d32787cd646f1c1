"""A denoiser averaged over turns and mirrors: equivariant, unchanged where it was so already, and never worse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.diffusion.symmetric import SymmetricDenoiser

F64 = torch.float64
LEVEL = sd.VPSchedule().level(300.0)
SQUARE: dict[str, Callable[[Tensor], Tensor]] = {
    f"{turns} turns{', mirrored' * mirrored}": (
        lambda x, t=turns, m=mirrored: (x.flip(-1) if m else x).rot90(t, (-2, -1))
    )
    for turns in range(4)
    for mirrored in range(2)
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Uneven:
    """A denoiser that treats every pixel in its own way."""

    def __init__(self, *shape: int) -> None:
        self.event_shape, self.dtype, self.device = torch.Size(shape), F64, torch.device("cpu")
        self.gain, self.shift, self.calls = normal(*shape, seed=1), normal(*shape, seed=2), 0

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        self.calls += 1
        mean = self.gain * x_t + self.shift * x_t.roll(1, -1)
        return Estimate(mean, self.gain.square()[None], torch.full((1, 1, 1, 1), 0.25, dtype=F64))


@pytest.mark.parametrize("name", SQUARE)
def test_it_is_equivariant(name: str) -> None:
    denoiser, move = SymmetricDenoiser(Uneven(1, 4, 4)), SQUARE[name]
    x = normal(3, 1, 4, 4)
    here, moved = denoiser(x, LEVEL), denoiser(move(x), LEVEL)
    torch.testing.assert_close(moved.mean, move(here.mean), rtol=1e-12, atol=1e-12)
    assert here.variance is not None and moved.variance is not None and here.fraction is not None
    torch.testing.assert_close(move(moved.variance), moved.variance, rtol=1e-12, atol=1e-12)
    assert float(here.fraction) == 0.25
    assert float((Uneven(1, 4, 4)(move(x), LEVEL).mean - move(Uneven(1, 4, 4)(x, LEVEL).mean)).abs().max()) > 0.1 or (
        name == "0 turns"
    )


def test_mirrors_take_pictures_that_are_not_square() -> None:
    uneven = Uneven(1, 3, 5)
    denoiser, x = SymmetricDenoiser(uneven, "mirrors"), normal(2, 1, 3, 5)
    here = denoiser(x, LEVEL).mean
    assert uneven.calls == denoiser.order == 4
    for axes in ((-1,), (-2,), (-1, -2)):
        torch.testing.assert_close(denoiser(x.flip(axes), LEVEL).mean, here.flip(axes), rtol=1e-12, atol=1e-12)


def test_it_is_the_mean_over_the_group_and_changes_it_once() -> None:
    uneven, x = Uneven(1, 4, 4), normal(3, 1, 4, 4)
    once = SymmetricDenoiser(uneven)
    inverse = {"1 turns": "3 turns", "3 turns": "1 turns"}
    terms = [SQUARE[inverse.get(name, name)](uneven(move(x), LEVEL).mean) for name, move in SQUARE.items()]
    torch.testing.assert_close(once(x, LEVEL).mean, torch.stack(terms).mean(0), rtol=1e-12, atol=1e-12)
    twice = SymmetricDenoiser(once)
    torch.testing.assert_close(twice(x, LEVEL).mean, once(x, LEVEL).mean, rtol=1e-12, atol=1e-12)


def test_an_invariant_law_keeps_its_exact_denoiser() -> None:
    frequency = torch.fft.fftfreq(8, dtype=F64) * 8
    spectrum = (1 + frequency[:, None] ** 2 + frequency**2)[None] ** -1.5
    exact = sd.GaussianFieldDenoiser(torch.zeros(1, 8, 8, dtype=F64), spectrum)
    x = normal(2, 1, 8, 8)
    found = SymmetricDenoiser(exact)(x, LEVEL).mean
    torch.testing.assert_close(found, exact(x, LEVEL).mean, rtol=1e-10, atol=1e-10)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="symmetries 'turns'"):
        SymmetricDenoiser(Uneven(1, 4, 4), "turns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(1, 3, 5\) for the symmetries 'square'"):
        SymmetricDenoiser(Uneven(1, 3, 5))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        SymmetricDenoiser(Uneven(4), "mirrors")


def test_it_enters_a_prior() -> None:
    prior = sd.DiffusionPrior(Uneven(1, 4, 4), sd.VPSchedule(), num_steps=3)
    symmetric = prior.replace(denoiser=SymmetricDenoiser(prior.chain.denoiser))
    assert symmetric.chain.num_steps == 3
    assert symmetric.sample().shape == (1, 4, 4)
