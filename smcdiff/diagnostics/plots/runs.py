"""What the particles did: traces over the steps, genealogy, weights, marginals, and evidence side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smcdiff.diagnostics.plots.style import BLUE, GREEN, GREY, ORANGE, SKY, Values, array, new_figure
from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.weights import effective_sample_size, pareto_k

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_evidence", "plot_genealogy", "plot_marginals", "plot_steps", "plot_weights"]

#: Final particles whose lines of descent are drawn, and particles in all that are.
_MOST_LINES, _MOST_PARTICLES = 200, 64


def plot_steps(run: Run, figure: Figure | None = None) -> NDArray[Any]:
    """Effective sample size, perplexity, surviving roots, and the running log-evidence of each chain over the steps.

    Returns:
        Two axes: counts above, log-evidence below.
    """
    figure = new_figure(figure, 7.0, 5.0)
    counts, evidence = figure.subplots(2, 1, sharex=True)
    n = run.log_w.shape[1]
    _lines(counts, array(run.ess), BLUE, "effective sample size")
    if run.entropy is not None:
        _lines(counts, np.exp(array(run.entropy)), SKY, "perplexity")
    if run.roots is not None:
        _lines(counts, array(run.roots), ORANGE, "surviving roots")
    counts.set_ylim(0, 1.05 * n)
    counts.set_ylabel(f"of {n} particles")
    counts.legend(fontsize=8)
    _lines(evidence, array(run.log_z_path), GREEN, "a chain")
    evidence.set_ylabel("running log-evidence (nats)")
    evidence.set_xlabel("step")
    both: NDArray[Any] = np.array([counts, evidence])
    return both


def plot_genealogy(ancestors: Values, figure: Figure | None = None) -> Axes:
    """The family tree of one chain: in colour the lines of descent that reach the end, the others in grey.

    Args:
        ancestors: (steps, n), index of each particle's parent among those of the step before; entry 0, of the initial
            particles, is not read. Of more than 64 particles only the lines that reach the end are drawn, and of more
            than 200 of these every so-manieth.
        figure: to draw into.
    """
    from matplotlib.collections import LineCollection

    parents = array(ancestors).astype(np.int64)
    steps, n = parents.shape
    axes: Axes = new_figure(figure, 7.0, 3.6).subplots()
    line = np.unique(np.linspace(0, n - 1, min(n, _MOST_LINES)).round().astype(np.int64))
    survivors, edges = [line], []
    for step in range(steps - 1, 0, -1):
        pairs = np.unique(np.stack([parents[step][line], line], -1), axis=0)  # a shared line is drawn once
        edges.append(_edges(step, pairs[:, 0], pairs[:, 1]))
        line = np.unique(parents[step][line])
        survivors.append(line)
    if n <= _MOST_PARTICLES:
        everyone = np.arange(n)
        grey = [_edges(step, parents[step], everyone) for step in range(1, steps)]
        axes.add_collection(LineCollection(list(_joined(grey)), colors=GREY, linewidths=0.5, alpha=0.5))
    axes.add_collection(LineCollection(list(_joined(edges)), colors=BLUE, linewidths=0.9))
    axes.plot(np.zeros(len(survivors[-1])), survivors[-1], "o", color=ORANGE, markersize=3)
    axes.set_xlim(-0.02 * max(steps - 1, 1), 1.02 * max(steps - 1, 1))
    axes.set_ylim(-1, n)
    axes.set_xlabel("step")
    axes.set_ylabel("particle")
    axes.set_title(f"{len(survivors[-1])} of {n} initial particles have descendants at the end", fontsize=9)
    return axes


def plot_weights(run: Run, figure: Figure | None = None) -> NDArray[Any]:
    """The exact weights of all final particles in falling order, and the share of each chain.

    Returns:
        Two axes: weights on the left, with the weight they would have if they were equal; chains on the right.
    """
    run = run.exact
    b, n = run.log_w.shape
    figure = new_figure(figure, 7.0, 3.0)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    w = np.sort(np.exp(array(run.log_w).ravel()))[::-1]
    positive = w[w > 0]
    left.loglog(np.arange(1, len(positive) + 1), positive, color=BLUE, marker="." if len(w) <= 200 else None)
    left.axhline(1 / (b * n), color=GREY, linestyle="--")
    left.set_ylim(max(positive[-1] / 2, 1e-12), 2.0)
    left.set_xlabel("rank")
    left.set_ylabel("weight")
    left.set_title(
        f"ESS {effective_sample_size(run.log_w):.1f} of {b * n}, Pareto k-hat {pareto_k(run.log_w):.2f}", fontsize=9
    )
    right.bar(np.arange(b), np.exp(array(run.chain_log_w)), color=BLUE)
    right.axhline(1 / b, color=GREY, linestyle="--")
    right.set_xlabel("chain")
    right.set_ylabel("share")
    both: NDArray[Any] = np.array([left, right])
    return both


def plot_marginals(run: Run, site: str, truth: Values | None = None, figure: Figure | None = None) -> Axes:
    """A site that is not a picture: the weighted histogram of a scalar, or mean and 90 % interval of every entry.

    Args:
        run: the run.
        site: its name.
        truth: the value itself, where it is known.
        figure: to draw into.
    """
    axes: Axes = new_figure(figure, 5.0, 3.0).subplots()
    mean = array(run.mean(site)).ravel()
    low, high = (array(run.quantile(site, level)).ravel() for level in (0.05, 0.95))
    known = None if truth is None else array(truth).ravel()
    if len(mean) == 1:
        values, w = array(run.values[site]).ravel(), np.exp(array(run.log_w)).ravel()
        axes.hist(values, bins=min(30, max(5, len(values) // 8)), weights=w, color=SKY)
        axes.axvline(mean[0], color=BLUE, label="mean")
        axes.axvspan(low[0], high[0], color=BLUE, alpha=0.12, label="90 % interval")
        if known is not None:
            axes.axvline(known[0], color=ORANGE, linestyle="--", label="truth")
        axes.set_xlabel(site)
        axes.set_ylabel("posterior probability")
    else:
        entries = np.arange(len(mean))
        axes.fill_between(entries, low, high, color=BLUE, alpha=0.25, linewidth=0, step="mid", label="90 % interval")
        axes.plot(entries, mean, color=BLUE, drawstyle="steps-mid", label="mean")
        if known is not None:
            axes.plot(entries, known, ".", color=ORANGE, label="truth")
        axes.set_xlabel("entry")
        axes.set_ylabel(site)
    axes.legend(fontsize=8)
    return axes


def plot_evidence(
    programs: Mapping[str, tuple[float, float]],
    exact: Mapping[str, float] | None = None,
    figure: Figure | None = None,
) -> Axes:
    """Log-evidence of several programs for the same data, less that of the best: log Bayes factors against it.

    Args:
        programs: {name: (log-evidence, its standard error)}, in nats; an error of NaN is drawn as an open circle.
        exact: {name: log-evidence}, where it is known; a cross.
        figure: to draw into.
    """
    names = list(programs)
    log_z, error = np.array([programs[name] for name in names], dtype=np.float64).T
    best = np.nanmax(log_z)
    axes: Axes = new_figure(figure, 6.0, 1.0 + 0.4 * len(names)).subplots()
    place = np.arange(len(names))[::-1]
    known = np.isfinite(error)
    axes.axvline(0, color=GREY, linestyle="--", linewidth=0.8)
    axes.errorbar(log_z[known] - best, place[known], xerr=2 * error[known], fmt="o", color=BLUE, capsize=3)
    axes.plot(log_z[~known] - best, place[~known], "o", markerfacecolor="none", color=BLUE)
    for name, truth in (exact or {}).items():
        axes.plot(truth - best, place[names.index(name)], "x", color=ORANGE)
    axes.set_yticks(place, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("log Bayes factor against the best (nats), 2 standard errors")
    return axes


def _lines(axes: Axes, values: NDArray[Any], colour: str, label: str) -> None:
    marker = "." if len(values) == 1 else None
    lines = axes.plot(np.arange(len(values)), values, color=colour, alpha=0.7, linewidth=1, marker=marker)
    lines[0].set_label(label)


def _edges(step: int, parents: NDArray[Any], children: NDArray[Any]) -> NDArray[Any]:
    """Line segments from parents at the step before to children, (m, 2, 2)."""
    before, after = np.full(len(parents), step - 1), np.full(len(children), step)
    return np.stack([np.stack([before, parents], -1), np.stack([after, children], -1)], 1)


def _joined(edges: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(edges) if edges else np.zeros((0, 2, 2))
