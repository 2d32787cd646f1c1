"""Beside deepinv and azula: how wide and how far off the posteriors of their samplers and of ours are.

    python benchmarks/peers.py [--json results/peers.json]

One problem with a known answer, the same for all: a Gaussian field of 8 x 8 pixels on the scale [-1, 1], half of the
pixels measured, noise 0.1. Every sampler gets the exact denoiser, its library's own default schedule and settings, and
as many network evaluations as there; the number of draws is the same but where it says otherwise. Printed are

    width       standard deviation of the draws over that of the posterior, median over pixels, seen and unseen
    mean        root mean square error of the draws' mean, in posterior standard deviations; of 512 exact draws 0.04
    forward     network evaluations for each draw, forward and back
    ms          processor time for each draw

deepinv and azula depend on torchvision, whose wheel does not go with every build of torch. They are installed into an
environment of their own in a temporary folder, which sees torch of this one (``peers_side.py`` runs there); what cannot
be installed or imported is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sysconfig
import tempfile
import time
import venv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from catalogue import Entry, available
from machine import describe
from page import markdown
from torch import Tensor

import smcdiff as sd
from smcdiff.transforms import HARTLEY

SIDE, DRAWS, FEW_DRAWS, SIGMA_Y, SIGMA_X = 8, 512, 64, 0.1, 0.25
LIBRARIES = ("deepinv==0.5.0", "azula==0.11.1", "torchmetrics", "lightning-utilities", "einops", "natsort")


class Problem:
    """The field, its measurement and the exact posterior."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        wave = torch.fft.fftfreq(SIDE, 1 / SIDE, dtype=torch.float64)
        spectrum = 1 / (1 + wave[:, None] ** 2 + wave**2) ** 1.5
        self.spectrum = spectrum * (SIGMA_X**2 / spectrum.mean())
        unit = torch.eye(SIDE**2, dtype=torch.float64).reshape(-1, 1, SIDE, SIDE)
        self.basis = HARTLEY.from_spectral(unit).flatten(1).mT  # columns are waves
        self.mask = (torch.rand((1, SIDE, SIDE), generator=generator) < 0.5).double()

        def normal() -> Tensor:
            return torch.randn((1, SIDE, SIDE), dtype=torch.float64, generator=generator)

        x = HARTLEY.from_spectral(self.spectrum.sqrt() * normal())
        self.y = self.mask * (x + SIGMA_Y * normal())
        C = self.basis * self.spectrum.flatten() @ self.basis.mT
        seen = self.mask.flatten() > 0
        gain = torch.linalg.solve(C[seen][:, seen] + SIGMA_Y**2 * torch.eye(int(seen.sum())).double(), C[seen]).mT
        self.mean, self.deviation = gain @ self.y.flatten()[seen], (C - gain @ C[seen]).diagonal().sqrt()

    def write(self, path: Path) -> None:
        known = {"basis": self.basis, "spectrum": self.spectrum.flatten(), "mask": self.mask, "y": self.y}
        torch.save({**known, "sigma_y": SIGMA_Y, "draws": DRAWS, "few draws": FEW_DRAWS}, path)

    def judged(self, x: Tensor) -> dict[str, float]:
        """Of draws (number, 1, side, side)."""
        width, seen = x.flatten(1).std(0) / self.deviation, self.mask.flatten() > 0
        off = (x.flatten(1).mean(0) - self.mean) / self.deviation
        return {
            "width seen": float(width[seen].median()),
            "width unseen": float(width[~seen].median()),
            "mean": float(off.square().mean().sqrt()),
        }

    def program(self, prior: sd.DiffusionPrior) -> Callable[..., Any]:
        seen = self.mask > 0
        operator = sd.Select(seen)

        def model(y: Tensor | None = None) -> Tensor:
            x = pyro.sample("x", prior)
            return pyro.sample("y", sd.GaussianMeasurement(operator, x, SIGMA_Y), obs=y)

        return model

    @property
    def measured(self) -> Tensor:
        return self.y[self.mask > 0]


def ours(problem: Problem) -> list[dict[str, Any]]:
    """Our samplers, as published with one particle to a chain, and with all particles in one chain."""
    denoiser = sd.GaussianFieldDenoiser(torch.zeros((1, SIDE, SIDE), dtype=torch.float64), problem.spectrum)
    rows = []
    for entry in available()[0]:
        if entry.published is not None:
            rows.append(_run(problem, denoiser, entry, f"smcdiff {entry.name}", entry.published, "posterior", False))
        if entry.weighted:
            name = f"smcdiff {entry.name}, n = {DRAWS}"
            rows.append(_run(problem, denoiser, entry, name, entry.settings, entry.variance, True))
    return rows


def _run(
    problem: Problem,
    denoiser: sd.GaussianFieldDenoiser,
    entry: Entry,
    name: str,
    settings: dict[str, Any],
    variance: Any,
    weighted: bool,
) -> dict[str, Any]:
    steps = 1000 if entry.name == "DPS" else 100
    n, chains = (DRAWS, 1) if weighted else (1, DRAWS)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=steps, variance=variance)
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # runs without evidence say so
            smc = sd.SMC(entry.load()(problem.program(prior), **settings), n, chains, seed=0, progress=False)
            smc.run(problem.measured)
    except (sd.FilterError, TypeError, ValueError) as error:
        return {"name": name, "reason": f"{type(error).__name__}: {error}"}
    seconds, (forward, backward) = time.process_time() - start, smc.network_evaluations
    x = smc.get_samples()["x"] if weighted else smc.weighted_samples().values["x"].flatten(0, 1)
    count = {"forward": forward / DRAWS, "backward": backward / DRAWS, "seconds": seconds / DRAWS}
    return {"name": name, "version": sd.__version__, "steps": steps, "draws": DRAWS, **count, **problem.judged(x)}


def theirs(problem: Problem) -> list[dict[str, Any]]:
    """Their samplers, or why not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem.write(folder / "problem.pt")
        try:
            python = environment(folder / "environment")
            command = [str(python), str(Path(__file__).with_name("peers_side.py")), str(folder)]
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            return [{"name": "deepinv and azula", "reason": str(getattr(error, "stderr", None) or error)}]
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:
            rows.append({"name": "the rest", "reason": f"the child ended with code {done.returncode}"})
        for row in rows:
            if "file" in row:
                row |= problem.judged(torch.load(folder / row.pop("file")))
        return rows


def environment(folder: Path) -> Path:
    """An environment with the two libraries that sees the packages of this one; its Python.

    Raises:
        subprocess.SubprocessError: where they cannot be installed.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    theirs = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True
    )
    own = Path(theirs.stdout.decode().strip())
    (own / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    minor = int(torch.__version__.split(".")[1])
    vision = f"torchvision==0.{minor + 15}.*"  # torch 2.m goes with torchvision 0.(m + 15)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *LIBRARIES, vision]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=600)
    return python


def table(rows: list[dict[str, Any]]) -> str:
    """The results, and below them what was left out."""
    done = [row for row in rows if "reason" not in row]
    lines = [
        {
            "sampler": row["name"],
            "draws": str(row["draws"]),
            "steps": str(row["steps"]),
            "width, seen": f"{row['width seen']:.2f}",
            "width, unseen": f"{row['width unseen']:.2f}",
            "mean": f"{row['mean']:.2f}",
            "forward": f"{row['forward']:.0f}",
            "back": f"{row['backward']:.0f}",
            "ms": f"{1e3 * row['seconds']:.1f}",
        }
        for row in done
    ]
    left_out = [f"- {row['name']} is left out: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join([markdown(lines), "", *left_out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine, problem = describe(), Problem()
    print(", ".join(f"{word} {value}" for word, value in machine.items()), "\n")
    rows = theirs(problem) + ours(problem)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "samplers": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
