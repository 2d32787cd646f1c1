"""What the methods of the singular basis are tested on: a Gaussian and a mixture prior under y = A x + noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from tests.guidance.exact import chain_density, chain_law, check_evidence, weighted_moments

F64 = torch.float64
EYE = torch.eye(3, dtype=F64)
MEAN = torch.tensor([1.0, -1.0, 0.3], dtype=F64)
COVARIANCE = torch.tensor([[1.2, 0.2, 0.2], [0.2, 2.2, 0.2], [0.2, 0.2, 0.7]], dtype=F64)
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]], dtype=F64)  # singular values sqrt(6) and 1, one null direction
Y = torch.tensor([0.4, 1.1], dtype=F64)
STEPS = 20

Kernel = Callable[[Any], Any]


def svd_of(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, m), s (m,) and V^T (3, 3) of A (m, 3) in the basis that the operator draws noise in, and that they are."""
    svd = sd.Matrix(a).svd(EYE)
    u = svd.measurement_from_spectral(EYE)[: len(a)].mT
    s, vt = svd.singular_values[: len(a)], svd.to_spectral(EYE).mT
    torch.testing.assert_close((u * s) @ vt[: len(a)], a, rtol=0, atol=1e-13)
    torch.testing.assert_close(vt @ vt.mT, EYE, rtol=0, atol=1e-13)
    return u, s, vt


def gaussian_prior(
    steps: int = STEPS,
    variance: str = "posterior",
    schedule: sd.VPSchedule | sd.VESchedule | None = None,
    grid: Any = None,
    eta: float = 1.0,
) -> sd.DiffusionPrior:
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    return sd.DiffusionPrior(denoiser, schedule or sd.VPSchedule(), steps, eta, variance=variance, grid=grid)


def program(prior: sd.DiffusionPrior, sigma: Any, operator: Any = None) -> Callable[..., Any]:
    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(operator or sd.Matrix(A), x, sigma), obs=y)

    return model


def x0_hat(alpha: float, sigma: float, x: Tensor) -> Tensor:
    """E[x_0 given x_t = x] under N(MEAN, COVARIANCE), by the textbook formula."""
    pull = COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * EYE)
    return MEAN + alpha * pull @ (x - alpha * MEAN)


def linspace_levels(steps: int) -> list[tuple[float, float]]:
    """(alpha, sigma) of the levels 0 ... K of the default grid of a VPSchedule, from the table of alpha_bar."""
    times = torch.linspace(1, 1000, steps, dtype=F64).round().long()
    bars = [1.0, *torch.as_tensor(sd.VPSchedule().alphas_cumprod)[times - 1].tolist()]
    return [(bar**0.5, (1 - bar) ** 0.5) for bar in bars]


def check_path(
    kernel: Kernel, loop: Callable[[Tensor], Tensor], sigma: float, prior: sd.DiffusionPrior | None = None
) -> None:
    """Runs of one particle end where the published loop does, given the same noise of shape (steps + 1, 3)."""
    prior = prior or gaussian_prior()
    steps, b = prior.chain.num_steps, 4
    model = program(prior, sigma)
    feynman_kac = TwistedModel(Program(model, (Y,)), kernel(model))
    result = ParticleFilter(ess_threshold=0).run(feynman_kac, num_particles=1, num_chains=b, seed=7)
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack([torch.randn(b, 1, 3, generator=generator, dtype=F64) for _ in range(steps + 1)])
    for chain in range(b):
        expected = loop(noise[:, chain, 0])
        torch.testing.assert_close(result.particles["x"][chain, 0], expected, rtol=1e-8, atol=1e-8)


def check_gaussian(
    kernel: Kernel,
    prior: sd.DiffusionPrior,
    sigma: float,
    n: int,
    A: Tensor = A,
    y: Tensor = Y,
) -> None:
    """Posterior moments and evidence of the discretised chain: 5 standard errors from 24 chains (see exact.py), which
    are at most a tenth of a posterior standard deviation; the covariance within 15 % of it."""
    posterior, log_z = chain_law(prior, MEAN, COVARIANCE).given(A, y, sigma)
    smc = sd.SMC(
        kernel(program(prior, sigma, sd.Matrix(A))), num_particles=n, num_chains=24, seed=1, progress=False
    ).run(y)
    check_evidence(smc, log_z, worst=0.05)
    mean, error, covariance = weighted_moments(smc, "x")
    scale = posterior.covariance.diagonal().sqrt()
    assert bool(((mean - posterior.mean).abs() < 5 * error + 1e-3 * scale).all())
    assert bool((error < 0.1 * scale).all())
    assert bool(((covariance - posterior.covariance).abs() < 0.15 * scale[:, None] * scale).all())


def check_mixture(
    kernel: Kernel,
    sigma: float,
    n: int,
    steps: int = 10,
    schedule: sd.VPSchedule | sd.VESchedule | None = None,
    gain: float = 1.5,
) -> None:
    """Evidence and the weights of the modes of a one-dimensional mixture, against its chain's density on a grid; 5
    standard errors from 32 chains, as in exact.py."""
    means = torch.tensor([[-3.0], [0.5], [3.0]], dtype=F64)
    covariances = torch.tensor([0.5, 1.0, 0.25], dtype=F64).reshape(3, 1, 1)
    denoiser = sd.GaussianMixtureDenoiser(means, covariances, torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    schedule = schedule or sd.VPSchedule()
    prior = sd.DiffusionPrior(denoiser, schedule, steps, variance="optimal", grid=sd.KarrasGrid())
    y = torch.tensor([gain * 0.8], dtype=F64)
    top = 12.0 if isinstance(schedule, sd.VPSchedule) else 40.0
    grid = torch.linspace(-top, top, 1601, dtype=F64)
    joint = chain_density(prior, grid) * torch.exp(dist.Normal(gain * grid, sigma).log_prob(y))
    log_z = float((joint.sum() * (grid[1] - grid[0])).log())
    posterior = joint / joint.sum()
    operator = sd.Matrix(torch.tensor([[gain]], dtype=F64))
    smc = sd.SMC(kernel(program(prior, sigma, operator)), num_particles=n, num_chains=32, seed=3, progress=False).run(y)
    check_evidence(smc, log_z)
    samples = smc.weighted_samples()
    w, x = samples.log_w.exp(), samples.values["x"][..., 0]
    for low, high in ((-top, -1.5), (-1.5, 1.5), (1.5, top)):
        inside = (x >= low) & (x < high)
        exact = float(posterior[(grid >= low) & (grid < high)].sum())
        share = float((w * inside).sum())
        error = float(((w * inside).sum(1) - share * w.sum(1)).square().sum().sqrt())
        assert error < 0.05
        assert abs(share - exact) < 5 * error + 1e-3, (share, exact, error)


def check_neighbours(kernel: Kernel) -> None:
    """Chain 0 and particle 0 of chain 1 come out the same when all other particles are moved far away."""
    model = program(gaussian_prior(), 0.5)
    feynman_kac = TwistedModel(Program(model, (Y,)), kernel(model))
    generator = torch.Generator().manual_seed(0)
    particles = feynman_kac.initial(2, 3, generator).particles
    far = {name: value.clone() for name, value in particles.items()}
    for value in far.values():
        value[1, 1:] *= 1e3
    state = generator.get_state()
    near_move = feynman_kac.step(1, particles, generator)
    generator.set_state(state)
    far_move = feynman_kac.step(1, far, generator)
    for name, value in near_move.particles.items():
        torch.testing.assert_close(far_move.particles[name][0], value[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(far_move.particles[name][1, 0], value[1, 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(far_move.log_g[0], near_move.log_g[0], rtol=1e-10, atol=1e-10)
    assert not torch.equal(near_move.particles["x"][1, 1], far_move.particles["x"][1, 1])


def check_refusals(kernel: Kernel, who: str) -> None:
    """Programs that are no linear-Gaussian measurement in a singular basis, each refused with the remedy, unrun."""
    prior = gaussian_prior()

    def latent_sigma(y):
        x = pyro.sample("x", prior)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.5))
        pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)

    def poisson(y):
        pyro.sample("y", dist.Poisson((A @ pyro.sample("x", prior)).exp()).to_event(1), obs=y.round())

    uneven = torch.tensor([0.1, 0.2], dtype=F64)
    cases = [
        (program(prior, 0.1, lambda x: x[..., :2] ** 2), "linear operator.*as_linear"),
        (program(prior, 0.1, sd.as_linear(lambda x: x[..., :2], MEAN)), "singular value.*sd.Matrix"),
        (latent_sigma, "no other latent.*sigma.*use sd.TDS"),
        (poisson, "Gaussian noise.*Poisson.*use sd.TDS"),
        (program(prior, uneven), "one noise level.*from 0.1 to 0.2.*sd.TDS"),
    ]
    who = who.replace("+", r"\+")
    for model, message in cases:
        with pytest.raises(TypeError, match=rf"{who} .*{message}"):
            sd.SMC(kernel(model), num_particles=2, progress=False).run(Y)
    with pytest.raises(ValueError, match="eta = 0.* without a density"):
        sd.SMC(kernel(program(gaussian_prior(eta=0.0), 0.1)), num_particles=2, progress=False).run(Y)


def check_last_step(kernel: Kernel) -> None:
    """Alone, a published last step that is a point mass is taken and leaves no evidence; many keep to the chain's."""
    model = program(gaussian_prior(), 0.5)
    alone = sd.SMC(kernel(model), num_particles=1, num_chains=3, seed=0, progress=False)
    with pytest.warns(UserWarning, match="point mass"):
        alone.run(Y)
    assert bool(alone.log_evidence.isnan())
    assert bool(sd.SMC(kernel(model), num_particles=8, seed=0, progress=False).run(Y).log_evidence.isfinite())
