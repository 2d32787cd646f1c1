"""The filter on a CUDA device: exact answers, the law of the CPU, no waiting inside a step, CUDA graphs, NCCL.

Statistical tests fail with the stated probability under the exact law; seeds are fixed.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor

from smcdiff.smc import (
    SSP,
    Capture,
    ConditionalSMC,
    FilterState,
    Killing,
    Move,
    Multinomial,
    ParticleFilter,
    Particles,
    Past,
    Records,
    Resampler,
    Residual,
    Stratified,
    Systematic,
)
from smcdiff.smc.integer_weights import comb_counts, cumulative
from tests.smc.models import LinearGaussian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and none is visible"),
]

CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[2]
RESAMPLERS = [Systematic(), Stratified(), Multinomial(), Residual(), SSP(), Killing()]


@dataclass(frozen=True)
class Tracked:
    """The bootstrap filter of a linear-Gaussian model whose measurements after the first are all the same.

    No step looks at its index, none waits for the device, and H, R are such that y = x + N(0, I r).
    """

    d: int
    num_steps: int
    device: torch.device
    dtype: torch.dtype = torch.float64
    r: float = 0.8

    @cached_property
    def model(self) -> LinearGaussian:
        """On the CPU, for its Kalman filter."""
        eye = torch.eye(self.d, dtype=torch.float64)
        y = torch.full((self.num_steps + 1, self.d), 0.4, dtype=torch.float64)
        return LinearGaussian(torch.zeros_like(y[0]), eye, 0.8 * eye, 0.5 * eye, eye, self.r * eye, y)

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self._weigh(self._noise((num_chains, num_particles, self.d), generator))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        x = particles["x"]
        return self._weigh(0.8 * x + math.sqrt(0.5) * self._noise(x.shape, generator))

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        square = (current["x"].double() - 0.4).square().sum(-1)
        return -0.5 * (square / self.r + self.d * math.log(2 * math.pi * self.r))

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        square = (current["x"].double() - 0.8 * previous["x"].double()).square().sum(-1)
        return -0.5 * (square / 0.5 + self.d * math.log(2 * math.pi * 0.5))

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

    def _weigh(self, x: Tensor) -> Move:
        return Move({"x": x}, self.log_potential(0, None, {"x": x}))


@dataclass(frozen=True)
class Indexed:
    """A model whose steps differ by numbers of the host, by shapes and by what particles carry, as a chain's do."""

    inner: Tracked

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        move = self.inner.initial(num_chains, num_particles, generator)
        return replace(move, particles={**move.particles, "a": move.particles["x"], "b": 2 * move.particles["x"]})

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        move = self.inner.step(i, particles, generator)
        x = move.particles["x"]
        # two entries change places, which a graph that wrote its buffers too early would get wrong
        carried = {"x": x, "a": particles["b"], "b": particles["a"]} if i < self.num_steps else {"x": x}
        odd = {"the index is odd": torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)} if i % 2 else {}
        return Move(carried, move.log_g * (1 + 0.1 * i), odd)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_mean(samples: Tensor, expected: Tensor, failure: float = 1e-6, bias: float = 0.0) -> None:
    """Student's test that independent rows have the expected mean, Bonferroni over the entries."""
    samples, expected = samples.cpu(), expected.cpu()
    error = samples.std(0) / math.sqrt(len(samples))
    critical = stats.t.isf(failure / 2 / expected.numel(), len(samples) - 1)
    excess = ((samples.mean(0) - expected).abs() - bias) / error
    assert excess.max() < critical, f"{excess.max().item():.1f} standard errors; critical {critical:.1f}"


def means(state: FilterState) -> Tensor:
    return (state.w[..., None] * state.particles["x"]).sum(1)


def everything(state: FilterState) -> dict[str, Tensor]:
    """All numbers of a state and of its history."""
    found = {name: getattr(state, name) for name in ("log_w", "w", "ess", "log_z", "log_z_settled", "generator_state")}
    found |= {f"particle {name}": value for name, value in state.particles.items()}
    found |= {f"fault {name}": value for name, value in state.faults.items()}
    for i, record in enumerate(state.history):
        found |= {f"ess {i}": record.ess, f"log_z {i}": record.log_z, f"resampled {i}": record.resampled}
        found |= {f"{name} {i}": value for name, value in record.summaries.items()}
        if record.ancestors is not None:
            found[f"ancestors {i}"] = record.ancestors
    return found


def assert_same(a: FilterState, b: FilterState) -> None:
    """Equal bit for bit, history included."""
    ours, theirs = everything(a), everything(b)
    assert a.step == b.step and list(ours) == list(theirs)
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not wrong, f"step {a.step}: {wrong}"


@pytest.mark.parametrize("resampler", RESAMPLERS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_kalman(resampler: Resampler, dtype: torch.dtype) -> None:
    # 256 chains of 500: Student's test at 1e-6 for the unbiased evidence of each step and for the filtering means,
    # whose bias is of order 1 / n.
    model = Tracked(2, 8, CUDA, dtype)
    exact, _, log_z = model.model.kalman
    result = ParticleFilter(resampler, ess_threshold=0.7).run(
        model, num_particles=500, num_chains=256, seed=1, records=Records(summaries={"means": means})
    )
    assert result.log_z.device.type == "cuda" and result.log_z.dtype == torch.float64
    assert 0 < result.records.resampled.double().mean() < 1
    ratio = torch.exp(result.records.log_z.cpu() - log_z[:, None])
    assert ratio.std() < 0.6, "too noisy to tell anything"
    assert_mean(ratio.T, torch.ones(9, dtype=torch.float64))
    assert_mean(result.records.summaries["means"].transpose(0, 1), exact, bias=0.004)


def test_same_law_as_on_the_cpu() -> None:
    # Welch's test of 4096 chains of 4 particles on either side, at 1e-6 for each of the five statistics: with so few
    # particles the law of log_z is far from its limit, and any difference in the resampling moves it.
    found = []
    for device in (CUDA, torch.device("cpu")):
        result = ParticleFilter(ess_threshold=0.6).run(Tracked(2, 6, device), num_particles=4, num_chains=4096, seed=2)
        found.append([
            result.log_z.cpu(), result.log_z.square().cpu(), result.records.resampled.double().sum(0).cpu(),
            result.records.ess.mean(0).cpu(), means_of(result.w, result.particles["x"])[:, 0].cpu(),
        ])  # fmt: skip
    for here, there in zip(*found, strict=True):
        assert stats.ttest_ind(here.numpy(), there.numpy(), equal_var=False).pvalue > 1e-6


def means_of(w: Tensor, x: Tensor) -> Tensor:
    return (w[..., None] * x).sum(1)


@pytest.mark.parametrize("n", [2, 1000, 1_000_000])
def test_integer_resampling_is_the_same_on_both_devices(n: int) -> None:
    # From the same integer weights and the same place, the counts are the same integers.
    generator = torch.Generator().manual_seed(n)
    w = torch.rand((2, n), dtype=torch.float64, generator=generator) ** 20
    c = cumulative(w)
    r = (torch.rand((2, 1), dtype=torch.float64, generator=generator) * c[:, -1:]).long()
    assert torch.equal(comb_counts(c.cuda(), r.cuda()).cpu(), comb_counts(c, r))


@pytest.mark.parametrize("resampler", RESAMPLERS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("n", [3, 1000, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampling_is_safe_at_any_size(resampler: Resampler, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(CUDA).manual_seed(n)
    w = torch.rand((3, n), dtype=dtype, device=CUDA, generator=generator)
    w[0, ::2] = 0
    w[1] = 1
    w[2] = torch.where(torch.arange(n, device=CUDA) == 1, 1.0, 1e-30)
    ancestors = resampler(w, generator)
    assert int(ancestors.min()) >= 0 and int(ancestors.max()) < n
    assert bool((w.gather(-1, ancestors) > 0).all()), "picked a particle without weight"
    assert bool((ancestors[2] == 1).all())
    if isinstance(resampler, Systematic | SSP | Killing | Residual):
        assert torch.equal(ancestors[1].sort().values, torch.arange(n, device=CUDA))


@pytest.mark.parametrize("resampler", RESAMPLERS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_nothing_in_a_step_waits_for_the_device(resampler: Resampler, threshold: float) -> None:
    model = Tracked(2, 6, CUDA)
    filter = ParticleFilter(resampler, ess_threshold=threshold)
    records = Records(log_weights=True, summaries={"means": means})
    states = filter.iterate(model, num_particles=64, num_chains=3, records=records)
    next(states), next(states)
    with no_waiting():
        last = list(states)[-1]
    assert last.step == 6 and bool(torch.isfinite(last.log_z).all())


def test_waiting_for_the_device_is_noticed() -> None:
    @dataclass(frozen=True)
    class Reading(Tracked):
        def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
            move = super().step(i, particles, generator)
            return replace(move, log_g=move.log_g * float(move.log_g.max()))

    states = ParticleFilter().iterate(Reading(1, 3, CUDA), num_particles=8)
    next(states)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        next(states)


def test_going_on_from_a_state_equals_never_stopping() -> None:
    model = Tracked(2, 6, CUDA)
    straight = list(ParticleFilter().iterate(model, num_particles=50, num_chains=3, seed=4))
    start = pickle.loads(pickle.dumps(straight[2]))
    for a, b in zip(
        ParticleFilter().iterate(model, num_particles=50, num_chains=3, seed=9, start=start), straight[3:], strict=True
    ):
        assert_same(a, b)


def test_conditional_smc_leaves_the_posterior_invariant() -> None:
    # From an exact draw of the posterior path, one update leaves an exact draw: means and variances of 4096 chains
    # against the dense Gaussian, Student's test at 1e-6.
    model = Tracked(1, 3, CUDA)
    mean, covariance = model.model.joint
    generator = torch.Generator(CUDA).manual_seed(3)
    z = torch.randn((4096, 4), dtype=torch.float64, device=CUDA, generator=generator)
    x = mean.cuda() + z @ torch.linalg.cholesky(covariance).cuda().T
    path = tuple({"x": x[:, None, i : i + 1]} for i in range(4))
    path = ConditionalSMC(past=Past.ANCESTOR_SAMPLED).update(model, path, 3, generator)
    after = torch.cat([step["x"][:, 0] for step in path], -1)
    assert not torch.equal(after, x)
    assert_mean(after, mean)
    assert_mean((after - mean.cuda()).square(), covariance.diagonal())


RECORDS = Records(summaries={"means": means})
NUMBERS = {"num_particles": 33, "num_chains": 3, "records": RECORDS}


@pytest.mark.parametrize("resampler", RESAMPLERS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_one_graph_for_all_steps_gives_the_same_numbers(resampler: Resampler, threshold: float) -> None:
    model, filter = Tracked(2, 7, CUDA), ParticleFilter(resampler, ess_threshold=threshold)
    capture = Capture(homogeneous=True)
    for seed in (1, 2):
        eager = filter.iterate(model, seed=seed, **NUMBERS)
        captured = filter.iterate(model, seed=seed, capture=capture, **NUMBERS)
        for a, b in zip(list(captured), list(eager), strict=True):
            assert_same(a, b)
    assert capture.num_graphs == 1


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_a_graph_for_each_step_gives_the_same_numbers(threshold: float) -> None:
    model, filter = Indexed(Tracked(2, 7, CUDA)), ParticleFilter(ess_threshold=threshold)
    capture = Capture()
    for run, seed in enumerate((1, 2, 3)):
        eager = filter.iterate(model, seed=seed, **NUMBERS)
        captured = filter.iterate(model, seed=seed, capture=capture, **NUMBERS)
        for a, b in zip(list(captured), list(eager), strict=True):
            assert_same(a, b)
        assert capture.num_graphs == (7 if run else 0)


def test_captured_runs_take_turns_and_are_taken_up() -> None:
    model, filter, capture = Tracked(2, 7, CUDA), ParticleFilter(), Capture(homogeneous=True)
    first, second = (list(filter.iterate(model, seed=seed, **NUMBERS)) for seed in (1, 2))
    turns = [filter.iterate(model, seed=seed, capture=capture, **NUMBERS) for seed in (1, 2)]
    for a, b in zip(first, second, strict=True):
        assert_same(next(turns[0]), a)
        assert_same(next(turns[1]), b)
    for a, b in zip(filter.iterate(model, start=first[2], capture=capture, **NUMBERS), first[3:], strict=True):
        assert_same(a, b)
    larger = filter.iterate(model, num_particles=70, capture=capture)
    for a, b in zip(larger, filter.iterate(model, num_particles=70), strict=True):
        assert_same(a, b)


def test_replaying_does_not_wait_for_the_device() -> None:
    model, filter, capture = Tracked(2, 7, CUDA), ParticleFilter(), Capture(homogeneous=True)
    filter.run(model, capture=capture, **NUMBERS)
    states = filter.iterate(model, capture=capture, **NUMBERS)
    next(states)
    with no_waiting():
        list(states)


def test_graphs_share_their_memory() -> None:
    # 30 graphs, each with a working memory of several states: together they may hold no more than a few.
    model, filter, capture = Indexed(Tracked(16, 30, CUDA)), ParticleFilter(), Capture()
    n = 50_000
    one_state = 3 * n * 16 * 8
    filter.run(model, num_particles=n, capture=capture, records=Records(ancestors=False))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    filter.run(model, num_particles=n, capture=capture, records=Records(ancestors=False))
    torch.cuda.empty_cache()
    assert capture.num_graphs == 30
    assert torch.cuda.memory_reserved() - before < 12 * one_state


def test_a_capture_is_of_one_model_and_filter_on_a_cuda_device() -> None:
    model, capture = Tracked(1, 3, CUDA), Capture()
    ParticleFilter().run(model, num_particles=4, capture=capture)
    for other, filter in ((Tracked(1, 3, CUDA), ParticleFilter()), (model, ParticleFilter(ess_threshold=1.0))):
        with pytest.raises(ValueError, match="Capture of its own"):
            filter.run(other, num_particles=4, capture=capture)


def child(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own, whose CUDA context may break."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


READING = """
import torch
from dataclasses import replace
from smcdiff.smc import Capture, CaptureError, ParticleFilter
from tests.smc.test_gpu import CUDA, Tracked

class Reading(Tracked):
    def step(self, i, particles, generator):
        move = super().step(i, particles, generator)
        return replace(move, log_g=move.log_g + float(move.log_g.max() * 0))

try:
    ParticleFilter().run(Reading(1, 4, CUDA), num_particles=8, capture=Capture(homogeneous=True))
except CaptureError as error:
    print(error)
"""


def test_a_step_that_waits_cannot_be_captured() -> None:
    said = child(READING)
    assert said.startswith("step 2 of 4 cannot be captured as a CUDA graph") and "Run without a capture" in said


RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from smcdiff.smc import Checkpoint, ParticleFilter
from smcdiff.smc.distributed import ChainsOverRanks, ParticlesOverRanks
from tests.smc.test_gpu import CUDA, Tracked

folder = Path(sys.argv[1])
dist.init_process_group("nccl", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
model = Tracked(2, 6, CUDA)
numbers = {"num_particles": 200, "num_chains": 128, "seed": 5}
sharded = ParticlesOverRanks(ParticleFilter(ess_threshold=0.7))
chains = ChainsOverRanks(ParticleFilter(ess_threshold=0.7))
kept = Checkpoint(folder / "kept.pt", every_steps=2)
particles = sharded.run(model, **numbers, checkpoint=kept)
again = sharded.run(model, **numbers, checkpoint=kept)
apart = chains.run(model, **numbers)
torch.save({"particles": particles.log_z.cpu(), "again": again.log_z.cpu(), "chains": apart.log_z.cpu(),
            "moved": int(particles.moved.sum()), "w": particles.w.sum(-1).cpu()}, folder / "found.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="needs NCCL, which this torch was built without")
def test_one_rank_over_nccl(tmp_path: Path) -> None:
    # One GPU has one rank; the ranks' talk goes over NCCL all the same. Student's test at 1e-6 for either mode.
    child(RANK, str(tmp_path))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    log_z = Tracked(2, 6, CUDA).model.kalman[2][-1]
    for mode in ("particles", "chains"):
        ratio = torch.exp(found[mode] - log_z)
        assert ratio.std() < 0.6
        assert_mean(ratio[:, None], torch.ones(1, dtype=torch.float64))
    assert torch.equal(found["again"], found["particles"]) and found["moved"] == 0
    torch.testing.assert_close(found["w"], torch.ones(128, dtype=torch.float64), rtol=1e-12, atol=0)
