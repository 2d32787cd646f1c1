r"""Noise laws of a measurement y = A(x) as Pyro distributions that remember the operator and x.

Any Pyro distribution can be an observed site of a program. These two also tell a method what the operator is, which
linear methods need; and both give the log-likelihood per pixel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from smcdiff.measurement.compose import as_operator
from smcdiff.measurement.operators import Operator, broadcasts

__all__ = ["GaussianMeasurement", "Measurement", "PoissonMeasurement"]

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Measurement(TorchDistribution):
    """p(y given x) for a measurement y of A(x) whose pixels are independent given x.

    Args:
        operator: A, what :func:`~smcdiff.measurement.as_operator` takes.
        x: clean events, (..., *event).
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap`` it must be off.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the base class declares it so)
    operator: Operator
    x: Tensor

    def __init__(
        self, operator: object, x: Tensor, event_dim: int | None, validate_args: bool | None
    ) -> None:
        self.operator = as_operator(operator)
        self.x = x
        self._clean = self.operator(x)
