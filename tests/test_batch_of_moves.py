"""Each way to run a program picks the batch of its network from the free memory, once, and gives the same draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.denoiser import from_clean
from smcdiff.guidance import batching
from smcdiff.guidance.batching import bytes_per_particle, max_batch_of_run
from smcdiff.guidance.program import Program

SHAPE = (1, 4, 4)
CHAINS, PARTICLES, STEPS = 2, 5, 6
Y = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(SHAPE)


class Watched(torch.nn.Module):
    """x0_hat = tanh(x) / 2, which notes the size of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.sizes: list[int] = []

    def forward(self, x: Tensor, index: float) -> Tensor:
        self.sizes.append(len(x))
        return self.gain * torch.tanh(x)


def problem(network: torch.nn.Module) -> sd.TDS:
    prior = sd.DiffusionPrior(sd.NetworkDenoiser(network, SHAPE, from_clean), sd.VPSchedule(), STEPS)

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.5))
        return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, sigma), obs=y)

    return sd.TDS(model)


def smc(kernel: sd.TDS, **options: Any) -> sd.SMC:
    return sd.SMC(kernel, PARTICLES, CHAINS, seed=3, progress=False, **options)


def gibbs(kernel: sd.TDS, **options: Any) -> sd.ParticleGibbs:
    return sd.ParticleGibbs(kernel, PARTICLES, 3, CHAINS, seed=3, progress=False, **options)


def marginal(kernel: sd.TDS, **options: Any) -> sd.MarginalMH:
    return sd.MarginalMH(kernel, ["sigma"], PARTICLES, 3, CHAINS, seed=3, progress=False, **options)


class Memory:
    """Free memory for ``particles`` of the problem, by the rule that a batch and its copy fill half of it."""

    def __init__(self, particles: float) -> None:
        kernel = problem(Watched())
        self.free = int(4 * particles * bytes_per_particle(Program(kernel.model, (Y,)), kernel))
        self.readings = 0

    def __call__(self, device: torch.device) -> int:
        self.readings += 1
        return self.free


@pytest.mark.parametrize("engine", [smc, gibbs, marginal])
def test_the_batch_is_bounded_by_the_free_memory(engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(memory: Memory, **options: Any) -> tuple[dict[str, Tensor], list[int]]:
        monkeypatch.setattr(batching, "free_bytes", memory)
        network = Watched()
        return engine(problem(network), **options).run(Y).get_samples(), network.sizes

    plenty, little, none = Memory(10_000), Memory(3.5), Memory(0.01)
    whole, sizes = run(plenty)
    assert max(sizes) == CHAINS * PARTICLES
    for memory, expected in ((little, 3), (none, 1)):
        cut, sizes = run(memory)
        assert max(sizes) == expected
        assert memory.readings == 1  # one choice for the whole run
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=1e-9)
    asked, sizes = run(little, max_batch=4)
    assert max(sizes) == 4 and little.readings == 1  # what the user asks for stands
    torch.testing.assert_close(asked, whole, rtol=1e-9, atol=1e-9)


def test_processes_on_cpus_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "free_bytes", Memory(12.5))
    kernel = problem(Watched())
    program = Program(kernel.model, (Y,))
    assert [max_batch_of_run(None, program, kernel, processes) for processes in (1, 2, 4, 100)] == [12, 6, 3, 1]
    assert max_batch_of_run(7, program, kernel, 4) == 7
