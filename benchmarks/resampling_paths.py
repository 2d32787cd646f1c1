"""Ways to do systematic resampling, by size: time, and what goes wrong.

    python benchmarks/resampling_paths.py [--device cuda] [--json results.json]

    smcdiff      smcdiff's Systematic: weights as int64, and by size one of the next two, which give the same ancestors;
    integers, counted    the number of points before each particle by division, one scatter and one sum;
    integers, searched   searchsorted of the points;
    search 64    float64 cumulative sums, searchsorted, clamp;
    counts 64    float64 cumulative sums, rounded up to counts, one scatter and one sum;
    search 32    as search 64 in float32;
    multinomial  torch.multinomial, float64, for scale.

All take turns on the same weights, one thread; times are medians per call, of the processor on a CPU and on the clock
with a GPU. The second table counts, over many draws, calls with a particle of zero weight among the ancestors, and
those in which a number of offspring is not n w rounded up or down. smcdiff takes integers at all sizes, because their
rightness does not depend on rounding; this is their price.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from page import markdown
from torch import Tensor

from smcdiff.smc.integer_weights import ancestors_from_counts, comb_counts, comb_search, cumulative, uniform_below
from smcdiff.smc.resampling import Systematic

Way = Callable[[Tensor, torch.Generator], Tensor]


def search(dtype: torch.dtype) -> Way:
    def draw(w: Tensor, g: torch.Generator) -> Tensor:
        b, n = w.shape
        c = w.to(dtype).cumsum(-1)
        comb = torch.arange(n, dtype=dtype, device=w.device) + torch.rand(
            (b, 1), dtype=dtype, device=w.device, generator=g
        )
        return torch.searchsorted(c, comb * (c[:, -1:] / n), right=True).clamp_(max=n - 1)

    return draw


def counts(w: Tensor, g: torch.Generator) -> Tensor:
    b, n = w.shape
    c = w.cumsum(-1)
    u = torch.rand((b, 1), dtype=w.dtype, device=w.device, generator=g)
    before = (c * (n / c[:, -1:]) - u).ceil_().to(torch.int64).clamp_(0, n)
    marks = before.new_zeros((b, n + 1)).scatter_add_(-1, before, torch.ones_like(before))
    return marks[:, :n].cumsum(-1).clamp_(max=n - 1)


def searched(w: Tensor, g: torch.Generator) -> Tensor:
    c = cumulative(w, failed=1)
    return comb_search(c, uniform_below(c[:, -1:], 1, g))


def counted(w: Tensor, g: torch.Generator) -> Tensor:
    c = cumulative(w, failed=1)
    return ancestors_from_counts(comb_counts(c, uniform_below(c[:, -1:], 1, g)))


WAYS: dict[str, Way] = {
    "smcdiff": Systematic(),
    "integers, counted": counted,
    "integers, searched": searched,
    "search 64": search(torch.float64),
    "counts 64": counts,
    "search 32": search(torch.float32),
    "multinomial": lambda w, g: torch.multinomial(w, w.shape[1], True, generator=g),
}


def weights(b: int, n: int, seed: int, zeros: bool) -> Tensor:
    """Normalised weights, uneven by orders of magnitude; a third of them zero if asked for, the last among them."""
    g = torch.Generator().manual_seed(seed)
    w = torch.exp(2 * torch.randn((b, n), dtype=torch.float64, generator=g))
    if zeros:
        w[torch.rand((b, n), generator=g) < 1 / 3] = 0
        w[:, -1] = 0
    return w / w.sum(-1, keepdim=True)


def wrong(way: Way, n: int, draws: int) -> tuple[int, int]:
    """Draws with an ancestor of zero weight or out of range; draws with offspring not n w rounded up or down."""
    zero = uneven = 0
    for seed in range(draws):
        w = weights(1, n, seed, zeros=True)
        ancestors = way(w, torch.Generator().manual_seed(seed))
        zero += bool((w.gather(-1, ancestors) == 0).any())
        offspring = torch.zeros_like(w).scatter_add_(-1, ancestors, torch.ones_like(w))
        uneven += bool(((offspring - n * w).abs() > 1 + 1e-9).any())
    return zero, uneven


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most", type=int, default=1_000_000, help="largest number of particles")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="for the times")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    print(", ".join(f"{word} {value}" for word, value in machine.items()), "\n")

    rows, g = [], torch.Generator(arguments.device).manual_seed(0)
    sizes = ((1, 64), (4, 64), (1, 256), (1, 1_000), (4, 1_000), (1, 4_000), (1, 10_000), (64, 1_000), (1, 100_000))
    for b, n in (*sizes, (1, 1_000_000)):
        if n > arguments.most:
            continue
        w = weights(b, n, 0, zeros=False).to(arguments.device)
        calls = max(2, 200_000 // (b * n))
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        now = time.perf_counter if w.is_cuda else time.process_time
        for _ in range(arguments.rounds):
            for name, way in WAYS.items():
                way(w, g)  # so that no side pays for the memory that the one before gave back
                start = now()
                for _ in range(calls):
                    way(w, g)
                if w.is_cuda:
                    torch.cuda.synchronize()
                seconds[name].append((now() - start) / calls)
        median = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
        rows.append({"chains": str(b), "n": f"{n:,}"} | {f"{name} us": f"{median[name]:.0f}" for name in WAYS})
    print("Time per call\n\n" + markdown(rows) + "\n")

    faulty = []
    for n, draws in ((1_000, 1_000), (131_072, 60), (1_000_000, 10)):
        if n > arguments.most:
            continue
        row = {"n": f"{n:,}", "draws": str(draws)}
        for name in ("smcdiff", "search 64", "counts 64", "search 32"):
            zero, uneven = wrong(WAYS[name], n, draws)
            row[f"{name}: zero weight"], row[f"{name}: offspring"] = str(zero), str(uneven)
        faulty.append(row)
    print("Wrong draws\n\n" + markdown(faulty))
    if arguments.json:
        content = {"machine": machine, "time per call": rows, "wrong draws": faulty}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
