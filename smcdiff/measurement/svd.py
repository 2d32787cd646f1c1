r"""Singular value decompositions that are fast to apply.

    A = U diag(s) V^T,    V real and orthonormal on the whole event space,

in the convention that makes every formula elementwise: the coordinates V^T x are given *the shape of x*, and U^T y
too, with zeros where s = 0. V includes the null space of A; U only the range, so y - U U^T y is what of y no x can
explain. White noise stays white in the coordinates V^T x, which is why V is real also for a Fourier operator (where
it is the Hartley transform).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.transforms import Transform

__all__ = ["SVD", "cut"]


@dataclass(frozen=True, eq=False)
class SVD:
    """A = U diag(s) V^T.

    Args:
        singular_values: s >= 0, broadcasts against x; exactly zero on the null space.
        to_spectral: x -> V^T x, of the shape of x.
        from_spectral: c -> V c, the inverse of ``to_spectral``.
        measurement_to_spectral: y -> U^T y, of the shape of x, zero where s is.
        measurement_from_spectral: c -> U c, of the shape of y; c counts only where s > 0.
    """

    singular_values: Tensor
    to_spectral: Transform
    from_spectral: Transform
    measurement_to_spectral: Transform
    measurement_from_spectral: Transform

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y = V s^+ U^T y, the Moore-Penrose inverse."""
        return self.from_spectral(self.measurement_to_spectral(y) * reciprocal(self.singular_values))

    def prox(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """argmin over x of gamma/2 |A x - y|^2 + 1/2 |x - z|^2, with V^T x = (V^T z + gamma s U^T y) / (1 + gamma s^2).

        Args:
            gamma: weight of the measurement, at least 0; a number, or broadcasts against x.
        """
        s = self.singular_values
        numerator = self.to_spectral(z) + gamma * s * self.measurement_to_spectral(y)
        return self.from_spectral(numerator / (1 + gamma * s.square()))

    def solve(self, y: Tensor, a: Tensor | float, c: Tensor | float) -> Tensor:
        """(a A A^T + c I)^-1 y = y / c - U (a s^2 / (c (a s^2 + c))) U^T y.

        Args:
            a: at least 0, a number or a tensor that broadcasts against x.
            c: positive, a number or a 0-d tensor.
        """
        weight = a * self.singular_values.square()
        return y / c - self.measurement_from_spectral(weight / (c * (weight + c)) * self.measurement_to_spectral(y))


def reciprocal(s: Tensor) -> Tensor:
    """1 / s where s > 0 and 0 where it is not, with a finite gradient in both places."""
    positive = s > 0
    return torch.where(positive, 1 / torch.where(positive, s, 1.0), 0.0)


def cut(s: Tensor, event_dim: int, rtol: float | None = None) -> Tensor:
    """Singular values with those within rounding of zero, s <= rtol max(s), set to zero.

    Args:
        s: singular values whose last ``event_dim`` dimensions belong to one operator.
        rtol: None takes 64 times the machine precision, the error of a fast transform with some room.
    """
    rtol = 64 * torch.finfo(s.dtype).eps if rtol is None else rtol
    largest = s.amax(dim=tuple(range(-event_dim, 0)), keepdim=True)
    return torch.where(s > rtol * largest, s, 0.0)
