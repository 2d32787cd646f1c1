"""Training against closed forms: the loss, the averaged weights, the crops, and a run that was stopped.

Statistical tests fail by chance with probability at most 1e-5 each; the seeds are fixed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from smcdiff.training import Training, random_crops

ALPHA_BAR = torch.tensor([0.9, 0.5, 0.08])


class Affine(nn.Module):
    """v = slope_k x_t + offset_k, one line for each training index k."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(len(ALPHA_BAR)))
        self.offset = nn.Parameter(torch.zeros(len(ALPHA_BAR)))

    def forward(self, x_t: Tensor, index: Tensor) -> Tensor:
        return self.slope[index].reshape(-1, 1, 1, 1) * x_t + self.offset[index].reshape(-1, 1, 1, 1)


def grey(number: int = 40, size: int = 8) -> Tensor:
    """Independent normal pixels of mean 0.4 and standard deviation 0.6."""
    noise = torch.randn(number, 1, size, size, generator=torch.Generator().manual_seed(7))
    return 0.4 + 0.6 * (noise - noise.mean()) / noise.std()


def test_an_affine_network_learns_the_exact_v_predictor(tmp_path: Path) -> None:
    training = Training(steps=1200, batch=48, size=8, learning_rate=0.02, ema=0.99, bfloat16=False)
    average = training.run(Affine(), grey(), ALPHA_BAR, tmp_path / "run.checkpoint.pt")
    # For x_0 ~ N(m, s^2) per pixel, E[v | x_t] = -sigma_t m + alpha_t sigma_t (1 - s^2) (x_t - alpha_t m)
    # / (alpha_t^2 s^2 + sigma_t^2), since v = alpha_t eps - sigma_t x_0 and x_t = alpha_t x_0 + sigma_t eps.
    m, s = 0.4, 0.6
    alpha_t, sigma_t = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()
    slope = alpha_t * sigma_t * (1 - s**2) / (alpha_t**2 * s**2 + sigma_t**2)
    offset = -sigma_t * m - slope * alpha_t * m
    assert torch.allclose(average.slope, slope, atol=0.01)
    assert torch.allclose(average.offset, offset, atol=0.01)
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_loss_is_the_mean_squared_error_of_v() -> None:
    """With a network that returns 0 the loss is E v^2 = alpha_t^2 + sigma_t^2 E x_0^2, averaged over the indices."""
    frames, batch = grey(), 4000
    loss = Training(1, batch, 8, bfloat16=False)._loss(Affine(), frames, ALPHA_BAR, torch.Generator().manual_seed(0))
    sigma_squared = 1 - ALPHA_BAR
    square = frames.square().mean()
    expected = (ALPHA_BAR + sigma_squared * square).mean()
    # One crop's mean over its 64 pixels has variance below 0.05: 0.026 between the indices and, with v normal of mean
    # mu and variance tau^2, (2 tau^4 + 4 tau^2 mu^2) / 64 within, 0.019 on average. 4.5 standard deviations: 7e-6.
    assert abs(loss - expected) < 4.5 * (0.05 / batch) ** 0.5


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, bfloat16: bool) -> None:
    def network() -> nn.Module:
        torch.manual_seed(1)
        return Convolution()

    whole = Training(steps=60, batch=4, size=6, save_every=17, bfloat16=bfloat16)
    expected = whole.run(network(), grey(), ALPHA_BAR, tmp_path / "whole.checkpoint.pt")

    class Stopped(Exception):
        pass

    stopped = network()
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 41:  # in the 41st step, seven after the checkpoint of step 34
            raise Stopped

    hook = stopped.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        whole.run(stopped, grey(), ALPHA_BAR, tmp_path / "halves.checkpoint.pt")
    hook.remove()
    assert torch.load(tmp_path / "halves.checkpoint.pt")["done"] == 34
    torch.manual_seed(99)  # neither the global generator nor the weights of the network given matter any more
    resumed = whole.run(Convolution(), grey(), ALPHA_BAR, tmp_path / "halves.checkpoint.pt")
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    first, second = (torch.load(tmp_path / f"{name}.checkpoint.pt") for name in ("whole", "halves"))
    assert first["done"] == second["done"] == 60 and first["loss_mean"] == second["loss_mean"]
    assert all(torch.equal(first["network"][name], second["network"][name]) for name in first["network"])


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.time = nn.Embedding(len(ALPHA_BAR), 3)

    def forward(self, x_t: Tensor, index: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x_t) + self.time(index)[..., None, None]))


def test_what_is_returned_is_the_moving_average_of_the_weights(tmp_path: Path) -> None:
    network, path = Affine().double(), []
    network.register_forward_pre_hook(lambda *_: path.append(network.slope.detach().clone()))
    training = Training(steps=30, batch=4, size=8, learning_rate=0.5, ema=0.7, bfloat16=False)
    average = training.run(network, grey().double(), ALPHA_BAR.double(), tmp_path / "run.checkpoint.pt")
    path.append(network.slope.detach())
    kept = path[0]
    for i, new in enumerate(path[1:]):
        decay = min(0.7, (i + 1) / (i + 10))  # a short memory at first, so that the initial weights are forgotten
        kept = decay * kept + (1 - decay) * new
    assert torch.allclose(average.slope, kept, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(average.slope, network.slope, atol=1e-3)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rate = Training(steps=2000, learning_rate=0.5)._rate
    assert rate(0) == pytest.approx(0.5 / 200)
    assert rate(99) == pytest.approx(0.25, rel=0.01)
    assert rate(1000) == pytest.approx(0.5 * (0.01 + 0.99 / 2))
    assert rate(1500) == pytest.approx(0.5 * (0.01 + 0.99 * (1 - 0.5**0.5) / 2))
    assert rate(2000) == pytest.approx(0.005)


def test_a_share_of_the_noise_levels_is_uniform_in_the_log_of_their_ratio() -> None:
    alpha_bar = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    training = Training(steps=1, batch=40_000, log_share=0.25)
    index = training._indices(alpha_bar, torch.Generator().manual_seed(0))
    log_ratio = (1 / alpha_bar - 1).log()
    cells = torch.cat([log_ratio[:1], (log_ratio[1:] + log_ratio[:-1]) / 2, log_ratio[-1:]])
    for part, probability in ((index[:10_000], cells.diff() / (cells[-1] - cells[0])), (index[10_000:], None)):
        last = torch.tensor([0, 1, 2, 4, 9, 19, 49, 99, 199, 399, 599, 799])  # of each group, so that counts are large
        groups = torch.searchsorted(last, torch.arange(1000))
        expected = torch.zeros(13, dtype=torch.float64).index_add(
            0, groups, torch.full((1000,), 1e-3, dtype=torch.float64) if probability is None else probability
        )
        counts = torch.bincount(groups[part], minlength=13)
        assert stats.chisquare(counts, len(part) * expected).pvalue > 1e-5


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got log_share 1.5; expected a share of the crops in \[0, 1\]"):
        Training(steps=1, log_share=1.5)


def test_crops_are_all_places_and_all_eight_symmetries_alike() -> None:
    frames = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 1, 3, 4)
    possible: dict[tuple[float, ...], int] = {}
    for frame in frames:
        for row in range(2):
            for column in range(3):
                crop = frame[:, row : row + 2, column : column + 2]
                for turned in (crop, crop.transpose(-1, -2)):
                    for axes in ((), (-1,), (-2,), (-2, -1)):
                        possible[tuple(turned.flip(axes).flatten().tolist())] = 0
    assert len(possible) == 2 * 6 * 8
    crops = random_crops(frames, 9600, 2, torch.Generator().manual_seed(0))
    assert crops.shape == (9600, 1, 2, 2)
    for crop in crops:
        possible[tuple(crop.flatten().tolist())] += 1
    assert len(possible) == 96
    assert stats.chisquare(list(possible.values())).pvalue > 1e-5


def test_upright_crops_are_neither_turned_nor_mirrored(tmp_path: Path) -> None:
    frames = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 1, 3, 4)
    possible = {frames[f, :, r : r + 2, c : c + 2].flatten() for f in range(2) for r in range(2) for c in range(3)}
    wanted = {tuple(crop.tolist()) for crop in possible}
    crops = random_crops(frames, 600, 2, torch.Generator().manual_seed(0), upright=True)
    # A place is left out of 600 with probability 12 (11 / 12)^600 < 1e-20.
    assert {tuple(crop.flatten().tolist()) for crop in crops} == wanted
    seen: list[Tensor] = []

    class Watching(Affine):
        def forward(self, x_t: Tensor, index: Tensor) -> Tensor:
            seen.append(x_t)
            return super().forward(x_t, index)

    still = torch.tensor([1 - 1e-12], dtype=torch.float64)  # no noise: the network sees the crops
    Training(1, 8, 2, bfloat16=False, upright=True).run(Watching(), frames, still.float(), tmp_path / "run.pt")
    assert {tuple(crop.flatten().tolist()) for crop in seen[0]} <= wanted


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    training = Training(steps=2, batch=2, size=8)
    training.run(Affine(), grey(), ALPHA_BAR, tmp_path / "run.checkpoint.pt")
    with pytest.raises(ValueError, match="holds a run with seed 0, this one has seed 5; give the seed"):
        replace(training, seed=5).run(Affine(), grey(), ALPHA_BAR, tmp_path / "run.checkpoint.pt")


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 8, 7)])
def test_frames_smaller_than_a_crop_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \(number, channels, rows, columns\) with at least 8 rows"):
        Training(steps=2, size=8).run(Affine(), torch.zeros(shape), ALPHA_BAR, tmp_path / "run.checkpoint.pt")


class FromMeasurement(nn.Module):
    """v = a_k x_t + b_k y, a pair of numbers for each training index k."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(len(ALPHA_BAR)))
        self.b = nn.Parameter(torch.zeros(len(ALPHA_BAR)))

    def forward(self, given: Tensor, index: Tensor) -> Tensor:
        x_t, y = given.chunk(2, 1)
        return self.a[index].reshape(-1, 1, 1, 1) * x_t + self.b[index].reshape(-1, 1, 1, 1) * y


def test_a_conditional_network_learns_the_exact_conditional_v(tmp_path: Path) -> None:
    """For x_0 ~ N(0, 1) and y = x_0 + tau noise: E[x_0 | x_t, y] = (alpha x_t / sigma^2 + y / tau^2) / P with the
    precision P = 1 + alpha^2 / sigma^2 + 1 / tau^2, and v = (alpha x_t - x_0) / sigma."""
    tau = 0.5
    frames = grey()
    frames = (frames - frames.mean()) / frames.std()

    def measure(x_0: Tensor, generator: torch.Generator) -> Tensor:
        return x_0 + tau * torch.randn(x_0.shape, generator=generator)

    training = Training(1500, 64, 8, learning_rate=0.02, ema=0.99, bfloat16=False, measure=measure)
    average = training.run(FromMeasurement(), frames, ALPHA_BAR, tmp_path / "run.checkpoint.pt")
    alpha_t, sigma_t = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()
    precision = 1 + alpha_t**2 / sigma_t**2 + tau**-2
    assert torch.allclose(average.a, (alpha_t - alpha_t / sigma_t**2 / precision) / sigma_t, atol=0.03)
    assert torch.allclose(average.b, -1 / (tau**2 * precision * sigma_t), atol=0.03)
