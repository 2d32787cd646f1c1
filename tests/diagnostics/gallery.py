"""Every plot once, from fixed numbers: for the image comparison, and for the eye.

    python -m tests.diagnostics.gallery FOLDER              every plot as a user sees it
    python -m tests.diagnostics.gallery --baselines         the pictures that test_plots.py compares with

Baselines have no text, whose shapes differ between versions of the font library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from smcdiff.diagnostics import Run
from smcdiff.diagnostics import plots as p

BASELINES = Path(__file__).with_name("baselines")


def scene(rows: int = 24, columns: int = 32) -> np.ndarray:
    """Bright lines and a spot on black, in [-1, 1]."""
    r, c = np.mgrid[:rows, :columns]
    lines = np.tanh(3 * np.sin(2 * np.pi * c / max(columns / 4, 2)))
    spot = 1.6 * np.exp(-((r - rows / 2) ** 2 + (c - columns / 3) ** 2) / 8)
    return (0.7 * lines + spot).clip(-1, 1)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def run(b: int = 4, n: int = 24, steps: int = 30) -> Run:
    """Particles that slowly lose their diversity, resampled at every fifth step."""
    rng = np.random.default_rng(1)
    log_w, ess, entropy, ancestors = rng.normal(size=(b, n)), [], [], []
    roots, alive = [], np.tile(np.arange(n), (b, 1))
    for step in range(steps):
        parents = np.tile(np.arange(n), (b, 1))
        if step and step % 5 == 0:
            w = np.exp(log_w) / np.exp(log_w).sum(1, keepdims=True)
            comb = (np.arange(n) + 0.5) / n
            parents = np.stack([np.searchsorted(row.cumsum(), comb).clip(max=n - 1) for row in w])
            log_w = np.zeros((b, n))
        alive = np.take_along_axis(alive, parents, 1)
        log_w = log_w + 0.5 * rng.normal(size=(b, n))
        w = np.exp(log_w) / np.exp(log_w).sum(1, keepdims=True)
        ess.append(1 / (w**2).sum(1))
        entropy.append(-(w * np.log(w)).sum(1))
        ancestors.append(parents)
        roots.append([len(set(row)) for row in alive])
    log_z = np.cumsum(0.4 * rng.normal(size=(steps, b)) - 1, 0)
    x = np.linspace(-2, 2, 6) + 0.4 * rng.normal(size=(b, n, 6))
    return Run(
        values={"sigma": torch.from_numpy(np.exp(0.3 * rng.normal(size=(b, n)))), "x": torch.from_numpy(x)},
        log_w=torch.from_numpy(log_w + log_z[-1][:, None]),
        log_z=torch.from_numpy(log_z[-1]),
        ess=torch.from_numpy(np.array(ess)),
        log_z_path=torch.from_numpy(log_z),
        roots=torch.tensor(roots),
        entropy=torch.from_numpy(np.array(entropy)),
        ancestors=torch.from_numpy(np.array(ancestors)),
    )


def panel(figure: Figure) -> None:
    truth = scene()
    sd = 0.05 + 0.2 * np.abs(np.gradient(truth, axis=1))
    draws = truth + sd * noise(3, 24, 32)
    quantiles = {"5 % quantile": truth - 1.64 * sd, "95 % quantile": truth + 1.64 * sd}
    references = {"truth": truth, "measurement": truth + 0.3 * noise(24, 32, seed=1)}
    p.plot_posterior(truth, sd, draws, references, quantiles, figure=figure)


def kernel(figure: Figure) -> None:
    r, c = np.mgrid[-5:6, -5:6]
    width = 1.5 + 0.2 * noise(40)[:, None, None]
    kernels = np.exp(-0.5 * (r**2 + c**2) / width**2)
    kernels /= kernels.sum((1, 2), keepdims=True)
    p.plot_kernel(kernels, kernels[3], figure=figure)


def film(figure: Figure) -> None:
    level = np.linspace(1, 0, 41)[:, None, None]
    clean = scene() * (1 - level**2)
    p.plot_film({"x_t": clean + level * noise(41, 24, 32), "x0_hat": clean}, figure=figure)


def curve(narrow: float) -> tuple[np.ndarray, ...]:
    level = np.arange(1, 50) / 50
    band = 2.6 * np.sqrt(level * (1 - level) / 100)
    return level, level**narrow, level - band, level + band


FIGURES: dict[str, tuple[tuple[float, float], Callable[[Figure], object]]] = {
    "posterior": ((9.6, 7.5), panel),
    "zscore": ((4.0, 3.4), lambda f: p.plot_zscore(0.3 * noise(24, 32), scene() * 0, 0.3 + 0 * scene(), figure=f)),
    "kernel": ((10.4, 2.5), kernel),
    "film": ((10.4, 2.9), film),
    "steps": ((7.0, 5.0), lambda f: p.plot_steps(run(), figure=f)),
    "genealogy": ((7.0, 3.6), lambda f: p.plot_genealogy(run().ancestors[:, 0], figure=f)),
    "weights": ((7.0, 3.0), lambda f: p.plot_weights(run(), figure=f)),
    "scalar": ((5.0, 3.0), lambda f: p.plot_marginals(run(), "sigma", torch.tensor(1.1), figure=f)),
    "vector": ((5.0, 3.0), lambda f: p.plot_marginals(run(), "x", torch.linspace(-2, 2, 6), figure=f)),
    "evidence": (
        (6.0, 2.6),
        lambda f: p.plot_evidence(
            {"wide PSF": (-120.0, 0.4), "narrow PSF": (-117.5, 0.2), "no blur": (-131.0, 1.1), "DPS": (-119.0, np.nan)},
            {"wide PSF": -119.5, "narrow PSF": -117.4},
            figure=f,
        ),
    ),
    "sbc": (
        (5.0, 3.0),
        lambda f: p.plot_sbc(np.array([21, 14, 9, 8, 6, 8, 9, 10, 13, 22]), 12.0, 5, 20, figure=f),
    ),
    "ecdf": ((4.0, 3.4), lambda f: p.plot_ecdf(*curve(1.3), figure=f)),
    "coverage": ((4.0, 3.4), lambda f: p.plot_coverage(*curve(1.05), figure=f)),
    "tarp": ((4.0, 3.4), lambda f: p.plot_tarp(*curve(0.7), figure=f)),
    "coverage map": (
        (4.0, 3.4),
        lambda f: p.plot_coverage_map((0.9 + 0.1 * noise(24, 32)).clip(0, 1), 0.9, figure=f),
    ),
}  # fmt: skip


def draw(name: str) -> Figure:
    """The figure of that name."""
    size, function = FIGURES[name]
    figure = Figure(figsize=size)
    function(figure)
    return figure


def without_text(figure: Figure) -> Figure:
    """The figure without titles, labels, ticks and legends."""
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xticks([], minor=True)
        axes.set_yticks([], minor=True)
        if axes.get_legend():
            axes.get_legend().remove()
    for text in figure.findobj(Text):
        text.set_text("")
    return figure


if __name__ == "__main__":
    baselines = sys.argv[1:] == ["--baselines"]
    folder = BASELINES if baselines else Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        figure = without_text(draw(name)) if baselines else draw(name)
        figure.savefig(folder / f"{name.replace(' ', '_')}.png", dpi=40 if baselines else 100)
