"""The Tweedie twist's covariance: the positive part of a matrix without an eigendecomposition."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.guidance.base import Prediction
from smcdiff.guidance.program import Program
from smcdiff.guidance.twists import _positive_part

F64 = torch.float64


@pytest.mark.parametrize("d", [1, 2, 3, 8, 64])
def test_positive_part(d: int) -> None:
    # Against the eigenvalues that the matrices are made of, of both signs and fourteen orders of magnitude.
    generator = torch.Generator().manual_seed(d)
    basis = torch.linalg.qr(torch.randn((40, d, d), generator=generator, dtype=F64))[0]
    values = torch.randn((40, d), generator=generator, dtype=F64)
    values = values * 10 ** (-14 * torch.rand((40, d), generator=generator, dtype=F64))
    matrices = basis * values[:, None] @ basis.mT
    matrices = matrices / torch.linalg.matrix_norm(matrices, keepdim=True)
    expected = basis * values.clamp(min=0)[:, None] @ basis.mT / torch.linalg.vector_norm(values, dim=1)[:, None, None]
    skew = torch.randn((40, d, d), generator=generator, dtype=F64) / d
    for scale in (1.0, 1e-30, 1e30):
        off = _positive_part(scale * (matrices + skew - skew.mT)) - scale * expected
        assert float(torch.linalg.matrix_norm(off).max()) < 1e-11 * scale
    assert not _positive_part(torch.zeros(2, d, d, dtype=F64)).any()


def test_positive_part_leaves_positive_and_drops_negative_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn((20, 5, 5), generator=generator, dtype=F64)
    definite = root @ root.mT
    torch.testing.assert_close(_positive_part(definite), definite, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(_positive_part(-definite), torch.zeros_like(definite), rtol=0, atol=1e-10)


class Linear:
    """x0_hat = G x_t with a G that is neither symmetric nor positive, as a network's derivative is."""

    event_shape, dtype, device = torch.Size([3]), F64, torch.device("cpu")

    def __init__(self, gain: Tensor) -> None:
        self.gain = gain

    def __call__(self, x_t: Tensor, level: object) -> Estimate:
        return Estimate(x_t @ self.gain.mT)


def test_tweedie_twist_is_its_gaussian() -> None:
    gain = torch.tensor([[0.9, -0.3, 0.0], [0.4, -0.5, 0.2], [0.0, 0.1, 0.3]], dtype=F64)
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=F64)
    sigma, y = torch.tensor([0.3, 0.5], dtype=F64), torch.tensor([0.7, -1.1], dtype=F64)
    prior = sd.DiffusionPrior(Linear(gain), sd.VPSchedule(), 10)

    def model(y: Tensor | None = None) -> Tensor:
        return pyro.sample("y", dist.Normal(A @ pyro.sample("x", prior), sigma).to_event(1), obs=y)

    program = Program(model, (y,))
    x = torch.randn((6, 3), generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    for k in (1, 5, 10):
        estimate = prior.chain.estimate(k, x)
        got = sd.TweedieTwist().log_psi(Prediction(program, k, {"x": x}, {"x": estimate}))
        level = prior.chain.levels[k]
        covariance = level.sigma**2 / level.alpha * A @ gain @ A.mT
        values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
        assert k == 1 or float(values.min()) < -0.1, "the case is there for its negative eigenvalue"
        total = vectors * values.clamp(min=0) @ vectors.mT + (sigma**2).diag()
        law = MultivariateNormal(estimate.mean @ A.mT, total)
        torch.testing.assert_close(got, law.log_prob(y), rtol=1e-10, atol=1e-10)
        (slope,) = torch.autograd.grad(got.sum(), x)
        expected = torch.linalg.solve(total, (y - law.mean).mT).mT @ A @ gain
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)
