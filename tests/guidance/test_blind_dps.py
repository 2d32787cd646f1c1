"""BlindDPS against a written-out loop, against quadrature of a scalar blind problem, and its regulariser's gradient."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import smcdiff as sd
from smcdiff.guidance.blind_dps import (
    BlindDPS,
    ConstantStep,
    KernelNorm,
    SignalStep,
    normalised_kernel,
)
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from tests.guidance.exact import chain_density, check_evidence

F64 = torch.float64
STEPS = 40


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


ROOTS = {"x": normal(16, 16, seed=0) / 4, "k": normal(9, 9, seed=1) / 6}
COVARIANCES = {"x": ROOTS["x"] @ ROOTS["x"].T + 0.3 * torch.eye(16, dtype=F64), "k": ROOTS["k"] @ ROOTS["k"].T}
MEANS = {"x": 0.5 * normal(1, 4, 4, seed=2), "k": 0.3 * normal(1, 3, 3, seed=3)}
PRIORS = {
    name: sd.DiffusionPrior(sd.GaussianDenoiser(MEANS[name], COVARIANCES[name]), sd.VPSchedule(), STEPS)
    for name in ("x", "k")
}
Y = normal(1, 4, 4, seed=4)


def blurred(x: Tensor, k: Tensor) -> Tensor:
    return conv2d(x[None], normalised_kernel(k)[None], padding=1)[0]


def model(y: Tensor | None = None) -> Tensor:
    x = pyro.sample("x", PRIORS["x"])
    k = pyro.sample("k", PRIORS["k"])
    return pyro.sample("y", sd.GaussianMeasurement(partial(blurred, k=k), x, 0.1), obs=y)


def published_loop(noise: dict[str, Tensor], zeta, weight: float) -> dict[str, Tensor]:
    """2211.10656, the joint update, in the betas of the sub-sampled schedule; noise: {site: (steps + 1, *event)}."""
    table = torch.as_tensor(sd.VPSchedule().alphas_cumprod)
    times = torch.linspace(1, 1000, STEPS, dtype=F64).round().long()
    alpha_bar = torch.cat((torch.ones(1, dtype=F64), table[times - 1]))
    state = {name: noise[name][0] for name in noise}
    for i in range(STEPS, 0, -1):
        bar, before = alpha_bar[i], alpha_bar[i - 1]
        beta = 1 - bar / before
        state = {name: value.clone().requires_grad_() for name, value in state.items()}
        x0_hat, drawn = {}, {}
        for name, value in state.items():
            cov, mean = COVARIANCES[name], MEANS[name].flatten()
            pull = cov @ torch.linalg.inv(bar * cov + (1 - bar) * torch.eye(len(cov), dtype=F64))
            x0_hat[name] = (mean + bar.sqrt() * pull @ (value.flatten() - bar.sqrt() * mean)).reshape(value.shape)
            drawn[name] = (
                (bar / before).sqrt() * (1 - before) / (1 - bar) * value
                + before.sqrt() * beta / (1 - bar) * x0_hat[name]
                + (beta * (1 - before) / (1 - bar)).sqrt() * noise[name][STEPS + 1 - i]
            )
        kernel = (x0_hat["k"] + 1) / 2
        kernel = kernel / kernel.sum()
        loss = torch.linalg.norm(Y - conv2d(x0_hat["x"][None], kernel[None], padding=1)[0])
        loss = loss + weight * kernel.abs().sum()
        gradients = torch.autograd.grad(loss, list(state.values()))
        state = {
            name: (drawn[name] - zeta(name, bar) * gradient).detach()
            for name, gradient in zip(state, gradients, strict=True)
        }
    return state


@pytest.mark.parametrize(
    ("kernel", "zeta", "weight"),
    [
        (
            BlindDPS(model, {"x": ConstantStep(0.3), "k": ConstantStep(0.05)}),
            lambda n, bar: {"x": 0.3, "k": 0.05}[n],
            0,
        ),
        (BlindDPS(model), lambda n, bar: 0.3, 0),
        (BlindDPS(model, SignalStep(0.2)), lambda n, bar: 0.2 * bar.sqrt(), 0),
        (BlindDPS(model, regulariser=KernelNorm("k", 0.7, 1)), lambda n, bar: 0.3, 0.7),
    ],
    ids=["two step sizes", "default", "growing", "with the l1 norm"],
)
def test_path_is_the_published_loop(kernel: BlindDPS, zeta, weight: float) -> None:
    b = 3
    feynman_kac = TwistedModel(Program(model, (Y,)), kernel)
    result = ParticleFilter(ess_threshold=0).run(feynman_kac, num_particles=1, num_chains=b, seed=7)
    generator = torch.Generator().manual_seed(7)
    noise: dict[str, list[Tensor]] = {"x": [], "k": []}
    for _ in range(STEPS + 1):
        for name in noise:
            noise[name].append(torch.randn(b, 1, *MEANS[name].shape, generator=generator, dtype=F64))
    for chain in range(b):
        expected = published_loop({name: torch.stack(n)[:, chain, 0] for name, n in noise.items()}, zeta, weight)
        for name in noise:
            torch.testing.assert_close(result.particles[name][chain, 0], expected[name], rtol=1e-8, atol=1e-8)


SCALAR = {
    "x": (torch.tensor([[-1.0], [1.5]], dtype=F64), torch.tensor([0.2, 0.4], dtype=F64)),
    "k": (torch.tensor([[0.6], [1.4]], dtype=F64), torch.tensor([0.04, 0.09], dtype=F64)),
}


@pytest.mark.parametrize("rule", [ConstantStep(0.004), SignalStep(0.004)], ids=str)
def test_many_particles_correct_it(rule) -> None:
    """y = k x + noise with a scalar picture and a scalar kernel: evidence and both means by quadrature of the chains.

    The means are within 5 standard errors over 24 chains: 2 P(t_23 > 5) = 5e-5 each, with a fixed seed.
    """
    priors = {
        name: sd.DiffusionPrior(
            sd.GaussianMixtureDenoiser(means, spread.reshape(2, 1, 1), torch.tensor([0.6, 0.4], dtype=F64)),
            sd.VPSchedule(),
            25,
            variance="optimal",
            grid=sd.KarrasGrid(),
        )
        for name, (means, spread) in SCALAR.items()
    }
    y, sigma = torch.tensor([1.2], dtype=F64), 1.2

    def scalar(y: Tensor | None = None) -> Tensor:
        x, k = (pyro.sample(name, priors[name]) for name in ("x", "k"))
        return pyro.sample("y", dist.Normal(k * x, sigma).to_event(1), obs=y)

    grids = {"x": torch.linspace(-6, 6, 801, dtype=F64), "k": torch.linspace(-3, 5, 801, dtype=F64)}
    densities = {name: chain_density(priors[name], grid) * (grid[1] - grid[0]) for name, grid in grids.items()}
    likelihood = dist.Normal(grids["x"][:, None] * grids["k"], sigma).log_prob(y).exp()
    joint = densities["x"][:, None] * densities["k"] * likelihood
    exact = {
        "x": float((joint.sum(1) * grids["x"]).sum() / joint.sum()),
        "k": float((joint.sum(0) * grids["k"]).sum() / joint.sum()),
    }
    smc = sd.SMC(BlindDPS(scalar, rule), 1000, num_chains=24, seed=0, progress=False).run(y)
    check_evidence(smc, float(joint.sum().log()))
    samples = smc.weighted_samples()
    w = samples.log_w.exp()
    for name, mean in exact.items():
        values = samples.values[name][..., 0]
        estimate = float((w * values).sum())
        error = float((w * (values - estimate)).sum(1).square().sum().sqrt())
        assert error < 0.03 and abs(estimate - mean) < 5 * error, (name, estimate, mean, error)


@pytest.mark.parametrize("order", [0, 1])
def test_the_published_regulariser_has_no_gradient(order) -> None:
    """Of a kernel on [-1, 1] the l1 norm after normalisation is 1 and the l0 norm a count; unnormalised, l1 has one."""
    k = (torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 - 1).requires_grad_()
    value = KernelNorm("k", 0.4, order)({"k": k})
    torch.testing.assert_close(value, torch.full((5,), 0.4 if order else 0.4 * 9, dtype=F64))
    (gradient,) = torch.autograd.grad(value.sum(), k, allow_unused=True, materialize_grads=True)
    assert float(gradient.abs().max()) < 1e-15
    raw = KernelNorm("k", 0.4, order, of=lambda k: k)({"k": k}).sum()
    (gradient,) = torch.autograd.grad(raw, k, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradient, 0.4 * k.detach().sign() if order else torch.zeros_like(k))


def test_the_normalised_kernel() -> None:
    k = torch.tensor([[[-1.0, 0.0], [1.0, 1.0]], [[0.2, 0.2], [0.2, 0.2]]], dtype=F64)
    expected = torch.tensor([[[0.0, 0.2], [0.4, 0.4]], [[0.25, 0.25], [0.25, 0.25]]], dtype=F64)
    torch.testing.assert_close(normalised_kernel(k), expected)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    kernel = BlindDPS(model, regulariser=KernelNorm("k", 1.0, 1, of=lambda k: k))
    feynman_kac = TwistedModel(Program(model, (Y,)), kernel)
    generator = torch.Generator().manual_seed(0)
    near = feynman_kac.initial(2, 3, generator).particles
    far = {name: torch.cat([value[:, :1], 3 * value[:, 1:]], 1) for name, value in near.items()}
    state = generator.get_state()
    one = feynman_kac.step(1, near, generator)
    generator.set_state(state)
    other = feynman_kac.step(1, far, generator)
    for name, value in one.particles.items():
        torch.testing.assert_close(other.particles[name][:, 0], value[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(one.particles["k"][:, 1], other.particles["k"][:, 1])


def test_one_particle_has_no_evidence_and_says_so() -> None:
    with pytest.warns(UserWarning, match="point mass"):
        smc = sd.SMC(BlindDPS(model), 1, num_chains=2, seed=0, progress=False).run(Y)
    assert bool(smc.log_evidence.isnan())
    assert smc.network_evaluations == (2 * 2 * STEPS, 2 * 2 * STEPS)  # two networks, two chains


def test_wrong_input_is_refused() -> None:
    for sizes in ({"x": ConstantStep(0.1)}, {"x": ConstantStep(0.1), "k": ConstantStep(0.1), "z": ConstantStep(0.1)}):
        with pytest.raises(
            ValueError, match=r"got step sizes for .*; expected one for each of the latents \['k', 'x'\]"
        ):
            sd.SMC(BlindDPS(model, sizes), 1, progress=False).run(Y)
    with pytest.raises(ValueError, match=r"regulariser on the site 'z'; expected one of the latents \['k', 'x'\]"):
        sd.SMC(BlindDPS(model, regulariser=KernelNorm("z")), 1, progress=False).run(Y)
    for make, message in (
        (lambda: ConstantStep(0.0), "a step size of 0.0"),
        (lambda: SignalStep(-1.0), "a step size of -1.0"),
        (lambda: KernelNorm("k", 0.0), "a weight of 0.0"),
        (lambda: KernelNorm("k", 1.0, 2), "the order 2; expected 0 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
