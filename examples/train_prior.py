r"""Train a small diffusion prior and save it as a diffusers pipeline folder.

The two priors that ship were made by

    python examples/train_prior.py wafer --out smcdiff/zoo/wafer64 --steps 8000 --seed 0
    python examples/train_prior.py FOLDER_OF_SEM_PICTURES --only 001-040 --out smcdiff/zoo/sem64 --steps 8000 --seed 0

The same weights trained further, at noise levels even in log(sigma / alpha) (docs/adapted.md):

    python examples/train_prior.py wafer --start smcdiff/zoo/wafer64 --out FOLDER --steps 6000 --seed 1 \
        --learning-rate 5e-4 --log-share 1

A run that was stopped goes on where its last checkpoint was written when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from smcdiff.diffusion.adapters.diffusers import SpaceToDepth
from smcdiff.restoration.images import read_image
from smcdiff.training import Training
from smcdiff.zoo.kernels import Kernels
from smcdiff.zoo.wafer import Wafer


def wafer_frames(size: int, number: int, seed: int) -> torch.Tensor:
    """Pictures of the package's own generator, 3 % of them with a defect."""
    return torch.from_numpy(Wafer(size=size, defect_rate=0.03).draw_images(np.random.default_rng(seed), number))


def kernel_frames(size: int, number: int, seed: int) -> torch.Tensor:
    """Blur kernels: simulated point-spread functions and traces of motion."""
    return torch.from_numpy(Kernels(size).draw_images(np.random.default_rng(seed), number))


def folder_frames(folder: Path, only: str | None) -> torch.Tensor:
    """Pictures of one size from a folder, sorted by name; ``only`` is a range of names such as 001-040."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".tif", ".tiff"))
    if only:
        first, last = only.split("-")
        files = [path for path in files if first <= path.stem <= last]
    if not files:
        raise SystemExit(f"no pictures to train on in {folder} (range {only}); expected PNG or TIFF files")
    frames = [read_image(path) for path in files]
    sizes = {tuple(frame.shape[1:]) for frame in frames}
    if len(sizes) > 1:
        raise SystemExit(f"got pictures of the sizes {sorted(sizes)} in {folder}; expected one size")
    return torch.stack(frames)


def small_unet(side: int, channels: int, widths: list[int], attention: bool) -> UNet2DModel:
    """A U-Net with one residual block per resolution, and attention at the coarsest where asked for."""
    down, up = ["DownBlock2D"] * len(widths), ["UpBlock2D"] * len(widths)
    if attention:
        down[-1], up[0] = "AttnDownBlock2D", "AttnUpBlock2D"
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=tuple(widths),
        norm_num_groups=8,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        add_attention=attention,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data",
        help="'wafer' for synthetic wafer pictures, 'kernels' for blur kernels, or a folder of pictures of one size "
        "(PNG, TIFF)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to save the pipeline in")
    parser.add_argument("--start", type=Path, help="folder of a pipeline of the same network to begin with")
    parser.add_argument("--only", help="train on this range of file names alone, such as 001-040")
    parser.add_argument("--images", type=int, default=20_000, help="number of synthetic pictures")
    parser.add_argument("--size", type=int, default=64, help="rows and columns of a training crop")
    parser.add_argument("--steps", type=int, default=8000, help="gradient steps")
    parser.add_argument("--batch", type=int, default=32, help="crops in a step")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 96], help="channels at each resolution")
    parser.add_argument("--space-to-depth", type=int, default=2, help="side of the pixel blocks laid into channels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="largest rate of AdamW")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weights' moving average")
    parser.add_argument("--log-share", type=float, default=0.0, help="share of crops with log-uniform noise levels")
    parser.add_argument("--attention", action="store_true", help="attention at the coarsest resolution")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.data == "wafer":
        frames = wafer_frames(arguments.size, arguments.images, arguments.seed)
    elif arguments.data == "kernels":
        frames = kernel_frames(arguments.size, arguments.images, arguments.seed)
    else:
        frames = folder_frames(Path(arguments.data), arguments.only)
    factor = arguments.space_to_depth
    unet = small_unet(arguments.size // factor, factor**2, arguments.channels, arguments.attention)
    if arguments.start:  # refuses weights of another network
        unet.load_state_dict(DDPMPipeline.from_pretrained(arguments.start).unet.state_dict())
    scheduler = DDPMScheduler(1000, 1e-4, 2e-2, "linear", prediction_type="v_prediction", clip_sample=False)
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, frames {tuple(frames.shape)}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    training = Training(
        steps=arguments.steps,
        batch=arguments.batch,
        size=arguments.size,
        learning_rate=arguments.learning_rate,
        ema=arguments.ema,
        seed=arguments.seed,
        log_share=arguments.log_share,
        upright=arguments.data == "kernels",  # the centre of an even grid is not that of its mirror image
        device=arguments.device,
    )
    checkpoint = arguments.out.with_suffix(".checkpoint.pt")
    average = training.run(SpaceToDepth(unet, factor), frames, scheduler.alphas_cumprod, checkpoint)
    DDPMPipeline(average.unet.cpu(), scheduler).save_pretrained(arguments.out)
    extra = {"event_shape": [1, arguments.size, arguments.size], "space_to_depth": factor}
    (arguments.out / "smcdiff.json").write_text(json.dumps(extra, indent=2) + "\n")


if __name__ == "__main__":
    main()
