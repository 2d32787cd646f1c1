r"""A run as one HTML page: how far to trust it, what came out, what the particles did, and how to do it again.

What the page says of the weights is said of the exact ones, even where pictures are made from tempered ones. Pictures
show the posterior's mean, standard deviation, 5 % and 95 % quantiles and some draws; where the truth of a site is known
(a constant "SITE.truth" of the run) its z-scores and the share of pixels inside the 90 % interval are shown as well.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from smcdiff.diagnostics import page as html
from smcdiff.diagnostics.plots import (
    plot_genealogy,
    plot_marginals,
    plot_posterior,
    plot_steps,
    plot_weights,
    plot_zscore,
)
from smcdiff.diagnostics.provenance import read_references, references
from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.verdict import Diagnostics, diagnose
from smcdiff.diagnostics.weights import pareto_k

__all__ = ["find_run", "report"]

#: The least number of draws to show.
_DRAWS = 4
#: Sites with more entries than this are given by ranges in the table.
_MOST_ROWS = 12
_HEADLINES = {
    "good": "Verdict: good. Nothing here speaks against the result.",
    "doubtful": "Verdict: doubtful. The result stands, with these reservations:",
    "bad": "Verdict: bad. Do not rely on the result until this is mended:",
}
#: Attributes that have a place of their own on the page, or none.
_ELSEWHERE = {
    "references", "command", "title", "inference_library", "log_evidence", "verdict", "tempering_exponent",
    "num_chains", "num_particles",
}  # fmt: skip


def find_run(path: Path) -> Path:
    """The file of a run: the path itself, or ``posterior.nc`` in a folder that ``smcdiff restore`` wrote.

    Raises:
        FileNotFoundError: where there is none.
    """
    file = path / "posterior.nc" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}; give a file that smc.save wrote, or a folder that `smcdiff restore` wrote"
        )
    return file


def report(run: Run, title: str = "Posterior report", summary: str = "") -> str:
    """The page, as text.

    Args:
        run: the run; its ``about`` says where it comes from.
        title: of the page.
        summary: what is known of the run besides, as lines of text.
    """
    diagnostics = diagnose(run)
    chains, particles = run.log_w.shape
    parts = [
        html.paragraph(f"{chains} chains of {particles} particles over {len(run.ess) - 1} steps.", "lead"),
        html.verdict(
            diagnostics.verdict,
            _HEADLINES[diagnostics.verdict],
            [(finding.level, finding.reason, finding.remedy) for finding in diagnostics.findings],
        ),
        html.table(_numbers(run, diagnostics)),
        html.section("Posterior", _posterior(run)),
        html.section("The run", _particles(run)),
        html.section("How it was made", _origin(run)),
        *([html.section("Summary", [html.code(summary)])] if summary else []),
        html.section("References", [html.listing(_papers(run))]),
    ]
    return html.page(title, parts)


def _numbers(run: Run, diagnostics: Diagnostics) -> list[list[str]]:
    n = run.log_w.numel()
    error = diagnostics.log_evidence_error
    evidence = f"{diagnostics.log_evidence:.2f}"
    evidence += " nats, with no error that could be given" if math.isnan(error) else f" ± {error:.2f} nats"
    rows = [
        ["Log-evidence", evidence],
        ["Spread over chains", f"{diagnostics.log_z_spread:.2f} nats"],
        ["Effective sample size", f"{diagnostics.pooled_ess:.1f} of {n} (perplexity {diagnostics.perplexity:.1f})"],
        ["Smallest of a step", f"{diagnostics.min_ess:.1f}, at step {diagnostics.min_ess_step}"],
        ["Pareto k-hat", f"{diagnostics.k_hat:.2f}"],
    ]
    if diagnostics.roots is not None:
        shown = " ".join(str(int(root)) for root in diagnostics.roots[:32])
        rows.append(["Surviving roots per chain", shown + (" ..." if len(diagnostics.roots) > 32 else "")])
    if run.exponent != 1:
        rows.append(["Tempering exponent", f"{run.exponent:.3g}: pictures and tables use the weights to this power"])
    return rows


def _posterior(run: Run) -> list[str]:
    pictures = [site for site, value in run.values.items() if _is_picture(value)]
    others = [site for site in run.values if site not in pictures]
    parts = []
    for site in pictures:
        parts += _about_picture(run, site)
    if others:
        parts.append(html.table(_table(run, others), ["Site", "mean", "sd", "5 %", "95 %"]))
    for site in others:
        if run.values[site].is_floating_point():
            size = (5.0, 2.8) if run.values[site][0, 0].numel() == 1 else (9.0, 2.8)
            figure = Figure(figsize=size)
            plot_marginals(run, site, _truth(run, site), figure)
            parts.append(html.figure(figure, f"Posterior of {site}."))
    return parts


def _about_picture(run: Run, site: str) -> list[str]:
    truth, mean, sd = _truth(run, site), run.mean(site), run.sd(site)
    low, high = run.quantile(site, 0.05), run.quantile(site, 0.95)
    known = {} if truth is None else {"truth": truth}
    measured = {f"measurement {name}": value for name, value in run.observed.items() if _is_picture(value[None, None])}
    quantiles = {"5 % quantile": low, "95 % quantile": high}
    before = len(known) + len(measured) + 2 + len(quantiles)
    number = _DRAWS + (-before - _DRAWS) % 4  # rows of four, all full
    height = 2.4 * min(max(mean.shape[-2] / mean.shape[-1], 0.3), 2.0) + 0.35
    figure = Figure(figsize=(9.6, (before + number) // 4 * height))
    span = _span([mean, *known.values()])
    plot_posterior(mean, sd, _draws(run, site, number), {**known, **measured}, quantiles, span, figure)
    caption = f"{site}: what was measured, the posterior's mean, standard deviation and quantiles, and {number} draws. "
    parts = [html.figure(figure, caption + f"Black is {span[0]:.3g}, white {span[1]:.3g}.")]
    if truth is not None:
        inside = 100 * float(((truth >= low) & (truth <= high)).double().mean())
        caption = f"{site} against the truth, which is known here: {inside:.1f} % of all pixels are inside the 90 % "
        caption += "interval. Blue: the truth is darker than the mean; orange: brighter."
        for channel in range(len(truth)):
            figure = Figure(figsize=(5.0, 4.0))
            plot_zscore(truth[channel], mean[channel], sd[channel], figure=figure)
            parts.append(html.figure(figure, caption))
    return parts


def _particles(run: Run) -> list[str]:
    steps, weights = Figure(figsize=(9.0, 5.0)), Figure(figsize=(9.0, 3.2))
    plot_steps(run, steps)
    plot_weights(run, weights)
    caption = "Above, how many particles count at each step, and from how many of the initial ones they descend; "
    parts = [
        html.figure(steps, caption + "below, the evidence gathered so far. One line is one chain."),
        html.figure(weights, "The exact weights of all final particles, and each chain's share. Dashed: all equal."),
    ]
    if run.ancestors is not None and run.log_w.shape[1] > 1:
        family = Figure(figsize=(9.0, 3.6))
        plot_genealogy(run.ancestors[:, 0], family)
        parts.append(html.figure(family, "Who descends from whom in the first chain; in blue what reaches the end."))
    return parts


def _origin(run: Run) -> list[str]:
    rows = [[name.replace("_", " "), _short(value)] for name, value in run.about.items() if name not in _ELSEWHERE]
    data = [
        [f"measurement {name}", f"shape {tuple(value.shape)}, {value.dtype}, sum {float(value.double().sum()):.8g}"]
        for name, value in run.observed.items()
    ]
    parts = [html.table([*rows, *data])]
    command = run.about.get("command")
    if command is not None:
        parts += [html.paragraph("The same numbers come out of:"), html.code(str(command))]
    elif "method" in run.about and "seed" in run.about:
        call = f"sd.SMC(sd.{run.about['method']}, num_particles={run.log_w.shape[1]}, num_chains={run.log_w.shape[0]}, "
        call += f"seed={run.about['seed']}).run(y)"
        parts += [
            html.paragraph("The same numbers come out of the same program (the method's first argument), run as:"),
            html.code(call),
        ]
    return parts


def _papers(run: Run) -> list[str]:
    """Of the run's method, as it was recorded, and of the numbers on the page."""
    own = read_references(str(run.about["references"])) if "references" in run.about else []
    return [*own, *(paper for paper in references(diagnose, pareto_k) if paper not in own)]


def _table(run: Run, sites: list[str]) -> list[list[str]]:
    rows = []
    for site in sites:
        columns = [run.mean(site), run.sd(site), run.quantile(site, 0.05), run.quantile(site, 0.95)]
        number = columns[0].numel()
        if number > _MOST_ROWS:
            ranges = [f"{float(column.min()):.4g} to {float(column.max()):.4g}" for column in columns]
            rows.append([f"{site} ({number} entries)", *ranges])
            continue
        for i, row in enumerate(zip(*(column.flatten().tolist() for column in columns), strict=True)):
            rows.append([f"{site}[{i}]" if number > 1 else site, *(f"{value:.4g}" for value in row)])
    return rows


def _is_picture(values: Tensor) -> bool:
    """Whether (b, n, *event) are pictures that can be shown."""
    return values.ndim == 5 and values.shape[2] in (1, 3) and values.is_floating_point() and values[0, 0].numel() > 3


def _truth(run: Run, site: str) -> Tensor | None:
    truth = run.constants.get(f"{site}.truth")
    return None if truth is None or truth.shape != run.values[site].shape[2:] else truth


def _draws(run: Run, site: str, number: int) -> Tensor:
    """Particles at even steps of the cumulative weight, so from chains far apart."""
    cumulative = run.log_w.exp().flatten().cumsum(0)
    comb = (torch.arange(number, device=cumulative.device) + 0.5) / number * cumulative[-1]
    index = torch.searchsorted(cumulative, comb).clamp(max=len(cumulative) - 1)
    return run.values[site].flatten(0, 1)[index]


def _span(pictures: list[Tensor]) -> tuple[float, float]:
    """[-1, 1], the scale of the library's pictures, if these keep to it; otherwise their own."""
    low = min(float(picture.min()) for picture in pictures)
    high = max(float(picture.max()) for picture in pictures)
    if low >= -1.2 and high <= 1.2:
        return -1.0, 1.0
    return low, high if high > low else low + 1.0


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 600 else text[:600] + " ..."
