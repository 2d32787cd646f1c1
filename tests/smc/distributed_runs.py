"""Processes that run one filter together; used by test_distributed.py.

``python distributed_runs.py FOLDER SCENARIO ...`` imports torch once and forks the ranks of each scenario, which meet
through a file in the folder and talk over the loopback interface. Each rank saves what it found, or the error that
ended it, in the folder; the exit codes are printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
from torch import Tensor

from smcdiff.smc import FeynmanKac, Move, ParticleFilter, Particles, Records, Systematic
from smcdiff.smc.checkpoint import Checkpoint
from smcdiff.smc.distributed import ChainsOverRanks, ChainsResult, ParticlesOverRanks, ParticlesResult
from tests.smc.models import CPU, Bootstrap, HiddenMarkov, LinearGaussian, OptimallyTwisted

LONG = Bootstrap(LinearGaussian.example(2, num_steps=30))
NUMBERS = {"num_particles": 8, "num_chains": 4, "seed": 6}


@dataclass(frozen=True)
class Labelled:
    """A model whose particles carry who they descend from and what they are, in several shapes and dtypes."""

    model: FeynmanKac
    rank: int
    device: torch.device = CPU

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        root = self.rank * num_particles + torch.arange(num_particles).expand(num_chains, num_particles)
        chain = torch.arange(num_chains)[:, None].expand(root.shape)
        move = self.model.initial(num_chains, num_particles, generator)
        x = move.particles["x"]
        return replace(
            move,
            particles={
                "x": x,
                "root": root,
                "odd": root % 2 == 1,
                "chain": chain.to(torch.uint8),
                "path": torch.zeros((*root.shape, self.num_steps + 1, x.shape[-1]), dtype=torch.float16),
                "pair": torch.complex(root.float(), chain.float())[..., None, None],
            },
        )

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        move = self.model.step(i, {"x": particles["x"]}, generator)
        path = particles["path"].clone()
        path[:, :, i] = move.particles["x"].to(path.dtype)
        return replace(move, particles={**particles, **move.particles, "path": path})


@dataclass(frozen=True)
class Broken:
    """A model that does something at a step."""

    model: FeynmanKac
    at: int
    what: Callable[[Move], Move]
    device: torch.device = CPU

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self.model.initial(num_chains, num_particles, generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        move = self.model.step(i, particles, generator)
        return self.what(move) if i == self.at else move


@dataclass(frozen=True)
class Skewed:
    """A resampler that draws otherwise on every rank, as differing devices might."""

    rank: int = field(repr=False)

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        return Systematic()(weights.roll(self.rank, -1), generator)


def not_a_number(move: Move) -> Move:
    log_g = move.log_g.clone()
    log_g[1, 0] = torch.nan
    return replace(move, log_g=log_g)


def fault_in_chain_2(move: Move) -> Move:
    return replace(move, faults={"the sky fell": torch.arange(move.log_g.shape[0]) == 2})


def no_fault(move: Move) -> Move:
    return replace(move, faults={"the sky fell": torch.zeros(move.log_g.shape[0], dtype=torch.bool)})


def same(move: Move) -> Move:
    return move


def second_rank(rank: int, at: int, what: Callable[[Move], Move]) -> Broken:
    """On rank 1 something happens at a step; rank 0 has the model of the same kind."""
    return Broken(LONG, at, what if rank == 1 else same)


def die(move: Move) -> Move:
    os._exit(7)


def stall(move: Move) -> Move:
    time.sleep(5)
    return move


def refuse(move: Move) -> Move:
    raise MemoryError("no room on this rank")


def exact(rank: int, folder: Path) -> dict[str, Any]:
    """Runs whose results are compared with exact answers."""
    found: dict[str, Any] = {}
    for d in (1, 3):
        twisted = OptimallyTwisted(LinearGaussian.example(d, num_steps=8))
        found[f"twisted {d}"] = sharded(
            ParticlesOverRanks(ParticleFilter(ess_threshold=1.0)).run(twisted, num_particles=6, num_chains=5, seed=d)
        )
    hidden = HiddenMarkov.example()
    for n, threshold in ((2, 0.8), (4, 0.5), (6, 1.0)):
        settings = ParticlesOverRanks(ParticleFilter(ess_threshold=threshold))
        found[f"hidden {n}"] = sharded(settings.run(hidden, num_particles=n, num_chains=20_000, seed=n))
    labelled = Labelled(Bootstrap(LinearGaussian.example(3, num_steps=12)), rank)
    found["labelled"] = sharded(ParticlesOverRanks().run(labelled, num_particles=10, num_chains=7, seed=3))
    found["chains"] = chains(ChainsOverRanks().run(hidden, num_particles=4, num_chains=20_000, seed=1))
    return found


def errors(rank: int, folder: Path) -> dict[str, Any]:
    """Runs that fail on one rank or on all, and what each rank then says."""
    model = Broken(LONG, 5, same if rank else not_a_number)
    runs: dict[str, Callable[[], object]] = {
        "sharded NaN": lambda: ParticlesOverRanks().run(model, **NUMBERS),
        "chain NaN": lambda: ChainsOverRanks().run(model, **NUMBERS),
        "sharded fault": lambda: ParticlesOverRanks().run(
            Broken(LONG, 4, fault_in_chain_2 if rank else no_fault), **NUMBERS
        ),
        "raises": lambda: ParticlesOverRanks().run(second_rank(rank, 3, refuse), **NUMBERS),
        "particles": lambda: ParticlesOverRanks().run(LONG, **{**NUMBERS, "num_particles": 7}),
        "chains": lambda: ChainsOverRanks().run(LONG, **{**NUMBERS, "num_chains": 3}),
        "summaries": lambda: ParticlesOverRanks().run(
            LONG, **NUMBERS, records=Records(summaries={"a": lambda state: state.ess})
        ),
        "limit": lambda: ParticlesOverRanks(time_limit=0.0).run(LONG, **NUMBERS),
        "seeds": lambda: ParticlesOverRanks().run(LONG, **{**NUMBERS, "seed": rank}),
        "ancestors": lambda: ParticlesOverRanks(ParticleFilter(Skewed(rank), 1.0)).run(LONG, **NUMBERS),
    }
    return {name: ended(run) for name, run in runs.items()}


def ended(run: Callable[[], object]) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def dies(rank: int, folder: Path) -> dict[str, Any]:
    return {"dies": ended(lambda: ParticlesOverRanks().run(second_rank(rank, 7, die), **NUMBERS))}


def dies_in_chains(rank: int, folder: Path) -> dict[str, Any]:
    return {"dies": ended(lambda: ChainsOverRanks().run(second_rank(rank, 7, die), **NUMBERS))}


def stalls(rank: int, folder: Path) -> dict[str, Any]:
    settings = ParticlesOverRanks(time_limit=1.0)
    return {"stalls": ended(lambda: settings.run(second_rank(rank, 7, stall), **NUMBERS))}


def checkpoint(folder: Path, name: str) -> Checkpoint:
    return Checkpoint(folder / f"{name}.pt", {"program": "a"}, every_seconds=None, every_steps=1)


def both_modes(model: FeynmanKac, folder: Path | None) -> dict[str, Any]:
    kept = {name: checkpoint(folder, name) if folder else None for name in ("particles", "chains")}
    return {
        "particles": sharded(ParticlesOverRanks().run(model, **NUMBERS, checkpoint=kept["particles"])),
        "chains": chains(ChainsOverRanks().run(model, **NUMBERS, checkpoint=kept["chains"])),
    }


def straight(rank: int, folder: Path) -> dict[str, Any]:
    """Never stopped, and without a checkpoint."""
    return both_modes(Broken(LONG, 0, same), None)


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """With checkpoints: goes on from those in the folder."""
    return both_modes(Broken(LONG, 0, same), folder)


def dies_with_particles(rank: int, folder: Path) -> dict[str, Any]:
    return {"dies": ended(lambda: both_modes(second_rank(rank, 17, die), folder))}


def dies_with_chains(rank: int, folder: Path) -> dict[str, Any]:
    model = second_rank(rank, 11, die)
    return {"dies": ended(lambda: ChainsOverRanks().run(model, **NUMBERS, checkpoint=checkpoint(folder, "chains")))}


def other_run(rank: int, folder: Path) -> dict[str, Any]:
    """Another seed on the checkpoints of the runs that died; and rank 0 loses its latest file."""
    kept = {name: kept_steps(folder, name, rank) for name in ("particles", "chains")}
    changed, model = {**NUMBERS, "seed": 7}, Broken(LONG, 0, same)
    other = ended(lambda: ParticlesOverRanks().run(model, **changed, checkpoint=checkpoint(folder, "particles")))
    if rank == 0:
        (folder / f"particles.rank0.{'ab'[kept['particles'].index(16)]}.pt").unlink()
    return {"other": other, "kept": kept, "left": kept_steps(folder, "particles", rank)}


def kept_steps(folder: Path, name: str, rank: int) -> list[int]:
    files = sorted(folder.glob(f"{name}.rank{rank}.?.pt"))
    return [int(torch.load(file, weights_only=True)["state"]["step"]) for file in files]


def sharded(result: ParticlesResult) -> dict[str, Any]:
    parts = {name: getattr(result, name) for name in ("rank", "particles", "log_w", "w", "log_z", "moved")}
    return {**parts, "ancestors": result.records.ancestors, "resampled": result.records.resampled}


def three_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """Particles come from two other ranks at once."""
    labelled = Labelled(Bootstrap(LinearGaussian.example(3, num_steps=12)), rank)
    return {"labelled": sharded(ParticlesOverRanks().run(labelled, num_particles=12, num_chains=7, seed=3))}


def chains(result: ChainsResult) -> dict[str, Any]:
    local = result.local
    alone = {"particles": local.particles, "local log_z": local.log_z, "ancestors": local.records.ancestors}
    return {**alone, "rank": result.rank, "log_z": result.log_z}


def fork(scenario: str, folder: Path) -> list[int]:
    """Fork the ranks, wait for both; their exit codes."""
    store = folder / f"{scenario}.{os.getpid()}.store"
    children, ranks = [], 3 if scenario == "three_ranks" else 2
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=ranks,
                    timeout=timedelta(seconds=30),
                )
                torch.save(globals()[scenario](rank, folder), folder / f"{scenario}.{rank}.pt")
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        print(*fork(name, Path(sys.argv[1])))
