"""Pipeline folders against the diffusers library's own numbers, step by step in float64."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smcdiff.diffusion.adapters.diffusers import SpaceToDepth, load_pipeline
from smcdiff.diffusion.denoiser import NetworkDenoiser
from smcdiff.diffusion.kernels import Variance
from smcdiff.diffusion.schedule import Grid, KarrasGrid, LeadingGrid, LinspaceGrid, TrailingGrid, VPSchedule
from tests.diffusion.adapters.pipelines import DDIMScheduler, DDPMScheduler, save_pipeline

each_prediction = pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])


def in_float64(scheduler: Any) -> Any:
    """The scheduler with its table (made in float32) carried in float64 from here on."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int, shape: tuple[int, ...] = (2, 1, 8, 8)) -> Tensor:
    """What diffusers draws from ``generator(seed)``."""
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


@each_prediction
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    ("kind", "variance", "grid"),
    [
        ("fixed_small", "posterior", LinspaceGrid()),
        ("fixed_small", "posterior", TrailingGrid()),
        ("fixed_large", "fixed_large", LinspaceGrid()),
        ("learned_range", "learned", LinspaceGrid()),
    ],
)
def test_ancestral_steps_are_those_of_ddpm_scheduler(
    tmp_path: Path, prediction: str, clip: bool, kind: str, variance: Variance, grid: Grid
) -> None:
    """A whole chain of five steps, on the same times and under the same noise."""
    settings: dict[str, Any] = {"prediction_type": prediction, "variance_type": kind}
    settings |= {"clip_sample": clip, "clip_sample_range": 0.4}
    unet = save_pipeline(tmp_path, **settings)
    chain = load_pipeline(tmp_path, num_steps=5, dtype=torch.float64, variance=variance, grid=grid).chain
    assert chain.clip == ((-0.4, 0.4) if clip else None)
    scheduler = in_float64(DDPMScheduler(**settings))
    scheduler.set_timesteps(timesteps=[int(level.t) - 1 for level in reversed(chain.levels[1:])])
    x = theirs = noise(0)
    with torch.no_grad():
        for k in range(5, 0, -1):
            index = int(chain.levels[k].t) - 1
            theirs = scheduler.step(unet(theirs, index).sample, index, theirs, generator(k)).prev_sample
            x = chain.transition(k, x, chain.estimate(k, x)).sample(noise(k))
            torch.testing.assert_close(x, theirs, rtol=1e-8, atol=1e-8)


@each_prediction
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.85])
def test_ddim_steps_are_those_of_ddim_scheduler(tmp_path: Path, prediction: str, clip: bool, eta: float) -> None:
    """Where x0_hat is clipped, eps_hat is the one that belongs to the clipped x0_hat."""
    settings: dict[str, Any] = {"prediction_type": prediction, "clip_sample": clip, "clip_sample_range": 0.4}
    unet = save_pipeline(tmp_path, scheduler=DDIMScheduler, **settings)
    chain = load_pipeline(tmp_path, num_steps=5, dtype=torch.float64, eta=eta, grid=LeadingGrid()).chain
    assert chain.clip == ((-0.4, 0.4) if clip else None)
    scheduler = in_float64(DDIMScheduler(**settings))
    scheduler.set_timesteps(5)
    x = theirs = noise(0)
    with torch.no_grad():
        for k, index in zip(range(5, 0, -1), scheduler.timesteps.tolist(), strict=True):
            output = unet(theirs, index).sample
            stepped = scheduler.step(
                output, index, theirs, eta, use_clipped_model_output=True, variance_noise=noise(k) if eta else None
            )
            theirs = stepped.prev_sample
            x = chain.transition(k, x, chain.estimate(k, x)).sample(noise(k))
            torch.testing.assert_close(x, theirs, rtol=1e-8, atol=1e-8)


def test_the_network_sees_blocks_of_pixels_and_times_between_the_training_steps(tmp_path: Path) -> None:
    """At a size it was not trained at, against the blocks laid out by hand."""
    unet = save_pipeline(tmp_path, channels=2, factor=2, prediction_type="sample", clip_sample=False)
    prior = load_pipeline(tmp_path, event_shape=(2, 12, 16), dtype=torch.float64)
    assert prior.event_shape == (2, 12, 16)
    x_t = noise(1, (3, 2, 12, 16))
    blocks = torch.stack([x_t[:, c, i::2, j::2] for c in range(2) for i in range(2) for j in range(2)], 1)
    for time in (41.0, 41.5):
        with torch.no_grad():
            output = unet(blocks, torch.tensor(time)).sample
        expected = torch.empty_like(x_t)
        for channel in range(8):
            c, i, j = channel // 4, channel // 2 % 2, channel % 2
            expected[:, c, i::2, j::2] = output[:, channel]
        got = prior.chain.denoiser(x_t, prior.chain.schedule.level(time + 1)).mean
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        cut_down = unet(blocks, 41.5).sample  # diffusers itself cuts a float down
        assert torch.equal(cut_down, unet(blocks, 41).sample) and not torch.equal(cut_down, output)


@pytest.mark.parametrize(
    ("settings", "betas"),
    [
        ({"beta_schedule": "linear"}, np.linspace(1e-4, 0.02, 1000)),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085}, np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2),
        (
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
            [
                min(0.999, 1 - (np.cos((i + 1.4) / 50.4 * np.pi / 2) / np.cos((i + 0.4) / 50.4 * np.pi / 2)) ** 2)
                for i in range(50)
            ],
        ),
        ({"trained_betas": [0.1, 0.2, 0.5]}, [0.1, 0.2, 0.5]),
    ],
    ids=["linear", "scaled_linear", "cosine", "trained"],
)
def test_schedule_is_the_table_of_the_scheduler(tmp_path: Path, settings: dict[str, Any], betas: list[float]) -> None:
    """The table itself to the last digit; against the betas in float64 to float32's rounding of a product."""
    save_pipeline(tmp_path, **settings)
    schedule = load_pipeline(tmp_path, num_steps=2).chain.schedule
    theirs = DDPMScheduler(**settings).alphas_cumprod.double().tolist()
    exact = np.cumprod(1 - np.asarray(betas))
    for index in (0, len(betas) // 2, len(betas) - 1):
        assert schedule.level(index + 1).alpha ** 2 == pytest.approx(theirs[index], rel=1e-12)
        assert theirs[index] == pytest.approx(exact[index], rel=1e-3 if index else 1e-6)


def test_linear_table_is_vp_schedule(tmp_path: Path) -> None:
    save_pipeline(tmp_path)
    schedule = load_pipeline(tmp_path).chain.schedule
    for t in (1, 10, 300, 1000):
        assert schedule.level(t).ratio == pytest.approx(VPSchedule().level(t).ratio, rel=1e-4)


def test_a_last_step_without_signal_is_left_out(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "num_train_timesteps": 100,
    }
    save_pipeline(tmp_path, **settings)
    theirs = DDPMScheduler(**settings).alphas_cumprod.double()
    assert theirs[-1] == 0
    schedule = load_pipeline(tmp_path, num_steps=10).chain.schedule
    assert schedule.t_max == 99
    assert schedule.level(99).alpha ** 2 == pytest.approx(float(theirs[98]), rel=1e-12)


def test_the_network_is_frozen(tmp_path: Path) -> None:
    """Evaluation mode (dropout would make two calls differ), no gradient for weights, one for pictures."""
    unet = save_pipeline(tmp_path, network={"dropout": 0.5}, prediction_type="sample", clip_sample=False)
    denoiser = load_pipeline(tmp_path, dtype=torch.float64).chain.denoiser
    x_t, level = noise(1).requires_grad_(), VPSchedule().level(300)
    torch.testing.assert_close(denoiser(x_t, level).mean, unet(x_t, 299).sample, rtol=1e-10, atol=1e-10)
    assert isinstance(denoiser, NetworkDenoiser) and isinstance(denoiser.network, SpaceToDepth)
    assert not any(module.training for module in denoiser.network.modules())
    assert not any(p.requires_grad for p in denoiser.network.parameters())
    (gradient,) = torch.autograd.grad(denoiser(x_t, level).mean.sum(), x_t)
    (theirs,) = torch.autograd.grad(unet(x_t, 299).sample.sum(), x_t)
    torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-10)


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked for")

    save_pipeline(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_pipeline(tmp_path).sample().shape == (1, 8, 8)


def test_settings_reach_the_chain(tmp_path: Path) -> None:
    save_pipeline(tmp_path, factor=2, clip_sample=True)
    prior = load_pipeline(
        tmp_path, num_steps=7, eta=0.6, variance="fixed_large", grid=KarrasGrid(), clip=(-2.0, 3.0), dtype=torch.float64
    )
    chain = prior.chain
    assert (chain.num_steps, chain.eta, chain.variance, chain.grid) == (7, 0.6, "fixed_large", KarrasGrid())
    assert (chain.clip, prior.event_shape, chain.denoiser.dtype) == ((-2.0, 3.0), (1, 8, 8), torch.float64)
    plain = load_pipeline(tmp_path).chain
    assert (plain.num_steps, plain.eta, plain.variance, plain.clip) == (100, 1.0, "posterior", (-1.0, 1.0))
    assert plain.denoiser.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 10, 8), (1, 8, 2), (3, 8, 8), (8, 8)])
def test_a_shape_that_the_network_cannot_take_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_pipeline(tmp_path, factor=2)
    expected = r"expected \(1, rows, columns\) with rows and columns multiples of 4, .* blocks of 2 x 2 pixels"
    with pytest.raises(ValueError, match=expected):
        load_pipeline(tmp_path, event_shape=shape)  # type: ignore[arg-type]


def test_a_size_is_needed_where_the_pipeline_names_none(tmp_path: Path) -> None:
    save_pipeline(tmp_path, network={"sample_size": None})
    with pytest.raises(ValueError, match="names no picture size; give event_shape"):
        load_pipeline(tmp_path)
    assert load_pipeline(tmp_path, event_shape=(1, 6, 4)).event_shape == (1, 6, 4)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction_type": "flow"},
            "got prediction_type 'flow' in .*; expected one of epsilon, sample, v_prediction",
        ),
        ({"thresholding": True}, "dynamic thresholding"),
        ({"_class_name": "KarrasVeScheduler"}, "scheduler of class KarrasVeScheduler in .*; expected one of DDPMSch"),
        ({"variance_type": "learned_range"}, "1 channels in and 1 out, and variance_type 'learned_range'"),
        ({"variance_type": "learned"}, "variance_type 'learned'"),
    ],
)
def test_schedulers_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_pipeline(tmp_path)
    rewrite(tmp_path / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)


def test_networks_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "labels", network={"num_class_embeds": 3})
    with pytest.raises(ValueError, match="expected an unconditional one"):
        load_pipeline(tmp_path / "labels")
    save_pipeline(tmp_path / "fourier", network={"time_embedding_type": "fourier"})
    with pytest.raises(ValueError, match="time embedding of type 'fourier'"):
        load_pipeline(tmp_path / "fourier")
    save_pipeline(tmp_path / "text")
    rewrite(tmp_path / "text/unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="network of class UNet2DConditionModel"):
        load_pipeline(tmp_path / "text")
    save_pipeline(tmp_path / "blocks", channels=3)
    (tmp_path / "blocks/smcdiff.json").write_text('{"space_to_depth": 2}')
    with pytest.raises(ValueError, match=r"space_to_depth 2 with a network of 3 channels .* multiple of 4"):
        load_pipeline(tmp_path / "blocks")


def test_folders_that_are_no_pipeline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere, which is not a folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"lacks model_index.json, unet/config.json, scheduler/scheduler_config"
    ):
        load_pipeline(tmp_path)


class Broken:
    """A library that is installed and cannot be imported, as diffusers is beside a torchvision of another torch."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("library", [None, Broken()], ids=["missing", "broken"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    save_pipeline(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", library)
    with pytest.raises(ImportError, match=r'pip install "smcdiff\[zoo\]"') as caught:
        load_pipeline(tmp_path)
    assert library is None or "torchvision::nms" in str(caught.value)


def test_space_to_depth_of_one_is_the_network_itself(tmp_path: Path) -> None:
    unet = save_pipeline(tmp_path)
    x_t = noise(1)
    with torch.no_grad():
        torch.testing.assert_close(SpaceToDepth(unet)(x_t, 7.0), unet(x_t, 7).sample, rtol=0, atol=0)
        index = torch.tensor([3, 500])  # as in training: one time for each picture
        torch.testing.assert_close(SpaceToDepth(unet)(x_t, index), unet(x_t, index).sample, rtol=0, atol=0)
