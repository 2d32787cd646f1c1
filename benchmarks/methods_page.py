"""docs/methods.md, from what the comparisons left in results/.

    python benchmarks/methods_page.py

reads ``methods.jsonl`` (methods_table.py), ``mixture.jsonl`` (mixture.py) and ``peers.json`` (peers.py), and runs
nothing.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import mixture
import mixture_spread
import numpy as np
import peers
from catalogue import CATALOGUE
from kept import Kept
from methods_table import KEYS, RUNS
from page import markdown

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"

HEAD = """# The methods, measured

Every number on this page is made by the scripts in `benchmarks/` and put here by `benchmarks/methods_page.py`. All
denoisers are exact, so that what is seen is the method and not a network. {doc}`choosing` draws the conclusions.
"""

SMALL = """## Small problems

`benchmarks/methods_table.py`: a correlated Gaussian in 6 dimensions with 3 measured values, and a mixture of 4
components in 4 dimensions with 2 measured values, which leave two of the components about as likely as each other.
Noise 0.3, 50 steps on a Karras grid.

With **one particle** a method is what was published (4096 independent runs, the chain's posterior variance). *Bias* is
how far the mean of the draws is off, in posterior standard deviations, root mean square over coordinates; *width* is
the root mean squared distance of draws from the exact mean over its true value, along measured and other directions. It
should be 1.

With **n particles** the chain has the optimal variance (full for `Adapted`), and the settings are those of
`benchmarks/catalogue.py`: `min_variance=1` where a proposal is narrower than the chain, gain 1 for DMPS. *Error* is
that of one run's mean, in posterior standard deviations, root mean square over runs: of n independent exact draws it
would be 0.25, 0.063 and 0.016. *log Z* is the median error of one run's log-evidence in nats. *ms* is the processor
time of a run of 256 particles. Forward and back are network evaluations per particle; MMPS, TMPD and the Tweedie twist
take further products back through the network within their twist, which are not among them.
"""

MIXTURE = """## The mixture of MCGDiff

`benchmarks/mixture.py`: 25 components in 8, 80 and 800 dimensions, 1, 2 and 4 measured values, 1000 particles, one run
for each problem, 100 network evaluations per particle. *Ratio* is the sliced Wasserstein distance to the posterior over
that of as many exact draws; the goal is a median of at most 1.15 on every cell, and of at most 0.1 nat for the error of
the log-evidence. *Modes* is half the summed error of the components' weights. Medians over seeds.

The schedule's rates rise as published for 1000 steps and on for 300 more. At the published end, sigma / alpha = 157,
the farthest components of the 80- and 800-dimensional priors, 286 and 905 from each other, are not forgotten yet, and a
chain that begins at N(0, I) has lost some of them at any number of steps. The last table of this section shows what
that costs. Steps are even in log(sigma / alpha), from four times the largest distance between components; with 10
steps from that distance itself, which took the ratio of 800 dimensions and one measured value from 2.3 to 1.7.
"""

SPREAD = """What keeps a ratio above 1 where one value is measured is the choice of a component, and not the steps: the
weights of `Adapted` spread while p(x_0 given x_t) is a mixture and its Gaussian guess is not, and no less with four
times as many steps (`benchmarks/mixture_spread.py`: the summed variance of the log-increments in nats², and the noise
between which its middle half falls, medians over seeds):
"""

PEERS = """## Beside deepinv and azula

`benchmarks/peers.py`: a Gaussian field of 8 × 8 pixels on [-1, 1], half of the pixels measured, noise 0.1, the same
exact denoiser for all, each library's default schedule and settings. *Width* is the standard deviation of the draws
over that of the posterior, median over seen and over unseen pixels; *mean* is the root mean square error of the draws'
mean in posterior standard deviations, 0.04 for 512 exact draws. Passes are per draw. Samplers with "n =" are one
particle filter of so many particles; all others are independent draws.
"""


def small(kept: Kept) -> str:
    """Two tables, one for each problem."""
    parts = [SMALL]
    known = {tuple(row[key] for key in KEYS): row for row in kept.rows}
    for problem in ("Gaussian", "mixture"):
        lines = []
        for entry in CATALOGUE:
            rows = {n: known.get((problem, entry.name, n), {}) for n in RUNS}
            if not any(rows.values()):
                continue
            work = next(row for row in rows.values() if row)
            line = {"method": entry.name, "bias, n = 1": _number(rows[1], "mean", 2)}
            line["width"] = f"{_number(rows[1], 'width seen', 2)} / {_number(rows[1], 'width unseen', 2)}"
            for n in list(RUNS)[1:]:
                line[f"error, n = {n}"] = _number(rows[n], "mean", 3)
            for n in list(RUNS)[1:]:
                line[f"log Z, n = {n}"] = _number(rows[n], "log evidence", 2)
            line["forward"], line["back"] = (_number(work, key, 0) for key in ("forward", "backward"))
            line["ms"] = _number(rows[256], "seconds", 0, 1000)
            lines.append(line)
        parts += [f"### {problem[0].upper()}{problem[1:]}\n", markdown(lines) if lines else "Not run.", ""]
    return "\n".join(parts)


def _number(row: dict[str, Any], key: str, digits: int, scale: float = 1.0) -> str:
    if "error" in row:
        return "failed"
    return f"{scale * row[key]:.{digits}f}" if key in row else "–"


def public(kept: Kept) -> str:
    """All methods at 100 evaluations, the flagship at fewer, and with the published end of the schedule."""
    parts = [MIXTURE, _goals(kept.rows), "", SPREAD, mixture_spread.table(), ""]
    for d in (8, 80, 800):
        here = [row for row in kept.rows if row["d"] == d]
        lines = mixture.table(here, 100, 1300)
        parts += [f"### {d} dimensions\n", markdown(lines) if lines else "Not run.", ""]
    flagship = [row for row in kept.rows if row["method"] == "Adapted"]
    for steps in (30, 10):
        lines = mixture.table(flagship, steps, 1300)
        parts += [f"### {steps} evaluations\n", markdown(lines) if lines else "Not run.", ""]
    lines = mixture.table(flagship, 100, 1000)
    if lines:
        parts += ["### 100 evaluations, the schedule as published\n", markdown(lines), ""]
    return "\n".join(parts)


def _goals(rows: list[dict[str, Any]]) -> str:
    """Which cells the best method meets the goals on, in words."""
    lines = []
    for d, dim_y in mixture.CELLS:
        best: tuple[float, float, str, float] | None = None
        for entry in CATALOGUE:
            name = (entry.name, d, dim_y, 100, 1300)
            here = [r for r in rows if tuple(r[key] for key in mixture.KEYS[:-1]) == name and "error" not in r]
            if len(here) >= 3 and entry.weighted:
                ratios = [r["distance"] / r["floor"] for r in here]
                ratio = statistics.median(ratios)
                error = statistics.median(abs(r["log evidence"] - r["exact"]) for r in here)
                if best is None or ratio + error < best[0] + best[1]:
                    best = (ratio, error, entry.name, _uncertainty(ratios))
        if best is not None:
            met = "met" if best[0] <= 1.15 and best[1] <= 0.1 else "missed"
            cell = {"d": str(d), "dim y": str(dim_y), "best method": best[2]}
            ratio_found = f"{best[0]:.2f} ± {best[3]:.2f}"
            lines.append(cell | {"ratio": ratio_found, "log Z error": f"{best[1]:.3f}", "goal": met})
    said = "Best of the methods on each cell, by ratio plus evidence error; ± is the standard error of the median over "
    return f"{said}seeds, by bootstrap:\n\n{markdown(lines)}" if lines else ""


def _uncertainty(values: list[float]) -> float:
    """Standard error of a median, by bootstrap."""
    random = np.random.default_rng(0)
    return float(np.median(random.choice(values, (2000, len(values))), 1).std())


def beside(path: Path) -> str:
    """The table of peers.py."""
    if not path.is_file():
        return PEERS + "\nNot run.\n"
    content = json.loads(path.read_text())
    return f"{PEERS}\n{peers.table(content['samplers'])}\n"


def main() -> None:
    tables = [
        HEAD,
        small(Kept(RESULTS / "methods.jsonl", KEYS)),
        public(Kept(RESULTS / "mixture.jsonl", mixture.KEYS)),
        beside(RESULTS / "peers.json"),
    ]
    PAGE.write_text("\n".join(tables).rstrip() + "\n")


if __name__ == "__main__":
    main()
