"""The picture of ``smcdiff demo``: a wafer with one rare defect, seen through a blur and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smcdiff.restoration.acquisition import Acquisition, blurred
from smcdiff.restoration.noise_level import Noise
from smcdiff.restoration.report import Truth
from smcdiff.zoo.wafer import Wafer

__all__ = ["Demo", "make_demo"]

#: Sides of the picture and of the scene, which is larger because the blur reaches beyond the picture's border.
_PICTURE, _BLOCK = 64, 8
_SMALLEST_DEFECT = 20


@dataclass(frozen=True)
class Demo:
    """A made-up picture.

    Args:
        y: the picture, (1, 64, 64).
        acquisition: how it was taken: a Gaussian blur of 1.5 pixels and noise of deviation 0.1.
        truth: the scene it shows, and where its defect is.
    """

    y: Tensor
    acquisition: Acquisition
    truth: Truth


def make_demo(seed: int) -> Demo:
    """Draw a scene with a bridge between lines or a missing contact hole, and take a picture of it."""
    rng = np.random.default_rng(seed)
    acquisition = blurred(Noise(sigma=0.1), psf_sigma=1.5)
    canvas = acquisition.canvas(_PICTURE, _PICTURE, _BLOCK)
    name = ("bridge", "missing")[rng.integers(2)]
    while True:
        scene = Wafer(size=canvas.rows).draw(rng, defect=name)
        defect = canvas.picture.of(torch.from_numpy(scene.mask)[None])
        if int(defect.sum()) >= _SMALLEST_DEFECT:
            break
    x = torch.from_numpy(scene.image).float()[None]
    clean = canvas.window.of(acquisition.operator(x))
    y = clean + acquisition.noise.sigma * torch.from_numpy(rng.standard_normal(clean.shape)).float()
    image, plain, normal = (
        canvas.picture.of(torch.from_numpy(part).float()[None]) for part in (scene.image, scene.clean, scene.normal)
    )
    return Demo(y, acquisition, Truth(image, plain, normal, defect, name))
