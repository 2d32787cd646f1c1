"""A Gaussian-mixture prior measured through a row: its exact posterior, and samplers of known and unknown quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.validation.posteriors import SMCPosterior

F64 = torch.float64
MEANS = torch.tensor([[-1.5, 0.5], [0.5, 1.5], [1.5, -1.0]], dtype=F64)
COVARIANCES = torch.stack(
    [
        torch.tensor(rows, dtype=F64)
        for rows in ([[0.6, 0.2], [0.2, 0.5]], [[0.4, -0.1], [-0.1, 0.8]], [[0.5, 0], [0, 0.4]])
    ]
)
WEIGHTS = torch.tensor([0.3, 0.4, 0.3], dtype=F64)
A = torch.tensor([[1.0, 0.6]], dtype=F64)
SIGMA = 0.5


def prior(num_steps: int = 40) -> sd.DiffusionPrior:
    denoiser = sd.GaussianMixtureDenoiser(MEANS, COVARIANCES, WEIGHTS)
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, variance="optimal", grid=sd.KarrasGrid())


def program(law: sd.DiffusionPrior, sigma: float = SIGMA):
    def model(y=None):
        x = pyro.sample("x", law)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(A), x, sigma), obs=y)

    return model


class Exact:
    """The posterior of the mixture prior: a mixture again. ``width`` scales its draws about their component's mean,
    and ``shift`` moves them."""

    def __init__(self, y: Tensor, sigma: float = SIGMA) -> None:
        total = A @ COVARIANCES @ A.mT + sigma**2 * torch.eye(1, dtype=F64)
        gain = COVARIANCES @ A.mT @ torch.linalg.inv(total)
        residual = y - MEANS @ A.mT
        self.means = MEANS + (gain @ residual[..., None])[..., 0]
        self.covariances = COVARIANCES - gain @ A @ COVARIANCES
        fit = WEIGHTS.log() + MultivariateNormal(torch.zeros(1, dtype=F64), total).log_prob(residual)
        self.weights = fit.softmax(0)

    def sample(self, number: int, width: float = 1.0, shift: float = 0.0) -> Tensor:
        c = torch.multinomial(self.weights, number, replacement=True)
        noise = torch.linalg.cholesky(self.covariances)[c] @ torch.randn(number, 2, 1, dtype=F64)
        return self.means[c] + width * noise[..., 0] + shift


def samplers(model, number: int, sigma: float = SIGMA) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
    """Samplers of the posterior given {"y": y}, each giving (number, 2) draws; good ones and bad ones."""

    def perturbed(width: float = 1.0, shift: float = 0.0):
        return lambda y: Exact(y["y"], sigma).sample(number, width, shift)

    def run(kernel, n: int):
        return lambda y: SMCPosterior(kernel, n, number)(y).values["x"]

    return {
        "exact": perturbed(),
        "half as wide": perturbed(width=0.5),
        "a third as wide": perturbed(width=0.33),
        "shifted": perturbed(shift=0.4),
        "shifted far": perturbed(shift=0.8),
        "half again as wide": perturbed(width=1.5),
        "prior": run(sd.Bootstrap(model), 1),
        "bootstrap, 3 particles": run(sd.Bootstrap(model), 3),
        "bootstrap, 16 particles": run(sd.Bootstrap(model), 16),
        "DPS, step 0.2": run(sd.DPS(model, 0.2), 1),
        "DPS, step 0.6": run(sd.DPS(model, 0.6), 1),
        "twisted, 1 particle": run(sd.TDS(model, sd.WidenedTwist(1.3)), 1),
        "twisted, 8 particles": run(sd.TDS(model, sd.WidenedTwist(1.3)), 8),
    }


def energy_distance(x: Tensor, exact: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, zero for equal laws only; unbiased over independent draws."""

    def within(z: Tensor) -> float:
        return float(torch.pdist(z).mean())

    return 2 * float(torch.cdist(x, exact).mean()) - within(x) - within(exact)


def rank_correlation(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Spearman's, over the methods both have."""
    ranks = [
        torch.tensor(list(d.values()), dtype=F64).argsort().argsort().double()
        for d in (first, {k: second[k] for k in first})
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
