"""Each method alone and with many particles, on two small problems with an exact answer.

    python benchmarks/methods_table.py [--methods DDRM ...]

The problems: a correlated Gaussian in 6 dimensions with 3 measured values, and a mixture of 4 components, 5 and more of
their standard deviations apart, in 4 dimensions with 2 measured values that hardly tell two of them from each other;
noise 0.3. 50 steps on a Karras grid. For each method

    n = 1       as published, with the chain's posterior variance: 4096 independent runs
    n = 16      with the catalogue's settings for many particles: 256 runs
    n = 256     64 runs
    n = 4096    8 runs

A run's estimate of the posterior mean is compared with the exact one in posterior standard deviations, root mean square
over coordinates and runs; of n exact draws it is 1 / sqrt(n). At n = 1 the mean over all runs is taken first, which
leaves the bias. The width is the root of the mean squared distance from the exact mean, in posterior standard
deviations, over directions that are measured and that are not. The evidence's error is the median over runs of
abs(log Z - exact), in nats. Each finished setting is a line of results/methods.jsonl and is not repeated;
``methods_page.py`` makes docs/methods.md of it.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from catalogue import Entry, available
from kept import Kept
from problems import MixtureProblem
from torch import Tensor

import smcdiff as sd

RESULTS = Path(__file__).with_name("results") / "methods.jsonl"
KEYS = ("problem", "method", "n")
RUNS = {1: 4096, 16: 256, 256: 64, 4096: 8}
STEPS = 50


def problems() -> dict[str, MixtureProblem]:
    """The two problems."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def measured(means: Tensor, weights: Tensor, covariance: Tensor, A: Tensor) -> MixtureProblem:
        x = means[0] + torch.linalg.cholesky(covariance) @ normal(means.shape[1])
        return MixtureProblem(means, weights, A, A @ x + 0.3 * normal(len(A)), 0.3, covariance)

    factor = torch.eye(6, dtype=torch.float64) + 0.3 * normal(6, 6)
    covariance = factor @ factor.mT
    covariance = covariance / covariance.trace() * 6
    gaussian = measured(normal(1, 6), torch.ones(1, dtype=torch.float64), covariance, normal(3, 6) / 6**0.5)
    corners = torch.tensor([(1, 1, 1, 1), (1, -1, 1, -1), (-1, 1, 1, -1), (-1, -1, 1, 1)], dtype=torch.float64)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    A = torch.tensor([(1.0, 0.1, 0.5, 0.0), (-0.5, 0.0, 1.0, 0.1)], dtype=torch.float64)
    mixture = measured(2 * corners, shares, 0.25 * torch.eye(4, dtype=torch.float64), A)
    return {"Gaussian": gaussian, "mixture": mixture}


def run(entry: Entry, problem: MixtureProblem, n: int) -> dict[str, Any]:
    """All runs of one method with n particles, as the chains of one run."""
    published, chains = n == 1, RUNS[n]
    settings = entry.published if published else entry.settings
    assert settings is not None
    prior = sd.DiffusionPrior(
        problem.denoiser,
        sd.VPSchedule(),
        num_steps=STEPS,
        grid=sd.KarrasGrid(),
        variance="posterior" if published else entry.variance,
    )
    kernel = entry.load()(problem.program(prior), **settings)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runs without evidence say so
        smc = sd.SMC(kernel, n, chains, seed=n, progress=False).run(problem.y)
    seconds, (forward, backward) = time.process_time() - start, smc.network_evaluations
    x, log_w = smc.weighted_samples().values["x"], smc.weighted_samples().log_w
    w = log_w.softmax(1)  # of each run by itself
    mean, covariance = problem.posterior_moments()
    deviation = covariance.diagonal().sqrt()
    estimates = (w[..., None] * x).sum(1)
    off = (estimates.mean(0, keepdim=True) if published else estimates) - mean
    _, _, directions = torch.linalg.svd(problem.A)
    away = ((x - mean) @ directions.mT).square()
    width = ((w[..., None] * away).sum(1).mean(0) / (directions @ covariance @ directions.mT).diagonal()).sqrt()
    rows = len(problem.A)
    total = n * chains
    row: dict[str, Any] = {
        "mean": float((off / deviation).square().mean().sqrt()),
        "width seen": float(width[:rows].mean()),
        "width unseen": float(width[rows:].mean()),
        "forward": forward / total,
        "backward": backward / total,
        "seconds": seconds / chains,
    }
    if not published:
        error = (smc.log_evidence_per_chain - problem.log_evidence).abs()
        row["log evidence"] = float(error.median())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names as in catalogue.py; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept, (entries, missing) = Kept(arguments.results, KEYS), available(arguments.methods)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    for (name, problem), n, entry in itertools.product(problems().items(), RUNS, entries):
        row: dict[str, Any] = {"problem": name, "method": entry.name, "n": n}
        if row in kept or (entry.published is None if n == 1 else not entry.weighted):
            continue
        try:
            row |= run(entry, problem, n)
        except sd.FilterError as error:
            row["error"] = str(error)
        except TypeError as error:
            print(f"{entry.name} does not take it: {error}")
            continue
        kept.add(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
