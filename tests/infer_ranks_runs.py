"""Processes that run one ``sd.SMC`` together; used by test_infer_ranks.py.

``python infer_ranks_runs.py FOLDER SCENARIO ...`` imports torch once and forks the two ranks of each scenario, which
meet through a file in the folder and talk over the loopback interface. Each rank saves what it found, or the error
that ended it, in the folder; the exit codes are printed.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import arviz  # noqa: F401 (before the fork)
import pyro
import pyro.distributions as pyro_dist
import torch
import torch.distributed as dist
from torch import Tensor

import smcdiff as sd
import smcdiff.infer
from smcdiff.smc import FilterState, Multinomial, Records
from smcdiff.smc.distributed import ChainsOverRanks, OfWeights, ParticlesOverRanks
from smcdiff.smc.ranks import Ranks
from tests.smc.models import HiddenMarkov

F64 = torch.float64
MEAN = torch.tensor([0.3, -0.8], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=F64)
A = torch.tensor([[1.0, 0.5]], dtype=F64)
Y = torch.tensor([1.4], dtype=F64)
SIGMA, STEPS = 0.5, 8
CHAINS, PARTICLES, SEED = 2000, 4, 5
PRIOR = sd.DiffusionPrior(sd.GaussianDenoiser(MEAN, COVARIANCE), sd.VPSchedule(), STEPS, variance="optimal")
MODES = {"chains": ChainsOverRanks, "particles": ParticlesOverRanks}
FILTER = sd.ParticleFilter(Multinomial(), 0.7)


def program(y: Tensor | None = None) -> Tensor:
    x = pyro.sample("x", PRIOR)
    pyro.deterministic("total", x.sum(-1))
    return pyro.sample("y", pyro_dist.Normal(x @ A.mT, SIGMA).to_event(1), obs=y)


def posterior(filter: Any, num_chains: int = CHAINS, seed: int | None = SEED, **options: Any) -> sd.SMC:
    kernel = sd.TDS(program, twist=sd.WidenedTwist())
    return sd.SMC(kernel, PARTICLES, num_chains, filter=filter, seed=seed, **{"progress": False, **options}).run(Y)


def everything(smc: sd.SMC) -> dict[str, Any]:
    """All that a user reads of a run."""
    whole, run, tree = smc.weighted_samples(), smc.posterior, smc.to_arviz(posterior_predictive=False, prior=2)
    exported = {
        f"{group}/{name}": torch.as_tensor(tree[group][name].values.copy())
        for group in ("posterior", "prior", "log_likelihood", "observed_data")
        for name in tree[group].data_vars
    }
    return {
        "values": whole.values,
        "log_w": whole.log_w,
        "log_z": smc.log_evidence_per_chain,
        "log_evidence": smc.log_evidence,
        "samples": smc.get_samples(50),
        "steps": {
            name: getattr(run, name)
            for name in ("ess", "log_z_path", "roots", "entropy", "resampled", "ancestors", "log_z_variance")
        },
        "log_likelihood": dict(run.log_likelihood),
        "evaluations": list(smc.network_evaluations),
        "summary": smc.summary(),
        "exported": exported,
    }


def exact(rank: int, folder: Path) -> dict[str, Any]:
    """Runs whose results are compared with closed forms and with one process."""
    kept = Records(log_weights=True)
    found = {}
    for name, mode in MODES.items():
        smc = posterior(mode(FILTER), records=kept)
        found[name] = {**everything(smc), "last log_w": smc.records.log_w[-1]}
    return found


def small(rank: int, folder: Path) -> dict[str, Any]:
    """No seed, a summary of the weights, a bar of progress; torch's generator differs between the ranks."""
    torch.manual_seed(100 + rank)
    found: dict[str, Any] = {}
    largest = Records(summaries={"largest": OfWeights(lambda w: w.amax(-1))})
    for name, mode in MODES.items():
        with redirect_stderr(io.StringIO()) as bar:
            smc = posterior(mode(), 6, None, records=largest, progress=True)
        found[name] = {
            "log_w": smc.posterior.log_w,
            "x": smc.posterior.values["x"],
            "largest": smc.records.summaries["largest"],
            "bar": bar.getvalue(),
        }
    with Ranks.open(60.0) as ranks:
        odd, empty = ranks.gather_all(of_all_kinds(rank), {"none": torch.zeros(0, 3, dtype=F64)})
    return {**found, "odd": odd, "empty": empty}


def of_all_kinds(rank: int) -> dict[str, Tensor]:
    """Values of many dtypes and shapes, in an order that leaves few of them aligned."""
    generator = torch.Generator().manual_seed(rank)
    noise = torch.randn((3, 5), generator=generator, dtype=F64)
    kinds = (torch.uint8, F64, torch.bool, torch.complex128, torch.bfloat16, torch.int64, torch.float16)
    values = {str(kind): (100 * noise.abs()).to(kind) for kind in kinds}
    return {"flag": noise[0, 0] > 0, **values, "turned": noise.mT, "number": noise[1, 1]}


class Network(torch.nn.Module):
    """A denoiser's network that does something at its call number ``at``."""

    def __init__(self, at: int = 0, what: Callable[[], None] = lambda: None, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=F64))
        self.calls, self.at, self.what = 0, at, what

    def forward(self, x: Tensor, index: float) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.what()
        return self.gain * x


def die() -> None:
    os._exit(7)


def refuse() -> None:
    raise MemoryError("no room on this rank")


def on_network(
    filter: Any, network: Network, checkpoint: Path | None = None, twist: Any = None, **numbers: int
) -> sd.SMC:
    prior = sd.DiffusionPrior(sd.NetworkDenoiser(network, (2,), sd.from_clean), sd.VPSchedule(), 30)

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", pyro_dist.Normal(x, 0.5).to_event(1), obs=y)

    n, b = numbers.get("n", 4), numbers.get("b", 2)
    options: dict[str, Any] = {"seed": 3, "progress": False, "max_batch": 100}
    kernel = sd.TDS(model) if twist is None else sd.TDS(model, twist)
    return sd.SMC(kernel, n, b, filter=filter, checkpoint=checkpoint, checkpoint_steps=1, **options)


LONG_Y = torch.tensor([0.5, -0.2], dtype=F64)


def kept(folder: Path | None, network: Callable[[], Network], names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        own = network()
        smc = on_network(MODES[name](FILTER), own, folder / f"{name}.pt" if folder else None).run(LONG_Y)
        found[name] = {**everything(smc), "calls": own.calls}
    return found


def straight(rank: int, folder: Path) -> dict[str, Any]:
    return kept(None, Network, list(MODES))


def dies_in_chains(rank: int, folder: Path) -> dict[str, Any]:
    return {"dies": ended(lambda: kept(folder, lambda: Network(20 if rank else 0, die), ["chains"]))}


def dies_in_particles(rank: int, folder: Path) -> dict[str, Any]:
    return {"dies": ended(lambda: kept(folder, lambda: Network(20 if rank else 0, die), ["particles"]))}


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    return kept(folder, Network, list(MODES))


def errors(rank: int, folder: Path) -> dict[str, Any]:
    """Runs that fail on one rank or on all, and what each rank then says."""

    def reads_particles(state: FilterState) -> Tensor:
        return state.particles["x"].mean((1, 2))

    def run(smc: sd.SMC) -> Callable[[], object]:
        return lambda: smc.run(LONG_Y)

    def on_second(call: int) -> Network:
        return Network(call if rank else 0, refuse)

    runs: dict[str, Callable[[], object]] = {
        "raises in chains": run(on_network(ChainsOverRanks(), on_second(12))),
        "raises in particles": run(on_network(ParticlesOverRanks(), on_second(12))),
        "raises before": run(on_network(ParticlesOverRanks(), on_second(1))),
        "measurements": lambda: on_network(ChainsOverRanks(), Network()).run(LONG_Y + rank),
        "weights": run(on_network(ChainsOverRanks(), Network(gain=0.5 + rank))),
        "settings": run(on_network(ParticlesOverRanks(), Network(), twist=sd.WidenedTwist(0.1 + rank))),
        "checkpoints": run(on_network(ChainsOverRanks(), Network(), None if rank else folder / "one.pt")),
        "chains": run(on_network(ChainsOverRanks(), Network(), b=3)),
        "particles": run(on_network(ParticlesOverRanks(), Network(), n=5)),
        "single": run(on_network(ParticlesOverRanks(), Network(), n=2)),
        "shape": lambda: posterior(
            ChainsOverRanks(), 2, 0, records=Records(summaries={"all": OfWeights(lambda w: w.sum())})
        ),
        "whole": whole_of_a_mean,
        "summaries": lambda: posterior(ChainsOverRanks(), 2, 0, records=Records(summaries={"mean": reads_particles})),
    }
    return {name: ended(call) for name, call in runs.items()}


def whole_of_a_mean() -> None:
    """A filter's run whose summary pools the chains of a rank, put together."""
    mean = Records(summaries={"mean": lambda state: state.ess.mean()})
    result = ChainsOverRanks().run(HiddenMarkov.example(), num_particles=2, num_chains=2, records=mean)
    with Ranks.open(60.0) as ranks:
        result.whole(ranks)


def ended(run: Callable[[], object]) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def fork(scenario: str, folder: Path) -> list[int]:
    """Fork the ranks, wait for both; their exit codes."""
    store = folder / f"{scenario}.store"
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(100)  # a rank that waits in vain does not outlive the test
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
                )
                torch.save(globals()[scenario](rank, folder), folder / f"{scenario}.{rank}.pt")
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        print(*fork(name, Path(sys.argv[1])))
