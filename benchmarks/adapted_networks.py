"""The locally optimal proposal on trained priors, beside other methods.

For each shipped prior and each of three problems (denoising, deblurring, inpainting) a picture is drawn from the prior
itself, the chain with the full covariance at 30 steps, and measured; every method then runs on the same measurement:

    tilted               sd.Tilted, two forward passes a step
    tilted, Karras grid  the same on the noise levels of sd.KarrasGrid, the other rows having those of sd.SinhGrid
    tilted, symmetric    tilted with the network averaged over the 8 symmetries that it was trained with
    adapted              sd.Adapted with the prior's spectral covariance
    adapted, isotropic   its mean over frequencies in place of it, in twist and proposal
    adapted, doubled     twice it, in twist and proposal
    adapted, Free Hunch  it and what each particle's last four steps add to it; not where no basis is shared
    TDS                  point, widened (0.1, max_shift 0.3) and PiGDM twists, on the same chain
    MMPS                 the Tweedie covariance by 5 conjugate gradients, weighed; the Tweedie twist itself takes a
                         pass for each measured value
    DPS                  1000 steps, one particle a chain
    DDRM, DiffPIR        100 steps, one particle a chain, as published; where the operator has an svd

n particles in each of b chains; methods without weights run with one particle in each of 8 chains (DPS: 4).
``sumvar`` is the variance of the log-increments over particles, summed over steps, nats^2: what the weights of the
paths spread by. Roots are the particles of the first step with descendants at the last. PSNR is that of the mean and
coverage the share of pixels of the true picture inside the central 90 % interval of all final particles, each chain
counted alike and its particles by their tempered weights: raised to the largest exponent that keeps half of them
effective (1: exact). The interval of N exact draws would cover 0.9 (N - 1) / (N + 1), in the column beside it.

    python benchmarks/adapted_networks.py --particles 32 --chains 4 --pictures 2

Results are kept line by line in benchmarks/results/adapted_networks.jsonl; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from machine import describe
from torch import Tensor

import smcdiff as sd
from smcdiff.smc.state import FilterState

RESULTS = Path(__file__).parent / "results" / "adapted_networks.jsonl"
SIDE, STEPS = 64, 30


def gaussian_kernel(width: float, radius: int = 6) -> Tensor:
    r = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-(r[:, None] ** 2 + r**2) / (2 * width**2))
    return kernel / kernel.sum()


def problem(name: str) -> tuple[Any, float, Any]:
    """Operator, sigma_y and the basis that suits it."""
    if name == "denoise":
        return sd.Identity(), 0.25, "dct"
    if name == "deblur":
        return sd.Blur(gaussian_kernel(1.5)), 0.1, "fft"
    seen = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(7)) < 0.4
    return sd.Select(seen), 0.1, "dct"


def scaled(covariance: sd.SpectralCovariance, flat: bool, factor: float) -> sd.SpectralCovariance:
    v = factor * covariance.table.variances
    v = v.flatten(1).mean(1).reshape(-1, 1, 1, 1).expand_as(v) if flat else v
    return sd.SpectralCovariance(v.contiguous(), covariance.basis_name, covariance.table.ratios)


def methods(prior: sd.DiffusionPrior, task: str) -> dict[str, tuple[Callable[[Any], Any], int, bool]]:
    """{name: (program -> method, steps, whether it is run with many particles)}."""
    covariance = prior.covariance
    assert isinstance(covariance, sd.SpectralCovariance)
    found: dict[str, tuple[Callable[[Any], Any], int, bool]] = {
        "tilted": (sd.Tilted, STEPS, True),
        "tilted, Karras grid": (sd.Tilted, STEPS, True),
        "tilted, symmetric": (sd.Tilted, STEPS, True),
        "adapted": (sd.Adapted, STEPS, True),
        "adapted, doubled": (lambda m: sd.Adapted(m, scaled(covariance, False, 2.0)), STEPS, True),
        "adapted, isotropic": (lambda m: sd.Adapted(m, scaled(covariance, True, 1.0)), STEPS, True),
        "adapted, Free Hunch": (lambda m: sd.Adapted(m, sd.FreeHunchCovariance(covariance)), STEPS, True),
        "TDS, widened": (lambda m: sd.TDS(m, sd.WidenedTwist(0.1), max_shift=0.3), STEPS, True),
        "TDS, point": (sd.TDS, STEPS, True),
        "TDS, PiGDM": (lambda m: sd.TDS(m, sd.PiGDMTwist()), STEPS, True),
        "MMPS": (lambda m: sd.MMPS(m, iterations=5), STEPS, True),
        "DDRM": (sd.DDRM, 100, False),
        "DiffPIR": (sd.DiffPIR, 100, False),
        "DPS": (lambda m: sd.DPS(m, step_size=0.5 if task == "inpaint" else 0.3), 1000, False),
    }
    return found


def log_w(state: FilterState) -> Tensor:
    return state.log_w


def increments(smc: sd.SMC) -> Tensor:
    """Variance over particles of log g per step, mean over chains, (K + 1,)."""
    kept = smc.records.summaries["log_w"]
    resampled = smc.records.resampled.bool()
    before = torch.cat([torch.zeros_like(kept[:1]), kept[:-1]])
    settled = torch.cat([torch.ones_like(resampled[:1]), resampled])
    g = kept - torch.where(settled[..., None], 0.0, before)
    return g.var(-1).mean(1)


def tempered(log_w: Tensor) -> tuple[Tensor, float]:
    """Weights of all particles, each chain alike, to the largest exponent that keeps half of a chain effective."""
    b, n = log_w.shape
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        w = (middle * log_w).softmax(1)
        low, high = (middle, high) if float((1 / w.square().sum(1)).mean()) >= n / 2 else (low, middle)
    exponent = 1.0 if low > 1 - 1e-9 else low
    return ((exponent * log_w).softmax(1) / b).flatten().float(), exponent


def average(values: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(weights, values, 1)


def quantile(values: Tensor, weights: Tensor, level: float) -> Tensor:
    """Weighted quantile over the first axis, linear between the middles of the weights' steps."""
    ordered, index = values.sort(0)
    steps = weights[index]
    place = steps.cumsum(0) - 0.5 * steps
    above = (place < level).sum(0, keepdim=True).clamp(1, len(values) - 1)
    p_0, p_1 = place.gather(0, above - 1), place.gather(0, above)
    share = ((level - p_0) / (p_1 - p_0)).clamp(0, 1)
    return ((1 - share) * ordered.gather(0, above - 1) + share * ordered.gather(0, above))[0]


def run(prior_name: str, task: str, name: str, picture: int, n: int, b: int) -> dict[str, Any]:
    operator, sigma, basis = problem(task)
    base = sd.load_prior(prior_name, basis=basis)
    prior = base.replace(num_steps=STEPS, grid=sd.SinhGrid(), variance="full")
    make, steps, many = methods(prior, task)[name]
    shown = prior
    if name == "tilted, symmetric":
        base = prior = prior.replace(denoiser=sd.SymmetricDenoiser(prior.chain.denoiser))
    if name == "tilted, Karras grid":
        prior = prior.replace(grid=sd.KarrasGrid())
    x = shown.chain.sample(1, torch.Generator().manual_seed(1000 + picture))[0]
    clean = operator(x)
    y = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2000 + picture))
    used = prior if steps == STEPS else base.replace(num_steps=steps, variance="posterior", grid=sd.LinspaceGrid())

    def model(y: Tensor | None = None) -> Any:
        scene = pyro.sample("x", used)
        return pyro.sample("y", sd.GaussianMeasurement(operator, scene, sigma), obs=y)

    particles, chains = (n, b) if many else (1, 8 if steps <= 100 else 4)
    records = sd.Records(ancestors=True, summaries={"log_w": log_w})
    smc = sd.SMC(make(model), particles, chains, seed=picture, max_batch=16, records=records, progress=False)
    started = time.perf_counter()
    smc.run(y)
    seconds = time.perf_counter() - started
    run = smc.posterior
    values = run.values["x"].flatten(0, 1)
    exact_ess, spread = (run.ess, increments(smc)) if many else (None, None)
    weights, exponent = tempered(run.log_w) if many else (torch.full((len(values),), 1 / len(values)), 1.0)
    low, high, mean = quantile(values, weights, 0.05), quantile(values, weights, 0.95), average(values, weights)
    effective = float(1 / weights.square().sum())
    log_z = smc.log_evidence_per_chain
    roots = None if run.roots is None else float(run.roots[-1].double().mean())
    forward, backward = smc.network_evaluations
    total = particles * chains
    return {
        "prior": prior_name,
        "task": task,
        "method": name,
        "picture": picture,
        "particles": particles,
        "chains": chains,
        "steps": steps,
        "psnr": -10 * math.log10(float((mean - x).square().mean()) / 4),
        "coverage": float(((x >= low) & (x <= high)).double().mean()),
        "nominal": 0.9 * (effective - 1) / (effective + 1),
        "exponent": exponent,
        "sumvar": None if spread is None else float(spread.sum()),
        "increments": None if spread is None else [round(float(v), 3) for v in spread],
        "ess": None if exact_ess is None else [round(float(v), 2) for v in exact_ess.double().mean(1)],
        "roots": roots if many else None,
        "log_z": [float(v) for v in log_z] if many else None,
        "log_z_range": float(log_z.max() - log_z.min()) if many else None,
        "forward": forward / total * getattr(prior.chain.denoiser, "order", 1),
        "backward": backward / total,
        "seconds": seconds,
        "seconds_per_particle": seconds / total,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--priors", nargs="+", default=["wafer64", "sem64"])
    parser.add_argument("--tasks", nargs="+", default=["deblur", "denoise", "inpaint"])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    keys = {(row["prior"], row["task"], row["method"], row["picture"]) for row in done}
    for picture in range(arguments.pictures):
        for prior_name in arguments.priors:
            for task in arguments.tasks:
                names = arguments.methods or methods(sd.load_prior(prior_name), task)
                for name in names:
                    if (prior_name, task, name, picture) in keys:
                        continue
                    try:
                        row = run(prior_name, task, name, picture, arguments.particles, arguments.chains)
                    except (TypeError, ValueError, sd.FilterError) as error:
                        row = {"prior": prior_name, "task": task, "method": name, "picture": picture}
                        row["failed"] = str(error).partition("\n")[0]
                    row["machine"] = describe()
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    shown = {
                        key: row.get(key) for key in ("psnr", "coverage", "sumvar", "roots", "log_z_range", "seconds")
                    }
                    print(prior_name, task, name, picture, shown, row.get("failed", ""), flush=True)


if __name__ == "__main__":
    main()
