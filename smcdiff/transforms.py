r"""Orthonormal transforms of events, and the bases they make.

A :class:`Basis` is a pair of maps, ``x -> V^T x`` and back, with V real and orthonormal on the whole event, so that
white noise stays white and lengths stay what they are. Coordinates have the shape of the event. Operators, covariances
and proposals that are diagonal in one basis are combined elementwise there; that two of them share it is seen from
their maps being the same functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DCT", "HARTLEY", "PIXELS", "Basis", "Transform", "dct", "hartley", "identity", "inverse_dct", "same_basis"]

Transform = Callable[[Tensor], Tensor]


class Basis(Protocol):
    """An orthonormal basis V of the event space."""

    @property
    def to_spectral(self) -> Transform:
        """x -> V^T x, of the shape of x."""

    @property
    def from_spectral(self) -> Transform:
        """c -> V c, the inverse of ``to_spectral``."""


@dataclass(frozen=True)
class _Maps:
    to_spectral: Transform
    from_spectral: Transform


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


def hartley(x: Tensor) -> Tensor:
    """The Hartley transform over the last two dimensions, Re F x - Im F x with F the unitary Fourier transform.

    It is real, orthonormal, symmetric and so its own inverse, and it diagonalises every circular convolution with a
    kernel that is symmetric about its centre.
    """
    spectrum = torch.fft.fft2(x, norm="ortho")
    return spectrum.real - spectrum.imag


def dct(x: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform (type II) over the last two dimensions."""
    rows, columns = (_cosines(size, x.dtype, x.device) for size in x.shape[-2:])
    return rows @ x @ columns.mT


def inverse_dct(c: Tensor) -> Tensor:
    """The inverse of :func:`dct` (type III)."""
    rows, columns = (_cosines(size, c.dtype, c.device) for size in c.shape[-2:])
    return rows.mT @ c @ columns


@functools.lru_cache(maxsize=16)
def _cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """M with M[j, i] = sqrt(2 / size) cos(pi (2 i + 1) j / (2 size)), the row j = 0 divided by sqrt 2."""
    i = torch.arange(size, dtype=torch.float64)
    matrix = (math.pi * (2 * i + 1) * i[:, None] / (2 * size)).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


PIXELS: Basis = _Maps(identity, identity)
HARTLEY: Basis = _Maps(hartley, hartley)
DCT: Basis = _Maps(dct, inverse_dct)


def same_basis(first: Basis, second: Basis) -> bool:
    """Whether both use the same maps."""
    return first.to_spectral is second.to_spectral and first.from_spectral is second.from_spectral
