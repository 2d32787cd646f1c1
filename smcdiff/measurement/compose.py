r"""Operators made of others, and of any differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import cast, final

import torch
from torch import Tensor

from smcdiff.measurement.operators import LinearOperator, Operator, TransposeOperator
from smcdiff.measurement.physics import LinearPhysics, Physics, PhysicsLike, is_linear_physics
from smcdiff.transforms import Basis

__all__ = [
    "Compose",
    "Composition",
    "Function",
    "LinearComposition",
    "LinearFunction",
    "as_linear",
    "as_operator",
    "diagonal_part",
]


@final
@dataclass(frozen=True, eq=False)
class Composition(Operator):
    """y = A_1(A_2(... A_m(x))), not all of them linear; :func:`Compose` makes it."""

    operators: tuple[Operator, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return reduce(lambda value, operator: operator(value), reversed(self.operators), x)


@final
@dataclass(frozen=True, eq=False)
class LinearComposition(TransposeOperator):
    """y = A_1 A_2 ... A_m x, A^T = A_m^T ... A_1^T; :func:`Compose` makes it."""

    operators: tuple[LinearOperator, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return reduce(lambda value, operator: operator(value), reversed(self.operators), x)

    def adjoint(self, y: Tensor) -> Tensor:
        return reduce(lambda value, operator: operator.adjoint(value), self.operators, y)


def diagonal_part(
    operator: LinearOperator, x: Tensor, basis: Basis
) -> tuple[Tensor | None, tuple[LinearOperator, ...]]:
    """a and operators R_1, ..., R_j with A = R_1 ... R_j V diag(a) V^T, as much of A as is known in a; None for a = 1.

    Taken off are operators of a composition, from the last one on; compositions within it are not opened.

    Args:
        x: an event; its shape, dtype and device count, its values do not.
    """
    rest = operator.operators if isinstance(operator, LinearComposition) else (operator,)
    a: Tensor | None = None
    while rest and (last := rest[-1].eigenvalues(x, basis)) is not None:
        a, rest = last if a is None else a * last, rest[:-1]
    return a, rest


def Compose(*operators: object) -> Operator:
    """The operators one after another, the last one first: ``Compose(Downsample(2), Blur(k))`` blurs, then samples.

    Args:
        operators: what :func:`as_operator` takes, at least one.

    Returns:
        The operator itself if there is one, a :class:`LinearComposition` if all are linear, else a
        :class:`Composition`.

    Raises:
        ValueError: for no operator.
    """
    made = tuple(as_operator(operator) for operator in operators)
    if not made:
        raise ValueError(
            "got no operator to compose; expected at least one, such as Compose(Downsample(2), Blur(kernel))"
        )
    if len(made) == 1:
        return made[0]
    linear = tuple(operator for operator in made if isinstance(operator, LinearOperator))
    return LinearComposition(linear) if len(linear) == len(made) else Composition(made)


@final
@dataclass(frozen=True, eq=False)
class Function(Operator):
    """y = f(x) for any differentiable f, taken to be non-linear.

    Args:
        function: f, from (..., *event) to (..., *measurement).
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


@final
@dataclass(frozen=True, eq=False)
class LinearFunction(TransposeOperator):
    """y = f(x) for a linear f, with A^T by automatic differentiation: <f(x), y> has the gradient A^T y at every x.

    :func:`as_linear` makes it, and tests the linearity.

    Args:
        function: f, from (..., *event) to (..., *measurement).
        event_shape: the shape of one event.
        measurement_dim: dimensions of one measurement.
    """

    function: Callable[[Tensor], Tensor]
    event_shape: tuple[int, ...]
    measurement_dim: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def adjoint(self, y: Tensor) -> Tensor:
        zero = y.new_zeros(y.shape[: y.ndim - self.measurement_dim] + torch.Size(self.event_shape))
        pull_back = torch.func.vjp(self.function, zero)[1]
        return cast(Tensor, pull_back(y)[0])


def as_operator(operator: object) -> Operator:
    """An operator as it is; a physics object of deepinv or a callable made into one.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(operator, Operator):
        return operator
    if is_linear_physics(operator):
        return LinearPhysics(operator)
    if isinstance(operator, PhysicsLike):
        return Physics(operator)
    if callable(operator):
        return Function(operator)
    raise TypeError(
        f"got {type(operator).__name__} as an operator; expected an operator such as Blur(kernel), a function of x, or "
        "an object with the methods A and A_adjoint; for a matrix give Matrix(A)"
    )


def as_linear(operator: object, x: Tensor) -> LinearOperator:
    """The operator as a linear one, tested numerically on random events if it is not known to be.

    Args:
        operator: what :func:`as_operator` takes.
        x: one event, without batch dimensions; its shape, dtype and device count, its values do not.

    Raises:
        TypeError: if A(a u + b v) is not a A(u) + b A(v) within rounding.
    """
    made = as_operator(operator)
    if isinstance(made, LinearOperator):
        return made
    generator = torch.Generator(x.device).manual_seed(0)
    u, v = torch.randn((2, *x.shape), generator=generator, dtype=x.dtype, device=x.device).unbind()
    with torch.no_grad():
        zero, of_u, of_v, of_sum = made(torch.zeros_like(u)), made(u), made(v), made(3 * u - 2 * v)
    scale = 1e4 * torch.finfo(x.dtype).eps * float(of_u.abs().amax() + of_v.abs().amax())
    if float((of_sum - zero - 3 * (of_u - zero) + 2 * (of_v - zero)).abs().amax()) > scale:
        raise TypeError(
            f"{type(made).__name__} is not linear: A(3u - 2v) differs from 3 A(u) - 2 A(v) by more than rounding; "
            "use a method for any likelihood, such as TDS or DPS"
        )
    if float(zero.abs().amax()) > scale:
        raise TypeError(
            f"{type(made).__name__} is affine, not linear: A(0) is not 0; subtract A(0) from the operator and from y"
        )
    return LinearFunction(made, tuple(x.shape), of_u.ndim)
