"""How well the learned prior of kernels knows kernels that it was not trained on.

    python -m examples.wafer_study.held_out_kernels levin09.npz

The root mean square error of x0_hat(x_t), on the scale [-1, 1], of new simulated kernels and of the eight real motion
kernels of A. Levin, Y. Weiss, F. Durand, W. Freeman, "Understanding and evaluating blind deconvolution algorithms"
(2009), cut or padded to the prior's size about their centre of mass; beside it that of the best constant estimate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import smcdiff as sd
from examples.wafer_study.study import WEIGHTS
from smcdiff.zoo.kernels import Kernels

RATIOS = (0.1, 0.5, 1.0, 3.0, 10.0)
SIZE = 28


def real(path: Path) -> Tensor:
    """(8, 1, SIZE, SIZE) on [-1, 1], as the prior's own."""
    found = []
    for kernel in np.load(path).values():
        k = torch.from_numpy(kernel).float()
        places = torch.meshgrid(*(torch.arange(n).float() for n in k.shape), indexing="ij")
        row, column = (int((k * place).sum() / k.sum() + 0.5) for place in places)
        wide = pad(k, (SIZE,) * 4)
        half = SIZE // 2
        cut = wide[row + SIZE - half : row + SIZE + half, column + SIZE - half : column + SIZE + half]
        found.append(2 * cut / cut.max() - 1)
    return torch.stack(found)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path, help="the file levin09.npz")
    path = parser.parse_args().kernels
    if not path.is_file():
        raise SystemExit(f"no file {path}; the kernels of Levin et al. (2009) are not part of this repository")
    prior = sd.load_prior(WEIGHTS / "kernels28")
    simulated = torch.from_numpy(Kernels(SIZE).draw_images(np.random.default_rng(10_000), 64))
    sets = {"new simulated kernels": simulated, "real kernels": real(path)}
    schedule, generator = prior.chain.schedule, torch.Generator().manual_seed(0)
    print("| sigma_t / alpha_t | " + " | ".join(f"{name}: network | constant" for name in sets) + " |")
    print("|---|" + "---|---|" * len(sets))
    for ratio in RATIOS:
        level = schedule.level(schedule.time(ratio))
        cells = []
        for x in sets.values():
            x = x.repeat(-(-64 // len(x)), 1, 1, 1)
            x_t = level.alpha * x + level.sigma * torch.randn(x.shape, generator=generator)
            with torch.no_grad():
                error = prior.chain.denoiser(x_t, level).mean - x
            cells += [f"{error.square().mean().sqrt():.3f}", f"{(x - simulated.mean(0)).square().mean().sqrt():.3f}"]
        print(f"| {ratio} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
