"""Where the weights of sd.Adapted spread on the public mixture, and whether more steps help.

For each cell and seed the variance over particles of the log-increments of one run, summed over steps, nats^2, at 100
and at 400 steps, and the noise sigma / alpha between which the middle half of it falls; medians over seeds.

    python benchmarks/mixture_spread.py [--cells 8x1 80x1] [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from adapted_networks import increments, log_w
from catalogue import available
from machine import describe
from mixture import FILTER, PARTICLES, TRAIN_STEPS, grid_of, schedule
from page import markdown
from problems import MixtureProblem

import smcdiff as sd

RESULTS = Path(__file__).with_name("results") / "mixture_spread.json"


def spread(d: int, dim_y: int, seed: int, steps: int) -> tuple[float, float, float]:
    """Summed variance, and the noise at which a quarter and three quarters of it have been met."""
    (entry,), _ = available(["Adapted"])
    problem = MixtureProblem.public(d, dim_y, seed)
    grid = grid_of(entry, problem, steps)
    prior = sd.DiffusionPrior(problem.denoiser, schedule(TRAIN_STEPS), steps, variance=entry.variance, grid=grid)
    records = sd.Records(summaries={"log_w": log_w})
    smc = sd.SMC(entry.load()(problem.program(prior)), PARTICLES, seed=seed, filter=FILTER, records=records,
                 max_batch=PARTICLES, progress=False).run(problem.y)  # fmt: skip
    found = increments(smc)
    share = found.cumsum(0) / found.sum()
    ratios = [level.ratio for level in reversed(prior.chain.levels)]
    quarter, three_quarters = (ratios[int((share < level).sum())] for level in (0.25, 0.75))
    return float(found.sum()), quarter, three_quarters


def table() -> str:
    """What the last run found, as a markdown table."""
    rows = json.loads(RESULTS.read_text())["rows"]
    return markdown([{k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["8x1", "80x1"])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for cell in arguments.cells:
        d, dim_y = map(int, cell.split("x"))
        for steps in (100, 400):
            found = [spread(d, dim_y, seed, steps) for seed in range(arguments.seeds)]
            total, high, low = (statistics.median(each) for each in zip(*found, strict=True))
            worst = max(one for one, _, _ in found)
            rows.append({"d": d, "dim y": dim_y, "steps": steps, "seeds": arguments.seeds, "summed variance": total,
                         "largest": worst, "from sigma / alpha": high, "to": low})  # fmt: skip
            print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=2) + "\n")
    print(table())


if __name__ == "__main__":
    main()
