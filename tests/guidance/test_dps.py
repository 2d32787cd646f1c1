"""DPS against a loop of the published algorithm, number by number."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from tests.guidance.exact import chain_density, chain_law, check_evidence, weighted_moments

F64 = torch.float64
MEAN = torch.tensor([1.0, -1.0, 0.3], dtype=F64)
COVARIANCE = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=F64)) + 0.2
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]], dtype=F64)
Y = torch.tensor([0.4, 1.1], dtype=F64)
STEPS, ZETA = 50, 0.3
COUNTS, GAIN, BACKGROUND = torch.tensor([0.0, 7.0], dtype=F64), 3.0, 0.2


def model_with(prior: sd.DiffusionPrior):
    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, 0.1), obs=y)

    return model


def counting_model_with(prior: sd.DiffusionPrior):
    def model(y=None):
        x = pyro.sample("x", prior)
        law = sd.PoissonMeasurement(lambda x: (0.5 * A @ x).exp(), x, GAIN, BACKGROUND, floor=1e-9)
        return pyro.sample("y", law, obs=y)

    return model


def gaussian_loss(x0_hat: torch.Tensor) -> torch.Tensor:
    """2209.14687, algorithm 1, line 7, with the step size over the norm: the gradient of the norm."""
    return torch.linalg.vector_norm(Y - A @ x0_hat)


def poisson_loss(x0_hat: torch.Tensor) -> torch.Tensor:
    """2209.14687, algorithm 2, line 7, with the step size over the norm, and a count of 0 weighted as 1."""
    residual = COUNTS - BACKGROUND - GAIN * (0.5 * A @ x0_hat).exp()
    weighted = residual[0] ** 2 / 2 + residual[1] ** 2 / (2 * 7)
    return weighted / (residual**2).sum().sqrt().item()


def prior_with(variance: str = "posterior") -> sd.DiffusionPrior:
    return sd.DiffusionPrior(sd.GaussianDenoiser(MEAN, COVARIANCE), sd.VPSchedule(), STEPS, variance=variance)


def published_loop(noise: torch.Tensor, loss) -> torch.Tensor:
    """2209.14687, algorithms 1 and 2, in the betas of the sub-sampled schedule; noise: (steps + 1, 3)."""
    table = sd.VPSchedule().alphas_cumprod
    times = torch.linspace(1, 1000, STEPS, dtype=F64).round().long()
    alpha_bar = torch.cat((torch.ones(1, dtype=F64), torch.as_tensor(table)[times - 1]))
    x = noise[0]
    for i in range(STEPS, 0, -1):
        bar, bar_before = alpha_bar[i], alpha_bar[i - 1]
        alpha, beta = bar / bar_before, 1 - bar / bar_before
        x = x.clone().requires_grad_()
        pull = COVARIANCE @ torch.linalg.inv(bar * COVARIANCE + (1 - bar) * torch.eye(3, dtype=F64))
        x0_hat = MEAN + bar.sqrt() * pull @ (x - bar.sqrt() * MEAN)
        ancestral = (
            alpha.sqrt() * (1 - bar_before) / (1 - bar) * x
            + bar_before.sqrt() * beta / (1 - bar) * x0_hat
            + (beta * (1 - bar_before) / (1 - bar)).sqrt() * noise[STEPS + 1 - i]
        )
        (gradient,) = torch.autograd.grad(loss(x0_hat), x)
        x = (ancestral - ZETA * gradient).detach()
    return x


@pytest.mark.parametrize(
    ("make", "y", "loss"), [(model_with, Y, gaussian_loss), (counting_model_with, COUNTS, poisson_loss)]
)
def test_path_is_the_published_loop(make, y: torch.Tensor, loss) -> None:
    model = make(prior_with())
    feynman_kac = TwistedModel(Program(model, (y,)), sd.DPS(model, ZETA))
    b = 4
    result = ParticleFilter(ess_threshold=0).run(feynman_kac, num_particles=1, num_chains=b, seed=7)
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack([torch.randn(b, 1, 3, generator=generator, dtype=F64) for _ in range(STEPS + 1)])
    for chain in range(b):
        torch.testing.assert_close(
            result.particles["x"][chain, 0], published_loop(noise[:, chain, 0], loss), rtol=1e-9, atol=1e-9
        )


def test_one_particle_has_no_evidence_and_says_so() -> None:
    smc = sd.SMC(sd.DPS(model_with(prior_with()), ZETA), num_particles=1, num_chains=3, seed=0, progress=False)
    with pytest.warns(UserWarning, match="point mass"):
        smc.run(Y)
    assert bool(smc.log_evidence.isnan())
    assert smc.get_samples()["x"].shape == (3, 3)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_many_particles_correct_it(variance: str) -> None:
    """With n > 1 the shift is a proposal like any other, and the weights make it exact."""
    prior = prior_with(variance)
    sigma = 2.0

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(A @ x, sigma).to_event(1), obs=y)

    posterior, log_z = chain_law(prior, MEAN, COVARIANCE).given(A, Y, sigma)
    kernel = sd.DPS(model, step_size=0.01)
    smc = sd.SMC(kernel, num_particles=4000, num_chains=24, seed=1, progress=False).run(Y)
    check_evidence(smc, log_z, worst=0.1)
    draws = smc.get_samples()["x"]
    assert float(((draws.mean(0) - posterior.mean) / posterior.covariance.diagonal().sqrt()).abs().max()) < 0.15


def test_many_particles_correct_it_for_counts() -> None:
    """Evidence and mean of one latent value seen as two counts, against the density of the chain."""
    denoiser = sd.GaussianDenoiser(torch.tensor([0.3], dtype=F64), torch.eye(1, dtype=F64))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 25, variance="optimal", grid=sd.KarrasGrid())
    y = torch.tensor([2.0, 3.0], dtype=F64)

    def law(x: torch.Tensor) -> sd.PoissonMeasurement:
        return sd.PoissonMeasurement(lambda x: (x * torch.tensor([0.5, 1.0], dtype=F64)).exp(), x, 1.5)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", law(x), obs=y)

    grid = torch.linspace(-6, 6, 1501, dtype=F64)
    joint = chain_density(prior, grid) * torch.stack([law(value[None]).log_prob(y) for value in grid]).exp()
    log_z, mean = float((joint.sum() * (grid[1] - grid[0])).log()), float((joint * grid).sum() / joint.sum())
    smc = sd.SMC(sd.DPS(model, step_size=0.01), num_particles=1500, num_chains=24, seed=1, progress=False).run(y)
    check_evidence(smc, log_z)
    estimate, error, _ = weighted_moments(smc, "x")
    assert float(error) < 0.02 and abs(float(estimate) - mean) < 5 * float(error)


@pytest.mark.parametrize(
    ("kernel", "make", "y"),
    [(sd.DPS, model_with, Y), (sd.DPS, counting_model_with, COUNTS), (sd.TDS, model_with, Y)],
)
def test_a_particle_does_not_depend_on_its_neighbours(kernel, make, y: torch.Tensor) -> None:
    """Chain 0 and particle 0 of chain 1 come out the same when all other particles are moved far away."""
    model = make(prior_with())
    feynman_kac = TwistedModel(Program(model, (y,)), kernel(model))
    generator = torch.Generator().manual_seed(0)
    particles = feynman_kac.initial(2, 3, generator).particles
    far = {name: value.clone() for name, value in particles.items()}
    for value in far.values():
        value[1, 1:] *= 2
    state = generator.get_state()
    near_move = feynman_kac.step(1, particles, generator)
    generator.set_state(state)
    far_move = feynman_kac.step(1, far, generator)
    for name, value in near_move.particles.items():
        torch.testing.assert_close(far_move.particles[name][0], value[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(far_move.particles[name][1, 0], value[1, 0], rtol=1e-13, atol=1e-13)
    assert not torch.equal(near_move.particles["x"][1, 1], far_move.particles["x"][1, 1])


def test_other_noise_is_refused() -> None:
    prior = prior_with()

    def model(y=None):
        x = pyro.sample("x", prior)
        pyro.sample("counts", dist.Poisson((A @ x).exp()).to_event(1), obs=COUNTS)
        return pyro.sample("y", dist.Laplace(A @ x, 1.0).to_event(1), obs=y)

    with pytest.raises(TypeError, match=r"DPS, unless all noise is Poisson, needs Gaussian noise.*'counts'.*Poisson"):
        sd.SMC(sd.DPS(model), num_particles=1, progress=False).run(Y)


def test_a_step_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="step_size"):
        sd.DPS(model_with(prior_with()), step_size=0.0)
