r"""Gaussian random fields at the size of images: the locally optimal proposal against closed forms.

x_0 is a stationary field of 16^2, 32^2 or 64^2 pixels on a torus, of spectrum (1 + |f|^2)^-1.5, whose denoiser and
Cov[x_0 given x_t] are known exactly; y is the field blurred (Gaussian kernel of width 1), or 60 % of its pixels, or
60 % of the pixels of the blurred field, under noise of sigma 0.1. ``sd.Adapted`` runs with n = 64 particles in 10, 30
and 100 steps, and its evidence is compared to

    y ~ N(0, T + sigma^2 I),   T of entries t(i - j), t the inverse Fourier transform of lambda |h|^2

elementwise where all pixels are seen, else by a Cholesky factor of the pixels that are. The schedule's rates rise as
those of the usual 1000 steps do, for 300 more, to sigma / alpha = 5094; rows with 1000 show what it costs to begin at
157, where the strongest mode of a field, lambda = 45, 171 and 665 at the three sizes, is not quite forgotten.

Then the covariance given to twist and proposal is made wrong by a factor, at 10 steps: the chain keeps its own, the
weights correct for the difference, and the mean over independent chains of Z / Z_exact is 1. ``sd`` there is the
deviation of log Z over chains. A factor of 1/2 or 3/2 in each of 256 modes and 10 steps spreads the weights over so
many nats that no feasible number of chains meets those that carry the mean: such rows stay far below 1, and the largest
share of one chain says so. At 4^2 pixels the mean is met.

    python benchmarks/fields.py [--seeds 3] [--report]

A line of results/fields.jsonl for each run; what is there is not run again. ``--report`` prints the tables alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from kept import Kept
from machine import describe
from page import markdown
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import smcdiff as sd
from smcdiff.transforms import hartley

RESULTS = Path(__file__).with_name("results") / "fields.jsonl"
KEYS = ("side", "operator", "steps", "train_steps", "factor", "seed")
D = torch.float64
SIGMA, PARTICLES = 0.1, 64
SIDES, STEPS, OPERATORS = (16, 32, 64), (10, 30, 100), ("blur", "mask", "both")
FACTORS = (0.95, 1.05, 0.8, 1.2, 0.5, 1.5)
TRAIN_STEPS = 1300
#: side, operator, factors, chains of the runs with a wrong covariance
WRONG = ((4, "mask", FACTORS, 600), (16, "blur", FACTORS, 400), (16, "both", (0.95, 1.05), 200))


class Field:
    """One field and one measurement of it.

    Args:
        side: pixels along an edge.
        operator: "blur", "mask" or "both".
    """

    def __init__(self, side: int, operator: str) -> None:
        frequency = torch.fft.fftfreq(side, dtype=D) * side
        power = (1 + frequency[:, None] ** 2 + frequency**2) ** -1.5
        self.side, self.spectrum = side, (power / power.mean())[None]
        r = torch.arange(-2, 3, dtype=D)
        kernel = torch.exp(-(r[:, None] ** 2 + r**2) / 2)
        kernel = kernel / kernel.sum()
        seen = torch.rand(1, side, side, generator=torch.Generator().manual_seed(3)) < 0.6
        blur, mask = sd.Blur(kernel), sd.Select(seen)
        self.operator = {"blur": blur, "mask": mask, "both": sd.Compose(mask, blur)}[operator]
        blurs = operator != "mask"
        response = torch.fft.fft2(kernel, s=(side, side)).abs().square() if blurs else torch.ones((), dtype=D)
        self._variances = self.spectrum[0] * response
        self._seen = None if operator == "blur" else seen[0].flatten().nonzero()[:, 0]

    def measurement(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = hartley(self.spectrum.sqrt() * torch.randn(self.spectrum.shape, generator=generator, dtype=D))
        clean = self.operator(x)
        return clean + SIGMA * torch.randn(clean.shape, generator=generator, dtype=D)

    def log_evidence(self, y: Tensor) -> float:
        """Exact."""
        if self._seen is None:
            return float(Normal(0.0, (self._variances + SIGMA**2).sqrt()).log_prob(hartley(y)).sum())
        t = torch.fft.ifft2(self._variances).real
        row, column = self._seen // self.side, self._seen % self.side
        matrix = t[(row[:, None] - row) % self.side, (column[:, None] - column) % self.side]
        matrix.diagonal().add_(SIGMA**2)
        return float(MultivariateNormal(torch.zeros(len(matrix), dtype=D), matrix, validate_args=False).log_prob(y))

    def run(
        self, y: Tensor, steps: int, train_steps: int, factor: float, chains: int, seed: int
    ) -> tuple[sd.SMC, float]:
        """A finished run and its processor seconds; ``factor`` times the exact covariance in twist and proposal."""
        denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, self.side, self.side, dtype=D), self.spectrum)
        schedule = sd.VPSchedule(1e-4, 1e-4 + (2e-2 - 1e-4) * (train_steps - 1) / 999, train_steps)
        prior = sd.DiffusionPrior(denoiser, schedule, num_steps=steps, grid=sd.KarrasGrid(), variance="full")

        def model(y: Tensor) -> None:
            pyro.sample("y", sd.GaussianMeasurement(self.operator, pyro.sample("x", prior), SIGMA), obs=y)

        given = None
        if factor != 1:
            ratios = torch.tensor([level.ratio for level in prior.chain.levels[1:]], dtype=D)
            exact = [denoiser.covariance.at(level, {}, y).variance[0] for level in prior.chain.levels[1:]]
            given = sd.SpectralCovariance(factor * torch.stack(exact), "fft", ratios)
        smc = sd.SMC(sd.Adapted(model, given), PARTICLES, chains, seed=seed, progress=False)
        began = time.process_time()
        smc.run(y)
        return smc, time.process_time() - began


def right(field: Field, steps: int, train_steps: int, seed: int) -> dict[str, Any]:
    y = field.measurement(seed)
    smc, seconds = field.run(y, steps, train_steps, 1.0, 1, seed)
    return {
        "exact": field.log_evidence(y),
        "log evidence": float(smc.log_evidence),
        "ess": float(smc.records.ess.min()) / PARTICLES,
        "resampled": int(smc.records.resampled.sum()),
        "forward": smc.network_evaluations[0] / PARTICLES,
        "backward": smc.network_evaluations[1],
        "seconds": seconds,
    }


def wrong(field: Field, steps: int, train_steps: int, factor: float, chains: int, seed: int) -> dict[str, Any]:
    y = field.measurement(seed)
    smc, seconds = field.run(y, steps, train_steps, factor, chains, seed)
    log_ratio = smc.log_evidence_per_chain.double() - field.log_evidence(y)
    ratio = log_ratio.exp()
    return {
        "chains": chains,
        "mean ratio": float(ratio.mean()),
        "error": float(ratio.std()) / math.sqrt(chains),
        "deviation of log Z": float(log_ratio.std()),
        "mean log ratio": float(log_ratio.mean()),
        "largest share": float(ratio.max() / ratio.sum()),
        "ess": float(smc.records.ess.double().mean(1).min()) / PARTICLES,
        "seconds": seconds,
    }


def tables(rows: list[dict[str, Any]]) -> str:
    found, bent = [], []
    for side, operator, steps, train_steps in itertools.product(SIDES, OPERATORS, STEPS, (TRAIN_STEPS, 1000)):
        name = (side, operator, steps, train_steps, 1.0)
        here = [row for row in rows if tuple(row[key] for key in KEYS[:-1]) == name]
        if here:
            line = {
                "pixels": f"{side}²",
                "measurement": operator,
                "steps": str(steps),
                "schedule": str(train_steps),
                "runs": str(len(here)),
                "largest error of log Z": f"{max(abs(row['log evidence'] - row['exact']) for row in here):.4f}",
                "least ESS / n": f"{min(row['ess'] for row in here):.4f}",
                "resampled": str(sum(row["resampled"] for row in here)),
                "seconds": f"{sum(row['seconds'] for row in here) / len(here):.1f}",
            }
            found.append(line)
    for row in rows:
        if row["factor"] != 1:
            line = {
                "pixels": f"{row['side']}²",
                "measurement": row["operator"],
                "factor": f"{row['factor']:g}",
                "chains": str(row["chains"]),
                "mean Z / Z exact": f"{row['mean ratio']:.3f} ± {row['error']:.3f}",
                "sd of log Z": f"{row['deviation of log Z']:.2f}",
                "least ESS / n": f"{row['ess']:.3f}",
                "largest share": f"{row['largest share']:.3f}",
            }
            bent.append(line)
    return "\n\n".join(markdown(lines) for lines in (found, bent) if lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="measurements of each field; one at 64 x 64")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    kept, machine = Kept(RESULTS, KEYS), describe()
    jobs: list[tuple[int, str, int, int, float, int, int]] = []
    for side, operator, steps in itertools.product(SIDES, OPERATORS, STEPS):
        seeds = arguments.seeds if side < 64 else 1
        jobs += [(side, operator, steps, TRAIN_STEPS, 1.0, seed, 1) for seed in range(seeds)]
    jobs += [(side, operator, 10, 1000, 1.0, 0, 1) for side, operator in itertools.product(SIDES, OPERATORS)]
    for side, operator, factors, chains in WRONG:
        jobs += [(side, operator, 10, TRAIN_STEPS, factor, 0, chains) for factor in factors]
    for side, operator, steps, train_steps, factor, seed, chains in [] if arguments.report else jobs:
        row: dict[str, Any] = dict(zip(KEYS, (side, operator, steps, train_steps, factor, seed), strict=True))
        if row in kept:
            continue
        field = Field(side, operator)
        if factor == 1:
            row |= right(field, steps, train_steps, seed)
        else:
            row |= wrong(field, steps, train_steps, factor, chains, seed)
        kept.add(row | {"machine": machine})
        print(row, flush=True)
    print(tables(kept.rows))


if __name__ == "__main__":
    main()
