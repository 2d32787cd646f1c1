"""Overhead of a guided run over the network it runs: TDS against a bare loop of network forward and backward.

    python benchmarks/overhead.py [--prior wafer64] [--particles 16] [--steps 50] [--repeats 7]

Both sides put the same batch through the same network the same number of times, forward and backward with respect to
the input, in one process, taking turns. The TDS run is a whole ``sd.SMC(...).run(y)``: the probe of the program, the
twist, the proposal, the weights, the resampling and the pointwise likelihood of the result are all in it. The last line
is the median over rounds of the ratio within a round; the goal is at most 1.05. Where other programs share the machine,
the ratio of the processor times is the one to read. A third side is the same network call without its gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from machine import describe
from page import markdown
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.adapters.diffusers import SpaceToDepth


def random_prior(num_steps: int) -> sd.DiffusionPrior:
    """A prior with a network of the shipped sizes and random weights, for a checkout without the shipped ones."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
    )
    network = SpaceToDepth(unet, 2).eval().requires_grad_(False)
    return sd.DiffusionPrior(sd.NetworkDenoiser(network, (1, 64, 64), sd.from_velocity), sd.VPSchedule(), num_steps)


def load(name: str, num_steps: int) -> tuple[str, sd.DiffusionPrior]:
    """The named prior, or a random network of its sizes, and which of the two it is."""
    try:
        return name, sd.load_prior(name, num_steps=num_steps)
    except FileNotFoundError:
        return "random network of the shipped sizes", random_prior(num_steps)


def bare_loop(prior: sd.DiffusionPrior, batch: int, gradient: bool) -> Callable[[], None]:
    """Network forward, and backward to its input, once per noise level, and nothing else."""
    chain = prior.chain
    x = torch.randn((batch, *chain.shape), generator=torch.Generator().manual_seed(1))
    network = chain.denoiser.network
    times = [chain.denoiser.time(chain.levels[k]) for k in range(chain.num_steps, 0, -1)]

    def run() -> None:
        for t in times:
            with torch.set_grad_enabled(gradient):
                here = x.detach().requires_grad_(gradient)
                scalar = network(here, t).square().sum()
                if gradient:
                    torch.autograd.grad(scalar, here)

    return run


def tds_run(prior: sd.DiffusionPrior, particles: int) -> Callable[[], None]:
    """A whole TDS run on a blurred, noisy picture, as `smcdiff restore` sets it."""
    row = torch.exp(-0.5 * (torch.arange(5) - 2.0) ** 2)
    blur = sd.Blur(row[:, None] * row / row.sum() ** 2)

    def model(y: Tensor | None = None) -> Any:
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(blur, x, 0.1), obs=y)

    with torch.no_grad():
        picture = torch.rand(prior.event_shape, generator=torch.Generator().manual_seed(2)) - 0.5
        y = blur(picture)
    smc = sd.SMC(sd.TDS(model, sd.WidenedTwist(0.1), max_shift=0.3), num_particles=particles, seed=0, progress=False)

    def run() -> None:
        smc.run(y)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="wafer64", help="a shipped name or a pipeline folder")
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="K, the steps of the reverse chain")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = describe()

    name, prior = load(arguments.prior, arguments.steps)
    sides = {
        "TDS run": tds_run(prior, arguments.particles),
        "forward and backward": bare_loop(prior, arguments.particles, gradient=True),
        "forward alone": bare_loop(prior, arguments.particles, gradient=False),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats + 1):
        for side, run in sides.items():
            start, busy = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first round warms up
                seconds[side].append(time.perf_counter() - start)
                processor[side].append(time.process_time() - busy)
    median = {side: statistics.median(times) for side, times in seconds.items()}

    def paired(clock: dict[str, list[float]]) -> float:
        """Median over the rounds of the ratio within a round, in which the sides take turns."""
        return statistics.median(
            run / bare for run, bare in zip(clock["TDS run"], clock["forward and backward"], strict=True)
        )

    overhead, busy = paired(seconds), paired(processor)

    print(", ".join(f"{word} {value}" for word, value in machine.items()))
    print(f"{name}, {arguments.particles} particles, {arguments.steps} steps, {arguments.repeats} repeats\n")
    print(
        markdown(
            [
                {
                    "side": side,
                    "median s": f"{median[side]:.3f}",
                    "range s": f"{min(times):.3f} to {max(times):.3f}",
                    "processor s": f"{statistics.median(processor[side]):.3f}",
                    "ms per particle and step": f"{1e3 * median[side] / (arguments.particles * arguments.steps):.2f}",
                }
                for side, times in seconds.items()
            ]
        )
    )
    print(f"\noverhead {overhead:.3f} (of processor time {busy:.3f})")
    if arguments.json:
        content = {
            "machine": machine,
            "network": name,
            "seconds": seconds,
            "processor": processor,
            "overhead": overhead,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
