r"""How the study's pictures are measured.

A picture x on [-1, 1] is an electron yield I = (x + 1) / 2. It is blurred and measured with Gaussian noise,

    y = k * x + sigma(dose) noise,        sigma(dose) = 2 sqrt(1 / (2 dose) + READ^2),

the noise that counting ``dose`` electrons per pixel at I = 1 and a read-out noise of READ give at half brightness,
taken to be the same everywhere: then every method of the study can be given the law that the measurement has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import smcdiff as sd

__all__ = [
    "DEFECT_RATE",
    "DOSES",
    "SEEN",
    "SIZE",
    "UNSEEN",
    "WIDTHS",
    "gaussian",
    "measure",
    "measure_majority",
    "noise",
]

#: Of the population that the conditional network's training pictures come from, which leaves out those with a defect of
#: the kinds in UNSEEN: 1 % of its pictures have a defect. Its initial weights are those of a prior that saw all kinds.
DEFECT_RATE = 0.02
SEEN = ("break", "pinch", "missing", "closed")
UNSEEN = ("bridge", "merged", "particle")

#: What the conditional network was trained on: standard deviations of a Gaussian blur in pixels, and doses.
WIDTHS = (0.6, 2.0)
DOSES = (20.0, 400.0)

#: Standard deviation of the read-out noise, on the scale of I.
READ = 0.03
#: Of a kernel: wide enough for 1.4 times the widest blur.
SIZE = 21


def noise(dose: float) -> float:
    """sigma(dose), on the scale of x."""
    return 2 * math.sqrt(0.5 / dose + READ**2)


def gaussian(width: Tensor) -> Tensor:
    """Gaussian kernels of these standard deviations in pixels, (*batch,) to (*batch, SIZE, SIZE)."""
    return sd.gaussian_psf(width, SIZE)


def measure(x: Tensor, kernel: Tensor, sigma: Tensor | float, generator: torch.Generator) -> Tensor:
    """y of clean pictures x, (m, 1, rows, columns), with one kernel each or one for all."""
    return sd.Blur(kernel)(x) + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def measure_majority(x: Tensor, generator: torch.Generator) -> Tensor:
    """y for training: blur widths uniform, doses log-uniform in their ranges, one each."""
    share = torch.rand(2, len(x), generator=generator)
    width = WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * share[0]
    dose = DOSES[0] * (DOSES[1] / DOSES[0]) ** share[1]
    sigma = 2 * (0.5 / dose + READ**2).sqrt()
    return measure(x.cpu(), gaussian(width), sigma[:, None, None, None], generator)
