"""Posteriors of pictures: panels, z-scores, the kernel of a blur, and how the picture came out of the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smcdiff.diagnostics.plots.style import BLUE, ORANGE, Values, array, diverging, new_figure, reduced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_film", "plot_kernel", "plot_posterior", "plot_zscore"]


def plot_posterior(
    mean: Values,
    sd: Values,
    draws: Values,
    references: Mapping[str, Values] | None = None,
    quantiles: Mapping[str, Values] | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    figure: Figure | None = None,
) -> NDArray[Any]:
    """Pictures side by side: references, the posterior's mean, its standard deviation, its quantiles, and draws.

    Args:
        mean: (rows, columns), (1, rows, columns), or (3, rows, columns) for colour.
        sd: of the same shape; of a colour picture the root mean square over the colours is shown.
        draws: (number, *shape of mean), all of them are shown.
        references: {title: picture} to show first, such as the truth, where it is known, and the measurement.
        quantiles: {title: picture} to show after the standard deviation.
        span: values shown as black and white.
        figure: to draw into.

    Returns:
        The axes of the pictures, in that order.
    """
    before = {**(references or {}), "posterior mean": mean}
    after = {**(quantiles or {}), **{f"draw {i + 1}": draw for i, draw in enumerate(draws)}}
    titles = [*before, "standard deviation", *after]
    columns = min(len(titles), 4)
    rows = -(-len(titles) // columns)
    figure = new_figure(figure, 2.4 * columns, (2.4 * _aspect(mean) + 0.3) * rows)
    grid: NDArray[Any] = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, title, values in zip(grid, titles, [*before.values(), sd, *after.values()], strict=False):
        if title == "standard deviation":
            picture = _picture(values)
            picture = np.sqrt((picture**2).mean(-1)) if picture.ndim == 3 else picture
            _map(axes, picture, title)
        else:
            _grey(axes, values, span, title)
    used: NDArray[Any] = grid[: len(titles)]
    return used


def plot_zscore(truth: Values, mean: Values, sd: Values, limit: float = 4.0, figure: Figure | None = None) -> Axes:
    """(truth - mean) / sd of every pixel: near standard normal where the posterior is right.

    A large picture shows, of the pixels that fall together on the screen, the one farthest from zero.

    Args:
        truth, mean, sd: (rows, columns) or (1, rows, columns).
        limit: the score of the strongest colours.
        figure: to draw into.

    Raises:
        ValueError: for pictures of several channels.
    """
    deviation, scale = _picture(truth) - _picture(mean), _picture(sd)
    if deviation.ndim == 3:
        raise ValueError("got a colour picture; give one channel at a time, truth[0], mean[0], sd[0]")
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(deviation == 0, 0.0, deviation / scale)
    axes: Axes = new_figure(figure, 4.0, 3.4).subplots()
    axes.set_axis_off()
    shown = axes.imshow(
        reduced(z, extreme=True), cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest", rasterized=True
    )
    axes.figure.colorbar(shown, ax=axes, shrink=0.8, extend="both", label="(truth - mean) / sd")
    axes.set_title(f"z-scores: root mean square {np.sqrt((z**2).mean()):.2f}", fontsize=9)
    return axes


def plot_kernel(draws: Values, truth: Values | None = None, figure: Figure | None = None) -> NDArray[Any]:
    """The posterior of a blur kernel: its mean, its standard deviation, and its profile along the middle row.

    Args:
        draws: (number, rows, columns) or (number, 1, rows, columns), equally weighted.
        truth: the kernel itself, where it is known.
        figure: to draw into.

    Returns:
        Axes of the truth (if given), the mean, the standard deviation and the profile; the profile shows the mean, the
        90 % interval of every pixel, and the truth.
    """
    kernels = array(draws)
    kernels = kernels.reshape(len(kernels), *kernels.shape[-2:])
    mean = kernels.mean(0)
    known = None if truth is None else _picture(truth)
    number = 3 + (known is not None)
    figure = new_figure(figure, 2.6 * number, 2.5)
    grid: NDArray[Any] = figure.subplots(1, number, squeeze=False).ravel()
    pictures = ({} if known is None else {"truth": known}) | {"posterior mean": mean}
    highest = max(float(picture.max()) for picture in pictures.values())
    for axes, (title, picture) in zip(grid, pictures.items(), strict=False):
        _map(axes, picture, title, highest)
    _map(grid[number - 2], kernels.std(0), "standard deviation")
    profile, row = grid[-1], kernels.shape[-2] // 2
    columns = np.arange(kernels.shape[-1]) - kernels.shape[-1] // 2
    low, high = np.quantile(kernels[:, row], (0.05, 0.95), axis=0)
    marker = "o" if len(columns) == 1 else None
    if len(columns) == 1:
        profile.errorbar(columns, mean[row], [mean[row] - low, high - mean[row]], color=BLUE, alpha=0.5)
    profile.fill_between(columns, low, high, color=BLUE, alpha=0.25, linewidth=0, label="90 % interval")
    profile.plot(columns, mean[row], color=BLUE, marker=marker, label="mean")
    if known is not None:
        profile.plot(columns, known[row], color=ORANGE, linestyle="--", marker=marker, label="truth")
    profile.set_xlabel("pixels from the middle")
    profile.set_title("middle row", fontsize=9)
    profile.legend(fontsize=7)
    return grid


def plot_film(
    strips: Mapping[str, Values],
    labels: Sequence[str] | None = None,
    number: int = 8,
    span: tuple[float, float] = (-1.0, 1.0),
    figure: Figure | None = None,
) -> NDArray[Any]:
    """How the picture came out of the noise: frames at even distances along the steps, one strip under the other.

    Args:
        strips: {title: (steps, rows, columns) or (steps, channels, rows, columns)}, such as x_t and x0_hat.
        labels: of the steps, written over the frames; their numbers by default.
        number: of frames, the first and the last among them.
        span: values shown as black and white.
        figure: to draw into.

    Returns:
        (strips, frames) axes.

    Raises:
        ValueError: for strips of different lengths.
    """
    steps = {title: len(frames) for title, frames in strips.items()}
    if len(set(steps.values())) != 1:
        raise ValueError(f"got strips of {steps} steps; expected at least one, all of one length")
    last = next(iter(steps.values())) - 1
    chosen = np.unique(np.linspace(0, last, min(number, last + 1)).round().astype(int))
    height = 1.3 * _aspect(next(iter(strips.values()))) + 0.1
    figure = new_figure(figure, 1.3 * len(chosen), height * len(strips) + 0.2)
    grid: NDArray[Any] = figure.subplots(len(strips), len(chosen), squeeze=False)
    for row, (title, frames) in zip(grid, strips.items(), strict=True):
        for axes, step in zip(row, chosen, strict=True):
            _grey(axes, frames[step], span, "")
            axes.set_axis_on()
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(title, fontsize=8)
    for axes, step in zip(grid[0], chosen, strict=True):
        axes.set_title(str(step) if labels is None else labels[step], fontsize=8)
    return grid


def _aspect(values: Values) -> float:
    """Height of a picture over its width, for a figure: never so small or large that titles would not fit."""
    return min(max(values.shape[-2] / values.shape[-1], 0.3), 2.0)


def _picture(values: Values) -> NDArray[Any]:
    """(rows, columns) or (rows, columns, 3)."""
    picture = array(values)
    if picture.ndim == 3 and picture.shape[0] == 3:
        return picture.transpose(1, 2, 0)
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[0] != 1):
        raise ValueError(
            f"got a picture of shape {picture.shape}; expected (rows, columns), (1, rows, columns) or, for colour, "
            "(3, rows, columns)"
        )
    return picture.reshape(picture.shape[-2:])


def _grey(axes: Axes, values: Values, span: tuple[float, float], title: str) -> None:
    picture = reduced(_picture(values))
    if picture.ndim == 3:
        picture = ((picture - span[0]) / (span[1] - span[0])).clip(0, 1)
    axes.set_axis_off()
    axes.imshow(picture, cmap="gray", vmin=span[0], vmax=span[1], interpolation="nearest")
    axes.set_title(title, fontsize=9)


def _map(axes: Axes, picture: NDArray[Any], title: str, highest: float | None = None) -> None:
    axes.set_axis_off()
    shown = axes.imshow(reduced(picture), cmap="cividis", vmin=0.0, vmax=highest, interpolation="nearest")
    axes.figure.colorbar(shown, ax=axes, shrink=0.7)
    axes.set_title(title, fontsize=9)
