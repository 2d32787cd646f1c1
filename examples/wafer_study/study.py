"""The study: every method on every picture, one row each.

    python -m examples.wafer_study.study --out OUT [--pictures 40] [--methods ...] [--large]

OUT/rows.0.jsonl gets a line per run and OUT/pictures the posterior means, spreads and probability maps of the first
pictures. What is there already is not done again: a study that was stopped goes on when the command is given again, and
two of them may share the work with ``--part 0/2`` and ``--part 1/2``. ``report.py`` makes the page of what is there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.kept import Kept
from benchmarks.machine import describe
from examples.wafer_study.methods import METHODS, Size, load
from examples.wafer_study.problems import CONTRAST, differing, problem
from examples.wafer_study.scores import score

WEIGHTS = Path(__file__).with_name("weights")
#: More particles, steps and draws: for a GPU, or for a night.
LARGE = Size(steps=60, dps_steps=1000, particles=16, chains=8, alone=32)
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--large", action="store_true", help=f"{LARGE}")
    parser.add_argument("--part", default="0/1", help="i/n: of n processes that share the pictures, the i-th")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part, parts_number = (int(number) for number in arguments.part.split("/"))
    parts = load(arguments.weights, LARGE if arguments.large else Size())
    (arguments.out / "pictures").mkdir(parents=True, exist_ok=True)
    kept = Kept(arguments.out / f"rows.{part}.jsonl", ("method", "number", "size"))
    machine, size = describe(), str(parts.size)
    work = [(number, name) for number in range(part, arguments.pictures, parts_number) for name in arguments.methods]
    for number, name in tqdm(work, unit="run"):
        row = {"method": name, "number": number, "size": size}
        if row in kept:
            continue
        given = problem(number)
        started = time.process_time()
        found = METHODS[name](given, parts)
        row |= score(given, found) | {"seconds": time.process_time() - started, "machine": machine}
        row |= {"width": given.setting.width, "dose": given.setting.dose}
        if number < SHOWN:
            chance = torch.einsum("d,d...->...", found.w, (differing(found.x, given.normal) > CONTRAST).double())
            shown = {"mean": found.mean, "sd": found.sd, "chance": chance, "draw": found.x[0]}
            if found.kernel is not None:
                shown["kernel"] = found.kernel
            arrays = {key: value.numpy().astype(np.float16) for key, value in shown.items()}
            np.savez_compressed(arguments.out / "pictures" / f"{number:02d} {name}.npz", **arrays)
        kept.add(row)


if __name__ == "__main__":
    main()
