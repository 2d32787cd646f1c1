"""One step of the particle filter on a GPU: eager, as a CUDA graph, and beside a bare torch loop.

    python benchmarks/gpu_filter.py --out FOLDER [--n 1000 1000000] [--d 1 64]

A bootstrap filter of the linear-Gaussian model x_0 ~ N(0, I), x_i = 0.9 x_{i-1} + N(0, 0.25 I), y_i = x_i + N(0, I), in
d dimensions with n particles, in float64, resampled systematically before every move:

    smcdiff          ParticleFilter, every kernel started on its own;
    captured         the same with Capture(homogeneous=True), the same numbers;
    bare loop        move, weigh, systematic resampling by a binary search in float64, gather, and nothing else;
    bare captured    the bare loop as a CUDA graph;
    gather           resample-and-gather alone: ancestors from weights, and the particles taken from them.

A time is the median over rounds in which all sides take turns, each timed by CUDA events around many steps. The gather
is also given as bytes it must move at least (weights read, ancestors written and read, particles read and written) over
the time, against a plain device-to-device copy of 1 GiB in the same run. The numbers go to FOLDER/gpu_filter.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe
from page import markdown
from torch import Tensor

from smcdiff.smc import Capture, Move, ParticleFilter, Particles, Records, Systematic
from smcdiff.smc.steps import gather

Y = 0.1
CUDA = torch.device("cuda")
F64 = torch.float64


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """The model as a Feynman-Kac model; its moves do not look at the step index."""

    d: int
    num_steps: int
    device: torch.device = CUDA

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        x = torch.randn((num_chains, num_particles, self.d), dtype=F64, device=CUDA, generator=generator)
        return Move({"x": x}, log_likelihood(x))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        x = moved(particles["x"], generator)
        return Move({"x": x}, log_likelihood(x))


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    return 0.9 * x + 0.5 * torch.randn(x.shape, dtype=F64, device=CUDA, generator=generator)


def log_likelihood(x: Tensor) -> Tensor:
    return -0.5 * (x - Y).square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def bare_step(x: Tensor, generator: torch.Generator) -> Tensor:
    n = len(x)
    c = torch.softmax(log_likelihood(x), 0).cumsum(0)
    u = torch.rand(1, dtype=F64, device=CUDA, generator=generator)
    ancestors = torch.searchsorted(c, (torch.arange(n, device=CUDA) + u) * (c[-1] / n)).clamp_(max=n - 1)
    return moved(x[ancestors], generator)


class Bare:
    """The bare loop, eager or as a CUDA graph of one step."""

    def __init__(self, n: int, d: int, captured: bool) -> None:
        self._generator = torch.Generator(CUDA).manual_seed(0)
        self._x = torch.randn((n, d), dtype=F64, device=CUDA, generator=self._generator)
        self._graph: torch.cuda.CUDAGraph | None = None
        if captured:
            bare_step(self._x, self._generator)
            self._graph = torch.cuda.CUDAGraph()
            self._graph.register_generator_state(self._generator)
            with torch.cuda.graph(self._graph):
                self._x.copy_(bare_step(self._x, self._generator))

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            if self._graph is None:
                self._x = bare_step(self._x, self._generator)
            else:
                self._graph.replay()


class Ours:
    """The filter, some steps of it at a time."""

    def __init__(self, n: int, d: int, capture: Capture | None) -> None:
        self._settings, self._model = ParticleFilter(ess_threshold=1.0), LinearGaussian(d, 10**9)
        self._states = self._settings.iterate(
            self._model, num_particles=n, records=Records(ancestors=False), capture=capture
        )
        for _ in range(4):  # first visit, capture, replay
            next(self._states)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            next(self._states)


class Gather:
    """Resample and gather, eager or as a CUDA graph."""

    def __init__(self, n: int, d: int, captured: bool) -> None:
        self._generator = torch.Generator(CUDA).manual_seed(0)
        self._x = torch.randn((1, n, d), dtype=F64, device=CUDA, generator=self._generator)
        self._w = torch.softmax(log_likelihood(self._x), -1)
        self._once()
        self._graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._graph = torch.cuda.CUDAGraph()
            self._graph.register_generator_state(self._generator)
            with torch.cuda.graph(self._graph):
                self._out = self._once()

    def _once(self) -> Tensor:
        return gather({"x": self._x}, Systematic()(self._w, self._generator))["x"]

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            if self._graph is None:
                self._once()
            else:
                self._graph.replay()


def milliseconds(side: Callable[[int], None], steps: int) -> float:
    """Per step, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    side(steps)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB between two buffers that rotate; the best of some."""
    buffers = [torch.rand(2**27, dtype=F64, device=CUDA) for _ in range(3)]

    def copies(steps: int) -> None:
        for i in range(steps):
            buffers[(i + 1) % 3].copy_(buffers[i % 3])

    copies(3)
    best = min(milliseconds(copies, 20) for _ in range(5))
    return 2 * 8 * 2**27 / (best / 1e3)


def peak_bytes(n: int, d: int) -> float:
    """Peak of the eager filter above the start, per particle."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = LinearGaussian(d, 5)
    ParticleFilter(ess_threshold=1.0).run(model, num_particles=n, records=Records(ancestors=False))
    return (torch.cuda.max_memory_allocated() - before) / n


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_filter.json")
    parser.add_argument("--n", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--d", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is visible; filter_step.py measures on a CPU")
    machine = describe()
    print(", ".join(f"{word} {value}" for word, value in machine.items()), "\n")
    bandwidth = copy_bandwidth()
    print(f"Device-to-device copy: {bandwidth / 1e12:.2f} TB/s, read and written\n")
    rows, results = [], []
    for n in arguments.n:
        for d in arguments.d:
            sides: dict[str, Callable[[int], None]] = {
                "smcdiff": Ours(n, d, None),
                "captured": Ours(n, d, Capture(homogeneous=True)),
                "bare loop": Bare(n, d, False),
                "bare captured": Bare(n, d, True),
                "gather": Gather(n, d, False),
                "gather captured": Gather(n, d, True),
            }
            steps = max(10, min(200, 200_000_000 // (n * d)))
            taken: dict[str, list[float]] = {name: [] for name in sides}
            for round_ in range(arguments.rounds + 1):
                for name, side in sides.items():
                    value = milliseconds(side, steps)
                    if round_:  # the first round warms up
                        taken[name].append(value)
            del sides
            median = {name: statistics.median(values) for name, values in taken.items()}
            least = n * (8 + 8 + 8 + 2 * 8 * d)
            speed = least / (median["gather captured"] / 1e3)
            memory = peak_bytes(n, d)
            results.append(
                {"n": n, "d": d, "ms per step": taken, "gather bytes per s": speed, "peak bytes per particle": memory}
            )
            rows.append(
                {"n": f"{n:,}", "d": str(d)}
                | {f"{name} ms": f"{value:.3f}" for name, value in median.items()}
                | {
                    "smcdiff / bare loop": f"{median['smcdiff'] / median['bare loop']:.2f}",
                    "captured / bare loop": f"{median['captured'] / median['bare loop']:.2f}",
                    "captured / bare captured": f"{median['captured'] / median['bare captured']:.2f}",
                    "gather TB/s": f"{speed / 1e12:.3f}",
                    "of copy": f"{speed / bandwidth:.2f}",
                    "bytes a particle": f"{memory:.0f}",
                }
            )
            torch.cuda.empty_cache()
    print(markdown(rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "copy bytes per s": bandwidth, "step": results}
    (arguments.out / "gpu_filter.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
