"""Transforms against their definitions, written out as matrices."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import dctn

from smcdiff.transforms import DCT, HARTLEY, PIXELS, Basis, dct, same_basis

EVENT = (2, 4, 5)


@pytest.mark.parametrize("basis", [PIXELS, HARTLEY, DCT], ids=["pixels", "hartley", "dct"])
def test_a_basis_is_real_orthonormal_and_inverted(basis: Basis) -> None:
    eye = torch.eye(math.prod(EVENT), dtype=torch.float64).reshape(-1, *EVENT)
    matrix = basis.to_spectral(eye).reshape(len(eye), -1)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(len(eye), dtype=torch.float64))
    torch.testing.assert_close(basis.from_spectral(basis.to_spectral(eye)), eye)


def test_the_cosine_transform_is_scipys() -> None:
    x = torch.randn(3, *EVENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(dct(x).numpy(), dctn(x.numpy(), type=2, norm="ortho", axes=(-2, -1)))


def test_bases_are_the_same_where_their_maps_are() -> None:
    assert same_basis(DCT, DCT)
    assert not same_basis(DCT, HARTLEY)
