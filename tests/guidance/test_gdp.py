"""GDP against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.gdp import GDP
from tests.guidance import published as pub
from tests.guidance.exact import chain_law, check_evidence

STEPS, SCALE = 50, 0.05


def published_loop(noise: torch.Tensor) -> torch.Tensor:
    """2304.01247: the ancestral mean, moved against the gradient of the mean squared error at x0_hat."""
    bars = pub.alpha_bars(STEPS)
    x = noise[0]
    for i in range(STEPS, 0, -1):
        x0_hat = pub.denoise(x, bars[i]).requires_grad_()
        error = torch.nn.functional.mse_loss(pub.A @ x0_hat, pub.Y)
        (gradient,) = torch.autograd.grad(error, x0_hat)
        mean, scale = pub.ancestral(x, x0_hat.detach(), bars[i], bars[i - 1])
        x = mean - SCALE * gradient + scale * noise[STEPS + 1 - i]
    return x


def gdp(model: pub.Model) -> GDP:
    return GDP(model, scale=SCALE)


def faint(model: pub.Model) -> GDP:
    """The shift is not scaled by the step's variance, so on short steps it must be small for even weights."""
    return GDP(model, scale=0.005)


def test_path_is_the_published_loop() -> None:
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Matrix(pub.A), 0.1)
    pub.check_loop(gdp, model, pub.Y, published_loop, STEPS + 1, 1e-9)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_many_particles_are_exact(variance: str) -> None:
    pub.check_gaussian_posterior(faint, sd.Matrix(pub.A), pub.A, pub.Y, 1000, pub.karras(variance))


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(lambda model: GDP(model, 0.02), 2000, 6, pub.LONG_STEPS)


def test_the_blind_form_is_exact() -> None:
    """y = A x + m + noise with a latent m: its posterior and the evidence are those of one Gaussian vector."""
    prior = pub.gaussian_prior("optimal", 20, sd.KarrasGrid())

    def model(y=None):
        x = pyro.sample("x", prior)
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=pub.F64), 2.0))
        return pyro.sample("y", dist.Normal(x @ pub.A.T + m, 1.0).to_event(1), obs=y)

    law = chain_law(prior, pub.MEAN, pub.COVARIANCE)
    joint = torch.block_diag(law.covariance, torch.tensor([[4.0]], dtype=pub.F64))
    mean = torch.cat((law.mean, torch.zeros(1, dtype=pub.F64)))
    matrix = torch.cat((pub.A, torch.ones(2, 1, dtype=pub.F64)), 1)
    posterior, log_z = type(law)(mean, joint).given(matrix, pub.Y, 1.0)
    smc = sd.SMC(faint(model), num_particles=2000, num_chains=24, seed=0, progress=False).run(pub.Y)
    check_evidence(smc, log_z, worst=0.1)
    samples = smc.weighted_samples()
    w = samples.log_w.exp()
    mean_m = float((w * samples.values["m"]).sum())
    by_chain = (w * (samples.values["m"] - mean_m)).sum(1)
    error = float(by_chain.square().sum().sqrt())
    assert error < 0.1 * float(posterior.covariance[3, 3]) ** 0.5
    assert abs(mean_m - float(posterior.mean[3])) < 5 * error  # probability 5e-5 of a t-distribution; fixed seed
    variance = float((w * (samples.values["m"] - mean_m) ** 2).sum())
    assert abs(variance / float(posterior.covariance[3, 3]) - 1) < 0.15


def test_the_blind_form_moves_its_latents() -> None:
    """With one particle m follows its twisted step; left to the prior, and not weighed, its mean stays near zero."""
    prior = pub.gaussian_prior("optimal", 20, sd.KarrasGrid())
    exact = torch.tensor([20.0, 20.0], dtype=pub.F64)

    def model(y=None):
        x = pyro.sample("x", prior)
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=pub.F64), 5.0))
        return pyro.sample("y", dist.Normal(x @ pub.A.T + m, 5.0).to_event(1), obs=y)

    smc = sd.SMC(gdp(model), num_particles=1, num_chains=200, seed=0, progress=False).run(exact)
    # 200 draws with a standard deviation of at most 5: the mean's is 0.35, so a prior's mean is above 3 with
    # probability below 1e-16
    assert float(smc.weighted_samples().values["m"].mean()) > 3


def test_no_gradient_goes_through_the_network() -> None:
    """A network that cannot be differentiated gives the same path."""
    prior = pub.gaussian_prior()
    denoiser = prior.chain.denoiser

    class Closed:
        event_shape, dtype, device = denoiser.event_shape, denoiser.dtype, denoiser.device

        def __call__(self, x_t, level):
            estimate = denoiser(x_t.detach(), level)
            return sd.Estimate(estimate.mean.detach().requires_grad_(x_t.requires_grad), estimate.variance)

    runs = [
        sd.SMC(gdp(pub.measured(p, sd.Matrix(pub.A), 1.0)), num_particles=5, seed=0, progress=False).run(pub.Y)
        for p in (prior, sd.DiffusionPrior(Closed(), sd.VPSchedule(), 50))
    ]
    torch.testing.assert_close(runs[0].get_samples()["x"], runs[1].get_samples()["x"], rtol=1e-10, atol=1e-10)


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(gdp)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(gdp)


def test_refusals() -> None:
    prior = pub.gaussian_prior()

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    with pytest.raises(TypeError, match=r"GDP needs Gaussian noise.*'y'.*Poisson"):
        sd.SMC(gdp(model), num_particles=1, progress=False).run(torch.ones(3, dtype=pub.F64))
    with pytest.raises(ValueError, match="scale 0"):
        GDP(model, scale=0.0)
