r"""Simulated blur kernels: point-spread functions of a microscope and traces of motion.

A kernel is a trajectory of the beam's centre with equal time on each of its points, spread by what the optics make of a
point, and divided by its sum,

    k(i) proportional to mean over s of h(i - c(s)),

on a grid of pixels whose centre is ``[size // 2, size // 2]``. The optics h are a Gaussian of two widths and an angle
(focus and astigmatism) or a disc (a strong defocus); the trajectory c is a point, a straight line (drift), or a random
walk with inertia (shake), centred on its mean. Kernels are drawn on a grid five times as fine and binned.

References:
    G. Boracchi, A. Foi, "Modeling the Performance of Image Restoration From Motion Blur", IEEE Transactions on Image
    Processing 21, 3502 (2012): random trajectories with inertia.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Kernels"]

Array = NDArray[np.float64]

#: The kinds of kernel, drawn with equal probabilities.
KINDS = ("gaussian", "astigmatic", "defocus", "drift", "shake")
FINE = 5


@dataclass(frozen=True)
class Kernels:
    """A population of kernels; :meth:`draw` takes one from it.

    Args:
        size: rows and columns, in pixels; at least 8.
        widths: range of a Gaussian's standard deviation, in pixels, drawn log-uniformly; a moving beam's is at most 1.
        radii: range of a defocus disc's radius, in pixels, drawn uniformly.
        lengths: range of a trajectory's length, in pixels, drawn uniformly.

    Raises:
        ValueError: for a size below 8 or a range that is not positive and ordered.
    """

    size: int = 28
    widths: tuple[float, float] = (0.5, 3.0)
    radii: tuple[float, float] = (1.0, 5.0)
    lengths: tuple[float, float] = (2.0, 24.0)

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"got size {self.size}; expected at least 8 pixels a side")
        for name in ("widths", "radii", "lengths"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"got {name} {(low, high)}; expected 0 < smallest <= largest, in pixels")

    def draw(self, rng: np.random.Generator, kind: str | None = None) -> Array:
        """One kernel, (size, size), at least 0 and of sum 1. ``kind`` asks for one of :data:`KINDS`.

        Raises:
            ValueError: for a kind that does not exist.
        """
        if kind is None:
            kind = KINDS[rng.integers(len(KINDS))]
        if kind not in KINDS:
            raise ValueError(f"got the kind {kind!r}; expected one of {KINDS}")
        if kind == "defocus":
            optics = self._disc(rng.uniform(*self.radii))
        else:
            first = np.exp(rng.uniform(*np.log(self.widths)))
            second = np.exp(rng.uniform(*np.log(self.widths))) if kind == "astigmatic" else first
            if kind in ("drift", "shake"):
                first = second = min(first, 1.0)  # a moving beam is in focus
            optics = self._gaussian(first, second, rng.uniform(0, np.pi))
        places = self._trajectory(rng, kind)
        return self._spread(optics, places)

    def draw_images(self, rng: np.random.Generator, number: int) -> NDArray[np.float32]:
        """(number, 1, size, size) of float32 on [-1, 1], as a network takes them: 2 k / max(k) - 1."""
        kernels = np.stack([self.draw(rng) for _ in range(number)])
        scaled = 2 * kernels / kernels.max((1, 2), keepdims=True) - 1
        images: NDArray[np.float32] = scaled[:, None].astype(np.float32)
        return images

    def _axis(self) -> Array:
        """Positions of the fine grid's cells relative to the centre, in pixels."""
        return (np.arange(FINE * self.size) + 0.5) / FINE - 0.5 - self.size // 2

    def _gaussian(self, first: float, second: float, angle: float) -> Array:
        row, column = np.meshgrid(self._axis(), self._axis(), indexing="ij")
        along = np.cos(angle) * column + np.sin(angle) * row
        across = np.cos(angle) * row - np.sin(angle) * column
        law: Array = np.exp(-0.5 * (along / first) ** 2 - 0.5 * (across / second) ** 2)
        return law

    def _disc(self, radius: float) -> Array:
        row, column = np.meshgrid(self._axis(), self._axis(), indexing="ij")
        return np.clip((radius - np.hypot(row, column)) * FINE + 0.5, 0, 1)

    def _trajectory(self, rng: np.random.Generator, kind: str) -> Array:
        """(points, 2): places of the beam in pixels, of mean 0."""
        if kind not in ("drift", "shake"):
            return np.zeros((1, 2))
        angle, points = rng.uniform(0, 2 * np.pi), 200
        heading = np.full(points, angle)
        if kind == "shake":
            turns = rng.normal(0, 0.12, points).cumsum()
            heading = heading + turns - turns[0] + np.pi * (rng.random(points) < 0.01).cumsum()
        steps = np.stack([np.sin(heading), np.cos(heading)], -1) * rng.uniform(*self.lengths) / points
        path = steps.cumsum(0)
        return path - path.mean(0)

    def _spread(self, optics: Array, places: Array) -> Array:
        """The mean of the optics moved to each place, binned and normalised.

        What leaves the grid is lost; places of the beam outside of it are moved to its border.
        """
        fine = FINE * self.size
        hits = np.zeros((2 * fine, 2 * fine))
        rows, columns = (np.rint(places * FINE).astype(int).clip(-fine // 2, fine // 2)).T
        np.add.at(hits, (rows % (2 * fine), columns % (2 * fine)), 1.0)
        padded = np.pad(optics, ((0, fine), (0, fine)))
        full = np.fft.irfft2(np.fft.rfft2(hits) * np.fft.rfft2(padded), s=hits.shape)[:fine, :fine]
        binned = full.clip(0).reshape(self.size, FINE, self.size, FINE).sum((1, 3))
        kernel: Array = binned / binned.sum()
        return kernel
