"""Programs with other latents than pictures, against quadrature; and the map from normal noise to any prior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import smcdiff as sd
from smcdiff.guidance.latents import from_standard_normal, noise_shape
from tests.guidance.exact import chain_law, check_evidence

F64 = torch.float64
MEAN = torch.tensor([0.5, -0.5], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=F64)
A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]], dtype=F64)
PRIOR = sd.DiffusionPrior(
    sd.GaussianDenoiser(MEAN, COVARIANCE), sd.VPSchedule(), 25, variance="optimal", grid=sd.KarrasGrid()
)
LAW = chain_law(PRIOR, MEAN, COVARIANCE)
GRID = torch.linspace(-7, 7, 2001, dtype=F64)
STANDARD = torch.exp(-0.5 * GRID**2) / (2 * torch.pi) ** 0.5 * (GRID[1] - GRID[0])


def check_mean(smc: sd.SMC, site: str, exact: float) -> None:
    """The weighted mean of a scalar site agrees with quadrature within 5 standard errors over chains."""
    samples = smc.weighted_samples()
    w, x = samples.log_w.exp(), samples.values[site]
    mean = float((w * x).sum())
    error = float(((w * x).sum(1) - mean * w.sum(1)).square().sum().sqrt())
    spread = float((w * (x - mean) ** 2).sum().sqrt())
    assert error < 0.15 * spread
    assert abs(mean - exact) < 5 * error, (mean, exact, error)


@pytest.mark.parametrize("twist", [sd.PointTwist(), sd.WidenedTwist(0.3), sd.TweedieTwist()])
def test_unknown_noise_level(twist) -> None:
    y = torch.tensor([0.9, -0.2, 1.5, 0.6], dtype=F64)

    def model(y=None):
        x = pyro.sample("x", PRIOR)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.4))
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)

    sigmas = torch.exp(0.3 + 0.4 * GRID)
    log_terms = torch.tensor([LAW.given(A, y, float(s))[1] for s in sigmas], dtype=F64)
    joint = STANDARD * log_terms.exp()
    smc = sd.SMC(sd.TDS(model, twist), num_particles=600, num_chains=24, seed=1, progress=False).run(y)
    check_evidence(smc, float(joint.sum().log()), worst=0.1)
    check_mean(smc, "sigma", float((joint * sigmas).sum() / joint.sum()))


def test_hierarchical_prior() -> None:
    """tau ~ HalfNormal, theta ~ Normal(0, tau), y = x_1 + theta + noise; tau is left to quadrature, the rest is
    normal given tau."""
    y = torch.tensor([3.0], dtype=F64)
    noise = 0.4

    def model(y=None):
        x = pyro.sample("x", PRIOR)
        tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0, dtype=F64)))
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=F64), tau))
        pyro.deterministic("total", x[0] + theta)
        return pyro.sample("y", dist.Normal(x[:1] + theta, noise).to_event(1), obs=y)

    taus = torch.as_tensor(scipy.stats.halfnorm.ppf(scipy.stats.norm.cdf(GRID.numpy()), scale=2.0), dtype=F64)
    variance = LAW.covariance[0, 0] + taus**2 + noise**2
    joint = STANDARD * dist.Normal(LAW.mean[0], variance.sqrt()).log_prob(y).exp()
    theta = taus**2 / variance * (y - LAW.mean[0])
    smc = sd.SMC(sd.TDS(model, sd.TweedieTwist()), num_particles=800, num_chains=24, seed=2, progress=False).run(y)
    check_evidence(smc, float(joint.sum().log()), worst=0.1)
    check_mean(smc, "tau", float((joint * taus).sum() / joint.sum()))
    check_mean(smc, "theta", float((joint * theta).sum() / joint.sum()))
    values = smc.weighted_samples().values
    torch.testing.assert_close(values["total"], values["x"][..., 0] + values["theta"])


def test_latents_in_a_plate_and_two_observed_sites() -> None:
    """Three independent offsets with a common picture, seen at two sites: everything is normal in closed form."""
    y, z = torch.tensor([1.0, 0.2, -0.4], dtype=F64), torch.tensor([0.3, -0.1], dtype=F64)

    def model(y=None, z=None):
        x = pyro.sample("x", PRIOR)
        with pyro.plate("offsets", 3):
            offset = pyro.sample("offset", dist.Normal(torch.zeros((), dtype=F64), 0.5))
            pyro.sample("y", dist.Normal(x.sum() + offset, 0.6), obs=y)
        pyro.sample("z", sd.GaussianMeasurement(sd.Identity(), x, 0.8), obs=z)

    rows = torch.cat((torch.ones(3, 2, dtype=F64), torch.eye(2, dtype=F64)))
    noise = torch.diag(torch.tensor([0.25 + 0.36] * 3 + [0.64] * 2, dtype=F64))
    total = rows @ LAW.covariance @ rows.mT + noise
    law = dist.MultivariateNormal(rows @ LAW.mean, total)
    log_z = float(law.log_prob(torch.cat((y, z))))
    smc = sd.SMC(sd.TDS(model, sd.TweedieTwist()), num_particles=200, num_chains=24, seed=5, progress=False).run(y, z)
    check_evidence(smc, log_z)
    gain = 0.25 * torch.linalg.solve(total, torch.cat((y, z)) - law.mean)[:3]  # E[offset given y, z]
    samples = smc.weighted_samples()
    mean = torch.einsum("bn,bnd->d", samples.log_w.exp(), samples.values["offset"])
    assert float((mean - gain).abs().max()) < 0.03


def f64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


LAWS = {
    "Normal": (dist.Normal(f64(1.0), 2.0), scipy.stats.norm(1, 2)),
    "LogNormal": (dist.LogNormal(f64(-0.3), 0.5), scipy.stats.lognorm(0.5, scale=2.718281828459045**-0.3)),
    "Uniform": (dist.Uniform(f64(-1.0), f64(3.0)), scipy.stats.uniform(-1, 4)),
    "HalfNormal": (dist.HalfNormal(f64(2.0)), scipy.stats.halfnorm(scale=2)),
    "HalfCauchy": (dist.HalfCauchy(f64(2.0)), scipy.stats.halfcauchy(scale=2)),
    "Exponential": (dist.Exponential(f64(0.7)), scipy.stats.expon(scale=1 / 0.7)),
    "Laplace": (dist.Laplace(f64(1.0), f64(0.5)), scipy.stats.laplace(1, 0.5)),
    "Gumbel": (dist.Gumbel(f64(1.0), f64(0.5)), scipy.stats.gumbel_r(1, 0.5)),
    "expanded": (dist.Exponential(f64(0.7)).expand([3]).to_event(1), scipy.stats.expon(scale=1 / 0.7)),
}


@pytest.mark.parametrize("name", LAWS)
def test_noise_becomes_a_draw_of_the_prior(name: str) -> None:
    law, reference = LAWS[name]
    shape = noise_shape(law, name)
    for u in (1e-4, 0.1, 0.5, 0.77, 0.999):
        z = torch.special.ndtri(torch.tensor(u, dtype=F64)).expand(shape)
        got = from_standard_normal(law, z)
        torch.testing.assert_close(got, torch.full(shape, reference.ppf(u), dtype=F64), rtol=1e-6, atol=1e-7)


def test_correlated_normal_prior() -> None:
    law = dist.MultivariateNormal(MEAN, COVARIANCE)
    z = torch.randn(100_000, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    draws = from_standard_normal(law, z)
    assert float((draws.mean(0) - MEAN).abs().max()) < 5 / 100_000**0.5
    assert float((draws.mT.cov() - COVARIANCE).abs().max()) < 0.03  # over 5 standard errors of a covariance


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (dist.Gamma(2.0, 1.0), "no quantile function"),
        (dist.Bernoulli(0.5), "discrete"),
        (dist.Poisson(3.0), "discrete"),
        (dist.Categorical(torch.ones(3)), "discrete"),
    ],
)
def test_priors_that_cannot_be_mapped_are_refused(law, message: str) -> None:
    def model(y=None):
        x = pyro.sample("x", PRIOR)
        a = pyro.sample("a", law)
        return pyro.sample("y", dist.Normal(x + a, 1.0).to_event(1), obs=y)

    with pytest.raises(sd.UnmappablePrior, match=f"'a'.*{message}"):
        sd.SMC(sd.TDS(model), num_particles=2, progress=False).run(torch.zeros(2, dtype=F64))
