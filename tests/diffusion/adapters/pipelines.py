"""Small random pipelines of the diffusers library; importing this skips the test module where it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
except (ImportError, RuntimeError) as error:  # RuntimeError: there, but a library below it is broken
    pytest.skip(f'diffusers cannot be imported; pip install "smcdiff[zoo]": {error}', allow_module_level=True)

__all__ = ["DDIMScheduler", "DDPMScheduler", "UNet2DModel", "save_pipeline"]


def save_pipeline(
    folder: Path,
    *,
    channels: int = 1,
    factor: int = 1,
    scheduler: type[Any] = DDPMScheduler,
    network: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Write a pipeline with a two-level U-Net of random weights, trained at 8 x 8 pixels; returns the U-Net in float64.

    Args:
        channels: of a picture.
        factor: of the space-to-depth step; with 1 no ``smcdiff.json`` is written.
        scheduler: class of it, made with ``settings``.
        network: settings of the U-Net that differ.
    """
    torch.manual_seed(0)
    inside = channels * factor**2
    learned = settings.get("variance_type") == "learned_range"
    unet = UNet2DModel(
        **{
            "sample_size": 8 // factor,
            "in_channels": inside,
            "out_channels": inside * (2 if learned else 1),
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "add_attention": False,
            **(network or {}),
        }
    )
    DDPMPipeline(unet, scheduler(**settings)).save_pretrained(folder)
    if factor > 1:
        ours = {"event_shape": [channels, 8, 8], "space_to_depth": factor}
        (folder / "smcdiff.json").write_text(json.dumps(ours))
    return unet.eval().double()
