r"""Noise laws of a measurement y of A(x), as Pyro distributions that remember the operator and x.

Any Pyro distribution can be an observed site of a program. These also tell a method which operator made the
measurement, which linear methods need, and give the log-likelihood per pixel.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Self, final

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from smcdiff.measurement.checks import broadcasts, holds, is_validating, require_finite
from smcdiff.measurement.compose import as_operator

__all__ = ["GaussianMeasurement", "Measurement", "PoissonMeasurement", "positive_part"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class Measurement(TorchDistribution):
    """p(y given x), the pixels of y independent given x. Abstract.

    Args:
        operator: A, what :func:`~smcdiff.measurement.as_operator` takes.
        x: clean events, (..., *event).
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap``, which hides
            values, none are checked.

    Raises:
        TypeError: for something that is not an operator.
        ValueError: for a measurement A(x) that is not real or has NaN, or an event_dim it has not.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the base class declares it so)
    _mean: Tensor

    def __init__(self, operator: object, x: Tensor, event_dim: int | None, validate_args: bool | None) -> None:
        self.operator = as_operator(operator)
        self.x = x
        clean = self.operator(x)
        if not isinstance(clean, Tensor) or not clean.is_floating_point():
            got = clean.dtype if isinstance(clean, Tensor) else type(clean).__name__
            raise ValueError(f"got {got} from the operator; expected a real tensor: torch.view_as_real makes one")
        event_dim = clean.ndim if event_dim is None else event_dim
        if not 0 <= event_dim <= clean.ndim:
            raise ValueError(f"got event_dim {event_dim} for A(x) of shape {tuple(clean.shape)}")
        batch_dim = clean.ndim - event_dim
        super().__init__(clean.shape[:batch_dim], clean.shape[batch_dim:], validate_args=False)
        self._validate_args = is_validating() if validate_args is None else validate_args
        if self._validate_args:
            require_finite("A(x)", clean)
        self._mean = clean

    @property
    @final
    def mean(self) -> Tensor:
        """E[y given x]."""
        return self._mean

    @abstractmethod
    def log_prob_pointwise(self, value: Tensor) -> Tensor:
        """log p(y_i given x) of every pixel, of the shape of y."""

    @final
    def log_prob(self, value: Tensor) -> Tensor:
        """log p(y given x), summed over the event, shape (..., *batch_shape)."""
        pointwise = self.log_prob_pointwise(value)
        return pointwise.sum(tuple(range(-self.event_dim, 0))) if self.event_dim else pointwise

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Self:
        """The same law for a larger batch; ``operator`` and ``x`` stay as they were."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._mean = self._mean.expand(torch.Size(batch_shape) + self.event_shape)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _parameter(self, name: str, value: Tensor | float, *, positive: bool) -> Tensor:
        """A parameter as a tensor that broadcasts to A(x)."""
        made = value if isinstance(value, Tensor) else self._mean.new_full((), value)
        if not broadcasts(made.shape, self._mean.shape):
            raise ValueError(
                f"got {name} of shape {tuple(made.shape)} and A(x) of shape {tuple(self._mean.shape)}; expected a "
                "number or a tensor that broadcasts to A(x): give one value per sample as shape (*batch, 1, 1, 1)"
            )
        if self._validate_args:
            require_finite(name, made)
            if not holds(made > 0 if positive else made >= 0):
                wanted = "greater than 0" if positive else "at least 0"
                raise ValueError(f"got {name} as low as {float(made.min())}; expected {wanted}")
        return made

    def _check(self, value: Tensor) -> None:
        """Refuse a measurement of another shape, and with validation on one that is not finite."""
        if value.shape[max(0, value.ndim - self.event_dim) :] != self.event_shape:
            raise ValueError(
                f"got a measurement of shape {tuple(value.shape)}; expected the shape of A(x), "
                f"{tuple(self.batch_shape + self.event_shape)}"
            )
        if self._validate_args:
            require_finite("a measurement", value)


@final
class GaussianMeasurement(Measurement):
    r"""y = A(x) + sigma noise, with p(y given x) = prod_i N(y_i; A(x)_i, sigma_i^2).

    Args:
        operator: A, an operator, a differentiable function or a physics object of deepinv.
        x: clean events, (..., *event).
        sigma: standard deviation of the noise in the units of A(x), greater than 0; a number or a tensor that
            broadcasts to A(x), also a latent of the program.
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap``, which hides
            values, none are checked.

    Raises:
        ValueError: for a sigma that is not greater than 0 or does not broadcast to A(x); what :class:`Measurement`
            raises.
    """

    arg_constraints = {"loc": constraints.real, "sigma": constraints.positive}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        operator: object,
        x: Tensor,
        sigma: Tensor | float,
        event_dim: int | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(operator, x, event_dim, validate_args)
        self.sigma = self._parameter("sigma", sigma, positive=True)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def loc(self) -> Tensor:
        """A(x)."""
        return self._mean

    @property
    def scale(self) -> Tensor:
        """sigma, of the shape of A(x)."""
        return self.sigma.expand(self._mean.shape)

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008 (immutable)
        mean = self._mean
        noise = torch.randn(self._extended_shape(sample_shape), dtype=mean.dtype, device=mean.device)
        return mean + self.sigma * noise

    def log_prob_pointwise(self, value: Tensor) -> Tensor:
        self._check(value)
        residual = (value - self._mean) / self.sigma
        return -0.5 * residual.square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)


@final
class PoissonMeasurement(Measurement):
    r"""y ~ Poisson(rate) counts, with rate = background + (gain A(x))_+.

    The positive part is smooth, (u)_+ = (u + sqrt(u^2 + 4 f^2)) / 2 with f = ``floor``: it is f at u = 0, u + f^2 / u
    for large u and f^2 / |u| for large -u, so the rate stays positive and its logarithm keeps a useful gradient
    where A(x) is negative. A(x) is an intensity: map a picture x on [-1, 1] by (x + 1) / 2 in the operator.

    Args:
        operator: A, an operator, a differentiable function or a physics object of deepinv.
        x: clean events, (..., *event).
        gain: counts per unit of A(x), greater than 0; a number or a tensor that broadcasts to A(x).
        background: counts where A(x) = 0, at least 0; a number or a tensor that broadcasts to A(x).
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        floor: f, in counts, greater than 0.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap``, which hides
            values, none are checked.

    Raises:
        ValueError: for a gain, background or floor outside its domain or that does not broadcast to A(x); what
            :class:`Measurement` raises.
    """

    arg_constraints = {"rate": constraints.positive}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self,
        operator: object,
        x: Tensor,
        gain: Tensor | float,
        background: Tensor | float = 0.0,
        event_dim: int | None = None,
        *,
        floor: float = 0.01,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(operator, x, event_dim, validate_args)
        if not 0 < floor < float("inf"):
            raise ValueError(f"got floor {floor}; expected a number of counts greater than 0")
        self.gain = self._parameter("gain", gain, positive=True)
        self.background = self._parameter("background", background, positive=False)
        self.floor = floor
        self._mean = self.background + positive_part(self.gain * self._mean, floor)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.nonnegative_integer, self.event_dim)

    @property
    def rate(self) -> Tensor:
        """Expected counts, of the shape of A(x)."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self._mean

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008 (immutable)
        with torch.no_grad():
            return torch.poisson(self._mean.expand(self._extended_shape(sample_shape)))

    def log_prob_pointwise(self, value: Tensor) -> Tensor:
        self._check(value)
        if self._validate_args and not holds((value >= 0) & (value == value.floor())):
            raise ValueError("got a measurement with negative or fractional values; a Poisson law expects counts")
        return value * self._mean.log() - self._mean - torch.lgamma(value + 1)


def positive_part(u: Tensor, floor: float) -> Tensor:
    """The larger root r of r^2 - u r - f^2 = 0, free of cancellation: the product of the roots is -f^2."""
    positive = u >= 0
    size = torch.where(positive, u, -u)
    root = (size + torch.sqrt(size.square() + 4 * floor**2)) / 2
    return torch.where(positive, root, floor**2 / root)
