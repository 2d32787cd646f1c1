"""The width by evidence, on Gaussian fields, of which the evidence is known for every width."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import smcdiff as sd
from examples.wafer_study import programs, quadrature
from examples.wafer_study.problems import Problem, Setting
from examples.wafer_study.quadrature import by_evidence, parabola
from smcdiff.transforms import hartley
from smcdiff.zoo.wafer import WaferPicture

D = torch.float64
SIDE, STEPS, PARTICLES, CHAINS = 24, 3, 4, 4


def spectrum() -> Tensor:
    f = torch.fft.fftfreq(SIDE, dtype=D) * SIDE
    power = (1 + f[:, None] ** 2 + f**2) ** -1.5
    return (power / power.mean())[None]


def measured_field(width: float) -> Problem:
    """A draw of the field in the place of a wafer's picture."""
    generator = torch.Generator().manual_seed(0)
    image = hartley(spectrum().sqrt() * torch.randn(1, SIDE, SIDE, generator=generator, dtype=D))[0].numpy()
    picture = WaferPicture(image, image, image, np.zeros(image.shape, dtype=bool), "lines", None)
    return Problem(1, picture, Setting(width, dose=30), seed=0)


@dataclass(frozen=True, eq=False)
class Exact:
    """Moments of the posterior of u = log width, of the kernel, and of x in Hartley coordinates."""

    u: float
    sd_u: float
    kernel: Tensor
    x: Tensor
    variance: Tensor


def exact(problem: Problem) -> Exact:
    """By the trapezium rule over u, 6 deviations of the prior to either side of its median of 1.4 pixels.

    Given u the field's coordinates are independent: y_i ~ N(0, lambda_i h_i^2 + sigma^2), h the transfer function.
    """
    lam, sigma, y = spectrum(), problem.sigma, hartley(problem.y.double())
    u = torch.linspace(math.log(1.4) - 2.4, math.log(1.4) + 2.4, 1201, dtype=D)
    r = torch.arange(SIDE) - SIDE // 2
    square = (r[:, None] ** 2 + r**2).to(D)
    window = (r.abs() <= 10) & (r.abs()[:, None] <= 10)  # the study's kernels have 21 x 21 pixels
    k = torch.where(window, torch.exp(-0.5 * square / (2 * u).exp()[:, None, None]), 0.0)
    k = k / k.sum((-2, -1), keepdim=True)
    h = torch.fft.fft2(torch.fft.ifftshift(k, dim=(-2, -1))).real[:, None]
    total = lam * h**2 + sigma**2
    log_posterior = Normal(0.0, total.sqrt()).log_prob(y).sum((1, 2, 3)) + Normal(math.log(1.4), 0.4).log_prob(u)
    w = log_posterior.softmax(0)

    def mean(values: Tensor) -> Tensor:
        return torch.einsum("u,u...->...", w, values)

    given, centre = lam * h / total * y, float(w @ u)
    variance = mean(lam * sigma**2 / total + given**2) - mean(given) ** 2
    inner = k[:, SIDE // 2 - 10 : SIDE // 2 + 11, SIDE // 2 - 10 : SIDE // 2 + 11]
    return Exact(centre, math.sqrt(float(w @ (u - centre) ** 2)), mean(inner), mean(given), variance)


@pytest.mark.parametrize("width", [0.8, 2.6])
def test_the_posterior_of_width_and_picture_is_exact(width: float) -> None:
    """Widths to either side of the prior's median; the prior moves the mean by a quarter of a deviation.

    Tilted's evidence is exact here, so that three nodes leave what the posterior of u has beyond a normal law: 0.02
    deviations of the mean and 2 % of the deviation are measured, and more than twice as much fails. The mean of x is of
    16 draws or a little less: the 576 squares below are of mean 1, nearly independent, and their mean is below 0.7 or
    above 1.3 with probability 2e-6 (chi-squared law by Wilson and Hilferty's formula).
    """
    problem = measured_field(width)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, SIDE, SIDE, dtype=D), spectrum())
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=STEPS, grid=sd.KarrasGrid(), variance="full")
    found, truth = by_evidence(problem, prior, PARTICLES, CHAINS), exact(problem)
    assert found.more["log width"] == pytest.approx(truth.u, abs=0.05 * truth.sd_u)
    assert found.more["sd of log width"] == pytest.approx(truth.sd_u, rel=0.05)
    assert found.kernel is not None and float((found.kernel - truth.kernel).abs().sum()) < 4e-3
    draws = PARTICLES * CHAINS
    of_node = found.w.unflatten(0, (quadrature.FINE, draws)).sum(1)
    assert of_node.tolist() == pytest.approx([1 / 6, 2 / 3, 1 / 6], abs=0.05)  # the rule's own, for a normal law
    assert float(of_node.sum()) == pytest.approx(1)
    assert 0.9 * draws < found.more["effective draws"] <= draws + 1e-9
    squares = (hartley(found.mean.double()) - truth.x) ** 2 / truth.variance * found.more["effective draws"]
    assert float(squares.mean()) == pytest.approx(1, abs=0.3)
    scouts = (quadrature.COARSE + 3 * quadrature.ROUNDS) * quadrature.SCOUTS
    passes = 2 * STEPS * (scouts + quadrature.FINE * draws)  # Tilted takes two a particle and step
    assert (found.forward, found.back) == (passes / draws, 0)


def test_the_prior_of_the_width_is_as_above() -> None:
    assert (programs.PHYSICAL.median, programs.PHYSICAL.spread, programs.PHYSICAL.size) == (1.4, 0.4, 21)


def test_a_parabola_is_found_exactly() -> None:
    u = np.linspace(-1, 1, 7)
    mean, spread = parabola(u, -0.5 * ((u - 0.2) / 0.3) ** 2 + 5)
    assert mean == pytest.approx(0.2) and spread == pytest.approx(0.3)


def test_a_best_node_at_the_end_is_kept() -> None:
    u = np.linspace(-1, 1, 5)
    assert parabola(u, u) == (1.0, 0.5)
