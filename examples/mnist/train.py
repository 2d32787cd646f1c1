"""Train the digits' prior and the two classifiers.

    python -m examples.mnist.train --mnist FOLDER --out WEIGHTS

FOLDER holds MNIST's test file; see examples/mnist/data.py for how it is divided. WEIGHTS becomes

    WEIGHTS/prior       a diffusers pipeline folder, which ``sd.load_prior(Path("WEIGHTS/prior"))`` reads, with the
                        covariance of x_0 given x_t measured on the held-out digits beside its weights
    WEIGHTS/guide.pt    the classifier that is the likelihood
    WEIGHTS/judge.pt    the classifier that judges: another architecture, other images, another seed

What is there already is not made again, and a training of the prior that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import nn

import smcdiff as sd
from examples.mnist.classifiers import Guide, Judge, accuracy, train_classifier
from examples.mnist.data import CALIBRATION, Digits, read_digits
from examples.train_prior import small_unet
from smcdiff.diffusion.adapters.calibrated import FILE as COVARIANCE_FILE
from smcdiff.diffusion.adapters.calibrated import save_covariance
from smcdiff.diffusion.adapters.diffusers import SpaceToDepth
from smcdiff.diffusion.calibration import calibrate
from smcdiff.training import Training


def train_prior(digits: Digits, folder: Path, channels: list[int], training: Training) -> None:
    """Train the prior, measure its covariance and save both. Weights are kept in half precision."""
    torch.manual_seed(training.seed)
    factor = 2
    unet: Any = small_unet(training.size // factor, factor**2, channels, attention=False)
    network = SpaceToDepth(unet, factor)
    print(f"prior: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters")
    scheduler: Any = DDPMScheduler(1000, 1e-4, 2e-2, "linear", prediction_type="v_prediction", clip_sample=False)
    images = digits.part("prior").images
    average = training.run(network, images, scheduler.alphas_cumprod, folder.with_suffix(".checkpoint.pt"))
    pipeline: Any = DDPMPipeline(average.unet.half(), scheduler)
    pipeline.save_pretrained(folder)
    extra = {"event_shape": [1, training.size, training.size], "space_to_depth": factor}
    (folder / "smcdiff.json").write_text(json.dumps(extra, indent=2) + "\n")


def measure_covariance(digits: Digits, folder: Path) -> None:
    """The spectral covariance of the prior in both bases, kept beside its weights."""
    prior = sd.load_prior(folder, num_steps=32, grid=sd.LogGrid())
    images = digits.part("held out").images[:CALIBRATION]
    measured = [calibrate(prior.chain, images, basis=basis, seed=1) for basis in ("dct", "fft")]
    print(measured[0])
    save_covariance(folder, [found.covariance for found in measured])


def train_classifiers(digits: Digits, out: Path, steps: int, seed: int) -> None:
    """Train, save and test both classifiers."""
    held_out = digits.part("held out")
    makers: dict[str, type[nn.Module]] = {"guide": Guide, "judge": Judge}
    for number, (name, make) in enumerate(makers.items()):
        file, mine = out / f"{name}.pt", digits.part(name)
        if file.exists():
            continue
        started = time.monotonic()
        network = train_classifier(make, mine.images, mine.labels, steps, seed + number)
        torch.save(network.state_dict(), file)
        share = accuracy(network, held_out.images, held_out.labels)
        print(f"{name}: {100 * share:.1f} % of 1000 held-out digits right, {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder with MNIST's test file")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the weights in")
    parser.add_argument("--steps", type=int, default=4000, help="gradient steps of the prior")
    parser.add_argument("--classifier-steps", type=int, default=1500, help="gradient steps of each classifier")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64], help="of the prior at each resolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    digits = read_digits(arguments.mnist)
    arguments.out.mkdir(parents=True, exist_ok=True)
    prior = arguments.out / "prior"
    if not (prior / "model_index.json").exists():
        training = Training(arguments.steps, size=32, seed=arguments.seed, log_share=0.25, upright=True)
        train_prior(digits, prior, arguments.channels, training)
    if not (prior / COVARIANCE_FILE).exists():
        measure_covariance(digits, prior)
    train_classifiers(digits, arguments.out, arguments.classifier_steps, arguments.seed)


if __name__ == "__main__":
    main()
