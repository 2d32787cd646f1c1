"""The posterior score of programs against autograd on closed-form densities, and the discrepancy on mixtures."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diagnostics.stein import median_distance
from smcdiff.validation.score import posterior_score, stein_discrepancy
from tests.validation.mixture import (
    COVARIANCES,
    MEANS,
    SIGMA,
    WEIGHTS,
    A,
    Exact,
    energy_distance,
    prior,
    program,
    rank_correlation,
    samplers,
)

F64 = torch.float64


@pytest.mark.parametrize("level", [1, 7])
@pytest.mark.parametrize("schedule", [sd.VPSchedule(), sd.VESchedule(0.05, 20.0)], ids=["VP", "VE"])
def test_score_of_the_blurred_posterior(schedule, level: int) -> None:
    """Mixture prior, a noise level that is itself a latent, and one bounded on both sides: log pi_rho in closed
    form."""
    law = sd.DiffusionPrior(sd.GaussianMixtureDenoiser(MEANS, COVARIANCES, WEIGHTS), schedule, 20)
    y = torch.tensor([0.4], dtype=F64)

    def model(y=None):
        x = pyro.sample("x", law)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.5))
        offset = pyro.sample("offset", dist.Uniform(torch.tensor([-1.0], dtype=F64), sigma))
        pyro.deterministic("twice", 2 * sigma)
        return pyro.sample("y", dist.Normal((A @ x) + offset, sigma).to_event(1), obs=y)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, dtype=F64, generator=generator).requires_grad_()
    u = torch.randn(5, dtype=F64, generator=generator).requires_grad_()  # log sigma
    v = torch.randn(5, 1, dtype=F64, generator=generator).requires_grad_()  # logit of the place in (-1, sigma)
    sigma, place = u.exp(), v.sigmoid()
    offset = -1 + (sigma[:, None] + 1) * place
    found = posterior_score(
        model, {"y": y}, {"x": x.detach(), "sigma": sigma.detach(), "offset": offset.detach()}, level
    )
    rho = law.chain.levels[level].ratio
    blurred = MultivariateNormal(MEANS, COVARIANCES + rho**2 * torch.eye(2, dtype=F64))
    log_density = (
        (WEIGHTS.log() + blurred.log_prob(x[:, None])).logsumexp(1)
        + torch.distributions.Normal(-1.0, 0.5).log_prob(u)
        + (place.log() + (1 - place).log())[:, 0]
        + torch.distributions.Normal((x @ A.T + offset)[:, 0], sigma).log_prob(y)
    )
    gradients = torch.autograd.grad(log_density.sum(), (x, u, v))
    for name, coordinate, gradient in zip(("x", "sigma", "offset"), (x, u, v), gradients, strict=True):
        torch.testing.assert_close(found.coordinates[name], coordinate.detach())
        torch.testing.assert_close(found.score[name], gradient, rtol=1e-6, atol=1e-8)
    assert found.rho == {"x": rho}
    coordinates, score = found.flat()
    assert coordinates.shape == score.shape == (5, 4)
    torch.testing.assert_close(score[:, 3], gradients[2][:, 0], rtol=1e-6, atol=1e-8)


def test_pictures_and_two_measurements() -> None:
    law = sd.DiffusionPrior(
        sd.GaussianDenoiser(torch.zeros(1, 2, 2, dtype=F64), torch.eye(4, dtype=F64)), sd.VPSchedule(), 9
    )

    def model(y=None, w=None):
        x = pyro.sample("x", law)
        pyro.sample("w", dist.Poisson(x.exp()).to_event(3), obs=w)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, 0.7), obs=y)

    x = torch.randn(3, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    y, w = torch.full((1, 2, 2), 0.3, dtype=F64), torch.full((1, 2, 2), 2.0, dtype=F64)
    found = posterior_score(model, {"y": y, "w": w}, {"x": x})
    exact = -x / (1 + found.rho["x"] ** 2) + (y - x) / 0.49 + w - x.exp()
    torch.testing.assert_close(found.score["x"], exact)


def test_discrepancy_follows_the_exact_error_over_methods() -> None:
    """Thirteen samplers of a mixture posterior, over two measurements: the rank correlation of the discrepancy with the
    energy distance to exact draws is above 0.85 (it was 0.86, 0.98, 0.92 and 0.91 on four single measurements; for
    unrelated ranks it is above 0.85 with probability 2e-4). Exact draws keep their p-value above 1e-3, those half as
    wide, shifted and from the prior do not, at seeds that are fixed."""
    model = program(prior())
    error: dict[str, float] = {}
    discrepancy: dict[str, float] = {}
    for seed, value in enumerate((0.8, -1.2)):
        torch.manual_seed(seed)
        y = {"y": torch.tensor([value], dtype=F64)}
        reference = Exact(y["y"]).sample(2000)
        scale = median_distance(reference[:300])
        for name, sampler in samplers(model, 300).items():
            draws = sampler(y)
            found = stein_discrepancy(model, y, {"x": draws}, scale=scale)
            error[name] = error.get(name, 0.0) + energy_distance(draws, reference)
            discrepancy[name] = discrepancy.get(name, 0.0) + found.u_statistic
            if name == "exact":
                assert found.p_value > 1e-3
            elif name in ("half as wide", "shifted", "prior"):
                assert found.p_value < 0.005
    assert rank_correlation(error, discrepancy) > 0.85


def test_weighted_draws_stand_for_what_they_weigh() -> None:
    """Draws from N(m, 2 C) with importance weights against the posterior N(m, C): the weighted discrepancy is a third
    of the unweighted one or less, at a fixed seed."""
    law = sd.DiffusionPrior(
        sd.GaussianDenoiser(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)), sd.VPSchedule(), 20
    )
    model = program(law)
    total = A.T @ A / SIGMA**2 + torch.eye(2, dtype=F64)
    covariance = torch.linalg.inv(total)
    mean = covariance @ A.T @ torch.tensor([0.5], dtype=F64) / SIGMA**2
    torch.manual_seed(0)
    wide = MultivariateNormal(mean, 2 * covariance)
    x = wide.sample((2000,))
    log_w = MultivariateNormal(mean, covariance).log_prob(x) - wide.log_prob(x)
    y = {"y": torch.tensor([0.5], dtype=F64)}
    plain = stein_discrepancy(model, y, {"x": x}, scale=1.0)
    weighted = stein_discrepancy(model, y, {"x": x}, scale=1.0, log_w=log_w + 5)
    assert weighted.ksd < plain.ksd / 3


def test_refusals() -> None:
    law = prior()
    model = program(law)
    y, x = {"y": torch.zeros(1, dtype=F64)}, {"x": torch.zeros(3, 2, dtype=F64)}
    with pytest.raises(ValueError, match="level 41"):
        posterior_score(model, y, x, level=41)
    with pytest.raises(ValueError, match="no values of the latents \\['x'\\]"):
        posterior_score(model, y, {"z": torch.zeros(3)})
    clipped = sd.DiffusionPrior(law.chain.denoiser, sd.VPSchedule(), 10, clip=(-1.0, 1.0))
    with pytest.raises(ValueError, match="clip"):
        posterior_score(program(clipped), y, x)

    def discrete(y=None):
        group = pyro.sample("group", dist.Bernoulli(0.5))
        return pyro.sample("y", dist.Normal(group, 1.0), obs=y)

    with pytest.raises(ValueError, match="discrete"):
        posterior_score(discrete, {"y": torch.zeros(())}, {"group": torch.zeros(3)})
