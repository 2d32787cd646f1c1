r"""Colours, and arrays made ready to be shown.

The diverging map runs along two straight lines in CIELAB, from a dark blue to white and from white to a dark orange of
the same lightness L*, in equal steps: equal differences of value are equal differences of colour (CIE 1976), and blue
against orange is told apart by eyes that lack any one kind of cone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "SKY", "Values", "array", "diverging", "new_figure", "reduced"]

Values = Tensor | NDArray[Any]

#: Okabe and Ito's colours, told apart by colour-blind eyes.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072b2", "#d55e00", "#009e73", "#56b4e9", "#888888"

#: A screen shows no more pixels along a side of one picture.
_MOST_PIXELS = 1024
_ENDS = ((40.0, 12.0, -52.0), (97.0, 0.0, 0.0), (40.0, 33.0, 42.0))  # L*, a*, b*; both equally far from white


def array(values: Values) -> NDArray[Any]:
    """A NumPy array of floats on the host."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().float().numpy() if values.itemsize < 8 else values.detach().cpu().numpy()
    found: NDArray[Any] = np.asarray(values)
    return found if found.dtype.kind == "f" else found.astype(np.float64)


def reduced(picture: NDArray[Any], extreme: bool = False) -> NDArray[Any]:
    """A picture (rows, columns) or (rows, columns, 3) with at most so many pixels along a side that a screen shows.

    Args:
        picture: its values.
        extreme: show the value of largest magnitude among those that fall together, instead of their mean.
    """
    block = -(-max(picture.shape[:2]) // _MOST_PIXELS)
    if block == 1:
        return picture
    rows, columns = (-(-side // block) for side in picture.shape[:2])
    pad = [(0, rows * block - picture.shape[0]), (0, columns * block - picture.shape[1])]
    padded = np.pad(picture, [*pad, (0, 0)][: picture.ndim], mode="edge")
    blocks = padded.reshape(rows, block, columns, block, *picture.shape[2:])
    if not extreme:
        mean: NDArray[Any] = blocks.mean((1, 3))
        return mean
    high, low = blocks.max((1, 3)), blocks.min((1, 3))
    return np.where(high >= -low, high, low)


@functools.cache
def diverging() -> ListedColormap:
    """Blue for negative, white for zero, orange for positive, in even steps."""
    from matplotlib.colors import ListedColormap

    start, middle, end = (np.array(point) for point in _ENDS)
    t = np.linspace(0, 1, 128)[:, None]
    lab = np.concatenate([start + t * (middle - start), (middle + t * (end - middle))[1:]])
    return ListedColormap(_srgb(lab), name="blue-white-orange")


def _srgb(lab: NDArray[Any]) -> NDArray[Any]:
    """CIELAB under D65 to sRGB in [0, 1] (IEC 61966-2-1)."""
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.95047, 1.0, 1.08883)
    linear = xyz @ np.array(
        [[3.2404542, -0.9692660, 0.0556434], [-1.5371385, 1.8760108, -0.2040259], [-0.4985314, 0.0415560, 1.0572252]]
    )
    linear = linear.clip(0, 1)
    srgb: NDArray[Any] = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb


def new_figure(figure: Figure | None, width: float, height: float) -> Figure:
    """The figure to draw into; a new one of pyplot's, of this size in inches, if none is given."""
    if figure is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    return figure
