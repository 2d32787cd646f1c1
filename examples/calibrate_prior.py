"""Measure the covariance of x_0 given x_t of a trained prior and keep it beside its weights.

Those of the two priors that ship were made by

    python examples/calibrate_prior.py wafer64 --seed 1
    python examples/calibrate_prior.py sem64 --draws --seed 1

wafer64 on pictures of its generator that it was not trained on; sem64 on its own draws, since all pictures it was not
trained on are kept for tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import smcdiff as sd
from smcdiff.diffusion.adapters.calibrated import save_covariance
from smcdiff.diffusion.calibration import calibrate
from smcdiff.zoo import FOLDER
from smcdiff.zoo.wafer import Wafer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", help="name of a prior that ships, or a diffusers pipeline folder")
    parser.add_argument("--draws", action="store_true", help="measure on draws of the prior, not on wafer pictures")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--levels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    prior = sd.load_prior(arguments.prior, num_steps=arguments.levels, grid=sd.LogGrid())
    if arguments.draws:
        long = prior.replace(num_steps=200, variance="fixed_large", grid=sd.LinspaceGrid())
        generator = torch.Generator().manual_seed(arguments.seed)
        parts = range(0, arguments.images, 64)
        images = torch.cat([long.chain.sample(min(64, arguments.images - start), generator) for start in parts])
    else:
        size = prior.event_shape[-1]
        pictures = Wafer(size=size).draw_images(np.random.default_rng(arguments.seed), arguments.images)
        images = torch.from_numpy(pictures).to(prior.chain.denoiser.dtype)
    covariances = []
    for basis in ("dct", "fft"):
        measured = calibrate(prior.chain, images, basis=basis, seed=arguments.seed)
        print(measured)
        covariances.append(measured.covariance)
    shipped = FOLDER / arguments.prior
    save_covariance(shipped if shipped.is_dir() else Path(arguments.prior), covariances)


if __name__ == "__main__":
    main()
