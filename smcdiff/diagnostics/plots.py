"""Pictures of a result. Every function draws into a figure it is given, or a new one, and returns the axes.

Grey pictures share one scale; standard deviations use the map "cividis", which has uniform steps of lightness and looks
the same to colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smcdiff.diagnostics.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_posterior", "plot_steps"]


def plot_posterior(
    mean: Tensor,
    sd: Tensor,
    draws: Tensor,
    references: Mapping[str, Tensor] | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    figure: Figure | None = None,
) -> NDArray[Any]:
    """Pictures side by side: the references, the posterior's mean, its standard deviation, and some draws.

    Args:
        mean: (1, rows, columns) or (rows, columns).
        sd: of the same shape.
        draws: (number, *shape of mean), all of them are shown.
        references: {title: picture} to show first, such as the measurement and, where it is known, the truth.
        span: grey values shown as black and white.
        figure: to draw into.

    Returns:
        The axes of the pictures, in that order.
    """
    greys = {**(references or {}), "posterior mean": mean}
    greys_after = {f"draw {i + 1}": draw for i, draw in enumerate(draws)}
    number = len(greys) + 1 + len(greys_after)
    columns = min(number, 4)
    rows = -(-number // columns)
    figure = _figure(figure, 2.4 * columns, 2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    titles = [*greys, "standard deviation", *greys_after]
    pictures = [*greys.values(), sd, *greys_after.values()]
    for axes, title, picture in zip(grid, titles, pictures, strict=False):
        values = picture.detach().cpu().double().numpy().reshape(picture.shape[-2:])
        if picture is sd:
            shown = axes.imshow(values, cmap="cividis", vmin=0.0, interpolation="nearest")
            figure.colorbar(shown, ax=axes, shrink=0.7)
        else:
            axes.imshow(values, cmap="gray", vmin=span[0], vmax=span[1], interpolation="nearest")
        axes.set_title(title, fontsize=9)
    used: NDArray[Any] = grid[:number]
    return used


def plot_steps(run: Run, figure: Figure | None = None) -> NDArray[Any]:
    """Effective sample size and surviving roots, and the running log-evidence, of each chain over the steps.

    Returns:
        Two axes: counts above, log-evidence below.
    """
    figure = _figure(figure, 7.0, 5.0)
    counts, evidence = figure.subplots(2, 1, sharex=True)
    n = run.log_w.shape[1]
    steps = np.arange(len(run.ess))
    _lines(counts, steps, run.ess, "#0072b2", "effective sample size")
    if run.roots is not None:
        _lines(counts, steps, run.roots, "#d55e00", "surviving roots")
    counts.set_ylim(0, 1.05 * n)
    counts.set_ylabel(f"of {n} particles")
    counts.legend(fontsize=8)
    _lines(evidence, steps, run.log_z_path, "#009e73", "a chain")
    evidence.set_ylabel("running log-evidence (nats)")
    evidence.set_xlabel("step")
    both: NDArray[Any] = np.array([counts, evidence])
    return both


def _lines(axes: Axes, steps: NDArray[Any], values: Tensor, colour: str, label: str) -> None:
    lines = axes.plot(steps, values.detach().cpu().numpy(), color=colour, alpha=0.7, linewidth=1)
    lines[0].set_label(label)


def _figure(figure: Figure | None, width: float, height: float) -> Figure:
    if figure is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    return figure
