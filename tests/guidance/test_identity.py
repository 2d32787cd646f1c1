"""The weights of a whole path multiply to p(path) p(y given x_0) / q(path), with p from Pyro's trace."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter

F64 = torch.float64
MEAN = torch.tensor([1.0, -1.0], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=F64)
A = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0]], dtype=F64)
Y = torch.tensor([0.7, -0.3, 0.4], dtype=F64)
STEPS = 12


def priors(variance: str) -> tuple[sd.DiffusionPrior, sd.DiffusionPrior]:
    """A Gaussian prior and a mixture, so that the network's variance depends on the particle."""
    grid = sd.KarrasGrid()
    one = sd.DiffusionPrior(sd.GaussianDenoiser(MEAN, COVARIANCE), sd.VPSchedule(), STEPS, variance=variance, grid=grid)
    mixture = sd.GaussianMixtureDenoiser(
        torch.tensor([[-1.0, 0.0], [2.0, 1.0]], dtype=F64), 0.3 * torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
    )
    return one, sd.DiffusionPrior(mixture, sd.CosineSchedule(), STEPS, eta=0.8, variance=variance)


def program(variance: str):
    first, second = priors(variance)

    def model(y):
        x = pyro.sample("x", first)
        w = pyro.sample("w", second)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.7, dtype=F64), 0.3))
        shift = pyro.sample("shift", dist.Laplace(torch.zeros(3, dtype=F64), sigma).to_event(1))
        pyro.sample("y", dist.Normal(A @ (x + 0.3 * w) + shift, sigma).to_event(1), obs=y)
        with pyro.plate("seen", 2):
            pyro.sample("z", dist.Normal(torch.sin(w), 1.5), obs=Y[:2])

    return model


def written_out_log_likelihood(x, w, sigma, shift):
    first = dist.Normal(A @ (x + 0.3 * w) + shift, sigma).log_prob(Y).sum()
    return first + dist.Normal(torch.sin(w), 1.5).log_prob(Y[:2]).sum()


def latents(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """x, w, sigma and shift from the chain states of one particle, by hand."""
    sigma = torch.exp(0.7 + 0.3 * state["sigma"])
    u = torch.special.ndtr(state["shift"])
    shift = -sigma * torch.sign(u - 0.5) * torch.log1p(-2 * (u - 0.5).abs())
    return state["x"], state["w"], sigma, shift


@pytest.mark.parametrize("variance", ["posterior", "fixed_large", "optimal"])
@pytest.mark.parametrize("max_shift", [None, 0.5])
def test_weights_are_the_path_ratio(variance: str, max_shift: float | None) -> None:
    model = program(variance)
    joint = Program(model, (Y,))
    feynman_kac = TwistedModel(joint, sd.TDS(model, max_shift=max_shift))
    b, n = 2, 3
    states = list(ParticleFilter(ess_threshold=0).iterate(feynman_kac, num_particles=n, num_chains=b, seed=4))
    for c in range(b):
        for i in range(n):
            path = [{name: state.particles[name][c, i] for name in joint.latents} for state in states]
            data = {f"{name}_{STEPS - step}": here[name] for step, here in enumerate(path) for name in here}
            trace = pyro.poutine.trace(pyro.condition(sd.unroll(model), data=data)).get_trace(Y)
            log_p = trace.log_prob_sum()
            log_q = sum(
                dist.Normal(0.0, latent.chain.initial_scale).log_prob(path[0][name]).sum()
                for name, latent in joint.latents.items()
            )
            for k, (here, there) in zip(range(STEPS, 0, -1), itertools.pairwise(path), strict=True):
                log_q = log_q + log_proposal(joint, k, here, there, max_shift)
            got = states[-1].log_w[c, i]
            assert abs(float(got - (log_p - log_q))) < 1e-10 * max(1.0, abs(float(got)))


def log_proposal(joint: Program, k: int, here: dict, there: dict, max_shift: float | None) -> torch.Tensor:
    """log q of one step, written out: a normal about mean + variance * gradient, its gradient by automatic
    differentiation of the hand-written likelihood."""
    x = {name: value.clone().requires_grad_() for name, value in here.items()}
    estimates = {name: latent.chain.estimate(k, x[name][None]) for name, latent in joint.latents.items()}
    log_psi = written_out_log_likelihood(*latents({name: e.mean[0] for name, e in estimates.items()}))
    gradients = dict(zip(x, torch.autograd.grad(log_psi, list(x.values())), strict=True))
    total = torch.zeros((), dtype=F64)
    for name, latent in joint.latents.items():
        p = latent.chain.transition(k, here[name][None], estimates[name])
        if p.variance is None:
            assert torch.equal(there[name], p.mean[0].detach())
            continue
        scale = p.variance[0].sqrt()
        shift = (scale * gradients[name]).detach()
        if max_shift is not None:
            shift = shift / max(1.0, float(shift.square().mean().sqrt()) / max_shift)
        total = total + dist.Normal(p.mean[0] + scale * shift, scale).log_prob(there[name]).sum().detach()
    return total


def test_likelihood_and_values_match_the_trace() -> None:
    model = program("optimal")
    joint = Program(model, (Y,))
    generator = torch.Generator().manual_seed(0)
    states = {
        name: torch.randn((5, *latent.chain.shape), generator=generator, dtype=F64)
        for name, latent in joint.latents.items()
    }
    expected = [written_out_log_likelihood(*latents({k: v[i] for k, v in states.items()})) for i in range(5)]
    torch.testing.assert_close(joint.log_prob(states), torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joint.values(states)["sigma"], torch.exp(0.7 + 0.3 * states["sigma"]))
    parts = joint.pointwise(states)
    assert parts["y"].shape == (5, 3) and parts["z"].shape == (5, 2)
    torch.testing.assert_close(parts["y"].sum(1) + parts["z"].sum(1), torch.stack(expected))
