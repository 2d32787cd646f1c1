"""Particle Gibbs and marginal Metropolis-Hastings leave the exact posterior invariant, for few particles."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import smcdiff as sd
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc.conditional import ConditionalSMC, Past
from smcdiff.smc.distributed import ChainsOverRanks
from smcdiff.smc.resampling import Multinomial, Systematic
from tests.guidance.exact import chain_density, chain_law

F64 = torch.float64
MEAN = torch.tensor([0.5, -0.5], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=F64)
A = torch.tensor([[1.0, 1.0]], dtype=F64)
Y = torch.tensor([2.0], dtype=F64)
SIGMA = 0.7
#: 10 tests use it, so that all of them together fail by chance with probability below 1e-5.
FALSE_ALARM = 1e-6


def gaussian_prior(steps: int = 10) -> sd.DiffusionPrior:
    denoiser = sd.GaussianDenoiser(MEAN, COVARIANCE)
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), steps, variance="optimal", grid=sd.KarrasGrid())


def mixture_prior(steps: int = 10) -> sd.DiffusionPrior:
    denoiser = sd.GaussianMixtureDenoiser(
        torch.tensor([[-2.0], [2.0]], dtype=F64), 0.4 * torch.eye(1, dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    )
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), steps, variance="optimal", grid=sd.KarrasGrid())


def gaussian_model(y=None):
    x = pyro.sample("x", gaussian_prior())
    return pyro.sample("y", dist.Normal(A @ x, SIGMA).to_event(1), obs=y)


@functools.cache
def exact_paths(number: int = 400):
    """One path for each of ``number`` chains with the posterior's law: a path of a filter with n particles is off by
    O(1 / n) only, and n = 1000 makes that invisible to ``number`` draws."""
    kernel = sd.TDS(gaussian_model, sd.WidenedTwist(0.5))
    model = TwistedModel(Program(kernel.model, (Y,)), kernel)
    return model, ConditionalSMC().first(model, 1000, number, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    "moves",
    [
        ConditionalSMC(),
        ConditionalSMC(ess_threshold=0.5, resampler=Systematic()),
        ConditionalSMC(past=Past.BACKWARD_SAMPLED, resampler=Multinomial()),
        ConditionalSMC(past=Past.TRACED),
    ],
    ids=["ancestor", "ancestor, systematic", "backward", "traced"],
)
def test_gaussian_posterior_is_invariant(n: int, moves: ConditionalSMC) -> None:
    """Started from the posterior, x is still distributed as the posterior after eight sweeps with n particles: the
    standardised coordinates are uniform under their normal law (Kolmogorov-Smirnov)."""
    model, path = exact_paths()
    generator = torch.Generator().manual_seed(n)
    for _ in range(8):
        path = moves.update(model, path, n, generator)
    x = path[-1]["x"][:, 0]
    posterior, _ = chain_law(gaussian_prior(), MEAN, COVARIANCE).given(A, Y, SIGMA)
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(posterior.covariance), (x - posterior.mean).mT, upper=False
    ).flatten()
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > FALSE_ALARM


def test_a_wrong_weight_would_be_seen() -> None:
    """The same statistic rejects the law that too few particles without correction give."""
    kernel = sd.TDS(gaussian_model, sd.WidenedTwist(0.5))
    smc = sd.SMC(kernel, num_particles=2, num_chains=400, seed=0, progress=False).run(Y)
    x = smc.posterior.values["x"][:, 0]  # a particle taken without its weight
    posterior, _ = chain_law(gaussian_prior(), MEAN, COVARIANCE).given(A, Y, SIGMA)
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(posterior.covariance), (x - posterior.mean).mT, upper=False
    ).flatten()
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue < FALSE_ALARM


def test_sweeps_mend_a_poor_run_on_a_mixture() -> None:
    """A bootstrap filter with 4 particles finds the modes' weights only by many sweeps of particle Gibbs."""
    prior = mixture_prior()
    y = torch.tensor([-1.0], dtype=F64)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    grid = torch.linspace(-7, 7, 801, dtype=F64)
    joint = chain_density(prior, grid) * dist.Normal(grid, 1.0).log_prob(y).exp()
    exact = float(joint[grid < 0].sum() / joint.sum())

    def left_share(sweeps: int, warmup: int) -> tuple[float, float]:
        kernel = sd.Bootstrap(model)
        run = sd.ParticleGibbs(kernel, 4, sweeps, 200, warmup=warmup, seed=1, progress=False).run(y)
        left = (run.get_samples(group_by_chain=True)["x"][..., 0] < 0).double().mean(1)
        return float(left.mean()), float(left.std()) / 200**0.5

    mean, error = left_share(sweeps=30, warmup=10)
    assert error < 0.02
    assert abs(mean - exact) < 5 * error, (mean, exact, error)  # 5 standard errors over independent chains
    poor = sd.SMC(sd.Bootstrap(model), num_particles=4, num_chains=4000, seed=2, progress=False).run(y)
    run = poor.posterior
    share = (run.within_chain_log_w.exp() * (run.values["x"][..., 0] < 0)).sum(1)
    assert abs(float(share.mean()) - exact) > 5 * float(share.std()) / 4000**0.5  # one filter of 4 alone is off


def test_marginal_metropolis_on_a_noise_level() -> None:
    """The noise level's posterior, against quadrature, with filters of 12 particles; the picture comes along."""
    law = chain_law(gaussian_prior(), MEAN, COVARIANCE)
    y = torch.tensor([2.0, -0.5, 0.4, 1.0], dtype=F64)
    rows = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=F64)

    def model(y=None):
        x = pyro.sample("x", gaussian_prior())
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0, dtype=F64), 0.5))
        return pyro.sample("y", dist.Normal(rows @ x, sigma).to_event(1), obs=y)

    grid = torch.linspace(-6, 6, 1201, dtype=F64)
    terms = [law.given(rows, y, float(s)) for s in torch.exp(0.5 * grid)]
    weight = torch.exp(-0.5 * grid**2 + torch.tensor([log_z for _, log_z in terms], dtype=F64))
    exact_sigma = float((weight * torch.exp(0.5 * grid)).sum() / weight.sum())
    exact_x = (weight[:, None] * torch.stack([posterior.mean for posterior, _ in terms])).sum(0) / weight.sum()

    kernel = sd.TDS(model, sd.TweedieTwist())
    run = sd.MarginalMH(kernel, ["sigma"], 12, 80, 48, warmup=15, step_size=1.0, seed=0, progress=False).run(y)
    draws = run.get_samples(group_by_chain=True)
    assert run.acceptance is not None and 0.2 < float(run.acceptance.mean()) < 0.9
    for got, exact in ((draws["sigma"][..., None], torch.tensor([exact_sigma])), (draws["x"], exact_x)):
        means = got.mean(1)
        error = means.std(0) / 48**0.5
        assert bool((error < 0.06).all())
        assert bool(((means.mean(0) - exact).abs() < 5 * error).all()), (means.mean(0), exact, error)


def bounded_model(y=None):
    """y = 1 says that |x_0 + shift - 1| is below a half, and nothing else is possible."""
    x = pyro.sample("x", gaussian_prior())
    shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    inside = (x[0] + shift - 1).abs() < 0.5
    return pyro.sample("y", dist.Poisson(inside.to(F64)), obs=y)


def test_marginal_metropolis_rejects_where_all_weights_are_zero() -> None:
    """With six particles of the prior most estimates are zero at most values of the shift; against quadrature."""
    one = torch.ones((), dtype=F64)
    law = chain_law(gaussian_prior(), MEAN, COVARIANCE)
    grid = torch.linspace(-6, 6, 2001, dtype=F64)
    normal = torch.distributions.Normal(law.mean[0], law.covariance[0, 0].sqrt())
    weight = torch.exp(-0.5 * grid**2) * (normal.cdf(1.5 - grid) - normal.cdf(0.5 - grid))
    first, second = ((weight * grid**k).sum() / weight.sum() for k in (1, 2))

    numbers = {"num_particles": 6, "num_steps": 150, "num_chains": 64, "warmup": 60, "step_size": 1.0}
    run = sd.MarginalMH(sd.Bootstrap(bounded_model), ["shift"], **numbers, seed=1, progress=False).run(one)
    draws = run.get_samples(group_by_chain=True)
    shift, x = draws["shift"], draws["x"][..., 0]
    assert bool(((x + shift - 1).abs() < 0.5).all())
    assert run.acceptance is not None and float(run.acceptance.mean()) < 0.5
    # Student's test over the chains' means, 5 standard errors of 64: 5e-6 each
    for got, exact in ((shift, first), (shift**2, second)):
        means = got.mean(1)
        assert float((means.mean() - exact).abs()) < 5 * float(means.std()) / 8 < 0.5


def test_marginal_metropolis_that_finds_nothing_possible_says_so() -> None:
    def impossible(y=None):
        shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        rate = pyro.sample("x", gaussian_prior())[0] * 0 + (shift > 90).to(F64)
        return pyro.sample("y", dist.Poisson(rate), obs=y)

    with pytest.raises(sd.smc.FilterError, match=r"chains \[0, 1\] of 2, so they have found no possible values"):
        sd.MarginalMH(sd.Bootstrap(impossible), ["shift"], 2, 3, 2, seed=0, progress=False).run(Y[0] / 2)


def test_what_cannot_be_moved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sites \['x'\] to move.*latents \[\]"):
        sd.MarginalMH(sd.TDS(gaussian_model), ["x"], 4, 2, progress=False).run(Y)
    with pytest.raises(TypeError, match="filter of type ChainsOverRanks"):
        sd.MarginalMH(sd.TDS(lambda: None), ["a"], 2, 2, filter=ChainsOverRanks())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_particles 1"):
        sd.ParticleGibbs(sd.TDS(gaussian_model), 1, 2)
    with pytest.raises(RuntimeError, match="not run yet"):
        sd.ParticleGibbs(sd.TDS(gaussian_model), 2, 2).get_samples()
