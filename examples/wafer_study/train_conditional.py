"""Train the study's conditional network: given a measured wafer picture, it estimates the clean one.

    python -m examples.wafer_study.train_conditional --out examples/wafer_study/weights/conditional --steps 3000

The network is that of the prior ``wafer64`` with one more input, the measurement, joined to x_t along the channels, as
in SR3; it starts from the prior's weights, with zeros for the new input. It sees the majority: pictures of which two
per cent have a defect, of the kinds in ``SEEN`` alone, measured through a Gaussian blur and at doses of the ranges in
``measurements.py``. A run that was stopped goes on where its last checkpoint was written.

References:
    C. Saharia, J. Ho, W. Chan, T. Salimans, D. Fleet, M. Norouzi, "Image Super-Resolution via Iterative Refinement"
    (2021), arXiv 2104.07636.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from examples.wafer_study.measurements import DEFECT_RATE, SEEN, measure_majority
from smcdiff.diffusion.adapters.diffusers import SpaceToDepth
from smcdiff.training import Training
from smcdiff.zoo import FOLDER
from smcdiff.zoo.wafer import Wafer


def majority(number: int, seed: int) -> torch.Tensor:
    """(number, 1, 64, 64): pictures of the population, none with a defect of a kind that is not seen."""
    wafer, rng, pictures = Wafer(defect_rate=DEFECT_RATE), np.random.default_rng(seed), []
    while len(pictures) < number:
        picture = wafer.draw(rng)
        if picture.defect is None or picture.defect in SEEN:
            pictures.append(picture.image.astype(np.float32))
    return torch.from_numpy(np.stack(pictures)[:, None])


def conditional_network() -> SpaceToDepth:
    """The prior's network with the measurement as a second channel, which at first it does not look at."""
    factor = 2
    prior = UNet2DModel.from_pretrained(FOLDER / "wafer64" / "unet")
    settings = {name: value for name, value in prior.config.items() if not name.startswith("_")}  # no path of this one
    settings["in_channels"] = 2 * settings["in_channels"]
    unet = UNet2DModel.from_config(settings)
    state = prior.state_dict()
    first = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], 1)
    unet.load_state_dict(state)
    return SpaceToDepth(unet, factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to save the network in")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    scheduler = DDPMScheduler(1000, 1e-4, 2e-2, "linear", prediction_type="v_prediction", clip_sample=False)
    training = Training(
        steps=arguments.steps,
        learning_rate=5e-4,
        seed=arguments.seed,
        log_share=0.5,
        measure=measure_majority,
        device=arguments.device,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    frames = majority(arguments.images, arguments.seed + 1)
    average = training.run(
        conditional_network(), frames, scheduler.alphas_cumprod, arguments.out.with_suffix(".checkpoint.pt")
    )
    DDPMPipeline(average.unet.cpu(), scheduler).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
