"""The public mixture problem of MCGDiff: nine cells, an exact answer, one run per problem.

    python benchmarks/mixture.py [--methods Adapted ...] [--cells 8x1 80x4 ...] [--seeds 20] [--steps 100 30 10]

For each cell (dimension of x) x (number of measured values) and each seed, a problem is drawn
(:mod:`problems`), and each method runs once on it, n = 1000 particles, one network evaluation per particle and step.
Particles are resampled when the effective sample size falls below 0.9 n.

The grid is even in log(sigma / alpha), from four times the largest distance between components, where they are
forgotten (the distance itself with 10 steps, which are better spent below it), to one deviation of a component
(Adapted, whose last step is exact from there) or a tenth of it (the others).

The schedule that the problem is published with, 1000 steps with beta from 1e-4 to 2e-2, ends at sigma / alpha = 157. In
80 and 800 dimensions the farthest components are 286 and 905 from each other and so not forgotten there: a chain that
begins at N(0, I) has other weights of the components than the prior, at any number of steps. Here the rates go on
rising for 300 steps more, to 5162; ``--train-steps 1000`` is as published. Printed are medians over seeds of

    ratio       sliced Wasserstein distance to the posterior over that of as many exact draws, the floor
    |log Z|     error of the log-evidence, in nats
    ESS         effective sample size of the last step's weights, and the least of any step
    modes       error of the components' weights, half the sum of absolute differences
    forward     network evaluations per particle, forward and back
    seconds     processor time of a run

Methods without weights (DPS) are run as 1000 chains of one particle. Each finished run is a line of
results/mixture.jsonl and is not repeated; ``--report`` prints the tables of what is there and runs nothing.

On Linux the environment variables MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=4294967296, with which
glibc keeps freed memory, make runs in 800 dimensions up to twice as fast (docs/performance.md).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from catalogue import Entry, available
from kept import Kept
from machine import describe
from page import markdown
from problems import MixtureProblem, Yardstick

import smcdiff as sd
from smcdiff.smc import ParticleFilter

RESULTS = Path(__file__).with_name("results") / "mixture.jsonl"
CELLS = [(d, dim_y) for d in (8, 80, 800) for dim_y in (1, 2, 4)]
PARTICLES, TRAIN_STEPS = 1000, 1300
KEYS = ("method", "d", "dim_y", "steps", "train_steps", "seed")
FILTER = ParticleFilter(ess_threshold=0.9)


@dataclass(frozen=True)
class EvenGrid:
    """Evenly spaced in log(sigma / alpha), as far up as the schedule goes.

    Args:
        low, high: ends of sigma / alpha.
    """

    low: float
    high: float

    def times(self, schedule: Any, num_steps: int) -> np.ndarray:
        high = min(self.high, schedule.level(schedule.t_max).ratio)
        return np.array([schedule.time(ratio) for ratio in np.geomspace(self.low, high, num_steps)])


def schedule(train_steps: int) -> sd.VPSchedule:
    """Rates that rise as those of 1000 steps from 1e-4 to 2e-2 do."""
    return sd.VPSchedule(1e-4, 1e-4 + (2e-2 - 1e-4) * (train_steps - 1) / 999, train_steps)


def grid_of(entry: Entry, problem: MixtureProblem, steps: int) -> EvenGrid:
    """The grid of a method on a problem."""
    farthest = float(torch.cdist(problem.means, problem.means).max())
    return EvenGrid(entry.last_ratio, (4 if steps > 10 else 1) * farthest)


def run(
    entry: Entry, problem: MixtureProblem, yardstick: Yardstick, steps: int, train_steps: int, seed: int
) -> dict[str, Any]:
    """One run of a method, and how far it is from the truth."""
    grid = grid_of(entry, problem, steps)
    prior = sd.DiffusionPrior(
        problem.denoiser, schedule(train_steps), num_steps=steps, grid=grid, variance=entry.variance
    )
    kernel = entry.load()(problem.program(prior), **entry.settings)
    n, chains = (PARTICLES, 1) if entry.weighted else (1, PARTICLES)
    wall, processor = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run without evidence says so
        smc = sd.SMC(kernel, n, chains, seed=seed, filter=FILTER, progress=False, max_batch=PARTICLES).run(problem.y)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    x, (forward, back) = smc.get_samples()["x"], smc.network_evaluations
    weighted = smc.weighted_samples()
    modes = problem.mode_weights(weighted.values["x"].flatten(0, 1), weighted.log_w.exp().flatten())
    ess = smc.records.ess if entry.weighted else None
    return {
        "distance": yardstick.distance(x),
        "floor": yardstick.floor,
        "log evidence": float(smc.log_evidence),
        "exact": problem.log_evidence,
        "ess": None if ess is None else float(ess[-1]),
        "least ess": None if ess is None else float(ess.min()),
        "modes": 0.5 * float((modes - problem.posterior_weights).abs().sum()),
        "forward": forward / PARTICLES,
        "backward": back / PARTICLES,
        "seconds": wall,
        "processor seconds": processor,
    }


def table(rows: list[dict[str, Any]], steps: int, train_steps: int) -> list[dict[str, str]]:
    """Medians over seeds, a line per method and cell."""
    lines = []
    for (d, dim_y), entry in itertools.product(CELLS, available()[0]):
        name = (entry.name, d, dim_y, steps, train_steps)
        here = [r for r in rows if tuple(r[key] for key in KEYS[:-1]) == name]
        done = [r for r in here if "error" not in r]
        if not here:
            continue
        line = {"d": str(d), "dim y": str(dim_y), "method": entry.name, "seeds": str(len(here))}
        failed = len(here) - len(done)
        if failed:
            line["seeds"] += f" ({failed} failed)"
        line |= {
            "ratio": _median([r["distance"] / r["floor"] for r in done], 2),
            "distance": _median([r["distance"] for r in done], 3),
            "floor": _median([r["floor"] for r in done], 3),
            "log Z error": _median([abs(r["log evidence"] - r["exact"]) for r in done], 3) if entry.weighted else "–",
            "ESS": _median([r["ess"] for r in done], 0) if entry.weighted else "–",
            "least ESS": _median([r["least ess"] for r in done], 0) if entry.weighted else "–",
            "mode error": _median([r["modes"] for r in done], 3),
            "forward": _median([r["forward"] for r in done], 0),
            "back": _median([r["backward"] for r in done], 0),
            "seconds": _median([r["processor seconds"] for r in done], 1),
        }
        lines.append(line)
    return lines


def _median(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names as in catalogue.py; all by default")
    parser.add_argument("--cells", nargs="+", default=[f"{d}x{dim_y}" for d, dim_y in CELLS])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="+", default=[100])
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(arguments.results, KEYS)
    if not arguments.report:
        machine = describe()
        print(", ".join(f"{word} {value}" for word, value in machine.items()), flush=True)
        entries, missing = available(arguments.methods)
        for name, reason in missing.items():
            print(f"{name} is left out: {reason}")
        cells = [tuple(int(part) for part in cell.split("x")) for cell in arguments.cells]
        for seed, (d, dim_y) in itertools.product(range(arguments.seeds), cells):
            problem = MixtureProblem.public(d, dim_y, seed)
            yardstick: Yardstick | None = None
            for entry, steps in itertools.product(entries, arguments.steps):
                row: dict[str, Any] = dict(
                    zip(KEYS, (entry.name, d, dim_y, steps, arguments.train_steps, seed), strict=True)
                )
                if row in kept:
                    continue
                yardstick = yardstick or Yardstick(problem, PARTICLES, seed)
                try:
                    row |= run(entry, problem, yardstick, steps, arguments.train_steps, seed)
                except sd.FilterError as error:
                    row["error"] = str(error)
                except TypeError as error:
                    print(f"{entry.name} does not take it: {error}")
                    continue
                kept.add(row)
    for steps in arguments.steps:
        print(
            f"\n{steps} network evaluations per particle\n\n"
            + markdown(table(kept.rows, steps, arguments.train_steps) or [{"": "none"}])
        )


if __name__ == "__main__":
    main()
