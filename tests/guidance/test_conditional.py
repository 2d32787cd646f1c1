"""A conditional denoiser as proposal: exact where it is exact, and still exact where it is wrong."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.conditional import Conditional
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.moves import ParticleGibbs
from smcdiff.smc import ParticleFilter
from tests.guidance.exact import NormalLaw, chain_law, check_evidence, weighted_moments

F64 = torch.float64
MEAN = torch.tensor([0.4, -0.6], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=F64)
A = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=F64)
Y, SIGMA = torch.tensor([0.7, -0.3], dtype=F64), 0.8


class ExactConditional:
    """E and Var of x_0 given x_t and y for x_0 ~ N(mean, covariance), y = A x_0 + sigma noise; the events it saw.

    Args:
        gain: multiplies what y adds; 1 is right.
        knows_variance: whether it gives the variance.
    """

    def __init__(
        self, mean: Tensor, covariance: Tensor, A: Tensor, sigma: float, gain: float = 1.0, knows_variance: bool = True
    ) -> None:
        self.prior, self.A, self.sigma = NormalLaw(mean, covariance), A, sigma
        self.gain, self.knows_variance, self.seen = gain, knows_variance, 0

    def __call__(self, x_t: Tensor, y: Tensor, level: NoiseLevel) -> Estimate:
        self.seen += len(x_t)
        given, _ = self.prior.given(self.A, y, self.sigma)
        known = sd.GaussianDenoiser(given.mean, given.covariance)(x_t, level)
        without = sd.GaussianDenoiser(self.prior.mean, self.prior.covariance)(x_t, level).mean
        mean = without + self.gain * (known.mean - without)
        return Estimate(mean, known.variance if self.knows_variance else None)


def problem(variance: str, num_steps: int = 30):
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, variance=variance, grid=sd.KarrasGrid())

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, SIGMA), obs=y)

    return model, prior


class ExactTwist:
    """p(y given x_t) of a standard normal x_0 seen as x_0 + sigma noise."""

    def log_psi(self, prediction) -> Tensor:
        level = prediction.program.latents["x"].chain.levels[prediction.k]
        variance = level.sigma**2 / (level.alpha**2 + level.sigma**2) + SIGMA**2
        y = prediction.program.observed["y"]
        return dist.Normal(prediction.x0_hat["x"], variance**0.5).log_prob(y).sum(1)


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_with_the_exact_denoiser_and_twist_every_step_has_weight_one(num_steps: int) -> None:
    """For N(0, I) the chain is exact at any number of steps, and q is the exact conditional of p: only the first
    level's potential p(y given x_T) is left in the weights, whose mean over x_T is the evidence."""
    zero, eye = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    prior = sd.DiffusionPrior(sd.GaussianDenoiser(zero, eye), sd.VPSchedule(), num_steps, variance="optimal")

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, SIGMA).to_event(1), obs=y)

    kernel = Conditional(model, ExactConditional(zero, eye, eye, SIGMA), ExactTwist())
    feynman_kac = TwistedModel(Program(model, (Y,)), kernel)
    first, *_, last = list(ParticleFilter(ess_threshold=0).iterate(feynman_kac, num_particles=50, num_chains=2, seed=0))
    torch.testing.assert_close(last.log_w, first.log_w, rtol=0, atol=1e-9)
    exact = float(dist.Normal(zero, (1 + SIGMA**2) ** 0.5).log_prob(Y).sum())
    assert float((last.log_z - exact).abs().max()) < 0.01  # alpha_T = 0.006 leaves that much of y in x_T
    assert float(last.w.max()) < 1.1 / 50


@pytest.mark.parametrize("gain", [1.0, 0.3, 1.4])
@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("knows_variance", [True, False])
def test_mean_and_evidence_are_exact_whatever_it_says(gain: float, variance: str, knows_variance: bool) -> None:
    model, prior = problem(variance)
    posterior, log_z = chain_law(prior, MEAN, COVARIANCE).given(A, Y, SIGMA)
    denoiser = ExactConditional(MEAN, COVARIANCE, A, SIGMA, gain, knows_variance)
    n = 400
    smc = sd.SMC(Conditional(model, denoiser, sd.TweedieTwist()), n, num_chains=24, seed=1, progress=False).run(Y)
    check_evidence(smc, log_z)
    mean, error, _ = weighted_moments(smc, "x")
    scale = posterior.covariance.diagonal().sqrt()
    assert bool(((mean - posterior.mean).abs() < 5 * error + 1e-3 * scale).all())
    assert bool((error < 0.1 * scale).all())


def test_both_networks_are_counted_and_chunks_change_nothing() -> None:
    model, _ = problem("posterior", num_steps=6)
    b, n = 2, 5

    def run(max_batch: int | None) -> tuple[sd.SMC, int]:
        denoiser = ExactConditional(MEAN, COVARIANCE, A, SIGMA)
        kernel = Conditional(model, denoiser)
        smc = sd.SMC(kernel, n, num_chains=b, seed=0, max_batch=max_batch, progress=False).run(Y)
        return smc, denoiser.seen

    whole, seen = run(b * n)
    assert seen == b * n * 6
    assert whole.network_evaluations == (2 * b * n * 6, 0)
    cut, _ = run(3)
    torch.testing.assert_close(cut.log_evidence, whole.log_evidence)
    torch.testing.assert_close(cut.weighted_samples().values["x"], whole.weighted_samples().values["x"])


@pytest.mark.parametrize("clip", [None, (-0.3, 0.5)])
def test_one_particle_is_the_published_sampler(clip: tuple[float, float] | None) -> None:
    """Ancestral sampling of the conditional network alone, written out in the schedule's betas."""
    num_steps = 20
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, clip=clip)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(A @ x, SIGMA).to_event(1), obs=y)

    conditional = ExactConditional(MEAN, COVARIANCE, A, SIGMA)
    with pytest.warns(UserWarning, match="point mass"):
        never = ParticleFilter(ess_threshold=0)  # draws no ancestors, so that all the noise is the sampler's
        kernel = Conditional(model, conditional)
        smc = sd.SMC(kernel, 1, num_chains=3, filter=never, seed=5, progress=False).run(Y)
    assert bool(smc.log_evidence.isnan())
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(3, 1, 2, generator=generator, dtype=F64)[:, 0] for _ in range(num_steps + 1)])
    table = torch.as_tensor(sd.VPSchedule().alphas_cumprod)
    times = torch.linspace(1, 1000, num_steps, dtype=F64).round().long()
    alpha_bar = torch.cat((torch.ones(1, dtype=F64), table[times - 1]))
    x = noise[0]
    for k in range(num_steps, 0, -1):
        bar, before = alpha_bar[k], alpha_bar[k - 1]
        beta = 1 - bar / before
        x0_hat = conditional(x, Y, prior.chain.levels[k]).mean
        x0_hat = x0_hat if clip is None else x0_hat.clamp(*clip)
        mean = (bar / before).sqrt() * (1 - before) / (1 - bar) * x + before.sqrt() * beta / (1 - bar) * x0_hat
        x = mean + (beta * (1 - before) / (1 - bar)).sqrt() * noise[num_steps + 1 - k]
    torch.testing.assert_close(smc.weighted_samples().values["x"][:, 0], x, rtol=1e-8, atol=1e-8)


def test_what_it_says_is_part_of_the_particle() -> None:
    """Particle Gibbs puts a path back and weighs it again without asking the network, to the same posterior."""
    model, prior = problem("optimal", num_steps=8)
    posterior, _ = chain_law(prior, MEAN, COVARIANCE).given(A, Y, SIGMA)
    denoiser = ExactConditional(MEAN, COVARIANCE, A, SIGMA, gain=0.6)
    gibbs = ParticleGibbs(Conditional(model, denoiser, sd.TweedieTwist()), 8, 30, num_chains=40, seed=0, progress=False)
    draws = gibbs.run(Y).get_samples(group_by_chain=True)["x"]
    assert denoiser.seen == 40 * 8 * 8 * 31  # every filter asks once per particle and step
    means = draws[:, 10:].mean(1)
    error = means.std(0) / 40**0.5
    assert bool(((means.mean(0) - posterior.mean).abs() < 5 * error).all())  # t_39: 2 * 1e-5 for two entries
    assert bool((error < 0.05).all())


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    model, _ = problem("optimal")
    kernel = Conditional(model, ExactConditional(MEAN, COVARIANCE, A, SIGMA))
    feynman_kac = TwistedModel(Program(model, (Y,)), kernel)
    generator = torch.Generator().manual_seed(0)
    near = feynman_kac.initial(2, 3, generator).particles
    far = {name: torch.cat([value[:, :1], 1e3 * value[:, 1:]], 1) for name, value in near.items()}
    state = generator.get_state()
    one = feynman_kac.step(1, near, generator)
    generator.set_state(state)
    other = feynman_kac.step(1, far, generator)
    for name, value in one.particles.items():
        torch.testing.assert_close(other.particles[name][:, 0], value[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(one.particles["x"][:, 1], other.particles["x"][:, 1])


def test_sites_that_are_not_there_are_refused() -> None:
    model, _ = problem("optimal")
    exact = ExactConditional(MEAN, COVARIANCE, A, SIGMA)
    for kernel, message in (
        (Conditional(model, exact, latent="z"), r"of the latent 'z' and the diffusion priors \['x'\]"),
        (Conditional(model, exact, measured="z"), r"the measurement 'z' and the observed sites \['y'\]"),
        (Conditional(model, lambda x, y, level: Estimate(x[:, :1])), r"estimate of shape \(2, 1\).*of x_t, \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sd.SMC(kernel, 2, progress=False).run(Y)
