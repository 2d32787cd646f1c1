"""Run a filter with checkpoints in child processes and kill them again and again; used by test_checkpoint.

A fresh process that imports torch once and forks: each child runs the filter from its checkpoint, and is killed by
SIGKILL at a random moment after it has come some random number of steps further, fifteen times or until one comes to
the end; the last one may finish. It prints how far the checkpoint was at each killing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from smcdiff.smc import ParticleFilter
from smcdiff.smc.checkpoint import Checkpoint
from tests.smc.models import Bootstrap, LinearGaussian

MODEL = Bootstrap(LinearGaussian.example(2, num_steps=200))
NUMBERS = {"num_particles": 40, "num_chains": 3, "seed": 11}


def run(folder: Path) -> None:
    checkpoint = Checkpoint(folder / "run.checkpoint.pt", {"program": "killed"}, every_seconds=None, every_steps=1)
    result = ParticleFilter().run(MODEL, **NUMBERS, checkpoint=checkpoint)
    torch.save(
        {"log_z": result.log_z, "x": result.particles["x"], "ancestors": result.records.ancestors}, folder / "part"
    )
    os.replace(folder / "part", folder / "result.pt")


def kept_step(folder: Path) -> int:
    path = folder / "run.checkpoint.pt"
    return int(torch.load(path, weights_only=True)["state"]["step"]) if path.exists() else -1


def main(folder: Path) -> None:
    delays = random.Random(int(sys.argv[2]))
    kills: list[int] = []
    while not (folder / "result.pt").exists():
        child = os.fork()
        if child == 0:
            try:
                run(folder)
            finally:
                os._exit(0)
        if len(kills) < 15:
            goal = kept_step(folder) + delays.randint(3, 15)
            while kept_step(folder) < goal and not (folder / "result.pt").exists():
                time.sleep(delays.uniform(0.0, 0.003))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills.append(kept_step(folder))
    print(*kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
