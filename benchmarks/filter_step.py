"""One step of the particle filter, side by side with other filters, and on two processes.

    python benchmarks/filter_step.py [--json results.json] [--skip-particles] [--step-only]
    THP_MEM_ALLOC_ENABLE=1 python benchmarks/filter_step.py ...

A bootstrap filter of the linear-Gaussian model x_0 ~ N(0, I), x_i = 0.9 x_{i-1} + N(0, 0.25 I), y_i = x_i + N(0, I),
in d dimensions with n particles, in float64, resampled systematically before every move:

    smcdiff      ParticleFilter, with its evidence, effective sample size and faults, without stored ancestors;
    float32      the same with states in float32; its weights and evidence stay in float64;
    bare loop    move, weigh, systematic resampling, gather in torch, and nothing else;
    particles    nchopin/particles 0.4 with the model in plain numpy; it needs numpy < 2, so the script makes an
                 environment of its own for it, in a temporary folder, and leaves this side out where it cannot;
    Pyro         pyro.infer.SMCFilter.

All sides take turns in one run, one thread each (--threads gives torch's sides more); a number is the median over the
rounds. The second command lets torch ask the system for large pages of memory, as numpy does unasked. Goals: at least
twice as fast as each library at n >= 10 000, within 10 % of the bare loop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as processes
from machine import describe
from page import markdown
from pyro.infer import SMCFilter
from torch import Tensor

from smcdiff.smc import Move, ParticleFilter, Particles, Records
from smcdiff.smc.distributed import ChainsOverRanks, ParticlesOverRanks

#: Runs a filter of n particles in d dimensions for some steps; the seconds it took, on the clock and of the processor.
Side = Callable[[int, int, int], tuple[float, float]]

Y = 0.1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LinearGaussian:
    """The model as a Feynman-Kac model."""

    d: int
    num_steps: int
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        x = torch.randn((num_chains, num_particles, self.d), dtype=self.dtype, generator=generator)
        return Move({"x": x}, log_likelihood(x))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        x = particles["x"]
        x = 0.9 * x + 0.5 * torch.randn(x.shape, dtype=self.dtype, generator=generator)
        return Move({"x": x}, log_likelihood(x))


def log_likelihood(x: Tensor) -> Tensor:
    return -0.5 * (x - Y).square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - start[0], time.process_time() - start[1]


def ours(n: int, d: int, steps: int, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    settings, records = ParticleFilter(ess_threshold=1.0), Records(ancestors=False)
    start = now()
    settings.run(LinearGaussian(d, steps, dtype), num_particles=n, records=records)
    return since(start)


def in_float32(n: int, d: int, steps: int) -> tuple[float, float]:
    return ours(n, d, steps, torch.float32)


@torch.no_grad()
def bare(n: int, d: int, steps: int) -> tuple[float, float]:
    """The least a bootstrap filter does; its resampling is the faster of two ways, by size."""
    g = torch.Generator().manual_seed(0)
    start = now()
    x = torch.randn((n, d), dtype=torch.float64, generator=g)
    for _ in range(steps):
        w = torch.softmax(log_likelihood(x), 0)
        c = w.cumsum(0)
        u = torch.rand(1, dtype=torch.float64, generator=g)
        if n < 10_000:
            ancestors = torch.searchsorted(c, (torch.arange(n) + u) * (c[-1] / n)).clamp_(max=n - 1)
        else:
            before = (c * (n / c[-1]) - u).ceil_().to(torch.int64).clamp_(0, n)
            marks = torch.zeros(n + 1, dtype=torch.int64).scatter_add_(0, before, torch.ones_like(before))
            ancestors = marks[:n].cumsum(0).clamp_(max=n - 1)
        x = x[ancestors]
        x = 0.9 * x + 0.5 * torch.randn((n, d), dtype=torch.float64, generator=g)
    log_likelihood(x)
    return since(start)


class PyroModel:
    """The model, and as its guide the same dynamics, as SMCFilter takes them."""

    def __init__(self, d: int, observes: bool) -> None:
        self.d, self.observes, self.t = d, observes, 0

    def init(self, state: dict[str, Tensor]) -> None:
        self.t = 0
        x = pyro.sample("x_0", dist.Normal(torch.zeros(self.d), 1.0).to_event(1))
        if self.observes:  # the guide may not write to the state
            state["x"] = x

    def step(self, state: dict[str, Tensor], y: Tensor | None = None) -> None:
        self.t += 1
        x = pyro.sample(f"x_{self.t}", dist.Normal(0.9 * state["x"], 0.5).to_event(1))
        if self.observes:
            state["x"] = x
            pyro.sample(f"y_{self.t}", dist.Normal(x, 1.0).to_event(1), obs=y)


def of_pyro(n: int, d: int, steps: int) -> tuple[float, float]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        y = torch.full((d,), Y)
        filter = SMCFilter(
            PyroModel(d, True), PyroModel(d, False), num_particles=n, max_plate_nesting=0, ess_threshold=1
        )
        with torch.no_grad(), pyro.validation_enabled(False):
            start = now()
            filter.init()
            for _ in range(steps):
                filter.step(y)
            return since(start)
    finally:
        torch.set_default_dtype(default)


class ParticlesLibrary:
    """A child process in an environment of its own that runs the filter of ``particles``."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", "particles==0.4", "numpy<2"]
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=600)
        self._child = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("particles_side.py"))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self(10, 1, 2)  # compiles what it compiles

    def __call__(self, n: int, d: int, steps: int) -> tuple[float, float]:
        wall, processor = self._ask(f"{n} {d} {steps}").split()
        return float(wall), float(processor)

    def memory(self, n: int, d: int, steps: int) -> int:
        return int(self._ask(f"memory {n} {d} {steps}"))

    def _ask(self, line: str) -> str:
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(line + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the child with particles ended with code {child.wait()}")
        return answer


def in_child(function: Callable[[], float]) -> float:
    """What the function returns in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return float(file.read())


def peak_memory(side: Side, n: int, d: int, steps: int) -> float:
    """Peak of a child that runs the side above its start, in bytes."""

    def run() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side(n, d, steps)
        return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    return in_child(run)


def on_two_processes(mode: str, n: int, d: int, steps: int, store: Path) -> float:
    """Seconds of rank 0 for one filter over two forked processes that talk by Gloo; the start is not counted."""

    def rank(number: int) -> float:
        limit = timedelta(seconds=60)
        processes.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=limit)
        settings, model = ParticleFilter(ess_threshold=1.0), LinearGaussian(d, steps)
        records = Records(ancestors=False)
        processes.barrier()
        start = time.perf_counter()
        if mode == "particles":
            ParticlesOverRanks(settings).run(model, num_particles=n, records=records)
        else:
            ChainsOverRanks(settings).run(model, num_particles=n // 2, num_chains=2, records=records)
        processes.barrier()
        return time.perf_counter() - start

    second = os.fork()
    if second == 0:
        try:
            rank(1)
        finally:
            os._exit(0)
    seconds = in_child(lambda: rank(0))
    os.waitpid(second, 0)
    return seconds


def timed(sides: dict[str, Side], n: int, d: int, rounds: int, clock: int) -> dict[str, list[float]]:
    """Seconds per step of each side, over rounds in which all take turns; clock 0 is the wall's, 1 the processor's."""
    steps = max(4, min(100, 1_000_000 // (n * max(1, d // 8))))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            taken = side(n, d, steps)[clock] / steps
            if round_:  # the first round warms up
                seconds[name].append(taken)
    return seconds


def memory_table(
    sides: dict[str, Side], library: ParticlesLibrary | None, n: int, ds: list[int], most: int
) -> list[dict[str, str]]:
    """Print and return the peak memory per particle of each side."""
    rows = []
    for d in (d for d in ds if n * d <= most):
        peaks = {name: peak_memory(side, n, d, 3) for name, side in sides.items() if side is not library}
        if library is not None:
            peaks["particles"] = library.memory(n, d, 3)
        rows.append({"d": str(d), "one particle's x": f"{8 * d}"} | {name: f"{peaks[name] / n:.0f}" for name in sides})
    print(f"Peak memory per particle at n = {n:,}, bytes\n\n" + markdown(rows) + "\n")
    return rows


def processes_table(folder: Path, rounds: int, most: int) -> list[dict[str, str]]:
    """Print and return the times of two processes against one."""
    rows = []
    for n, d in ((10_000, 8), (100_000, 8), (100_000, 64)):
        if n * d > most:
            continue
        taken: dict[str, list[float]] = {"one": [], "particles": [], "chains": []}
        for round_ in range(rounds):
            taken["one"].append(ours(n, d, 20)[0] / 20)
            for mode in ("particles", "chains"):
                store = folder / f"{n} {d} {mode} {round_}"
                taken[mode].append(on_two_processes(mode, n, d, 20, store) / 20)
        one, sharded, chains = (statistics.median(values) for values in taken.values())
        rows.append(
            {
                "n": f"{n:,}",
                "d": str(d),
                "one process ms": f"{1e3 * one:.2f}",
                "particles over two ms": f"{1e3 * sharded:.2f}",
                "chains of n / 2 over two ms": f"{1e3 * chains:.2f}",
                "one / particles": f"{one / sharded:.2f}",
                "one / chains": f"{one / chains:.2f}",
            }
        )
    print("Two processes against one, time per step\n\n" + markdown(rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--d", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=10_000_000, help="leave out sizes with n d above this")
    parser.add_argument("--skip-particles", action="store_true")
    parser.add_argument("--step-only", action="store_true", help="leave out memory and the two processes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--processor-time", action="store_true", help="in the first table, for a machine that other programs share"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {**describe(), "large pages for torch": os.environ.get("THP_MEM_ALLOC_ENABLE", "0")}
    print(", ".join(f"{word} {value}" for word, value in machine.items()), "\n")
    content: dict[str, object] = {"machine": machine}

    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Side] = {"smcdiff": ours, "float32": in_float32, "bare loop": bare}
        library = None
        if not arguments.skip_particles:
            try:
                library = ParticlesLibrary(Path(folder) / "environment")
                sides["particles"] = library
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                print(f"particles is left out: {getattr(error, 'stderr', None) or error}\n", file=sys.stderr)
        sides["Pyro"] = of_pyro

        sizes = [(n, d) for n in arguments.n for d in arguments.d if n * d <= arguments.most]
        rows, results = [], []
        for n, d in sizes:
            seconds = timed(sides, n, d, arguments.rounds, int(arguments.processor_time))
            median = {name: statistics.median(values) for name, values in seconds.items()}
            results.append({"n": n, "d": d, "seconds per step": seconds})
            rows.append(
                {"n": f"{n:,}", "d": str(d)}
                | {f"{name} ms": f"{1e3 * value:.3f}" for name, value in median.items()}
                | {f"{name} / smcdiff": f"{median[name] / median['smcdiff']:.2f}" for name in list(median)[3:]}
                | {"smcdiff / bare loop": f"{median['smcdiff'] / median['bare loop']:.2f}"}
            )
        kind = "Processor time" if arguments.processor_time else "Time"
        print(f"{kind} per step\n\n" + markdown(rows) + "\n")
        content["step"] = results

        if not arguments.step_only:
            content["bytes per particle"] = memory_table(sides, library, max(arguments.n), arguments.d, arguments.most)
            content["two processes"] = processes_table(Path(folder), arguments.rounds, arguments.most)
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
