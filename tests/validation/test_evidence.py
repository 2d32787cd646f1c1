"""Bayes factors between programs from runs of the filter, against exact evidence."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diagnostics.evidence import compare_evidence
from tests.guidance.exact import chain_density, chain_law

F64 = torch.float64


def run(model, y: torch.Tensor, n: int = 100) -> sd.SMC:
    return sd.SMC(sd.TDS(model, sd.TweedieTwist()), n, 24, seed=1, progress=False).run(y)


def check(comparison, exact: dict[str, float]) -> None:
    """log Z and log Bayes factors within 5 of their errors, which are small; as tests.guidance.exact.check_evidence."""
    truth = torch.tensor([exact[name] for name in comparison.names], dtype=F64)
    assert float(comparison.error.max()) < 0.1
    assert bool(((comparison.log_evidence - truth).abs() < 5 * comparison.error + 1e-3).all())
    factors = truth[:, None] - truth
    off = comparison.log_bayes_factor - factors
    assert bool((off.abs() < 5 * comparison.log_bayes_factor_error + 2e-3).all())
    probability = truth.softmax(0)
    assert bool(((comparison.probability - probability).abs() < 5 * comparison.probability_error + 1e-3).all())


def test_operators_noise_levels_and_priors_of_gaussian_programs() -> None:
    d = 3
    eye = torch.eye(d, dtype=F64)
    A = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 1.0]], dtype=F64)
    y = torch.tensor([1.0, -0.5], dtype=F64)
    settings = {  # operator, noise, prior's mean
        "as it was": (A, 0.5, 0.0),
        "other operator": (A.flip(1), 0.5, 0.0),
        "more noise": (A, 1.5, 0.0),
        "other prior": (A, 0.5, 1.0),
    }
    runs, exact = {}, {}
    for name, (operator, sigma, centre) in settings.items():
        mean = torch.full((d,), centre, dtype=F64)
        prior = sd.DiffusionPrior(
            sd.GaussianDenoiser(mean, eye), sd.VPSchedule(), 20, variance="optimal", grid=sd.KarrasGrid()
        )

        def model(y=None, prior=prior, operator=operator, sigma=sigma):
            x = pyro.sample("x", prior)
            return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(operator), x, sigma), obs=y)

        law = chain_law(prior, mean, eye)
        total = operator @ law.covariance @ operator.mT + sigma**2 * torch.eye(2, dtype=F64)
        exact[name] = float(MultivariateNormal(operator @ law.mean, total).log_prob(y))
        runs[name] = run(model, y).posterior
    found = compare_evidence(runs)
    check(found, exact)
    assert set(found.loo) == set(settings) and "more noise" in str(found)


def test_mixture_priors_and_noise_laws() -> None:
    grid = torch.linspace(-12, 12, 1201, dtype=F64)
    width = float(grid[1] - grid[0])
    y = torch.tensor([1.7], dtype=F64)
    runs, exact = {}, {}
    for name, shares, sigma in (
        ("even", [0.5, 0.5], 1.0),
        ("uneven", [0.9, 0.1], 1.0),
        ("even, more noise", [0.5, 0.5], 2.0),
    ):
        denoiser = sd.GaussianMixtureDenoiser(
            torch.tensor([[-2.0], [2.5]], dtype=F64),
            torch.tensor([0.5, 0.3], dtype=F64).reshape(2, 1, 1),
            torch.tensor(shares, dtype=F64),
        )
        prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 20, variance="optimal", grid=sd.KarrasGrid())

        def model(y=None, prior=prior, sigma=sigma):
            x = pyro.sample("x", prior)
            return pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

        joint = chain_density(prior, grid) * dist.Normal(grid, sigma).log_prob(y).exp()
        exact[name] = math.log(float(joint.sum()) * width)
        runs[name] = run(model, y, 200).posterior
    check(compare_evidence(runs), exact)


def test_a_run_without_evidence_is_refused() -> None:
    prior = sd.DiffusionPrior(sd.GaussianDenoiser(torch.zeros(1), torch.eye(1)), sd.VPSchedule(), 5)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    y = torch.zeros(1)
    with pytest.warns(UserWarning, match="point mass"):
        without = sd.SMC(sd.DPS(model), 1, 2, seed=0, progress=False).run(y)
    good = sd.SMC(sd.TDS(model), 4, 2, seed=0, progress=False).run(y)
    with pytest.raises(ValueError, match="'DPS'.*without evidence"):
        compare_evidence({"DPS": without.posterior, "TDS": good.posterior})
