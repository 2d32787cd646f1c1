"""Particle Gibbs and marginal Metropolis-Hastings leave the exact posterior invariant, for few particles."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import smcdiff as sd
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc.conditional import ConditionalSMC, Past, Path
from smcdiff.smc.distributed import ChainsOverRanks
from smcdiff.smc.resampling import Multinomial, Systematic
from tests.guidance.exact import NormalLaw, chain_density, chain_law

F64 = torch.float64
MEAN = torch.tensor([0.5, -0.5], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=F64)
A = torch.tensor([[1.0, 1.0]], dtype=F64)
Y = torch.tensor([2.0], dtype=F64)
SIGMA = 0.7
#: A path has 22 coordinates: 22 means, 253 second moments and 22 distribution functions. One of these 297 normal scores
#: is above 6 with probability 6e-7, below 1e-6 with the squares' heavier tails: 1e-5 for the 9 tests that stay below.
LIMIT = 6.0


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


def path_law(prior: sd.DiffusionPrior) -> NormalLaw:
    """The exact law of the whole path (x_K ... x_0) of a Gaussian prior, from its chain's affine transitions."""
    chain, size, eye = prior.chain, len(MEAN), torch.eye(len(MEAN), dtype=F64)
    mean, root = chain.initial_mean, chain.initial_scale * eye  # path = mean + root noise
    points = torch.cat([torch.zeros_like(MEAN)[None], eye])
    for k in range(chain.num_steps, 0, -1):
        law = chain.transition(k, points, chain.estimate(k, points))
        forward, scale = (law.mean[1:] - law.mean[0]).mT, law.variance.expand(points.shape)[0].sqrt()
        mean = torch.cat([mean, forward @ mean[-size:] + law.mean[0]])
        old, fresh = torch.cat([root, forward @ root[-size:]]), torch.cat([0 * root[:, :size], scale.diag()])
        root = torch.cat([old, fresh], 1)
    return NormalLaw(mean, root @ root.mT)


@functools.cache
def exact_paths(number: int = 8_000) -> tuple[TwistedModel, NormalLaw, Path]:
    """Particle Gibbs with a poor twist, the posterior's exact law on whole paths, and ``number`` independent draws."""
    kernel = sd.TDS(gaussian_model, sd.WidenedTwist(0.1))
    model = TwistedModel(Program(kernel.model, (Y,)), kernel)
    prior = path_law(gaussian_prior())
    last = torch.cat([torch.zeros(1, len(prior.mean) - len(MEAN), dtype=F64), A], 1)
    law, log_z = prior.given(last, Y, SIGMA)
    own, own_log_z = chain_law(gaussian_prior(), MEAN, COVARIANCE).given(A, Y, SIGMA)
    torch.testing.assert_close(law.mean[-2:], own.mean)
    torch.testing.assert_close(law.covariance[-2:, -2:], own.covariance)
    assert math.isclose(log_z, own_log_z, abs_tol=1e-8)
    noise = torch.randn((number, len(law.mean)), generator=torch.Generator().manual_seed(0), dtype=F64)
    x = (law.mean + noise @ torch.linalg.cholesky(law.covariance).mT).unflatten(1, (-1, len(MEAN)))
    path = tuple(model.evaluate(model.num_steps - i, {"x": x[:, i, None]})[0] for i in range(model.num_steps + 1))
    return model, law, path


def largest_score(law: NormalLaw, path: Path) -> float:
    """The largest score of all whole paths, in coordinates that the exact law makes independent normals.

    Means and second moments in standard errors of the exact law, and Kolmogorov-Smirnov of each coordinate as the
    normal score of its p-value.
    """
    x = torch.cat([particles["x"].flatten(1) for particles in path], 1)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(law.covariance), (x - law.mean).mT, upper=False).mT
    number, eye = len(z), torch.eye(z.shape[1], dtype=F64)
    first = z.mean(0) * number**0.5
    second = (z.mT @ z / number - eye) * torch.sqrt(number / (1 + eye))
    p_values = scipy.stats.kstest(z.numpy(), "norm", axis=0).pvalue
    normal = scipy.stats.norm.isf(p_values.clip(1e-300) / 2)
    return max(float(first.abs().max()), float(second.abs().max()), float(normal.max()))


def updated(moves: ConditionalSMC, n: int, updates: int = 8) -> Path:
    model, _, path = exact_paths()
    generator = torch.Generator().manual_seed(n)
    for _ in range(updates):
        path = moves.update(model, path, n, generator)
    return path


MOVES = {
    "ancestor": ConditionalSMC(),
    "ancestor, some chains": ConditionalSMC(ess_threshold=0.75, resampler=Systematic()),
    "backward": ConditionalSMC(past=Past.BACKWARD_SAMPLED, resampler=Multinomial()),
    "traced": ConditionalSMC(past=Past.TRACED),
}


def test_exact_paths_have_a_small_score() -> None:
    _, law, path = exact_paths()
    assert largest_score(law, path) < LIMIT


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", MOVES)
def test_gaussian_posterior_is_invariant(n: int, name: str) -> None:
    """Started from the posterior, whole paths still have the posterior's law after eight sweeps of n particles."""
    _, law, start = exact_paths()
    path = updated(MOVES[name], n)
    assert float((path[-1]["x"] != start[-1]["x"]).any(-1).double().mean()) > 0.8, "many paths must have moved"
    assert largest_score(law, path) < LIMIT


@pytest.mark.parametrize(
    ("name", "method", "factor"),
    [(name, "log_potential", factor) for name in MOVES for factor in (2.0, 0.0)]
    + [(name, "log_transition", factor) for name in MOVES if name != "traced" for factor in (0.0, 0.5)],
)
def test_wrong_weights_are_seen(monkeypatch: pytest.MonkeyPatch, name: str, method: str, factor: float) -> None:
    """The same score is large for kernels with a wrong potential or a wrong transition, which tracing never asks.

    Two particles show it best, but four where traced paths coalesce on the reference.
    """
    right = getattr(TwistedModel, method)
    monkeypatch.setattr(TwistedModel, method, lambda *given: factor * right(*given))
    assert largest_score(exact_paths()[1], updated(MOVES[name], 4 if name == "traced" else 2)) > 1.5 * LIMIT


def test_too_few_particles_without_correction_are_seen() -> None:
    """A plain filter's path with two particles does not have the posterior's law."""
    model, law, path = exact_paths()
    poor = ConditionalSMC().first(model, 2, len(path[0]["x"]), torch.Generator().manual_seed(0))
    assert largest_score(law, poor) > 1.5 * LIMIT


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
