"""Guided runs on a CUDA device: exact evidence, no waiting in a step, CUDA graphs, compiled and bfloat16 networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import smcdiff as sd
from smcdiff.guidance.batching import pick_max_batch
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import Capture, ParticleFilter
from tests.guidance.exact import NormalLaw, chain_law, check_evidence, weighted_moments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and none is visible"),
]

CUDA = torch.device("cuda")
F64 = torch.float64

METHODS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "bootstrap": (lambda model: sd.Bootstrap(model), 800),
    "point": (lambda model: sd.TDS(model), 1000),
    "limited": (lambda model: sd.TDS(model, max_shift=1.0), 1000),
    "widened": (lambda model: sd.TDS(model, sd.WidenedTwist(0.5)), 500),
    "Tweedie": (lambda model: sd.TDS(model, sd.TweedieTwist()), 100),
}


def gaussian_problem(d: int = 3, num_steps: int = 30) -> tuple[sd.DiffusionPrior, NormalLaw, Tensor, Tensor]:
    """A prior on the device, the law of its chain, an operator and a measurement on the CPU."""
    generator = torch.Generator().manual_seed(d)
    mean = torch.randn(d, generator=generator, dtype=F64)
    root = torch.randn(d, d, generator=generator, dtype=F64) / d**0.5
    covariance = root @ root.mT + 0.3 * torch.eye(d, dtype=F64)
    A = torch.randn(max(1, d - 1), d, generator=generator, dtype=F64)
    y = A @ mean + torch.randn(len(A), generator=generator, dtype=F64)
    denoiser = sd.GaussianDenoiser(mean.to(CUDA), covariance.to(CUDA))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, variance="optimal", grid=sd.KarrasGrid())
    return prior, chain_law(prior, mean, covariance), A, y


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_linear_gaussian(method: str) -> None:
    # 48 chains: the failure probabilities of check_evidence and of five standard errors, below 1e-5 each.
    prior, law, A, y = gaussian_problem()
    posterior, log_z = law.given(A, y, 1.0)
    operator = sd.Matrix(A.to(CUDA))

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), 1.0), obs=y)

    kernel, n = METHODS[method]
    smc = sd.SMC(kernel(model), num_particles=n, num_chains=48, seed=1, progress=False).run(y.to(CUDA))
    assert smc.log_evidence.device.type == "cuda"
    check_evidence(smc, log_z, worst=0.1)
    mean, error, _ = weighted_moments(smc, "x")
    deviation = posterior.covariance.diagonal().sqrt()
    assert bool(((mean.cpu() - posterior.mean).abs() < 5 * error.cpu() + 2e-3 * deviation).all())


def test_what_is_read_of_a_run_does_not_depend_on_the_device() -> None:
    prior, _, A, y = gaussian_problem()
    operator = sd.Matrix(A.to(CUDA))

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), 1.0), obs=y)

    smc = sd.SMC(sd.TDS(model), num_particles=200, num_chains=2, seed=1, progress=False).run(y.to(CUDA))
    draws = smc.get_samples()["x"]
    w, x = smc.weighted_samples().log_w.exp(), smc.weighted_samples().values["x"]
    assert draws.device.type == "cuda" and draws.shape == (400, 3)
    # systematic draws: their mean is off the weighted one by less than one draw's share of the range
    weighted = (w[..., None] * x).sum((0, 1))
    assert bool(((draws.mean(0) - weighted).abs() <= (x.amax((0, 1)) - x.amin((0, 1))) / 100).all())
    assert "x" in smc.summary()
    assert smc.diagnostics() is not None


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_step_waits_for_the_device(method: str) -> None:
    """With latents of all kinds beside the diffusion prior, each of which enters by another map."""
    prior, _, A, y = gaussian_problem(num_steps=6)
    operator = sd.Matrix(A.to(CUDA))
    zero, one = torch.zeros((), dtype=F64, device=CUDA), torch.ones((), dtype=F64, device=CUDA)

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        sigma = pyro.sample("sigma", dist.LogNormal(zero, 0.1 * one))
        gain = pyro.sample("gain", dist.Uniform(0.9 * one, 1.1 * one))
        shift = pyro.sample("shift", dist.Normal(zero, 0.1 * one))
        return pyro.sample("y", dist.Normal(gain * operator(x) + shift, sigma).to_event(1), obs=y)

    kernel = METHODS[method][0](model)
    twisted = TwistedModel(Program(model, (y.to(CUDA),)), kernel)
    states = ParticleFilter(ess_threshold=0.8).iterate(twisted, num_particles=20, num_chains=2, seed=1)
    next(states), next(states)
    with no_waiting():
        last = list(states)[-1]
    assert last.step == 6 and bool(torch.isfinite(last.log_z).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_batch", [None, 7])
def test_captured_steps_give_the_same_numbers(method: str, max_batch: int | None) -> None:
    prior, _, A, y = gaussian_problem(num_steps=5)
    operator = sd.Matrix(A.to(CUDA))

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), 1.0), obs=y)

    twisted = TwistedModel(Program(model, (y.to(CUDA),)), METHODS[method][0](model), max_batch)
    filter, capture = ParticleFilter(ess_threshold=0.8), Capture()
    for seed in (1, 2, 3):
        eager = filter.run(twisted, num_particles=10, num_chains=2, seed=seed)
        captured = filter.run(twisted, num_particles=10, num_chains=2, seed=seed, capture=capture)
        torch.testing.assert_close(captured.log_z, eager.log_z, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(captured.particles["x"], eager.particles["x"], rtol=1e-9, atol=1e-9)
        assert torch.equal(captured.records.ancestors, eager.records.ancestors)
    assert capture.num_graphs == 5


class Small(nn.Module):
    """A convolutional network whose time is a tensor or a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor | float) -> Tensor:
        if not isinstance(time, Tensor):
            time = torch.full((), float(time), device=x.device)
        level = (time / 1000).to(x.dtype).expand(len(x), 1, *x.shape[2:])
        return x + 0.1 * self.second(torch.nn.functional.silu(self.first(torch.cat([x, level], 1))))


def network_prior(network: Callable[..., Tensor], autocast: torch.dtype | None = None) -> sd.DiffusionPrior:
    denoiser = sd.NetworkDenoiser(
        network, (1, 16, 16), dtype=torch.float32, device=CUDA, autocast=autocast, time=lambda level: level.t - 1
    )
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), 8)


def network_run(prior: sd.DiffusionPrior, **numbers: int) -> sd.SMC:
    mask = torch.zeros(1, 16, 16, device=CUDA)
    mask[:, ::4, ::4] = 1
    y = torch.linspace(-1, 1, 256, device=CUDA).reshape(1, 16, 16) * mask

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", sd.GaussianMeasurement(sd.Mask(mask), pyro.sample("x", prior), 1.0), obs=y)

    return sd.SMC(sd.TDS(model, sd.WidenedTwist()), **numbers, seed=3, progress=False).run(y)


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().to(CUDA).requires_grad_(False)


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own parts
def test_a_compiled_network_gives_the_same_run() -> None:
    network = small()
    compiled = torch.compile(copy.deepcopy(network))

    def with_tensor_time(x: Tensor, time: float) -> Tensor:  # a number would be compiled anew at every step
        return compiled(x, torch.full((), time, device=x.device))

    torch._dynamo.utils.counters.clear()
    numbers = {"num_particles": 16, "num_chains": 2}
    plain, fast = (
        network_run(network_prior(network), **numbers),
        network_run(network_prior(with_tensor_time), **numbers),
    )
    torch.testing.assert_close(fast.log_evidence_per_chain, plain.log_evidence_per_chain, rtol=1e-3, atol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_bfloat16_network_has_float64_weights() -> None:
    # The rounding moves the log-evidence by less than 0.05 here; beyond that the two runs agree within five standard
    # errors over their 64 chains each (below 1e-5).
    network = small()
    prior, exact = network_prior(network, torch.bfloat16), network_prior(network)
    seen = []
    network.second.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    smc = network_run(prior, num_particles=64, num_chains=64)
    assert set(seen) == {torch.bfloat16}
    w = smc.weighted_samples().log_w
    assert w.dtype == F64 and smc.log_evidence_per_chain.dtype == F64
    assert float(w.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert smc.get_samples()["x"].dtype == torch.float32
    x = torch.randn(4, 1, 16, 16, device=CUDA)
    rounded, full = (p.chain.estimate(4, x).mean for p in (prior, exact))
    assert 1e-5 < float((rounded - full).abs().mean()) < 1e-1
    other = network_run(exact, num_particles=64, num_chains=64)
    here, there = smc.log_evidence_per_chain, other.log_evidence_per_chain
    error = math.hypot(float(here.std()), float(there.std())) / 8
    assert abs(float(here.mean() - there.mean())) < 5 * error + 0.05


def test_the_batch_that_is_picked_fits() -> None:
    prior = network_prior(small())
    y = torch.zeros(1, 16, 16, device=CUDA)

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 1.0), obs=y)

    program, kernel = Program(model, (y,)), sd.TDS(model)
    size = pick_max_batch(program, kernel)
    few = min(size, 200_000)
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    TwistedModel(program, kernel).initial(1, few, torch.Generator(CUDA).manual_seed(0))
    used = torch.cuda.max_memory_allocated() - before
    assert used * size / few < free, f"{used / few:.0f} bytes a particle, {size} particles, {free} bytes free"


def test_the_cut_into_batches_does_not_change_the_result() -> None:
    prior, _, A, y = gaussian_problem(num_steps=6)
    operator = sd.Matrix(A.to(CUDA))

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), 1.0), obs=y)

    found = [
        sd.SMC(sd.TDS(model), 50, 2, seed=1, progress=False, max_batch=size).run(y.to(CUDA)).log_evidence
        for size in (None, 13)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
