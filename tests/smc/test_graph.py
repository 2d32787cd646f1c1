"""What a capture does around its CUDA graphs, on the CPU with a stand-in; the graphs themselves are in test_gpu.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from smcdiff.smc import Capture, FeynmanKac, FilterState, Move, ParticleFilter, Particles, Records
from tests.smc.models import Bootstrap, LinearGaussian


@dataclass(frozen=True)
class Changing:
    """Steps that differ in what particles carry and in their faults; two entries change places at each step."""

    inner: Bootstrap

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        move = self.inner.initial(num_chains, num_particles, generator)
        x = move.particles["x"]
        return replace(move, particles={"x": x, "a": x + 1, "b": x + 2})

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        move = self.inner.step(i, particles, generator)
        x = move.particles["x"]
        carried = {"x": x, "a": particles["b"], "b": particles["a"]} if i < self.num_steps else {"x": x}
        odd = {"the index is odd": torch.zeros(x.shape[0], dtype=torch.bool)} if i % 2 else {}
        return Move(carried, move.log_g, odd)


class Graph:
    """In place of a CUDA graph: what is captured is computed at once, so that its first replay has nothing to do."""

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generator = generator

    def replay(self) -> None:
        assert not hasattr(self, "replayed"), "the stand-in can be replayed once"
        self.replayed = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def graph(graph: Graph, pool: object) -> Iterator[None]:
        yield

    def bind(self: Capture, feynman_kac: FeynmanKac, settings: object) -> None:
        if self._generator is None:
            self._generator, self._at = torch.Generator(), torch.zeros((), dtype=torch.int64)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Capture, "bind", bind)


def everything(state: FilterState) -> dict[str, torch.Tensor]:
    found = {name: getattr(state, name) for name in ("log_w", "w", "ess", "log_z", "log_z_settled", "generator_state")}
    found |= {f"particle {name}": value for name, value in state.particles.items()}
    found |= {f"fault {name}": value for name, value in state.faults.items()}
    for i, record in enumerate(state.history):
        found |= {f"log_z {i}": record.log_z, f"resampled {i}": record.resampled, f"mean {i}": record.summaries["mean"]}
        found |= {} if record.ancestors is None else {f"ancestors {i}": record.ancestors}
    return found


def assert_same(ours: list[FilterState], theirs: list[FilterState]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        here, there = everything(a), everything(b)
        assert a.step == b.step and here.keys() == there.keys()
        assert [name for name in here if not torch.equal(here[name], there[name])] == []


RECORDS = Records(summaries={"mean": lambda state: (state.w[..., None] * state.particles["x"]).sum(1)})
NUMBERS = {"num_particles": 9, "num_chains": 3, "records": RECORDS}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_captured_steps_give_the_same_numbers(threshold: float) -> None:
    model, filter = Changing(Bootstrap(LinearGaussian.example(2, num_steps=6))), ParticleFilter(ess_threshold=threshold)
    capture, runs = Capture(), []
    for seed in (1, 2):
        runs.append(list(filter.iterate(model, seed=seed, capture=capture, **NUMBERS)))
        assert_same(runs[-1], list(filter.iterate(model, seed=seed, **NUMBERS)))
        assert capture.num_graphs == (0, 6)[seed - 1]
    # the states own their numbers: what came later has not changed them
    assert_same(runs[0], list(filter.iterate(model, seed=1, **NUMBERS)))


@pytest.mark.usefixtures("stand_in")
def test_captured_runs_take_turns_and_are_taken_up() -> None:
    model, filter, capture = Changing(Bootstrap(LinearGaussian.example(2, num_steps=6))), ParticleFilter(), Capture()
    first, second = (list(filter.iterate(model, seed=seed, **NUMBERS)) for seed in (1, 2))
    turns = [filter.iterate(model, seed=seed, capture=capture, **NUMBERS) for seed in (1, 2)]
    for a, b in zip(first, second, strict=True):
        assert_same([next(turns[0]), next(turns[1])], [a, b])
    other = Capture()
    list(filter.iterate(model, start=second[1], capture=other, **NUMBERS))
    assert_same(list(filter.iterate(model, start=first[2], capture=other, **NUMBERS)), first[3:])
    assert other.num_graphs == 4
    # another size gets graphs of its own
    list(filter.iterate(model, **{**NUMBERS, "num_particles": 5}, capture=other))
    assert_same(
        list(filter.iterate(model, **{**NUMBERS, "num_particles": 5}, seed=3, capture=other)),
        list(filter.iterate(model, **{**NUMBERS, "num_particles": 5}, seed=3)),
    )


def test_a_capture_needs_a_cuda_device() -> None:
    model = Bootstrap(LinearGaussian.example(1, num_steps=2))
    with pytest.raises(ValueError, match="got a capture for a model on cpu; CUDA graphs need a CUDA device"):
        ParticleFilter().run(model, num_particles=2, capture=Capture())
