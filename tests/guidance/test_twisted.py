"""One network evaluation per particle and step, chunks, faults, and no waiting for the device."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import smcdiff as sd
from smcdiff.guidance.batching import bytes_per_particle, pick_max_batch
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


def problem(network: torch.nn.Module, method=sd.TDS):
    prior = sd.DiffusionPrior(sd.NetworkDenoiser(network, SHAPE), sd.VPSchedule(), STEPS)

    def model(y=None):
        x = pyro.sample("x", prior)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.5))
        return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, sigma), obs=y)

    return method(model)


Y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


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
    assert pick_max_batch(Program(kernel.model, (Y,)), kernel) > 1000


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
    assert low.dtype == torch.float32
    difference = float((low - full).abs().max().detach())
    assert 0 < difference < 0.05


class PlainNetwork(torch.nn.Module):
    """eps_hat = tanh(x), with a parameter for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
        return self.gain * torch.tanh(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_compiled_network_gives_the_same_run() -> None:
    networks = PlainNetwork(), torch.compile(PlainNetwork(), backend="eager")
    kernels = [problem(network, lambda model: sd.TDS(model, max_shift=0.5)) for network in networks]
    runs = [sd.SMC(kernel, num_particles=3, seed=0, progress=False).run(Y) for kernel in kernels]
    torch.testing.assert_close(runs[0].log_evidence, runs[1].log_evidence, rtol=1e-10, atol=1e-10)
