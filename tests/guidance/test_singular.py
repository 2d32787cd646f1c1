"""The algebra of the singular basis against dense matrices, and what all its methods have in common."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.guidance.base import Prediction, SiteStep
from smcdiff.guidance.ddnm import BODDNM, DDNM, DDNMPlus
from smcdiff.guidance.ddrm import DDRM
from smcdiff.guidance.diffpir import DiffPIR
from smcdiff.guidance.fps import FPS
from smcdiff.guidance.mcgdiff import MCGDiff
from smcdiff.guidance.program import Program
from smcdiff.guidance.singular import SingularTwist, conjugate, singular_measurement
from smcdiff.guidance.twisted import TwistedModel
from tests.guidance.exact import NormalLaw, weighted_moments
from tests.guidance.linear_problems import COVARIANCE, EYE, F64, MEAN, A, Y, gaussian_prior, program

SHAPE = (1, 4, 4)
METHODS = {
    "DDRM": lambda model: DDRM(model, eta_b=0.8),
    "DDNM": DDNM,
    "DDNM+": lambda model: DDNMPlus(model, min_variance=0.3),
    "BO-DDNM": BODDNM,
    "DiffPIR": DiffPIR,
    "MCGDiff": lambda model: MCGDiff(model, 0.1),
    "FPS": lambda model: FPS(model, None),
}
TALL = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 0.0], [2.0, 0.0, 0.0]], dtype=F64)  # rank 2 of 3 measured values


class Smoothing(torch.nn.Module):
    """A small convolutional eps-predictor."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(0.2 * torch.randn(1, 1, 3, 3, generator=generator, dtype=F64))

    def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
        return x / (1 + x.square()) + torch.nn.functional.conv2d(x, self.weight, padding=1)


def pictures(variance: str = "posterior") -> sd.DiffusionPrior:
    prior = sd.DiffusionPrior(sd.NetworkDenoiser(Smoothing(), SHAPE), sd.VPSchedule(), 8)
    if variance == "posterior":
        return prior
    images = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=F64)
    return prior.with_measured_variance(images)


@pytest.mark.parametrize("matrix", [A, TALL], ids=["wide", "rank-deficient"])
@pytest.mark.parametrize("k", [1, 10, 20])
def test_twist_is_the_dense_normal(matrix: torch.Tensor, k: int) -> None:
    y = torch.tensor([0.4, 1.1, -0.3], dtype=F64)[: len(matrix)]
    prior, sigma = gaussian_prior(), 0.7
    joint = Program(program(prior, sigma, sd.Matrix(matrix)), (y,))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    estimate = prior.chain.estimate(k, x)
    got = SingularTwist().log_psi(Prediction(joint, k, {"x": x}, {"x": estimate}))
    v = float(estimate.variance.mean())
    covariance = v * matrix @ matrix.T + sigma**2 * torch.eye(len(matrix), dtype=F64)
    expected = MultivariateNormal(estimate.mean @ matrix.T, covariance).log_prob(y)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_twist_of_a_network_takes_unit_variance_data() -> None:
    prior, sigma, k = pictures(), 0.5, 6
    operator = sd.Downsample(2)
    y = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    joint = Program(program(prior, sigma, operator), (y,))
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=F64)
    estimate = prior.chain.estimate(k, x)
    got = SingularTwist().log_psi(Prediction(joint, k, {"x": x}, {"x": estimate}))
    level = prior.chain.levels[k]
    v = level.sigma**2 / (level.sigma**2 + level.alpha**2) / 4  # A A^T = I / 4
    law = torch.distributions.Normal(operator(estimate.mean), (v + sigma**2) ** 0.5)
    torch.testing.assert_close(got, law.log_prob(y).flatten(1).sum(1))


def test_conjugate_is_the_dense_conditional() -> None:
    variance, noise = 0.6, 0.3
    here = singular_measurement(Program(program(gaussian_prior(), 0.5), (Y,)), "this test")
    mean = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    law, _ = conjugate(mean, torch.full((1, 1), variance, dtype=F64), here.y, noise, here)
    covariance = torch.linalg.inv(EYE / variance + A.T @ A / noise)
    torch.testing.assert_close(law.mean, (mean / variance + Y @ A / noise) @ covariance)
    v = here.svd.from_spectral(EYE).T
    torch.testing.assert_close(v @ law.variance.expand(1, 3)[0].diag() @ v.T, covariance)


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_an_operator_and_its_matrix_give_the_same_law(name: str, variance: str, k: int) -> None:
    """Pictures under a mask that weighs and hides pixels, and the same as a matrix: one mean, covariance and twist."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(SHAPE, generator=generator, dtype=F64) * (torch.rand(SHAPE, generator=generator) < 0.7)
    y, x = torch.randn(SHAPE, generator=generator, dtype=F64), torch.randn(3, *SHAPE, generator=generator, dtype=F64)
    prior = pictures(variance)
    covariances, means, twists = [], [], []
    for operator, value in (
        (sd.Mask(weights), y),
        (sd.Matrix(weights.flatten().diag(), event_shape=SHAPE), y.flatten()),
    ):
        method = METHODS[name](program(prior, 0.3, operator))
        joint = Program(method.model, (value,))
        with torch.no_grad():
            estimate = prior.chain.estimate(k, x)
        p = prior.chain.transition(k, x, estimate)
        twists.append(method.twist.log_psi(Prediction(joint, k, {"x": x}, {"x": estimate})))
        q = method.proposal.q(SiteStep(joint, "x", k, prior.chain.step(k), x, estimate, p, None))
        means.append(q.mean)
        if q.variance is not None:
            rows = q.basis.to_spectral(torch.eye(16, dtype=F64).reshape(16, *SHAPE)).flatten(1)  # V
            spread = q.variance.expand(q.mean.shape)[0].flatten()
            covariances.append(rows * spread @ rows.T)
    torch.testing.assert_close(means[0], means[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twists[0], twists[1], rtol=1e-9, atol=1e-9)
    assert len(covariances) == (0 if variance == "posterior" and k == 1 else 2)
    if covariances:
        torch.testing.assert_close(covariances[0], covariances[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*METHODS, "FPS with a path"])
def test_no_gradient_and_no_waiting_for_the_device(name: str) -> None:
    """Fake tensors hold no data and raise on every operation whose result the host would need."""
    y = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    method = METHODS.get(name, FPS)(program(pictures(), 0.5, sd.Downsample(2)))
    feynman_kac = TwistedModel(Program(method.model, (y,)), method)
    particles = feynman_kac.initial(2, 3, torch.Generator().manual_seed(0)).particles
    for i in range(1, 8):
        moved = feynman_kac.step(i, particles, torch.Generator().manual_seed(i))
        assert bool(moved.log_g.isfinite().all())
    assert feynman_kac.evaluations.backward == 0 and method.forward_only
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in particles.items()}
        for i in (1, 8):
            assert feynman_kac.step(i, fake, torch.Generator()).log_g.shape == (2, 3)


@pytest.mark.parametrize("name", ["DDRM", "DDNM+", "BO-DDNM", "DiffPIR", "MCGDiff", "FPS"])
def test_a_chain_of_full_covariance(name: str) -> None:
    """Its steps are exact for a Gaussian prior (but for x_T, at alpha_T = 0.006), not diagonal in the singular basis.

    The evidence is within 5 standard errors of 24 chains, as in exact.py, and 0.002 for x_T.
    """
    kernels = {
        "DDRM": lambda model: DDRM(model, min_variance=1.0),
        "DDNM+": lambda model: DDNMPlus(model, min_variance=1.0),
        "DiffPIR": lambda model: DiffPIR(model, min_variance=1.0),
        "MCGDiff": lambda model: MCGDiff(model, 1.0),
    }
    sigma = 1.0
    posterior, log_z = NormalLaw(MEAN, COVARIANCE).given(A, Y, sigma)
    model = program(gaussian_prior(10, "full", grid=sd.KarrasGrid()), sigma)
    kernel = kernels.get(name, METHODS[name])(model)
    smc = sd.SMC(kernel, num_particles=2000, num_chains=24, seed=1, progress=False).run(Y)
    ratio = (smc.log_evidence_per_chain - log_z).exp()
    error = float(ratio.std()) / 24**0.5
    assert error < 0.05 and abs(float(ratio.mean()) - 1) < 5 * error + 0.002
    mean, error_of_mean, _ = weighted_moments(smc, "x")
    scale = posterior.covariance.diagonal().sqrt()
    assert bool(((mean - posterior.mean).abs() < 5 * error_of_mean + 0.005 * scale).all())


def test_a_twist_that_needs_the_graph_gets_it() -> None:
    method = DDRM(program(gaussian_prior(), 0.5), min_variance=1.0, twist=sd.TweedieTwist())
    assert not method.forward_only
    smc = sd.SMC(method, num_particles=4, seed=0, progress=False).run(Y)
    assert bool(smc.log_evidence.isfinite())
