"""Draw a sheet of unconditional samples of a prior, as its model card shows.

python examples/sample_sheet.py wafer64 --out smcdiff/zoo/wafer64/samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import smcdiff as sd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", help="a shipped name or a pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    prior = sd.load_prior(arguments.prior, num_steps=arguments.steps, variance="fixed_large")
    draws = prior.sample(torch.Size((arguments.rows, arguments.columns)))[:, :, 0].clamp(-1, 1)
    sheet = torch.nn.functional.pad(draws, (1, 1, 1, 1), value=1.0).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    Image.fromarray(((sheet.numpy() + 1) * 127.5).round().astype(np.uint8)).save(arguments.out)


if __name__ == "__main__":
    main()
