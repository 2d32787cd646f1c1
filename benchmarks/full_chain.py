"""How close a coarse chain with the full covariance comes to the trained model.

Unconditional draws of a shipped prior: the chain with ``variance="full"`` and, beside it, with ``variance="posterior"``
and ``"fixed_large"``, at 10, 20 and 50 steps, each against draws of the 1000-step chain with the posterior variance.
Two distances, with the value that two independent sets of 1000-step draws have between them (the floor):

    patches     sliced Wasserstein-1 distance between the laws of 8 x 8 patches, grey values on [-1, 1]
    spectrum    root mean square over frequencies of log(power / power of the 1000-step draws), frequencies in rings

    python benchmarks/full_chain.py wafer64 --draws 64 --threads 1

writes benchmarks/results/full_chain_<prior>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from machine import describe
from torch import Tensor

import smcdiff as sd
from smcdiff.transforms import dct

RESULTS = Path(__file__).parent / "results"


def patches(x: Tensor, size: int = 8) -> Tensor:
    """(number, size^2): the patches on a regular grid."""
    return x.unfold(-2, size, size).unfold(-2, size, size).reshape(-1, size * size)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256) -> float:
    """Mean over random directions of the Wasserstein-1 distance of the projections."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(a.shape[1], directions, generator=generator, dtype=a.dtype)
    theta = theta / theta.norm(dim=0)
    count = min(len(a), len(b))
    return float(((a[:count] @ theta).sort(0)[0] - (b[:count] @ theta).sort(0)[0]).abs().mean())


def log_rings(x: Tensor, rings: int = 16) -> Tensor:
    """Log of the mean power in rings of frequency, (rings,)."""
    power = dct(x - x.mean((-2, -1), keepdim=True)).square().mean((0, 1))
    frequency = torch.arange(x.shape[-1]) / x.shape[-1]
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    ring = (radius * rings).long().clamp(max=rings - 1)
    return torch.stack([power[ring == r].mean() for r in range(rings)]).log()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = sd.load_prior(arguments.prior)

    def draw(num_steps: int, variance: str, grid: object, seed: int) -> tuple[Tensor, float]:
        chain = base.replace(num_steps=num_steps, variance=variance, grid=grid).chain  # type: ignore[arg-type]
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        x = torch.cat([chain.sample(16, generator) for _ in range(0, arguments.draws, 16)])
        return x, time.perf_counter() - started

    reference, seconds = draw(1000, "posterior", sd.LinspaceGrid(), arguments.seed)
    again, _ = draw(1000, "posterior", sd.LinspaceGrid(), arguments.seed + 1)
    rings = log_rings(reference)

    def row(name: str, steps: int, x: Tensor, taken: float) -> dict[str, object]:
        found = {
            "chain": name,
            "steps": steps,
            "patches": sliced_wasserstein(patches(x), patches(reference)),
            "spectrum": float((log_rings(x) - rings).square().mean().sqrt()),
            "seconds": taken,
        }
        print(found, flush=True)
        return found

    rows = [row("posterior, another seed (floor)", 1000, again, seconds)]
    for steps in (10, 20, 50):
        for variance in ("full", "posterior", "fixed_large"):
            rows.append(row(variance, steps, *draw(steps, variance, sd.KarrasGrid(), arguments.seed + 2)))
    result = {"machine": describe(), "prior": arguments.prior, "draws": arguments.draws, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"full_chain_{arguments.prior}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
