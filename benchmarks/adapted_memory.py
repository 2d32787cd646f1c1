"""Peak memory of the methods of adapted_networks.py.

Each method runs on the deblurring of a ``wafer64`` picture in a process of its own, 4 chains of 32 particles, 16 at a
time through the network, for 3 steps: what a run holds does not depend on their number. Reported is the peak of the
process above what it held before the run, with the network loaded, in MB.

    python benchmarks/adapted_memory.py [--particles 32] [--chains 4]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import adapted_networks
import torch
from machine import describe
from page import markdown

import smcdiff as sd

RESULTS = Path(__file__).with_name("results") / "adapted_memory.json"
TASK = "deblur"


def held() -> float:
    """The most that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak(name: str, particles: int, chains: int) -> float:
    """MB of a short run above those before it."""
    torch.set_num_threads(1)
    adapted_networks.STEPS = 3
    prior = sd.load_prior("wafer64", basis="fft")
    prior.replace(num_steps=3).chain.sample(1, torch.Generator().manual_seed(0))
    before = held()
    adapted_networks.run("wafer64", TASK, name, 0, particles, chains)
    return held() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--chains", type=int, default=4)
    arguments = parser.parse_args()
    names = [name for name, found in adapted_networks.methods(sd.load_prior("wafer64"), TASK).items() if found[2]]
    rows = []
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
            rows.append({"method": name, "MB": one.submit(peak, name, arguments.particles, arguments.chains).result()})
        print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps({"machine": describe(), **vars(arguments), "rows": rows}, indent=2) + "\n")
    print(markdown([{"method": row["method"], "MB": f"{row['MB']:.0f}"} for row in rows]))


if __name__ == "__main__":
    main()
