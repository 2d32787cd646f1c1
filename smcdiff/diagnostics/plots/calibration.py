"""Calibration studies in pictures, from the plain arrays that :mod:`smcdiff.diagnostics.calibration` computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smcdiff.diagnostics.plots.style import BLUE, GREY, ORANGE, SKY, Values, array, diverging, new_figure, reduced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_coverage", "plot_coverage_map", "plot_ecdf", "plot_sbc", "plot_tarp"]


def plot_sbc(counts: Values, expected: float, lower: float, upper: float, figure: Figure | None = None) -> Axes:
    """Rank histogram of simulation-based calibration: flat, up to chance, for an exact posterior.

    A hump means a posterior too wide, a trough one too narrow, a slope one that is off to a side.

    Args:
        counts: (bins,), replications in each.
        expected: count of a bin under calibration.
        lower, upper: band of one bin's count under calibration.
        figure: to draw into.
    """
    heights = array(counts)
    axes: Axes = new_figure(figure, 5.0, 3.0).subplots()
    edges = np.arange(len(heights) + 1) / len(heights)
    axes.axhspan(lower, upper, color=GREY, alpha=0.3, linewidth=0)
    axes.axhline(expected, color=GREY, linewidth=0.8)
    outside = (heights < lower) | (heights > upper)
    axes.bar(
        edges[:-1],
        heights,
        1 / len(heights),
        align="edge",
        color=[ORANGE if out else SKY for out in outside],
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.1 * max(float(heights.max()), upper))
    axes.set_xlabel("rank of the truth among the draws, as a share")
    axes.set_ylabel("replications")
    return axes


def plot_ecdf(z: Values, ecdf: Values, lower: Values, upper: Values, figure: Figure | None = None) -> Axes:
    """ECDF of the ranks less the diagonal, with its simultaneous band: inside it everywhere if calibrated.

    Args:
        z: (points,), in (0, 1).
        ecdf: (points,), share of the ranks up to z.
        lower, upper: (points,), the band.
        figure: to draw into.
    """
    axes = _curve(z, ecdf, lower, upper, figure, less=array(z))
    axes.set_xlabel("rank of the truth among the draws, as a share")
    axes.set_ylabel("ECDF less the diagonal")
    return axes


def plot_coverage(level: Values, coverage: Values, lower: Values, upper: Values, figure: Figure | None = None) -> Axes:
    """How often regions of each level hold the truth: on the diagonal if calibrated, below it if too narrow.

    Args:
        level: (points,), posterior mass of the region, in (0, 1).
        coverage: (points,), the share of replications in which it held the truth.
        lower, upper: (points,), band under calibration.
        figure: to draw into.
    """
    axes = _curve(level, coverage, lower, upper, figure)
    axes.set_xlabel("posterior mass of the region")
    axes.set_ylabel("share of truths inside")
    return axes


def plot_tarp(level: Values, coverage: Values, lower: Values, upper: Values, figure: Figure | None = None) -> Axes:
    """Expected coverage of balls around random points (TARP) against their credibility; arguments as plot_coverage."""
    axes = _curve(level, coverage, lower, upper, figure)
    axes.set_xlabel("credibility level")
    axes.set_ylabel("expected coverage (TARP)")
    return axes


def plot_coverage_map(coverage: Values, level: float, figure: Figure | None = None) -> Axes:
    """How often an interval of ``level`` held each pixel, less that level: blue too seldom, orange too often.

    A large picture shows, of the pixels that fall together on the screen, the one farthest from the level.

    Args:
        coverage: (rows, columns) or (1, rows, columns), shares of replications.
        level: of the interval.
        figure: to draw into.
    """
    picture = array(coverage)
    picture = picture.reshape(picture.shape[-2:]) - level
    limit = max(level, 1 - level) / 2
    axes: Axes = new_figure(figure, 4.0, 3.4).subplots()
    axes.set_axis_off()
    shown = axes.imshow(
        reduced(picture, extreme=True), cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.figure.colorbar(shown, ax=axes, shrink=0.8, extend="both", label=f"coverage less {level:g}")
    axes.set_title(f"mean coverage {picture.mean() + level:.3f}", fontsize=9)
    return axes


def _curve(
    x: Values, y: Values, lower: Values, upper: Values, figure: Figure | None, less: Values | float = 0.0
) -> Axes:
    """y less ``less`` on its band, over x in [0, 1]; beside the diagonal, less the same. Orange where it leaves."""
    axes: Axes = new_figure(figure, 4.0, 3.4).subplots()
    at, values, low, high, off = (np.atleast_1d(array(np.asarray(v))) for v in (x, y, lower, upper, less))
    off = np.broadcast_to(off, at.shape)
    inside = (low <= values) & (values <= high)
    marker = "." if len(at) == 1 else None
    axes.fill_between(at, low - off, high - off, color=GREY, alpha=0.3, linewidth=0)
    axes.plot(at, at - off, color=GREY, linewidth=0.8)
    axes.plot(at, values - off, color=BLUE, linewidth=1.2, marker=marker)
    axes.plot(at[~inside], (values - off)[~inside], ".", color=ORANGE)
    axes.set_xlim(0, 1)
    return axes
