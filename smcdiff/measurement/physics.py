r"""Foreign operators in the manner of ``deepinv.physics``: objects with ``A`` and ``A_adjoint`` on batches.

Such an object takes x of shape (batch, channels, rows, columns). Here it gets any batch dimensions flattened into
one, and a single event as a batch of one. It is recognised by its methods, so deepinv itself is not needed.

Having ``A_adjoint`` does not make it linear: deepinv's phase retrieval, A(x) = |B x|^2, has the adjoint of B under that
name. What sets deepinv's linear operators apart from its others, which all have ``A_vjp``, is ``A_adjoint_A``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeGuard, final, runtime_checkable

from torch import Tensor

from smcdiff.measurement.operators import LinearOperator, Operator, lacks

__all__ = ["LinearPhysics", "LinearPhysicsLike", "Physics", "PhysicsLike", "is_linear_physics"]


@runtime_checkable
class PhysicsLike(Protocol):
    """An object whose ``A`` maps a batch of events to a batch of measurements."""

    def A(self, x: Tensor) -> Tensor:
        """A(x)."""


@runtime_checkable
class LinearPhysicsLike(PhysicsLike, Protocol):
    """A linear one. It may also have ``A_dagger(y)`` and ``prox_l2(z, y, gamma)``."""

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""


def is_linear_physics(physics: object) -> TypeGuard[LinearPhysicsLike]:
    """Whether a physics object is a linear one."""
    return isinstance(physics, LinearPhysicsLike) and (hasattr(physics, "A_adjoint_A") or not hasattr(physics, "A_vjp"))


@final
@dataclass(frozen=True, eq=False)
class Physics(Operator):
    """y = A(x) of a non-linear physics object.

    Args:
        physics: has ``A``.
        event_dim: dimensions of one event.
    """

    physics: PhysicsLike
    event_dim: int = 3

    def __call__(self, x: Tensor) -> Tensor:
        return _batched(self.physics.A, x, self.event_dim)


@final
@dataclass(frozen=True, eq=False)
class LinearPhysics(LinearOperator):
    """y = A x of a linear physics object; its ``A_dagger`` and ``prox_l2``, where it has them, are used as they are.

    In deepinv both are iterative for an operator without a closed form, by default to a relative tolerance of 1e-4.

    Args:
        physics: has ``A`` and ``A_adjoint``.
        event_dim: dimensions of one event.
        measurement_dim: dimensions of one measurement.
    """

    physics: LinearPhysicsLike
    event_dim: int = 3
    measurement_dim: int = 3

    def __call__(self, x: Tensor) -> Tensor:
        y = _batched(self.physics.A, x, self.event_dim)
        got = y.ndim - (x.ndim - self.event_dim)
        if got != self.measurement_dim:
            raise ValueError(
                f"got a measurement of {got} dimensions from {type(self.physics).__name__}; expected "
                f"{self.measurement_dim}: give LinearPhysics(physics, measurement_dim={got})"
            )
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        return _batched(self.physics.A_adjoint, y, self.measurement_dim)

    def svd(self, x: Tensor) -> None:
        return None

    def pinv(self, y: Tensor) -> Tensor:
        dagger = getattr(self.physics, "A_dagger", None)
        if dagger is None:
            raise lacks(self, "pseudo-inverse (A_dagger)")
        return _batched(dagger, y, self.measurement_dim)

    def prox(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        prox = getattr(self.physics, "prox_l2", None)
        if prox is None:
            raise lacks(self, "proximal map (prox_l2)")
        lead = z.shape[: z.ndim - self.event_dim]
        y = y.expand(lead + y.shape[y.ndim - self.measurement_dim :]).flatten(0, len(lead) - 1) if lead else y[None]
        return _batched(lambda batch: prox(batch, y, gamma), z, self.event_dim)


def _batched(function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """The function on x with its batch dimensions made one."""
    if x.ndim < event_dim:
        raise ValueError(
            f"got a tensor of shape {tuple(x.shape)}; expected {event_dim} dimensions, or more with a batch on the left"
        )
    lead = x.shape[: x.ndim - event_dim]
    value = function(x.reshape(-1, *x.shape[len(lead) :]))
    return value.reshape(lead + value.shape[1:])
