"""The locally optimal proposal against closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.guidance.picture import picture_measurement
from smcdiff.guidance.program import Program
from smcdiff.restoration.acquisition import blurred
from smcdiff.restoration.noise_level import Noise
from smcdiff.transforms import hartley

D = torch.float64
SIDE = 16
R = torch.arange(-2, 3, dtype=D)
KERNEL = torch.exp(-(R[:, None] ** 2 + R**2) / 2) / torch.exp(-(R[:, None] ** 2 + R**2) / 2).sum()
SEEN = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) < 0.6
OPERATORS = {
    "blur": sd.Blur(KERNEL),
    "mask": sd.Select(SEEN),
    "both": sd.Compose(sd.Select(SEEN), sd.Blur(KERNEL)),
}


def spectrum(side: int = SIDE) -> Tensor:
    f = torch.fft.fftfreq(side, dtype=D) * side
    power = (1 + f[:, None] ** 2 + f**2) ** -1.5
    return (power / power.mean())[None]


@pytest.mark.parametrize("num_steps", [10, 30])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_gaussian_field_has_its_evidence_and_mean(name: str, num_steps: int) -> None:
    operator, lam = OPERATORS[name], spectrum()
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, SIDE, SIDE, dtype=D), lam)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=num_steps, grid=sd.KarrasGrid())

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), 0.1), obs=y)

    generator = torch.Generator().manual_seed(0)
    y = operator(hartley(lam.sqrt() * torch.randn(1, SIDE, SIDE, generator=generator, dtype=D)))
    y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=D)
    units = hartley(torch.eye(SIDE**2, dtype=D).reshape(-1, 1, SIDE, SIDE))
    rows = torch.stack([operator(unit).flatten() for unit in units])
    covariance = rows.mT @ (lam.flatten()[:, None] * rows) + 0.01 * torch.eye(rows.shape[1], dtype=D)
    exact = MultivariateNormal(torch.zeros(rows.shape[1], dtype=D), covariance).log_prob(y.flatten())
    gain = (lam.flatten()[:, None] * rows) @ torch.linalg.inv(covariance)
    mean = hartley((gain @ y.flatten()).reshape(1, SIDE, SIDE))
    left = torch.diag(lam.flatten()) - gain @ (lam.flatten()[:, None] * rows).mT
    unit = units.flatten(1)
    sd_exact = (unit.mT @ left @ unit).diagonal().sqrt()

    smc = sd.SMC(sd.Adapted(model), num_particles=64, seed=1, progress=False).run(y)
    torch.testing.assert_close(smc.log_evidence, exact, atol=0.05, rtol=0)
    assert float(smc.records.ess.min()) >= 0.9 * 64
    assert not bool(smc.records.resampled.any())
    assert smc.network_evaluations == (64 * num_steps, 0)
    z = (smc.posterior.mean("x") - mean).flatten() / sd_exact * 8  # of 64 draws: standard normal
    assert float(z.square().mean()) < 2.5  # of 256 correlated squares of mean 1; independent ones pass it at 1e-30


@pytest.mark.parametrize("wrong", [0.95, 0.8, 1.5])
def test_a_wrong_covariance_leaves_the_evidence_unbiased(wrong: float) -> None:
    """2000 chains of 4 particles; 6 standard errors are passed with probability 2e-9."""
    side, lam = 4, spectrum(4)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, side, side, dtype=D), lam)
    prior = sd.DiffusionPrior(denoiser, sd.VESchedule(0.05, 50.0), num_steps=8, grid=sd.KarrasGrid())
    y = torch.linspace(-1, 1, side**2, dtype=D).reshape(1, side, side)

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 0.5), obs=y)

    # the chain begins at N(0, (1 + 50^2) I) and the field is added after: its evidence by the recursion of moments
    variance = torch.full_like(lam, 1 + 50.0**2)
    chain = prior.chain
    for k in range(chain.num_steps, 0, -1):
        step = chain.step(k)
        v = lam * step.t.sigma**2 / (lam + step.t.sigma**2)
        slope = step.b + step.c * lam / (lam + step.t.sigma**2)
        variance = slope**2 * variance + step.kappa**2 + step.c**2 * v
    spread = (variance + 0.25).sqrt()
    exact = torch.distributions.Normal(0.0, spread).log_prob(hartley(y)).sum()
    method = sd.Adapted(model, sd.SpectralCovariance(wrong * lam, "fft"))
    smc = sd.SMC(method, num_particles=4, num_chains=2000, seed=5, progress=False).run(y)
    ratio = (smc.log_evidence_per_chain - exact).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.05
    assert abs(float(ratio.mean()) - 1) < 6 * error


def mixture(num_steps: int) -> tuple[sd.DiffusionPrior, sd.GaussianMixtureDenoiser]:
    means = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, -3.0]], dtype=D)
    denoiser = sd.GaussianMixtureDenoiser(means, 0.5 * torch.eye(2, dtype=D), torch.tensor([0.5, 0.3, 0.2], dtype=D))
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=num_steps, grid=sd.KarrasGrid()), denoiser


PRIOR, MIXTURE = mixture(60)
A = torch.tensor([[1.0, 0.4]], dtype=D)


def on_a_grid(log_likelihood: Callable[[Tensor], Tensor]) -> float:
    """log evidence of the mixture by quadrature."""
    side = torch.linspace(-9, 9, 601, dtype=D)
    x = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    normal = MultivariateNormal(MIXTURE.means, 0.5 * torch.eye(2, dtype=D))
    log_p = (MIXTURE.log_weights + normal.log_prob(x[:, None])).logsumexp(1)
    return float((log_p + log_likelihood(x)).logsumexp(0)) + 2 * math.log(float(side[1] - side[0]))


LAWS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "linear": (lambda x: sd.GaussianMeasurement(sd.Matrix(A), x, 0.5), torch.tensor([1.0], dtype=D)),
    "correlated noise": (
        lambda x: dist.MultivariateNormal(x, torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=D)),
        torch.tensor([0.5, -0.3], dtype=D),
    ),
    "counts": (lambda x: dist.Poisson((0.5 * x).exp()).to_event(1), torch.tensor([2.0, 1.0], dtype=D)),
    "not linear": (
        lambda x: dist.Normal(x.square().sum(-1, keepdim=True), 2.0).to_event(1),
        torch.tensor([9.0], dtype=D),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_mixture_under_any_law_has_its_evidence(name: str) -> None:
    """20 chains of 500 particles on 60 steps; 0.05 nat is left to the time steps, and 6 standard errors on top."""
    law, y = LAWS[name]

    def model(y: Tensor) -> None:
        pyro.sample("y", law(pyro.sample("x", PRIOR)), obs=y)

    exact = on_a_grid(lambda x: torch.func.vmap(lambda one: law(one).log_prob(y).sum())(x))
    smc = sd.SMC(sd.Adapted(model), num_particles=500, num_chains=20, seed=2, progress=False).run(y)
    log_z = smc.log_evidence_per_chain
    error = float((log_z - smc.log_evidence).exp().std()) / 20**0.5
    assert error < 0.1
    assert abs(float(smc.log_evidence) - exact) < 0.05 + 6 * error


def test_several_sites_and_a_latent_noise_level() -> None:
    def model(y: Tensor, z: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-0.5, dtype=D), 0.3))
        pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)
        pyro.sample("z", dist.Normal(x[..., :1], 1.0).to_event(1), obs=z)

    y, z = torch.tensor([1.0], dtype=D), torch.tensor([2.0], dtype=D)
    nodes = torch.linspace(-4, 4, 41, dtype=D)
    weights = torch.distributions.Normal(0.0, 1.0).log_prob(nodes.to(D)).softmax(0)

    def log_likelihood(x: Tensor) -> Tensor:
        mean = x @ A[0]
        sigmas = (-0.5 + 0.3 * nodes).exp()
        terms = torch.distributions.Normal(mean[:, None], sigmas).log_prob(y) + weights.log()
        return terms.logsumexp(1) + torch.distributions.Normal(x[:, 0], 1.0).log_prob(z)

    smc = sd.SMC(sd.Adapted(model), num_particles=500, num_chains=20, seed=2, progress=False).run(y, z)
    error = float((smc.log_evidence_per_chain - smc.log_evidence).exp().std()) / 20**0.5
    assert error < 0.1
    assert abs(float(smc.log_evidence) - on_a_grid(log_likelihood)) < 0.05 + 6 * error


def test_the_covariance_can_be_replaced() -> None:
    prior = sd.DiffusionPrior(sd.WithVariance(MIXTURE, torch.ones(1), torch.ones(1)), sd.VPSchedule(), num_steps=5)

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), pyro.sample("x", prior), 0.5), obs=y)

    y = torch.tensor([1.0], dtype=D)
    with pytest.raises(ValueError, match="calibrate"):
        sd.SMC(sd.Adapted(model), num_particles=4, progress=False).run(y)
    given = dataclasses.replace(sd.Adapted(model), covariance=sd.IsotropicCovariance(3.0))
    assert bool(torch.isfinite(sd.SMC(given, num_particles=4, seed=0, progress=False).run(y).log_evidence))


def test_an_unmasked_restoration_is_taken_as_it_is() -> None:
    acquisition = blurred(Noise(0.1), psf_sigma=1.0)
    canvas = acquisition.canvas(8, 8, 4)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, canvas.rows, canvas.columns), torch.ones(1))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=3)
    program = Program(acquisition.program(prior, canvas), (torch.zeros(1, 8, 8),))
    assert picture_measurement(program) is not None
