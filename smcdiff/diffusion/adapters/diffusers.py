r"""Networks and pipelines of the diffusers library as denoisers; the only place that knows their conventions.

A pipeline folder holds ``model_index.json``, ``unet/`` and ``scheduler/``. Ours may add ``smcdiff.json`` with the
shape of one picture and the factor of a space-to-depth step in front of the U-Net, which diffusers itself does not
know: the U-Net then sees pictures of a quarter of the pixels with four times the channels.

The scheduler's table of alpha_bar becomes the schedule; training index i is noise time t = i + 1. Its
``prediction_type`` names the parametrisation,

    epsilon         x0_hat = (x_t - sigma_t output) / alpha_t,
    sample          x0_hat = output,
    v_prediction    x0_hat = alpha_t x_t - sigma_t output,

its ``variance_type`` "learned_range" says that the output has a second half of channels for the variance, and its
``clip_sample`` that x0_hat is clipped. Which times a chain visits, and with which variance, is not read from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smcdiff.diffusion.adapters.calibrated import load_covariance
from smcdiff.diffusion.covariance_models import SpectralBasis
from smcdiff.diffusion.denoiser import NetworkDenoiser, Parametrisation, from_clean, from_epsilon, from_velocity
from smcdiff.diffusion.kernels import Variance
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import Grid, TabulatedSchedule

__all__ = ["SpaceToDepth", "load_pipeline"]

PARAMETRISATIONS: dict[str, Parametrisation] = {
    "epsilon": from_epsilon,
    "sample": from_clean,
    "v_prediction": from_velocity,
}

#: Schedulers with the alpha_bar table of a variance-preserving model, as DDPMScheduler builds it from their settings.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


class SpaceToDepth(nn.Module):
    """A U-Net of the diffusers library run on blocks of pixels laid into channels.

    Args:
        unet: takes (batch, channels * factor^2, rows / factor, columns / factor) and a time, returns ``.sample``.
        factor: side of a block, in pixels; 1 leaves pictures as they are.
    """

    def __init__(self, unet: nn.Module, factor: int = 1) -> None:
        super().__init__()
        self.unet = unet
        self.factor = factor

    def forward(self, x_t: Tensor, index: Tensor | float) -> Tensor:
        if not isinstance(index, Tensor):  # diffusers cuts a plain float down to an integer
            index = torch.full((), float(index), device=x_t.device)
        blocks = functional.pixel_unshuffle(x_t, self.factor)
        return functional.pixel_shuffle(self.unet(blocks, index).sample, self.factor)


def load_pipeline(
    folder: Path,
    *,
    event_shape: tuple[int, int, int] | None = None,
    num_steps: int = 100,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    eta: float = 1.0,
    variance: Variance = "posterior",
    grid: Grid | None = None,
    clip: tuple[float, float] | None = None,
    basis: SpectralBasis = "dct",
) -> DiffusionPrior:
    """The prior in a local diffusers folder: an unconditional ``UNet2DModel`` and a discrete-time scheduler.

    Nothing is downloaded. The network is in evaluation mode and its weights take no gradient.

    Args:
        folder: holds ``model_index.json``, ``unet/``, ``scheduler/`` and, optionally, ``smcdiff.json``
            with ``event_shape`` and ``space_to_depth``.
        event_shape: (channels, rows, columns) of one picture; None takes that of ``smcdiff.json``, or else the size
            the network was trained at. Rows and columns may be others, as far as the network can halve them.
        num_steps: K, the number of steps of the chain.
        device, dtype: of the network and its events; None leaves them as loaded.
        eta: share of the ancestral noise, in [0, 1].
        variance: of a step (see :mod:`smcdiff.diffusion.kernels`).
        grid: where the noise times lie; None takes the schedule's default.
        clip: (low, high) that x0_hat is clipped to; None takes the pipeline's own choice, and
            ``(-math.inf, math.inf)`` clips nothing.
        basis: of the covariance of x_0 given x_t, where the folder keeps one: "dct", or "fft" for measurements that
            are circular convolutions.

    Raises:
        FileNotFoundError: for a folder that does not exist or is not a pipeline.
        ImportError: where diffusers is not installed or cannot be imported.
        ValueError: for a pipeline of another kind than described above, or an event shape that the network cannot take.
    """
    folder = Path(folder)
    _check_folder(folder)
    unet_class, scheduler_class = _import_diffusers()
    settings = _scheduler_settings(folder)
    scheduler = scheduler_class.from_config(settings)
    unet = unet_class.from_pretrained(folder, subfolder="unet", local_files_only=True, low_cpu_mem_usage=False)
    learned = scheduler.config.variance_type == "learned_range"
    _check_network(unet, scheduler.config.variance_type, folder)
    extra = folder / "smcdiff.json"
    ours: dict[str, Any] = json.loads(extra.read_text()) if extra.is_file() else {}
    factor = int(ours.get("space_to_depth", 1))
    shape = _event_shape(unet, factor, event_shape or ours.get("event_shape"), folder)
    network = SpaceToDepth(unet, factor).to(device=device, dtype=dtype).eval().requires_grad_(False)
    parametrisation = PARAMETRISATIONS[scheduler.config.prediction_type]
    denoiser = NetworkDenoiser(network, shape, parametrisation, learned_variance=learned)
    table = scheduler.alphas_cumprod.double().numpy()
    schedule = TabulatedSchedule(table[table > 0])  # a last step without any signal (zero terminal SNR) is left out
    if clip is None and settings.get("clip_sample", False):
        clip = (-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    covariance = load_covariance(folder, basis, shape)
    return DiffusionPrior(
        denoiser, schedule, num_steps, eta, variance=variance, grid=grid, clip=clip, covariance=covariance
    )


def _import_diffusers() -> tuple[Any, Any]:
    """The classes UNet2DModel and DDPMScheduler."""
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: diffusers is there, a library below it is broken
        raise ImportError(
            'a pipeline folder needs the diffusers library: pip install "smcdiff[zoo]". If it is installed, a library '
            f"that it imports is missing or broken (torchvision must fit torch). Importing it said: {error}"
        ) from error
    return UNet2DModel, DDPMScheduler


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"got {folder}, which is not a folder; expected one that save_pretrained wrote")
    needed = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"got {folder}, which is not a diffusers pipeline folder: it lacks {', '.join(missing)}. Save one with "
            "diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)"
        )
    kind = json.loads((folder / "unet/config.json").read_text()).get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"got a network of class {kind} in {folder}; expected an unconditional UNet2DModel")


def _scheduler_settings(folder: Path) -> dict[str, Any]:
    """The scheduler's settings, checked."""
    settings: dict[str, Any] = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    kind, prediction = settings.get("_class_name"), settings.get("prediction_type", "epsilon")
    if kind not in SCHEDULERS:
        raise ValueError(f"got a scheduler of class {kind} in {folder}; expected one of {', '.join(SCHEDULERS)}")
    if prediction not in PARAMETRISATIONS:
        raise ValueError(
            f"got prediction_type {prediction!r} in {folder}; expected one of {', '.join(PARAMETRISATIONS)}"
        )
    if settings.get("thresholding", False):
        raise ValueError(
            f"got a scheduler with dynamic thresholding in {folder}, which smcdiff does not have; set "
            '"thresholding" to false in scheduler_config.json, and give clip=(low, high) if pictures are bounded'
        )
    return settings


def _check_network(unet: Any, variance_type: str, folder: Path) -> None:
    config = unet.config
    if unet.class_embedding is not None or config.time_embedding_type != "positional":
        raise ValueError(
            f"got a network in {folder} with class labels or a time embedding of type {config.time_embedding_type!r}; "
            'expected an unconditional one with time_embedding_type "positional"'
        )
    expected = config.in_channels * (2 if variance_type == "learned_range" else 1)
    if variance_type == "learned" or config.out_channels != expected:
        raise ValueError(
            f"got a network with {config.in_channels} channels in and {config.out_channels} out, and variance_type "
            f'{variance_type!r}, in {folder}; expected as many out as in, or twice as many with "learned_range"'
        )


def _event_shape(
    unet: Any, factor: int, wanted: tuple[int, ...] | list[int] | None, folder: Path
) -> tuple[int, int, int]:
    """The checked shape of one picture."""
    config = unet.config
    channels, rest = divmod(config.in_channels, factor**2)
    if rest:
        raise ValueError(
            f"got space_to_depth {factor} with a network of {config.in_channels} channels in {folder}; expected a "
            f"multiple of {factor**2} channels"
        )
    if wanted is None:
        if config.sample_size is None:
            raise ValueError(f"the pipeline in {folder} names no picture size; give event_shape=(channels, rows, cols)")
        size = config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        wanted = (channels, rows * factor, columns * factor)
    block = factor * 2 ** (len(config.block_out_channels) - 1)
    shape = tuple(int(n) for n in wanted)
    if len(shape) != 3 or shape[0] != channels or any(n < block or n % block for n in shape[1:]):
        raise ValueError(
            f"got event_shape {shape} for the pipeline in {folder}; expected ({channels}, rows, columns) with rows and "
            f"columns multiples of {block}, which its network halves {len(config.block_out_channels) - 1} times"
            + (f" after blocks of {factor} x {factor} pixels" if factor > 1 else "")
            + ". Crop or pad the picture"
        )
    return shape[0], shape[1], shape[2]
