"""The tilted denoiser: the conditional mean against closed forms, the weights against written-out densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import smcdiff as sd
from smcdiff.guidance.base import Prediction, SiteStep
from smcdiff.guidance.program import Program
from smcdiff.guidance.tilted import Tilted
from smcdiff.transforms import hartley

D = torch.float64
SIDE = 8
#: A blur of 3 x 3 and a mask that hides a third of the pixels.
KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], dtype=D) / 16
SEEN = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) < 0.67
OPERATORS = {
    "identity": sd.Identity(),
    "blur": sd.Blur(KERNEL),
    "mask": sd.Select(SEEN),
    "both": sd.Compose(sd.Select(SEEN), sd.Blur(KERNEL)),
}


def spectrum() -> Tensor:
    f = torch.fft.fftfreq(SIDE, dtype=D) * SIDE
    power = (1 + f[:, None] ** 2 + f**2) ** -1.5
    return (power / power.mean())[None]


def field_program(operator: Any, num_steps: int) -> Callable[[Tensor], None]:
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, SIDE, SIDE, dtype=D), spectrum())
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=num_steps, grid=sd.KarrasGrid())

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), 0.3), obs=y)

    return model


@pytest.mark.parametrize("name", OPERATORS)
def test_a_gaussian_field_is_exact(name: str) -> None:
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    x = hartley(spectrum().sqrt() * torch.randn(1, SIDE, SIDE, generator=generator, dtype=D))
    y = operator(x)
    y = y + 0.3 * torch.randn(y.shape, generator=generator, dtype=D)
    rows = torch.stack([operator(e).flatten() for e in hartley(torch.eye(SIDE**2, dtype=D).reshape(-1, 1, SIDE, SIDE))])
    covariance = rows.mT @ (spectrum().flatten()[:, None] * rows) + 0.09 * torch.eye(rows.shape[1], dtype=D)
    exact = MultivariateNormal(torch.zeros(rows.shape[1], dtype=D), covariance).log_prob(y.flatten())
    smc = sd.SMC(Tilted(field_program(operator, 5)), num_particles=8, seed=1, progress=False).run(y)
    # what is left is x_T, drawn from N(0, I) in the place of N(0, alpha_T^2 C + sigma_T^2 I)
    torch.testing.assert_close(smc.log_evidence, exact, atol=0.05, rtol=0)
    assert float(smc.posterior.log_w.std()) < 0.15
    assert smc.network_evaluations == (2 * 5 * 8, 0)


class Trained:
    """A mixture's exact denoiser that does not tell its covariance, as a network does not."""

    event_shape, dtype, device = torch.Size([3]), D, torch.device("cpu")
    mixture = sd.GaussianMixtureDenoiser(
        torch.tensor([[2.0, 0.0, -1.0], [-2.0, 1.0, 0.5], [0.0, -2.0, 1.0]], dtype=D),
        0.2 * torch.eye(3, dtype=D),
        torch.tensor([0.5, 0.3, 0.2], dtype=D),
    )

    def __call__(self, x_t: Tensor, level: sd.NoiseLevel) -> sd.Estimate:
        return sd.Estimate(self.mixture(x_t, level).mean)


def mixture_program(num_steps: int = 8, sigma: float = 0.7) -> Callable[[Tensor], None]:
    covariance = sd.SpectralCovariance(torch.tensor([2.0, 1.5, 1.0], dtype=D), "pixels")
    prior = sd.DiffusionPrior(
        Trained(), sd.VPSchedule(), num_steps=num_steps, grid=sd.KarrasGrid(), covariance=covariance
    )

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), sigma), obs=y)

    return model


Y = torch.tensor([0.4, 0.1, -0.3], dtype=D)


def at_level(method: Tilted, k: int) -> tuple[Prediction, dict[str, Tensor]]:
    program = Program(method.model, (Y,))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(k), dtype=D)
    chain = program.latents["x"].chain
    prediction = Prediction(program, k, {"x": x}, {"x": chain.estimate(k, x)})
    return prediction, method.proposal.carry(prediction)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_white_noise_has_the_exact_conditional_mean_of_any_prior(k: int) -> None:
    method = Tilted(mixture_program())
    prediction, carried = at_level(method, k)
    mean, _, covariances, information = method._adapted.looked(prediction)
    found = information.condition(mean, covariances).mean()["x"] + carried["away"]
    level = prediction.program.latents["x"].chain.levels[k]
    a, s, x = level.alpha, level.sigma, prediction.x["x"]
    mixture = Trained.mixture
    # x_t and y are two independent measurements of x_0: per component a product of normals
    precision = 1 / 0.2 + a**2 / s**2 + 1 / 0.49
    centres = (mixture.means / 0.2 + (a / s**2 * x + Y / 0.49)[:, None]) / precision
    fit = Normal(a * mixture.means, math.sqrt(a**2 * 0.2 + s**2)).log_prob(x[:, None]).sum(-1)
    after = 0.2 * s**2 / (a**2 * 0.2 + s**2)  # variance of x_0 given x_t and the component
    before = mixture.means + a * 0.2 / (a**2 * 0.2 + s**2) * (x[:, None] - a * mixture.means)
    fit = fit + Normal(before, math.sqrt(after + 0.49)).log_prob(Y).sum(-1)
    share = (mixture.log_weights + fit).softmax(-1)[..., None]
    torch.testing.assert_close(found, (share * centres).sum(1), atol=1e-8, rtol=0)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("tilt", [None, 0.0, 1.0])
def test_the_weight_is_the_ratio_of_written_out_densities(k: int, tilt: float | None) -> None:
    method = Tilted(mixture_program(), tilt=tilt)
    prediction, carried = at_level(method, k)
    step = SiteStep.at(prediction, "x")
    transition = method.proposal.transition({"x": step}, {}, carried)
    generator = torch.Generator().manual_seed(9)
    x = transition.sample(lambda shape: torch.randn(shape, generator=generator, dtype=D))
    to, m = step.coefficients, step.estimate.mean
    c = torch.tensor([2.0, 1.5, 1.0], dtype=D)
    c = 1 / (1 / c + to.t.ratio**-2)
    after = 1 / (1 / c + 1 / 0.49)
    m_y = m + after * (Y - m) / 0.49 + carried["away"]
    p = Normal(to.b * step.x + to.c * m, (to.kappa**2 + to.c**2 * c).sqrt())
    q = Normal(to.b * step.x + to.c * m_y, (to.kappa**2 + to.c**2 * after).sqrt())
    expected = (p.log_prob(x["x"]) - q.log_prob(x["x"])).sum(-1)
    torch.testing.assert_close(transition.log_ratio(x), expected, atol=1e-8, rtol=0)


def test_the_evidence_is_unbiased_and_weights_come_at_the_end() -> None:
    """2000 chains of 2 particles: each exp(log_z) has the chain's own evidence for its mean.

    Against 64 000 particles of another method on the same chain; failure probability below 1e-6 for 5 standard errors.
    """
    model = mixture_program(num_steps=4)
    smc = sd.SMC(Tilted(model, tilt=0.5), num_particles=2, num_chains=2000, seed=3, progress=False).run(Y)
    torch.testing.assert_close(smc.records.ess[:-1], torch.full_like(smc.records.ess[:-1], 2.0))
    other = sd.SMC(sd.Adapted(model), num_particles=64, num_chains=1000, seed=4, progress=False).run(Y)
    means, errors = [], []
    for log_z in (smc.log_evidence_per_chain, other.log_evidence_per_chain):
        z = (log_z - other.log_evidence).exp()
        means.append(float(z.mean()))
        errors.append(float(z.std() / len(z) ** 0.5))
    assert abs(means[0] - means[1]) < 5 * math.hypot(*errors)
    assert errors[0] < 0.05


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(ValueError, match="got tilt -1"):
        Tilted(mixture_program(), tilt=-1.0)
    lowrank = sd.DiffusionPrior(Trained.mixture, sd.VPSchedule(), num_steps=4)

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", lowrank), 0.7), obs=y)

    with pytest.raises(TypeError, match="one covariance for all particles"):
        sd.SMC(Tilted(model), num_particles=2, progress=False).run(Y)

    def two(y: Tensor) -> None:
        x = pyro.sample("x", lowrank) + pyro.sample("z", lowrank)
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, 0.7), obs=y)

    with pytest.raises(TypeError, match="one diffusion prior"):
        sd.SMC(Tilted(two), num_particles=2, progress=False).run(Y)
