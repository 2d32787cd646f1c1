"""Measure the covariance of x_0 given x_t of a trained prior and keep it beside its weights.

Those of the two priors that ship were made by

    python examples/calibrate_prior.py wafer64 --seed 1
    python examples/calibrate_prior.py sem64 --draws --seed 1

wafer64 on pictures of its generator that it was not trained on; sem64 on its own draws, since all pictures it was not
trained on are kept for tests.

With ``--head FILE`` the covariance that the prior has is left as it is, and a variance head that rescales it picture by
picture (:mod:`smcdiff.diffusion.variance_head`) is fitted on other pictures and written to FILE:

    python examples/calibrate_prior.py wafer64 --head head.safetensors --basis dct --images 256 --levels 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import smcdiff as sd
from smcdiff.diffusion.adapters.calibrated import save_covariance, save_head
from smcdiff.diffusion.calibration import calibrate
from smcdiff.diffusion.covariance_models import SpectralBasis
from smcdiff.diffusion.variance_head import fit_variance_head
from smcdiff.zoo import FOLDER
from smcdiff.zoo.wafer import Wafer


def pictures(prior: sd.DiffusionPrior, draws: bool, number: int, seed: int) -> torch.Tensor:
    """Pictures the prior was not trained on: its draws, or the wafer generator's."""
    if draws:
        long = prior.replace(num_steps=200, variance="fixed_large", grid=sd.LinspaceGrid())
        generator = torch.Generator().manual_seed(seed)
        parts = range(0, number, 64)
        return torch.cat([long.chain.sample(min(64, number - start), generator) for start in parts])
    drawn = Wafer(size=prior.event_shape[-1], defect_rate=0.03).draw_images(np.random.default_rng(seed), number)
    return torch.from_numpy(drawn).to(prior.chain.denoiser.dtype)


def fit_head(prior: sd.DiffusionPrior, images: torch.Tensor, basis: SpectralBasis, seed: int, path: Path) -> None:
    """Fit a head to a prior's covariance and write it down; in pixels, to one measured on the same images."""
    covariance = prior.covariance
    if basis == "pixels":
        covariance = calibrate(prior.chain, images, basis=basis, seed=seed).covariance
    if not isinstance(covariance, sd.SpectralCovariance):
        raise SystemExit("the prior has no covariance yet; run this script without --head first")
    fitted = fit_variance_head(prior.chain, images, covariance, seed=seed)
    print(fitted)
    save_head(path, fitted.covariance.head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", help="name of a prior that ships, or a diffusers pipeline folder")
    parser.add_argument("--draws", action="store_true", help="measure on draws of the prior, not on wafer pictures")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--levels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--head", type=Path, help="fit a variance head instead, into this file")
    parser.add_argument("--basis", choices=["dct", "fft", "pixels"], default="dct", help="of the head's covariance")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    basis: SpectralBasis = "fft" if arguments.basis == "fft" else "dct"
    prior = sd.load_prior(arguments.prior, num_steps=arguments.levels, grid=sd.LogGrid(), basis=basis)
    seed = arguments.seed
    if arguments.head is not None:
        images = pictures(prior, arguments.draws, arguments.images, seed + 1)
        fit_head(prior, images, arguments.basis, seed + 1, arguments.head)
        return
    images = pictures(prior, arguments.draws, arguments.images, seed)
    covariances = []
    for measured_basis in ("dct", "fft"):
        measured = calibrate(prior.chain, images, basis=measured_basis, seed=seed)
        print(measured)
        covariances.append(measured.covariance)
    shipped = FOLDER / arguments.prior
    save_covariance(shipped if shipped.is_dir() else Path(arguments.prior), covariances)


if __name__ == "__main__":
    main()
