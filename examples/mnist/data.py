"""The digits and the blur kernels, read from disk, and how the digits are divided.

The digits are the 10 000 images of MNIST's test file (Y. LeCun, C. Cortes, C. Burges), numbered as in the file and
divided by the last figure of their number, so that the clean first half and the harder second half of the file are in
every part alike:

    prior     1 ... 9          9000 images
    guide     1 3 5 7 9        5000 images, the classifier that is the likelihood
    judge     2 4 6 8          4000 images, the classifier that judges; none of them seen by the guide
    held out  0                1000 images: the first 500 to measure the prior's covariance on, the others to restore

Pictures are 32 x 32, two black pixels added on each side, on the scale [-1, 1] with black at -1.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["CALIBRATION", "Digits", "read_digits", "read_kernels"]

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
#: The last figures of the numbers in each part.
PARTS = {"prior": (1, 2, 3, 4, 5, 6, 7, 8, 9), "guide": (1, 3, 5, 7, 9), "judge": (2, 4, 6, 8), "held out": (0,)}
#: Held-out digits that the covariance is measured on.
CALIBRATION = 500


@dataclass(frozen=True, eq=False)
class Digits:
    """Pictures and what they show.

    Args:
        images: (number, 1, 32, 32), on the scale [-1, 1].
        labels: (number,), integers 0 ... 9.
    """

    images: Tensor
    labels: Tensor

    def part(self, name: str) -> Digits:
        """Those of one part: "prior", "guide", "judge" or "held out"."""
        mine = torch.isin(torch.arange(len(self.labels)) % 10, torch.tensor(PARTS[name]))
        return Digits(self.images[mine], self.labels[mine])


def read_digits(folder: Path) -> Digits:
    """All digits of MNIST's test file.

    Raises:
        SystemExit: where the files are not there or are others, with where to get them.
    """
    missing = [name for name in (IMAGES, LABELS) if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"no MNIST in {folder}: {' and '.join(missing)} missing. Give the folder with --mnist FOLDER; the files "
            "are the test half of http://yann.lecun.com/exdb/mnist and lie in public repositories, such as fgnt/mnist"
        )
    images, labels = _read_idx(folder / IMAGES), _read_idx(folder / LABELS)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise SystemExit(
            f"got images of shape {images.shape} and labels of shape {labels.shape} in {folder}; expected "
            "(number, 28, 28) and (number,)"
        )
    scaled = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    padded = torch.nn.functional.pad(scaled, (2, 2, 2, 2), value=-1.0)
    return Digits(padded, torch.from_numpy(labels.astype(np.int64)))


def read_kernels(file: Path) -> dict[str, Tensor]:
    """The blur kernels of an ``npz`` file, {name: (rows, columns)}, each summing to 1.

    Raises:
        SystemExit: where the file is not there.
    """
    if not file.is_file():
        raise SystemExit(
            f"no blur kernels at {file}. Give the file with --kernels FILE: the eight kernels of Levin, Weiss, Durand "
            "and Freeman (2009) as arrays k0 ... k7 of an npz file"
        )
    with np.load(file) as arrays:
        kernels = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    return {name: kernel / kernel.sum() for name, kernel in kernels.items()}


def _read_idx(file: Path) -> np.ndarray:
    """An array of unsigned bytes in the IDX format: two zeros, 8, the number of axes, their lengths, the values."""
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{file} is no IDX file of unsigned bytes; it begins with {content[:4]!r}")
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
