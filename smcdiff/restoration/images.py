r"""Picture files of a user's own as tensors on the scale [-1, 1], and back.

A grey value v of a file becomes

    x = 2 v / white - 1,

with ``white`` the largest value of the file's number format (255, 65535, 1 for floating point) unless it is given.
Colours become grey by the luma 0.299 R + 0.587 G + 0.114 B of ITU-R BT.601; an alpha channel is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

__all__ = ["Crop", "ImageFileError", "read_image", "read_mask", "write_png"]

_LUMA = (0.299, 0.587, 0.114)

#: Pillow's modes that hold one grey value per pixel, and the value that is white in each.
_GREY = {
    "1": 1.0,
    "L": 255.0,
    "I;16": 65535.0,
    "I;16B": 65535.0,
    "I;16L": 65535.0,
    "I;16N": 65535.0,
    "F": 1.0,
    "I": None,
}


class ImageFileError(ValueError):
    """A picture file that cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Crop:
    """A rectangle of a picture: ``image[..., top : top + height, left : left + width]``.

    Args:
        top: first row, counted from 0.
        left: first column, counted from 0.
        height: number of rows, at least 1.
        width: number of columns, at least 1.

    Raises:
        ValueError: for a negative corner or an empty rectangle.
    """

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.top, self.left) < 0 or min(self.height, self.width) < 1:
            raise ValueError(f"got {self}; expected top and left of at least 0, height and width of at least 1")

    def of(self, image: Tensor) -> Tensor:
        """The rectangle, cut out of ``image`` (..., rows, columns).

        Raises:
            ValueError: if it reaches beyond the picture.
        """
        rows, columns = image.shape[-2:]
        if self.top + self.height > rows or self.left + self.width > columns:
            raise ValueError(f"got {self} of a picture of {rows} rows and {columns} columns; choose a smaller crop")
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


def read_image(path: Path | str, crop: Crop | None = None, white: float | None = None) -> Tensor:
    """A PNG or TIFF file (8 or 16 bit or floating point, grey or colour, any size) as (1, rows, columns), float32.

    Pillow reads sixteen-bit colour with eight bits; sixteen-bit grey keeps all of them.

    Args:
        path: the file.
        crop: the part of it to keep; all of it if None.
        white: grey value that becomes 1. Give it where a file does not use its number format up to the top, such as
            4095 for twelve-bit data in a sixteen-bit file.

    Raises:
        ImageFileError: for a file that is not there, is no picture, is damaged, has several frames, or holds values
            outside [0, white] or not finite.
        ValueError: for a crop that reaches beyond the picture.
    """
    values, top = _read(Path(path))
    if white is not None and not white > 0:
        raise ValueError(f"got white {white}; expected the grey value of a white pixel, greater than 0")
    top = top if white is None else white
    if top is None:
        raise ImageFileError(f"{path} holds 32-bit integers; say which value of them is white (white)")
    if not np.isfinite(values).all():
        raise ImageFileError(f"{path} holds values that are NaN or infinite; replace them or use a mask")
    if values.min() < 0 or values.max() > top:
        raise ImageFileError(
            f"{path} holds values from {values.min():g} to {values.max():g}; expected 0 to {top:g}. "
            "Give the value of a white pixel (white), or rescale the file"
        )
    image = torch.from_numpy((2 * values / top - 1).astype(np.float32))[None]
    return image if crop is None else crop.of(image)


def read_mask(path: Path | str, crop: Crop | None = None) -> Tensor:
    """A mask file as (1, rows, columns) of float32: 1 where the pixel is brighter than half of white, 0 elsewhere.

    Args:
        path: the file; bright pixels were measured, dark ones are missing.
        crop: the part of it to keep; all of it if None.

    Raises:
        ImageFileError: as :func:`read_image`, or if no pixel or every pixel is bright.
    """
    mask = (read_image(path, crop) > 0).float()
    if mask.min() == mask.max():
        kind = "measured" if mask.max() == 1 else "missing"
        raise ImageFileError(f"the mask {path} says that every pixel is {kind}; expected bright and dark pixels")
    return mask


def write_png(path: Path | str, image: Tensor, low: float = -1.0, high: float = 1.0) -> None:
    """Write a grey picture (1, rows, columns) or (rows, columns) with eight bits: ``low`` is black, ``high`` white.

    Values beyond the two are clipped.

    Raises:
        ValueError: for another shape, values that are not finite, or ``low`` not below ``high``.
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] != 1):
        raise ValueError(f"got a picture of shape {tuple(image.shape)}; expected (1, rows, columns) or (rows, columns)")
    if not low < high or not bool(torch.isfinite(image).all()):
        raise ValueError(
            f"got low {low}, high {high} or a picture that is not finite; expected low < high, finite values"
        )
    grey = ((image.detach().double().cpu() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    Image.fromarray(grey.reshape(image.shape[-2:]).numpy()).save(path, format="PNG")


def _read(path: Path) -> tuple[NDArray[np.float64], float | None]:
    """Grey values (rows, columns), and the value that is white in the file's number format, where that is plain."""
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            if frames > 1:
                raise ImageFileError(f"{path} holds {frames} pictures; save the one you mean in a file of its own")
            if file.mode in _GREY:
                return np.asarray(file, dtype=np.float64), _GREY[file.mode]
            return np.asarray(file.convert("RGB"), dtype=np.float64) @ np.asarray(_LUMA), 255.0
    except FileNotFoundError as error:
        raise ImageFileError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise ImageFileError(f"{path} is a folder; expected a PNG or TIFF file") from error
    except UnidentifiedImageError as error:
        raise ImageFileError(f"{path} is no picture that Pillow can read; expected a PNG or TIFF file") from error
    except Image.DecompressionBombError as error:
        raise ImageFileError(f"{path} is too large to read safely ({error}); cut out a part of it first") from error
    except (OSError, SyntaxError) as error:
        raise ImageFileError(f"{path} cannot be read: {error}. The file may be damaged; save it again") from error
