"""A low-rank covariance against the matrix that it stands for, with factors of all particles and of each."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from smcdiff.diffusion.analytic import GaussianMixtureDenoiser
from smcdiff.diffusion.covariance import Corrected, Dense, LowRank
from smcdiff.diffusion.schedule import VPSchedule
from smcdiff.transforms import HARTLEY, PIXELS

M, RANK, EVENT = 5, 3, (2, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixing(m: int) -> Tensor:
    """Matrices of norm at most 1."""
    raw = normal(m, RANK, RANK, seed=3)
    return raw / torch.linalg.matrix_norm(raw, ord=2, keepdim=True)


CASES = {
    "shared, mixed": LowRank(normal(1, *EVENT).exp(), normal(1, RANK, *EVENT, seed=1), HARTLEY, mixing(M)),
    "shared": LowRank(normal(1, *EVENT).exp(), normal(1, RANK, *EVENT, seed=1), PIXELS),
    "own": LowRank(normal(M, *EVENT).exp(), normal(M, RANK, *EVENT, seed=1), HARTLEY),
    "own, mixed": LowRank(normal(M, *EVENT).exp(), normal(M, RANK, *EVENT, seed=1), PIXELS, mixing(M)),
}


def dense(covariance: LowRank) -> Tensor:
    """The matrices (M, d, d), from U written out."""
    d = 8
    basis = covariance.basis.from_spectral(torch.eye(d, dtype=torch.float64).reshape(d, *EVENT)).flatten(1).mT
    u = covariance.factors.flatten(2)
    if covariance.mixing is not None:
        u = covariance.mixing @ u
    inner = covariance.variance.expand(-1, *EVENT).flatten(1).diag_embed() + u.mT @ u
    return (basis @ inner @ basis.mT).expand(M, -1, -1)


@pytest.mark.parametrize("covariance", CASES.values(), ids=CASES)
def test_low_rank_is_its_matrix(covariance: LowRank) -> None:
    matrix, x, eye = dense(covariance), normal(M, *EVENT, seed=7), torch.eye(8, dtype=torch.float64)

    def close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)

    close(covariance.apply(x).flatten(1), (matrix @ x.flatten(1)[..., None])[..., 0])
    close(covariance.log_prob(x), Dense(matrix).log_prob(x))
    columns = [covariance.draw(column.expand(M, *EVENT)).flatten(1) for column in eye.reshape(8, *EVENT)]
    root = torch.stack(columns, 2)
    close(root @ root.mT, matrix)
    close(dense(covariance.affine(0.7, 0.2)), 0.7 * matrix + 0.2 * eye)
    given = covariance.given(1.3)
    assert isinstance(given, LowRank)
    close(dense(given), torch.linalg.inv(torch.linalg.inv(matrix) + 1.3 * eye))
    close(
        dense(given.affine(2.0, 0.1).given(0.5)),
        torch.linalg.inv(torch.linalg.inv(2 * dense(given) + 0.1 * eye) + 0.5 * eye),
    )
    assert given.mixing is None or float(torch.linalg.matrix_norm(given.mixing, ord=2).amax()) <= 1 + 1e-12


def smaller_core() -> Tensor:
    """Symmetric with eigenvalues of both signs, that of W S W^T above -1."""
    raw = normal(M, RANK, RANK, seed=3)
    turn = torch.linalg.qr(raw).Q
    return turn @ torch.tensor([-0.005, 0.0, 0.7], dtype=torch.float64).diag_embed() @ turn.mT


CORRECTED = {
    "Hartley": Corrected(normal(1, *EVENT).exp(), normal(M, RANK, *EVENT, seed=1), smaller_core(), HARTLEY),
    "pixels": Corrected(normal(M, *EVENT).exp(), normal(M, RANK, *EVENT, seed=1), smaller_core(), PIXELS),
    "columns of zeros": Corrected(
        normal(1, *EVENT).exp(),
        normal(M, RANK, *EVENT, seed=1) * torch.tensor([1.0, 0.0, 1.0]).reshape(RANK, 1, 1),
        smaller_core(),
        HARTLEY,
    ),
    "more columns than entries": Corrected(
        normal(1, *EVENT).exp(),
        normal(M, 10, *EVENT, seed=1),
        torch.cat([torch.full((5,), -0.002), torch.full((5,), 0.5)]).double().diag_embed().expand(M, -1, -1),
        PIXELS,
    ),
}


def matrix_of(covariance: Corrected) -> Tensor:
    """(M, d, d), written out."""
    basis = covariance.basis.from_spectral(torch.eye(8, dtype=torch.float64).reshape(8, *EVENT)).flatten(1).mT
    w = covariance.factors.flatten(2)
    inner = covariance.variance.expand(-1, *EVENT).flatten(1).diag_embed() + w.mT @ covariance.core @ w
    return basis @ inner @ basis.mT


@pytest.mark.parametrize("covariance", CORRECTED.values(), ids=CORRECTED)
def test_corrected_is_its_matrix(covariance: Corrected) -> None:
    matrix, x, eye = matrix_of(covariance), normal(M, *EVENT, seed=7), torch.eye(8, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0
    assert float(torch.linalg.eigvalsh(matrix - matrix_of(replace(covariance, core=0 * covariance.core))).min()) < 0
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
    close(covariance.apply(x).flatten(1), (matrix @ x.flatten(1)[..., None])[..., 0])
    close(covariance.log_prob(x), Dense(matrix).log_prob(x))
    columns = [covariance.draw(column.expand(M, *EVENT)).flatten(1) for column in eye.reshape(8, *EVENT)]
    root = torch.stack(columns, 2)
    close(root @ root.mT, matrix)
    close(matrix_of(covariance.affine(0.7, 0.2)), 0.7 * matrix + 0.2 * eye)
    for precision in (1.3, normal(1, *EVENT, seed=8).square(), normal(M, *EVENT, seed=9).square()):
        given = covariance.given(precision)
        assert isinstance(given, Corrected)
        more = precision * eye if isinstance(precision, float) else in_pixels(covariance, precision)
        close(matrix_of(given), torch.linalg.inv(torch.linalg.inv(matrix) + more))
        if isinstance(precision, Tensor):
            close(covariance.log_det_gain(precision), torch.logdet(eye + matrix @ more))
    assert float(covariance.given(math.inf).apply(x).abs().max()) == 0


def in_pixels(covariance: Corrected, precision: Tensor) -> Tensor:
    """V diag(precision) V^T."""
    basis = covariance.basis.from_spectral(torch.eye(8, dtype=torch.float64).reshape(8, *EVENT)).flatten(1).mT
    return basis @ precision.flatten(1).diag_embed() @ basis.mT


@pytest.mark.parametrize("t", [5.0, 300.0, 1000.0])
def test_mixture_with_one_covariance_for_all_components(t: float) -> None:
    """Against the same mixture with the covariance repeated, whose C_t is written out."""
    means, weights, factor = normal(4, 6), torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), normal(6, 6, seed=2)
    C, level, x_t = factor @ factor.mT, VPSchedule().level(t), normal(M, 6, seed=5)
    one, each = (
        GaussianMixtureDenoiser(3 * means, covariances, weights) for covariances in (C, C.expand(4, 6, 6).clone())
    )
    estimates = [denoiser(x_t, level) for denoiser in (one, each)]
    torch.testing.assert_close(estimates[0].mean, estimates[1].mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(estimates[0].variance, estimates[1].variance, rtol=1e-9, atol=1e-9)
    found, wanted = (
        denoiser.covariance.at(level, denoiser.covariance.parts(denoiser, x_t, level, estimate), x_t)
        for denoiser, estimate in zip((one, each), estimates, strict=True)
    )
    assert isinstance(found, LowRank) and isinstance(wanted, Dense)
    for column in torch.eye(6, dtype=torch.float64):
        v = column.expand(M, 6)
        torch.testing.assert_close(found.apply(v), wanted.apply(v), rtol=1e-8, atol=1e-9)
