r"""How a picture was taken: what the instrument did to the scene, and which part of the scene it saw.

A picture y of H x W pixels is a window onto a scene x on a larger canvas,

    y = window(A(x)) + noise,

because a blur brings in what lies just beyond the border, and because a network takes canvases whose sides divide by
some number only. What the window does not show is not made up by padding: it is inferred with the rest, from the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.measurement import (
    Blur,
    Compose,
    Downsample,
    GaussianMeasurement,
    Identity,
    LinearOperator,
    Reflective,
    TransposeOperator,
)
from smcdiff.restoration.images import Crop
from smcdiff.restoration.noise_level import Noise, whiten

__all__ = ["Acquisition", "Canvas", "Whiten", "Window", "blurred", "coarse", "gaussian_psf", "masked", "sharp"]


@final
@dataclass(frozen=True, eq=False)
class Window(TransposeOperator):
    """y = the rectangle ``crop`` of x.

    Args:
        crop: the rectangle.
        shape: (rows, columns) of x.
    """

    crop: Crop
    shape: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        return self.crop.of(x)

    def adjoint(self, y: Tensor) -> Tensor:
        crop = self.crop
        below, right = self.shape[0] - crop.top - crop.height, self.shape[1] - crop.left - crop.width
        return functional.pad(y, (crop.left, right, crop.top, below))


@final
@dataclass(frozen=True, eq=False)
class Whiten(TransposeOperator):
    """y = W x, the map of every row that makes noise of this correlation white: see :mod:`.noise_level`.

    Args:
        row_correlation: rho, in [0, 1).
    """

    row_correlation: float

    def __call__(self, x: Tensor) -> Tensor:
        return whiten(x, self.row_correlation)

    def adjoint(self, y: Tensor) -> Tensor:
        rho, scale = self.row_correlation, math.sqrt(1 - self.row_correlation**2)
        scaled = torch.cat([y[..., :1], y[..., 1:] / scale], -1)
        return scaled - functional.pad(rho / scale * y[..., 1:], (0, 1))


@dataclass(frozen=True)
class Canvas:
    """Where a picture lies in the scene.

    Args:
        rows, columns: of the scene, in its own pixels.
        window: what the picture shows, in pixels of the picture: a rectangle of A(x).
        picture: the same rectangle in pixels of the scene.
    """

    rows: int
    columns: int
    window: Crop
    picture: Crop


@dataclass(frozen=True, eq=False)
class Acquisition:
    """y = window(A(x)) + noise, on the measured pixels; :func:`sharp`, :func:`blurred`, :func:`masked` and
    :func:`coarse` make the usual ones.

    Args:
        noise: the law of the noise.
        operator: A.
        margin: how many pixels beyond the border of the window reach the picture, at least 0.
        factor: pixels of the scene per pixel of the picture along a side, at least 1.
        mask: (1, H, W), positive where a pixel was measured; all were if None.

    Raises:
        ValueError: for a margin or factor out of range, or a mask together with a row correlation.
    """

    noise: Noise
    operator: LinearOperator = Identity()  # noqa: RUF009 (immutable)
    margin: int = 0
    factor: int = 1
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.margin < 0 or self.factor < 1:
            raise ValueError(f"got margin {self.margin}, factor {self.factor}; expected at least 0 and at least 1")
        if self.mask is not None and self.noise.row_correlation:
            raise ValueError(
                f"got a mask and the row correlation {self.noise.row_correlation}; correlated noise can be made white "
                "on whole rows only: give one of the two"
            )

    def canvas(self, rows: int, columns: int, block: int) -> Canvas:
        """The smallest scene around a picture of this size whose sides divide by ``block``."""
        unit = math.lcm(block, self.factor)

        def side(length: int) -> int:
            return math.ceil((length * self.factor + 2 * self.margin) / unit) * unit

        height, width = side(rows), side(columns)
        top, left = (height // self.factor - rows) // 2, (width // self.factor - columns) // 2
        f = self.factor
        return Canvas(height, width, Crop(top, left, rows, columns), Crop(top * f, left * f, rows * f, columns * f))

    def data(self, y: Tensor) -> Tensor:
        """What the program observes for a picture y: W y. Pixels that were not measured may hold any finite number.

        Raises:
            ValueError: for a picture of another shape than the mask.
        """
        if self.mask is not None and self.mask.shape != y.shape:
            raise ValueError(f"got a mask of shape {tuple(self.mask.shape)} for a picture of shape {tuple(y.shape)}")
        return whiten(y, self.noise.row_correlation)

    def program(self, prior: DiffusionPrior, canvas: Canvas) -> Callable[..., Tensor]:
        """The Pyro program: the scene "x" from the prior, where unknown the noise level "sigma", and the picture "y".

        Args:
            prior: of scenes (1, rows, columns) of the canvas.
            canvas: from :meth:`canvas`.
        """
        noise = self.noise
        view = Compose(
            Window(canvas.window, (canvas.rows // self.factor, canvas.columns // self.factor)), self.operator
        )
        seen = Compose(Whiten(noise.row_correlation), view) if noise.row_correlation else view
        mask = None if self.mask is None else self.mask > 0

        def program(y: Tensor | None = None) -> Tensor:
            x = pyro.sample("x", prior)
            sigma: Tensor | float = noise.sigma
            if noise.width:
                sigma = pyro.sample("sigma", dist.LogNormal(math.log(noise.sigma), noise.width))
            scale = sigma * noise.relative_scale(view(x)) if noise.shot else sigma
            with pyro.poutine.mask(mask=True if mask is None else mask):  # type: ignore[arg-type]
                return pyro.sample("y", GaussianMeasurement(seen, x, scale, event_dim=0), obs=y)

        return program


def sharp(noise: Noise) -> Acquisition:
    """y = x + noise."""
    return Acquisition(noise)


def blurred(noise: Noise, psf_sigma: float) -> Acquisition:
    """y = k * x + noise, with k a Gaussian of standard deviation ``psf_sigma`` pixels.

    The margin keeps the window clear of what the padding makes up. With reflection the blur is diagonal in the cosines,
    as the prior's covariance is.
    """
    kernel = gaussian_psf(psf_sigma)
    return Acquisition(noise, Blur(kernel, Reflective()), margin=len(kernel) // 2)


def masked(noise: Noise, mask: Tensor) -> Acquisition:
    """y = x + noise where ``mask`` (1, H, W) is positive; nothing elsewhere."""
    return Acquisition(noise, mask=mask)


def coarse(noise: Noise, factor: int) -> Acquisition:
    """y = the mean of x over blocks of ``factor`` x ``factor`` pixels, plus noise: x has finer pixels than y."""
    return Acquisition(noise, Downsample(factor), factor=factor)


def gaussian_psf(sigma: float) -> Tensor:
    """(2 r + 1, 2 r + 1), r = ceil(3 sigma): exp(-d^2 / (2 sigma^2)) at distance d from the centre, with sum 1.

    Raises:
        ValueError: for a sigma that is not greater than 0.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"got psf_sigma {sigma}; expected a width in pixels greater than 0")
    radius = math.ceil(3 * sigma)
    tap = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    return tap[:, None] * tap / tap.sum() ** 2
