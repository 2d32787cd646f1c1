"""The study's pictures: half of them with a defect, in five settings of dose and blur.

Picture ``number`` is in setting ``number % 5``; within a setting every second picture has a defect, and of these every
second one of a kind that the conditional network was not trained on. In the last setting the blur is wider than in its
training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from examples.wafer_study.measurements import SEEN, UNSEEN, gaussian, measure, noise
from smcdiff.zoo.wafer import Wafer, WaferPicture

__all__ = ["CONTRAST", "SETTINGS", "Problem", "Setting", "differing", "problem"]

#: A window of this many rows and columns differs if the mean of x - normal over it is larger than CONTRAST in size.
WINDOW = 5
CONTRAST = 0.4


@dataclass(frozen=True)
class Setting:
    """Blur width in pixels, electrons per pixel, and whether the conditional network was trained on the like."""

    width: float
    dose: float
    trained: bool = True


SETTINGS = (Setting(1.0, 150), Setting(1.0, 30), Setting(1.6, 150), Setting(1.6, 30), Setting(2.6, 150, trained=False))


@dataclass(frozen=True, eq=False)
class Problem:
    """One picture, measured.

    Args:
        number: of the picture.
        picture: truth, without the defect, and its mask.
        setting: how it was measured.
        seed: of the measurement's noise.
    """

    number: int
    picture: WaferPicture
    setting: Setting
    seed: int

    @property
    def defect(self) -> str:
        """ "none", or "seen" or "unseen" in the training of the conditional network."""
        kind = self.picture.defect
        return "none" if kind is None else "seen" if kind in SEEN else "unseen"

    @property
    def x(self) -> Tensor:
        """The picture, (1, 64, 64)."""
        return torch.from_numpy(self.picture.image.astype(np.float32))[None]

    @property
    def clean(self) -> Tensor:
        """Without grain."""
        return torch.from_numpy(self.picture.clean.astype(np.float32))[None]

    @property
    def normal(self) -> Tensor:
        """Without grain and without the defect."""
        return torch.from_numpy(self.picture.normal.astype(np.float32))[None]

    @property
    def differs(self) -> bool:
        """Whether the picture does differ from the one without the defect."""
        return bool(differing(self.x[None], self.normal).amax() > CONTRAST)

    @property
    def mask(self) -> Tensor:
        """(1, 64, 64) of bool: the defect's pixels."""
        return torch.from_numpy(self.picture.mask)[None]

    @property
    def kernel(self) -> Tensor:
        return gaussian(torch.tensor(self.setting.width))

    @property
    def sigma(self) -> float:
        return noise(self.setting.dose)

    @property
    def y(self) -> Tensor:
        """The measurement, (1, 64, 64)."""
        generator = torch.Generator().manual_seed(self.seed)  # not that of the samplers
        return measure(self.x[None], self.kernel, self.sigma, generator)[0]


def differing(x: Tensor, normal: Tensor) -> Tensor:
    """(draws, 1, rows, columns): |mean of x - normal| over the window about each pixel."""
    half = WINDOW // 2
    return avg_pool2d(pad(x - normal, (half,) * 4, mode="reflect"), WINDOW, 1).abs()


def problem(number: int, offset: int = 1_000_000) -> Problem:
    """The picture of that number; ``offset`` leads to other pictures of the same settings, for tuning."""
    rng = np.random.default_rng(offset + number)
    round_ = number // len(SETTINGS)
    defect = None
    if round_ % 2 == 0:
        kinds = UNSEEN if round_ % 4 == 0 else SEEN
        defect = kinds[rng.integers(len(kinds))]
    population = Wafer(defect_rate=0.0)
    picture = population.draw(rng, defect=defect)
    found = Problem(number, picture, SETTINGS[number % len(SETTINGS)], 10_000_000 + offset + number)
    while defect is not None and not found.differs:  # a defect that hardly changed anything is none
        found = replace(found, picture=population.draw(rng, defect=defect))
    return found
