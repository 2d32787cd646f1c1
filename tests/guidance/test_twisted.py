"""One network evaluation per particle and step, chunks, faults, and no waiting for the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import smcdiff as sd
from smcdiff.diffusion.denoiser import from_clean
from smcdiff.guidance import batching
from smcdiff.guidance.batching import bytes_per_particle, free_bytes, pick_max_batch
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel

SHAPE = (1, 4, 4)
STEPS = 8


class CountingNetwork(torch.nn.Module):
    """A small convolutional eps-predictor that counts the pictures it sees forward and backward."""

    def __init__(self, nan_at: float | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(0.2 * torch.randn(1, 1, 3, 3, generator=generator, dtype=torch.float64))
        self.forward_count, self.backward_count, self.nan_at = 0, 0, nan_at

    def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
        self.forward_count += len(x)
        out = x / (1 + x.square()) + torch.nn.functional.conv2d(x, self.weight, padding=1) * (1 + index / 1000)
        if out.requires_grad:
            out.register_hook(self._count)
        if self.nan_at is not None and abs(index + 1 - self.nan_at) < 0.5:
            out = out * torch.nan
        return out

    def _count(self, gradient: torch.Tensor) -> None:
        self.backward_count += len(gradient)


def problem(network: Callable[..., torch.Tensor], method=sd.TDS):
    denoiser = sd.NetworkDenoiser(network, SHAPE, dtype=torch.float64, device=torch.device("cpu"))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), STEPS)

    def model(y=None):
        x = pyro.sample("x", prior)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.5))
        return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, sigma), obs=y)

    return method(model)


Y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_model_is_freed_after_its_run() -> None:
    """Its last graph, which it keeps for the allocator's sake, must not keep the model in turn."""
    kernel = problem(CountingNetwork())
    model = TwistedModel(Program(kernel.model, (Y,)), kernel)
    sd.ParticleFilter().run(model, num_particles=4, seed=0)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("method", [sd.TDS, sd.DPS])
def test_one_evaluation_per_particle_and_step(method) -> None:
    network = CountingNetwork()
    b, n = 2, 5
    smc = sd.SMC(problem(network, method), num_particles=n, num_chains=b, seed=0, progress=False).run(Y)
    probe = 2  # before the run the program is looked at once, and one particle's memory is measured
    assert network.forward_count == b * n * STEPS + probe
    assert network.backward_count == b * n * STEPS
    assert smc.network_evaluations == (b * n * STEPS, b * n * STEPS)


def test_the_bootstrap_needs_no_gradient() -> None:
    network = CountingNetwork()
    smc = sd.SMC(problem(network, sd.Bootstrap), num_particles=3, seed=0, progress=False).run(Y)
    assert network.backward_count == 0 and smc.network_evaluations == (3 * STEPS, 0)


@pytest.mark.parametrize("max_batch", [1, 3, 7])
def test_chunks_do_not_change_the_result(max_batch: int) -> None:
    def run(size: int | None):
        return sd.SMC(
            problem(CountingNetwork()), num_particles=5, num_chains=2, seed=3, max_batch=size, progress=False
        ).run(Y)

    whole, cut = run(None), run(max_batch)
    torch.testing.assert_close(cut.log_evidence_per_chain, whole.log_evidence_per_chain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        cut.weighted_samples().values["x"], whole.weighted_samples().values["x"], rtol=1e-9, atol=1e-9
    )


def test_seeds() -> None:
    def run(seed: int | None):
        smc = sd.SMC(problem(CountingNetwork()), num_particles=4, seed=seed, progress=False)
        return smc.run(Y).weighted_samples().values["x"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    pyro.set_rng_seed(5)
    first = run(None)
    pyro.set_rng_seed(5)
    assert torch.equal(first, run(None))


def test_a_network_that_returns_nan_is_named_with_its_step() -> None:
    schedule_time = 1 + 999 * 4 / 7  # level k = 5 of 8 on the linspace grid
    kernel = problem(CountingNetwork(nan_at=round(schedule_time)))
    with pytest.raises(sd.FilterError, match=r"step k = 5 of K = 8, noise time t = 572.*denoiser of 'x' returned NaN"):
        sd.SMC(kernel, num_particles=3, seed=0, progress=False).run(Y)


def test_weights_that_are_all_zero_are_named() -> None:
    prior = sd.DiffusionPrior(
        sd.GaussianDenoiser(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)), sd.VPSchedule(), 5
    )

    def model(y=None):
        x = pyro.sample("x", prior)
        pyro.factor("impossible", torch.log((x[0] > 100).double()))
        return pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(sd.FilterError, match=r"all weights are zero"):
        sd.SMC(sd.Bootstrap(model), num_particles=3, seed=0, progress=False).run(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("method", [sd.TDS, sd.DPS, lambda model: sd.TDS(model, sd.WidenedTwist(), max_shift=1.0)])
def test_a_step_never_waits_for_the_device(method) -> None:
    """Fake tensors hold no data and raise on every operation whose result the host would need."""
    kernel = problem(CountingNetwork(), method)
    feynman_kac = TwistedModel(Program(kernel.model, (Y,)), kernel)
    particles = feynman_kac.initial(2, 3, torch.Generator().manual_seed(0)).particles
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in particles.items()}
        for i in (1, STEPS):
            moved = feynman_kac.step(i, fake, torch.Generator())
            assert moved.log_g.shape == (2, 3)


def test_max_batch_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_batch"):
        sd.SMC(problem(CountingNetwork()), num_particles=3, max_batch=0, progress=False).run(Y)


def test_memory_of_a_particle_counts_what_the_graph_saves() -> None:
    """The network saves its input twice in float64 and little else; a network twice as deep saves about twice that."""
    kernel = problem(CountingNetwork())
    one = bytes_per_particle(Program(kernel.model, (Y,)), kernel)
    picture = 16 * 8
    assert 3 * picture < one < 30 * picture

    class Twice(CountingNetwork):
        def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
            return super().forward(super().forward(x, index), index)

    deeper = problem(Twice())
    assert one < bytes_per_particle(Program(deeper.model, (Y,)), deeper) < 3 * one


class Wide(torch.nn.Module):
    """An eps-predictor whose graph saves little else than ``width`` hidden pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gains = torch.nn.Parameter(torch.ones(width, 1, 1, dtype=torch.float64) / width)

    def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
        return torch.tanh(self.gains * x).mean(1, keepdim=True)


@pytest.mark.parametrize("free", [10**8, 10**10])
def test_the_picked_batch_follows_memory_and_network(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the memory, in inverse proportion to the hidden pictures, which fill half of it twice over."""
    page = 4096

    def picked(width: int, share: float) -> int:
        pages = {"SC_AVPHYS_PAGES": int(share * free) // page, "SC_PAGE_SIZE": page}
        monkeypatch.setattr(batching, "os", SimpleNamespace(sysconf=pages.__getitem__))
        assert free_bytes(torch.device("cpu")) == pages["SC_AVPHYS_PAGES"] * page
        kernel = problem(Wide(width))
        return pick_max_batch(Program(kernel.model, (Y,)), kernel)

    one = picked(400, 1)
    assert free / 4 / (400 * 16 * 8) / 1.1 < one < free / 4 / (400 * 16 * 8)
    assert picked(400, 2) == pytest.approx(2 * one, rel=0.01)
    assert picked(400, 0.1) == pytest.approx(one / 10, rel=0.03)
    assert picked(800, 1) == pytest.approx(one / 2, rel=0.03)
    assert picked(400, 1e-6) == 1  # one particle at least


def test_memory_that_a_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "os", SimpleNamespace())  # as on Windows, without sysconf
    assert free_bytes(torch.device("cpu")) == 2 * 2**30


def test_lower_precision_in_the_network_alone() -> None:
    """bfloat16 arithmetic moves x0_hat by its rounding only, and nothing else changes its dtype."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(16, 16, generator=generator) / 4)

        def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
            return x @ self.weight

    level = sd.VPSchedule().level(300.0)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    full = sd.NetworkDenoiser(Linear(), (16,))(x, level).mean
    low = sd.NetworkDenoiser(Linear(), (16,), autocast=torch.bfloat16)(x, level).mean
    clean = sd.NetworkDenoiser(Linear(), (16,), from_clean, autocast=torch.bfloat16)(x, level).mean
    assert low.dtype == clean.dtype == torch.float32
    difference = float((low - full).abs().max().detach())
    assert 0 < difference < 0.05


def test_a_run_in_bfloat16_has_float64_weights() -> None:
    """The rounding moves the log-evidence of 64 chains by 0.001 nats in the mean; their own spread is 0.14 nats."""
    operands: list[torch.dtype] = []

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(1, 1, 3, 3, generator=generator) / 5)

        def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
            out = torch.nn.functional.conv2d(x, self.weight, padding=1)
            operands.append(out.dtype)
            return torch.tanh(out)

    y = Y.float()

    def run(autocast: torch.dtype | None) -> sd.SMC:
        denoiser = sd.NetworkDenoiser(Small(), SHAPE, from_clean, autocast=autocast)
        prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), STEPS)

        def model(y: torch.Tensor | None = None) -> torch.Tensor:
            return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 1.0), obs=y)

        return sd.SMC(sd.TDS(model, sd.WidenedTwist()), num_particles=32, num_chains=64, seed=3, progress=False).run(y)

    low = run(torch.bfloat16)
    assert set(operands) == {torch.bfloat16}
    log_w, there = low.weighted_samples().log_w, low.log_evidence_per_chain
    assert low.log_evidence.dtype == torch.float64
    assert float(log_w.exp().sum()) == pytest.approx(1, abs=1e-12)
    for kept in (low.records.ess[1:], there, log_w):
        assert kept.dtype == torch.float64
        assert not torch.equal(kept, kept.float().double())  # nor was it in lower precision on its way
    first = TwistedModel(Program(low.kernel.model, (y,)), low.kernel).initial(1, 2, torch.Generator().manual_seed(0))
    assert first.log_g.dtype == torch.float64 and first.particles["x"].dtype == torch.float32
    assert low.get_samples()["x"].dtype == torch.float32
    operands.clear()
    here = run(None).log_evidence_per_chain
    assert set(operands) == {torch.float32}
    assert 0 < float((there - here).abs().mean()) < 0.02
    assert float(here.std()) > 0.1  # so that this says something


class PlainNetwork(torch.nn.Module):
    """eps_hat = tanh(x), with a parameter for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
        return self.gain * torch.tanh(x) * (1 + index / 1e4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_compiled_network_gives_the_same_run() -> None:
    """It is compiled anew for one particle, for more, with and without gradients and for a time that changes; not by
    later steps, nor by another run."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(PlainNetwork(), backend=backend)
    steps: list[tuple[int, int]] = []

    def noting(x: torch.Tensor, index: float) -> torch.Tensor:
        out = compiled(x, index)
        steps.append((len(x), len(graphs)))
        return out

    def run(network: Callable[..., torch.Tensor], seed: int = 0) -> torch.Tensor:
        kernel = problem(network, lambda model: sd.TDS(model, max_shift=0.5))
        return sd.SMC(kernel, num_particles=3, seed=seed, progress=False).run(Y).log_evidence

    torch.testing.assert_close(run(noting), run(PlainNetwork()), rtol=1e-10, atol=1e-10)
    counts = [count for size, count in steps if size == 3]
    assert len(counts) == STEPS
    assert counts[0] > 0, "nothing was compiled"
    assert counts[1:] == [counts[1]] * (STEPS - 1), "compiled anew at later steps"
    run(noting, seed=1)
    assert len(graphs) == counts[-1], "compiled anew by another run"
