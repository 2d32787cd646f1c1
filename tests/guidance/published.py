"""What the tests of published methods share: a small problem, the DDPM formulas written out, and the checks."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import smcdiff as sd
from smcdiff.diffusion.schedule import Grid, Schedule
from smcdiff.guidance.base import Method
from smcdiff.guidance.program import Program
from smcdiff.guidance.time_travel import with_travel
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.measurement.operators import Operator
from smcdiff.smc import ParticleFilter
from tests.guidance.exact import chain_density, chain_law, check_evidence, weighted_moments

F64 = torch.float64
MEAN = torch.tensor([1.0, -1.0, 0.3], dtype=F64)
COVARIANCE = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=F64)) + 0.2
EYE = torch.eye(3, dtype=F64)
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]], dtype=F64)
Y = torch.tensor([0.4, 1.1], dtype=F64)

Model = Callable[..., Tensor]
Build = Callable[[Model], Method]


def gaussian_prior(
    variance: str = "posterior", num_steps: int = 50, grid: Grid | None = None, schedule: Schedule | None = None
) -> sd.DiffusionPrior:
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    return sd.DiffusionPrior(denoiser, schedule or sd.VPSchedule(), num_steps, variance=variance, grid=grid)


def karras(variance: str) -> sd.DiffusionPrior:
    """30 steps on Karras' grid, which carries the chain near the prior."""
    return gaussian_prior(variance, 30, sd.KarrasGrid())


def measured(prior: sd.DiffusionPrior, operator: Operator, sigma: float) -> Model:
    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(operator, x, sigma), obs=y)

    return model


def alpha_bars(num_steps: int) -> Tensor:
    """abar of the levels 0 ... K of the sub-sampled linear schedule, abar_0 = 1."""
    table = torch.as_tensor(sd.VPSchedule().alphas_cumprod)
    times = torch.linspace(1, 1000, num_steps, dtype=F64).round().long()
    return torch.cat((torch.ones(1, dtype=F64), table[times - 1]))


def denoise(x: Tensor, bar: Tensor, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Tensor:
    """E[x_0 given x_t] of the Gaussian prior."""
    pull = covariance @ torch.linalg.inv(bar * covariance + (1 - bar) * torch.eye(len(mean), dtype=F64))
    return mean + bar.sqrt() * pull @ (x - bar.sqrt() * mean)


def jacobian(bar: Tensor) -> Tensor:
    """d x0_hat / d x_t of the Gaussian prior."""
    return bar.sqrt() * COVARIANCE @ torch.linalg.inv(bar * COVARIANCE + (1 - bar) * EYE)


def ancestral(x: Tensor, x0: Tensor, bar: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of DDPM's q(x_{t-1} given x_t, x_0)."""
    alpha, beta = bar / before, 1 - bar / before
    mean = (alpha.sqrt() * (1 - before) * x + before.sqrt() * beta * x0) / (1 - bar)
    return mean, (beta * (1 - before) / (1 - bar)).sqrt()


def check_loop(build: Build, model: Model, y: Tensor, loop: Callable[[Tensor], Tensor], draws: int, tol: float) -> None:
    """One particle is the written-out loop, number by number, under the same noise.

    Args:
        loop: (draws, *event) of standard normal noise, in the order it is used -> x_0.
        draws: how many noise tensors a path takes.
        tol: of the comparison, absolute and relative.
    """
    program = Program(model, (y,))
    method = build(model)
    feynman_kac = with_travel(TwistedModel(program, method), method, 1)
    b, shape = 4, tuple(program.latents["x"].chain.shape)
    result = ParticleFilter(ess_threshold=0).run(feynman_kac, num_particles=1, num_chains=b, seed=7)
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack([torch.randn(b, *shape, generator=generator, dtype=F64) for _ in range(draws)])
    for chain in range(b):
        torch.testing.assert_close(result.particles["x"][chain, 0], loop(noise[:, chain]), rtol=tol, atol=tol)


#: A chain of few and long steps, whose lowest level is as noisy as the measurement: for proposals that are wide.
LONG_STEPS = sd.VPSchedule(0.3, 0.7, num_train_steps=6)


def check_gaussian_posterior(
    build: Build,
    operator: Operator,
    matrix: Tensor,
    y: Tensor,
    n: int,
    prior: sd.DiffusionPrior,
) -> None:
    """Posterior mean, covariance and evidence of a Gaussian prior, against the discretised chain's own.

    The mean of 24 chains is within 5 of its standard errors of the truth but with probability 3 times 5e-5 (a
    t-distribution of 23 degrees of freedom); the seed is fixed, so it always or never is.
    """
    sigma = 1.0
    posterior, log_z = chain_law(prior, MEAN, COVARIANCE).given(matrix, y, sigma)
    method = build(measured(prior, operator, sigma))
    smc = sd.SMC(method, num_particles=n, num_chains=24, seed=1, progress=False).run(y)
    check_evidence(smc, log_z, worst=0.1)
    mean, error, covariance = weighted_moments(smc, "x")
    width = posterior.covariance.diagonal().sqrt()
    assert bool(((mean - posterior.mean).abs() < 5 * error + 1e-3 * width).all()), (mean, posterior.mean, error)
    assert bool((error < 0.1 * width).all()), error / width
    excess = (covariance - posterior.covariance).abs() / (width[:, None] * width)
    assert bool((excess < 0.15).all()), excess


def check_mixture_posterior(
    build: Build, n: int, num_steps: int = 30, schedule: Schedule | None = None, grid: Grid | None = None
) -> None:
    """Mean, variance and evidence of a mixture prior with modes apart, against the discretised chain by quadrature.

    Bounds as for the Gaussian prior.
    """
    means = torch.tensor([[-4.0], [0.5], [5.0]], dtype=F64)
    covariances = torch.tensor([0.5, 1.0, 0.25], dtype=F64).reshape(3, 1, 1)
    denoiser = sd.GaussianMixtureDenoiser(means, covariances, torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    prior = sd.DiffusionPrior(denoiser, schedule or sd.VPSchedule(), num_steps, variance="optimal", grid=grid)
    gain, sigma, y = 1.5, 4.5, torch.tensor([1.2], dtype=F64)
    points = torch.linspace(-12, 12, 1501, dtype=F64)
    joint = chain_density(prior, points) * dist.Normal(gain * points, sigma).log_prob(y).exp()
    log_z = float((joint.sum() * (points[1] - points[0])).log())
    share = joint / joint.sum()
    centre = float((share * points).sum())
    spread = float((share * (points - centre) ** 2).sum())

    method = build(measured(prior, sd.Matrix(torch.tensor([[gain]], dtype=F64)), sigma))
    smc = sd.SMC(method, num_particles=n, num_chains=32, seed=3, progress=False).run(y)
    check_evidence(smc, log_z, worst=0.1)
    mean, error, covariance = weighted_moments(smc, "x")
    assert float(error) < 0.1 * spread**0.5
    assert abs(float(mean) - centre) < 5 * float(error), (mean, centre, error)
    assert abs(float(covariance) / spread - 1) < 0.1, (covariance, spread)


def check_neighbours(build: Build, operator: Operator = sd.Matrix(A), y: Tensor = Y) -> None:  # noqa: B008
    """Chain 0 and particle 0 of chain 1 come out the same when all other particles are moved far away."""
    model = measured(gaussian_prior(), operator, 0.3)
    feynman_kac = TwistedModel(Program(model, (y,)), build(model))
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
        torch.testing.assert_close(far_move.particles[name][0], value[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(far_move.particles[name][1, 0], value[1, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(far_move.log_g[0], near_move.log_g[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(far_move.log_g[1, 0], near_move.log_g[1, 0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(near_move.particles["x"][1, 1], far_move.particles["x"][1, 1])


def check_no_waiting(build: Build) -> None:
    """A step does nothing whose result the host would need: fake tensors hold no data and raise where it does."""
    model = measured(gaussian_prior(), sd.Matrix(A), 0.3)
    feynman_kac = TwistedModel(Program(model, (Y,)), build(model))
    particles = feynman_kac.initial(2, 3, torch.Generator().manual_seed(0)).particles
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in particles.items()}
        for i in (1, feynman_kac.num_steps):
            assert feynman_kac.step(i, fake, torch.Generator()).log_g.shape == (2, 3)


class Squares(Operator):
    """y = x^2, which is not linear."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.square()


def check_refusals(build: Build, who: str, needs_svd: bool) -> None:
    """Programs that the method is not for are refused before any step, by its name and with what to do."""

    def refused(model: Model, y: Tensor, match: str) -> None:
        with pytest.raises(TypeError, match=match):
            sd.SMC(build(model), num_particles=2, progress=False).run(y)

    prior = gaussian_prior()
    refused(measured(prior, Squares(), 0.1), MEAN, rf"{who} needs a linear operator and got Squares; .*sd.TDS")

    def poisson(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    refused(poisson, torch.ones(3, dtype=F64), rf"{who} needs Gaussian noise.*'y' has the law Poisson; use sd.TDS")
    if needs_svd:
        picture = sd.DiffusionPrior(
            sd.GaussianDenoiser(torch.zeros(1, 4, 4, dtype=F64), torch.ones(1, 4, 4, dtype=F64)), sd.VPSchedule(), 5
        )
        both = sd.Compose(sd.Blur(torch.tensor([[1.0, 2.0, 0.5]], dtype=F64)), sd.Mask(torch.eye(4, dtype=F64)))
        refused(
            measured(picture, both, 0.1),
            torch.zeros(1, 4, 4, dtype=F64),
            rf"{who} needs the singular value decomposition.*LinearComposition.*sd.Matrix for a small problem",
        )
        levels = torch.tensor([0.1, 0.2], dtype=F64)
        refused(measured(prior, sd.Matrix(A), levels), Y, rf"{who} needs one noise level .* from 0.1 to 0.2")
