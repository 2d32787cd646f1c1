r"""What a measurement operator is.

An operator maps clean events to noise-free measurements, y = A(x). It takes x of shape (..., *event), any batch
dimensions on the left, and gives y of shape (..., *measurement); it works on a single event under
``torch.func.vmap`` and is differentiable. Linear ones know their transpose, and where there is a fast one their
singular value decomposition, from which the pseudo-inverse and the proximal map follow.

The transpose is that of the Euclidean inner product, <A x, y> = <x, A^T y>.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from torch import Size, Tensor

from smcdiff.measurement.svd import SVD
from smcdiff.transforms import Basis

__all__ = ["LinearOperator", "Operator", "SpectralOperator", "TransposeOperator", "require_linear", "require_svd"]


class Operator(ABC):
    """y = A(x), linear or not."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A(x) for x of shape (..., *event)."""

    @property
    @final
    def is_linear(self) -> bool:
        """Whether this is a :class:`LinearOperator`."""
        return isinstance(self, LinearOperator)


class LinearOperator(Operator):
    """y = A x with A^T, and A^+ and a proximal map where they are known."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y for y of shape (..., *measurement)."""

    @abstractmethod
    def svd(self, x: Tensor) -> SVD | None:
        """A = U diag(s) V^T on events like x, or None where no fast one is known.

        Args:
            x: an event, with or without batch dimensions; its shape, dtype and device count, its values do not.
        """

    def eigenvalues(self, x: Tensor, basis: Basis) -> Tensor | None:
        """a with A = V diag(a) V^T on events like x, of any sign, where that is known of the basis; None elsewhere."""
        return None

    @abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y.

        Raises:
            TypeError: where it is not known.
        """

    @abstractmethod
    def prox(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """argmin over x of gamma/2 |A x - y|^2 + 1/2 |x - z|^2.

        Raises:
            TypeError: where it is not known.
        """


class SpectralOperator(LinearOperator):
    """A linear operator whose pseudo-inverse and proximal map come from its svd, where it has one."""

    @abstractmethod
    def input_shape(self, shape: Size) -> Size:
        """The shape of the x that gives a y of this shape."""

    @final
    def pinv(self, y: Tensor) -> Tensor:
        return require_svd(self, y.new_empty(self.input_shape(y.shape)), "the pseudo-inverse").pinv(y)

    @final
    def prox(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        return require_svd(self, z, "the proximal map").prox(z, y, gamma)


class TransposeOperator(LinearOperator):
    """A linear operator of which only A and A^T are known."""

    @final
    def svd(self, x: Tensor) -> None:
        return None

    @final
    def pinv(self, y: Tensor) -> Tensor:
        raise lacks(self, "pseudo-inverse")

    @final
    def prox(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        raise lacks(self, "proximal map")


def lacks(operator: LinearOperator, what: str) -> TypeError:
    """The error of an operator that lacks something, with what to use instead."""
    return TypeError(
        f"{type(operator).__name__} has no {what} that can be computed exactly and fast; use a blur with circular "
        "padding, or with reflection and a kernel symmetric in both directions whose values can be read, one operator "
        "in place of a composition, Matrix for a small problem, or a method that needs only the transpose"
    )


def require_linear(operator: Operator, wanted_by: str) -> LinearOperator:
    """The operator, which must be linear.

    Raises:
        TypeError: if it is not, naming who wanted it and what to do.
    """
    if isinstance(operator, LinearOperator):
        return operator
    raise TypeError(
        f"{wanted_by} needs a linear operator and got {type(operator).__name__}; if it is linear, make it one with "
        "smcdiff.measurement.as_linear(operator, x), otherwise use a method for any likelihood, such as TDS or DPS"
    )


def require_svd(operator: Operator, x: Tensor, wanted_by: str) -> SVD:
    """The operator's singular value decomposition on events like x, which must exist.

    Raises:
        TypeError: if there is none, naming who wanted it and what to do.
    """
    linear = require_linear(operator, wanted_by)
    svd = linear.svd(x)
    if svd is None:
        raise lacks(linear, f"singular value decomposition, which {wanted_by} needs,")
    return svd
