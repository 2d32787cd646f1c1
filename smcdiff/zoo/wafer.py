r"""Synthetic scanning-electron-microscope pictures of wafers, with a rare defect now and then.

A layout is a signed distance ``d(row, col)`` to the nearest edge of the resist, in pixels, positive inside:

- *lines and spaces*: line ``i`` lies between the edges ``e_i^-(row)`` and ``e_i^+(row)``; its distance is
  ``min(col - e_i^-, e_i^+ - col)`` and the layout's is the largest over the lines;
- *contact holes*: ``d = rho - r(theta)``, with ``rho`` and ``theta`` the polar coordinates about the hole's centre,
  and the layout's is the smallest over the holes.

Edges are rough. Along an edge of length L the displacement is a stationary Gaussian process with the power spectral
density of Palasantzas, ``PSD(f) proportional to 1 / (1 + (2 pi f xi)^2)^(1/2 + H)``, normalised to standard
deviation ``roughness``; ``xi`` is the correlation length in pixels and ``H`` the roughness (Hurst) exponent. A hole's
rim is sampled at 64 angles, ``xi`` counts these, and its roughness is 0.6 of a line's.

The picture is the secondary-electron yield, flat on resist and substrate and brighter at edges,

    I(d) = space + (line - space) S(d / softness) + edge exp(-|d| / width),        S the logistic function,

blurred by a Gaussian point-spread function and read out with Poisson noise of ``dose`` electrons per pixel at I = 1.
Defects change the geometry before the picture is formed, so that they have edges and blur like everything else. What a
microscope makes of the noise-free picture that is out of focus, charges the wafer or correlates the noise of a row is
in :mod:`smcdiff.zoo.microscope`.

References:
    G. Palasantzas, "Roughness spectrum and surface width of self-affine fractal surfaces via the K-correlation
    model", Physical Review B 48, 14472 (1993): the spectrum.
    L. Reimer, "Scanning Electron Microscopy", Springer (1998): edge brightening.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEFECTS", "DEFECT_KINDS", "Wafer", "WaferPicture", "rough_edges"]

Array = NDArray[np.float64]

#: The defects of each layout.
DEFECTS = {
    "lines": ("bridge", "break", "pinch", "particle"),
    "holes": ("missing", "closed", "merged", "particle"),
}
#: All kinds of defect.
DEFECT_KINDS = tuple(dict.fromkeys(kind for kinds in DEFECTS.values() for kind in kinds))


@dataclass(frozen=True)
class WaferPicture:
    """One picture and what is true about it.

    Args:
        image: (size, size), the picture on the scale [-1, 1] (dark, bright), noise of the stated dose included.
        clean: (size, size), the same without noise.
        normal: (size, size), the same without noise and without the defect.
        mask: (size, size) of bool, the pixels whose noise-free value the defect changed by more than 0.1.
        layout: ``"lines"`` or ``"holes"``.
        defect: a name of :data:`DEFECTS`, or None.
    """

    image: Array
    clean: Array
    normal: Array
    mask: NDArray[np.bool_]
    layout: str
    defect: str | None


@dataclass(frozen=True)
class Wafer:
    """A population of wafer pictures; :meth:`draw` takes one from it.

    Args:
        size: rows and columns of a picture, in pixels; at least 32.
        defect_rate: probability that a picture has a defect, in [0, 1]: the imbalance of the classes.
        roughness: standard deviation of an edge's displacement, in pixels; 0 for straight edges.
        correlation_length: xi of the roughness spectrum, in pixels.
        hurst: roughness exponent H, greater than 0; at most 1 for a self-affine edge.
        psf_sigma: standard deviation of the microscope's point-spread function, in pixels.
        dose: electrons per pixel at full brightness; infinity for a picture without noise.
        kinds: the kinds of defect that occur, of :data:`DEFECT_KINDS`, those of a layout equally often. One that is
            left out is unseen in this population; ``draw(defect=...)`` makes it all the same.

    Raises:
        ValueError: for a size under 32, a rate outside [0, 1], a negative roughness, a correlation length, Hurst
            exponent, point-spread width or dose that is not positive, a kind that does not exist, or kinds that leave
            a layout without defects while the rate is not zero.
    """

    size: int = 64
    defect_rate: float = 0.02
    roughness: float = 0.7
    correlation_length: float = 8.0
    hurst: float = 0.7
    psf_sigma: float = 0.7
    dose: float = 1000.0
    kinds: tuple[str, ...] = DEFECT_KINDS

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"got size {self.size}; a wafer picture needs at least 32 pixels a side")
        if not 0 <= self.defect_rate <= 1:
            raise ValueError(f"got defect_rate {self.defect_rate}; expected a probability in [0, 1]")
        if not self.roughness >= 0:
            raise ValueError(f"got roughness {self.roughness}; expected a number of pixels, 0 or greater")
        for name in ("correlation_length", "hurst", "psf_sigma", "dose"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name} {getattr(self, name)}; expected a number greater than 0")
        if not set(self.kinds) <= set(DEFECT_KINDS):
            raise ValueError(f"got kinds {self.kinds}; expected some of {DEFECT_KINDS}")
        without = [layout for layout in DEFECTS if not self._kinds_of(layout)]
        if without and self.defect_rate > 0:
            raise ValueError(
                f"got kinds {self.kinds}, none of them a defect of the layouts {without}; expected at least one of "
                "each layout, or defect_rate=0"
            )

    def draw(self, rng: np.random.Generator, defect: str | None = None, layout: str | None = None) -> WaferPicture:
        """One picture. ``defect`` and ``layout`` ask for that kind, any that exists; None leaves them to chance.

        Raises:
            ValueError: for a defect or a layout that does not exist, or that do not go together.
        """
        layouts = [name for name, kinds in DEFECTS.items() if layout in (None, name) and defect in (None, *kinds)]
        if not layouts:
            raise ValueError(f"got layout {layout!r} with defect {defect!r}; expected a pair of {DEFECTS}")
        layout = layouts[rng.integers(len(layouts))]
        if defect is None and rng.random() < self.defect_rate:
            kinds = self._kinds_of(layout)
            defect = kinds[rng.integers(len(kinds))]
        geometry = _lines if layout == "lines" else _holes
        plain, damaged, bright = geometry(self, rng, defect)
        if layout == "lines" and rng.random() < 0.5:
            plain, damaged, bright = plain.T, damaged.T, bright.T

        look = _Look.draw(rng)
        normal = self._form(look.intensity(plain))
        clean = self._form(np.maximum(look.intensity(damaged), bright))
        mask = np.abs(clean - normal) > 0.05
        image = rng.poisson(self.dose * clean) / self.dose if np.isfinite(self.dose) else clean
        return WaferPicture(2 * image - 1, 2 * clean - 1, 2 * normal - 1, mask, layout, defect)

    def draw_images(self, rng: np.random.Generator, number: int) -> NDArray[np.float32]:
        """(number, 1, size, size) of float32: the images of ``number`` draws, as a network takes them."""
        return np.stack([self.draw(rng).image for _ in range(number)])[:, None].astype(np.float32)

    def _kinds_of(self, layout: str) -> tuple[str, ...]:
        return tuple(kind for kind in DEFECTS[layout] if kind in self.kinds)

    def _form(self, intensity: Array) -> Array:
        """Blur by the point-spread function, on a picture continued by reflection."""
        radius = max(1, int(np.ceil(4 * self.psf_sigma)))
        tap = np.exp(-0.5 * (np.arange(-radius, radius + 1) / self.psf_sigma) ** 2)
        tap /= tap.sum()
        for axis in (0, 1):
            padded = np.pad(intensity, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
            windows = np.lib.stride_tricks.sliding_window_view(padded, len(tap), axis=axis)
            intensity = windows @ tap
        return intensity


@dataclass(frozen=True)
class _Look:
    """Grey levels of one picture, on the scale [0, 1]."""

    space: float
    line: float
    edge: float
    width: float
    softness: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Look:
        return cls(
            space=rng.uniform(0.05, 0.20),
            line=rng.uniform(0.40, 0.62),
            edge=rng.uniform(0.30, 0.50),
            width=rng.uniform(1.0, 1.8),
            softness=0.4,
        )

    def intensity(self, d: Array) -> Array:
        inside = 0.5 * (1 + np.tanh(d / (2 * self.softness)))
        return self.space + (self.line - self.space) * inside + self.edge * np.exp(-np.abs(d) / self.width)


def rough_edges(wafer: Wafer, rng: np.random.Generator, number: int, length: int) -> Array:
    """(number, length): independent edge displacements in pixels, periodic along the edge."""
    frequency = np.fft.rfftfreq(length)
    density = (1 + (2 * np.pi * frequency * wafer.correlation_length) ** 2) ** -(0.5 + wafer.hurst)
    density[0] = 0.0  # the mean displacement is the line's position, drawn elsewhere
    gain = np.sqrt(density / (density.sum() * 2 - density[-1] * (length % 2 == 0)))
    white = rng.standard_normal((number, length))
    return wafer.roughness * np.sqrt(length) * np.fft.irfft(np.fft.rfft(white) * gain, length)


def _ellipse(wafer: Wafer, row: float, col: float, rows: float, cols: float) -> Array:
    """Signed distance (to first order) to an ellipse with these half-axes, positive inside."""
    r, c = np.mgrid[: wafer.size, : wafer.size]
    return (1 - np.hypot((r - row) / rows, (c - col) / cols)) * min(rows, cols)


def _particle(wafer: Wafer, rng: np.random.Generator) -> Array:
    """The brightness of a dust particle: a bright, soft-edged blob."""
    row, col = rng.uniform(0.2, 0.8, 2) * wafer.size
    d = _ellipse(wafer, row, col, rng.uniform(2.0, 4.0), rng.uniform(2.0, 4.0))
    return 0.95 / (1 + np.exp(-2 * d))


def _lines(wafer: Wafer, rng: np.random.Generator, defect: str | None) -> tuple[Array, Array, Array]:
    """Signed distance without and with the defect, and the brightness laid over it."""
    size = wafer.size
    pitch = rng.uniform(11.0, 20.0)
    width = pitch * rng.uniform(0.4, 0.6)
    centres = np.arange(-pitch, size + 2 * pitch, pitch) + rng.uniform(0, pitch)
    edges = rough_edges(wafer, rng, 2 * len(centres), size).reshape(2, len(centres), size)
    low = centres[:, None] - width / 2 + edges[0]
    high = centres[:, None] + width / 2 + edges[1]
    col = np.arange(size)

    row = rng.uniform(0.2, 0.8) * size
    inner = np.flatnonzero((centres > 0.2 * size) & (centres < 0.8 * size - (pitch if defect == "bridge" else 0)))
    chosen = inner[rng.integers(len(inner))] if len(inner) else len(centres) // 2

    def distance() -> Array:
        return np.minimum(col - low[..., None], high[..., None] - col).max(0)

    plain = damaged = distance()
    bright = np.zeros_like(plain)
    if defect == "bridge":
        gap = _ellipse(wafer, row, centres[chosen] + pitch / 2, rng.uniform(2.0, 4.0), pitch / 2)
        damaged = np.maximum(plain, gap)
    elif defect == "break":
        damaged = np.minimum(plain, -_ellipse(wafer, row, centres[chosen], rng.uniform(2.0, 4.5), 0.75 * width))
    elif defect == "pinch":
        dent = rng.uniform(0.25, 0.4) * width * np.exp(-0.5 * ((np.arange(size) - row) / rng.uniform(2.0, 3.5)) ** 2)
        low[chosen] += dent
        high[chosen] -= dent
        damaged = distance()
    elif defect == "particle":
        bright = _particle(wafer, rng)
    return plain, damaged, bright


def _holes(wafer: Wafer, rng: np.random.Generator, defect: str | None) -> tuple[Array, Array, Array]:
    """Signed distance without and with the defect, and the brightness laid over it."""
    size = wafer.size
    pitch = rng.uniform(14.0, 22.0)
    radius = pitch * rng.uniform(0.26, 0.36)
    start = rng.uniform(0, pitch, 2)
    grid = [np.arange(-pitch, size + pitch, pitch) + s for s in start]
    centres = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 2)
    centres = centres + rng.normal(0, 0.3, centres.shape)
    angles = 64
    edges = 0.6 * rough_edges(wafer, rng, len(centres), angles)
    radii = np.full(len(centres), radius)

    middle = np.flatnonzero(((centres > 0.2 * size) & (centres < 0.8 * size - 0.5 * pitch)).all(1))
    chosen = middle[rng.integers(len(middle))] if len(middle) else len(centres) // 2
    r, c = np.mgrid[:size, :size]

    def distance() -> Array:
        dr, dc = r - centres[:, 0, None, None], c - centres[:, 1, None, None]
        turn = (np.arctan2(dr, dc) / (2 * np.pi) % 1) * angles
        near = np.floor(turn).astype(int) % angles
        part = turn - np.floor(turn)
        hole = np.arange(len(centres))[:, None, None]
        rim = radii[:, None, None] + (1 - part) * edges[hole, near] + part * edges[hole, (near + 1) % angles]
        return (np.hypot(dr, dc) - rim).min(0)

    plain = damaged = distance()
    bright = np.zeros_like(plain)
    if defect == "missing":
        radii[chosen] = -10.0
        damaged = distance()
    elif defect == "closed":
        radii[chosen] *= rng.uniform(0.35, 0.6)
        damaged = distance()
    elif defect == "merged":
        row, col = centres[chosen]
        gap = _ellipse(wafer, row, col + pitch / 2, rng.uniform(2.0, 3.5), pitch / 2)
        damaged = np.minimum(plain, -gap)
    elif defect == "particle":
        bright = _particle(wafer, rng)
    return plain, damaged, bright
