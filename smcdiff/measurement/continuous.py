r"""Noise laws other than the Gaussian of known width: heavy tails, multiplicative noise, and noise that grows with x.

    Laplace      y = A(x) + b noise,               noise ~ exp(-|u|) / 2
    log-normal   y = (A(x))_+ exp(sigma noise),    noise ~ N(0, 1)
    mixed        y ~ N(A(x), sigma^2 + gain max(A(x), 0))

each pixel by itself.

References:
    A. Foi, M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian Noise Modeling and Fitting for
    Single-Image Raw-Data", IEEE Transactions on Image Processing 17 (2008): the mixed law, its a and b.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.distributions import constraints

from smcdiff.measurement.checks import holds
from smcdiff.measurement.distributions import Measurement, positive_part

__all__ = ["LaplaceMeasurement", "LogNormalMeasurement", "MixedMeasurement"]

_Shape = torch.Size | list[int] | tuple[int, ...]


@final
class LaplaceMeasurement(Measurement):
    r"""y = A(x) + b noise, with p(y given x) = prod_i exp(-|y_i - A(x)_i| / b_i) / (2 b_i).

    The tails are heavy enough that single wild pixels pull little. The standard deviation is sqrt(2) b.

    Args:
        operator: A, an operator, a differentiable function or a physics object of deepinv.
        x: clean events, (..., *event).
        scale: b, in the units of A(x), greater than 0; a number or a tensor that broadcasts to A(x).
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap``, which hides
            values, none are checked.

    Raises:
        ValueError: for a scale that is not greater than 0 or does not broadcast to A(x); what :class:`Measurement`
            raises.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        operator: object,
        x: Tensor,
        scale: Tensor | float,
        event_dim: int | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(operator, x, event_dim, validate_args)
        self._scale = self._parameter("scale", scale, positive=True)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def loc(self) -> Tensor:
        """A(x)."""
        return self._mean

    @property
    def scale(self) -> Tensor:
        """b, of the shape of A(x)."""
        return self._scale.expand(self._mean.shape)

    @property
    def variance(self) -> Tensor:
        return 2 * self.scale.square()

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008 (immutable)
        mean = self._mean
        shape = self._extended_shape(sample_shape)
        # the difference of two standard exponential draws has the standard Laplace law
        first, second = (mean.new_empty(shape).exponential_() for _ in range(2))
        return mean + self._scale * (first - second)

    def log_prob_pointwise(self, value: Tensor) -> Tensor:
        self._check(value)
        return -(value - self._mean).abs() / self._scale - self._scale.log() - math.log(2)


@final
class LogNormalMeasurement(Measurement):
    r"""y = (A(x))_+ exp(sigma noise): p(y given x) = prod_i N(log y_i; log (A(x)_i)_+, sigma_i^2) / y_i.

    Noise that multiplies, as speckle and gains do. (A(x))_+ is the median of y; its mean is exp(sigma^2 / 2) times as
    large. The positive part is smooth, (u)_+ = (u + sqrt(u^2 + 4 f^2)) / 2 with f = ``floor``: u + f^2 / u for large u
    and f^2 / |u| for large -u, so that the logarithm keeps a useful gradient where A(x) is negative. A(x) is an
    intensity: map a picture x on [-1, 1] by (x + 1) / 2 in the operator.

    Args:
        operator: A, an operator, a differentiable function or a physics object of deepinv.
        x: clean events, (..., *event).
        sigma: standard deviation of log y, greater than 0; a number or a tensor that broadcasts to A(x).
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        floor: f, in the units of A(x), greater than 0.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap``, which hides
            values, none are checked.

    Raises:
        ValueError: for a sigma or floor that is not greater than 0, a sigma that does not broadcast to A(x), or a
            measurement that is not positive; what :class:`Measurement` raises.
    """

    arg_constraints = {"sigma": constraints.positive}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        operator: object,
        x: Tensor,
        sigma: Tensor | float,
        event_dim: int | None = None,
        *,
        floor: float = 0.01,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(operator, x, event_dim, validate_args)
        if not 0 < floor < float("inf"):
            raise ValueError(f"got floor {floor}; expected a number greater than 0, in the units of A(x)")
        self.sigma = self._parameter("sigma", sigma, positive=True)
        self.floor = floor
        self._mean = positive_part(self._mean, floor) * (0.5 * self.sigma.square()).exp()

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.positive, self.event_dim)

    @property
    def loc(self) -> Tensor:
        """log (A(x))_+, the mean of log y."""
        return self._mean.log() - 0.5 * self.sigma.square()

    @property
    def scale(self) -> Tensor:
        """sigma, of the shape of A(x)."""
        return self.sigma.expand(self._mean.shape)

    @property
    def variance(self) -> Tensor:
        return self._mean.square() * torch.expm1(self.sigma.square())

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008 (immutable)
        mean = self._mean
        noise = torch.randn(self._extended_shape(sample_shape), dtype=mean.dtype, device=mean.device)
        return (self.loc + self.sigma * noise).exp()

    def log_prob_pointwise(self, value: Tensor) -> Tensor:
        self._check(value)
        if self._validate_args and not holds(value > 0):
            raise ValueError("got a measurement with values at or below 0; a log-normal law expects positive ones")
        log_value = value.log()
        residual = (log_value - self.loc) / self.sigma
        return -0.5 * residual.square() - self.sigma.log() - 0.5 * math.log(2 * math.pi) - log_value


@final
class MixedMeasurement(Measurement):
    r"""y ~ N(A(x), sigma^2 + gain max(A(x), 0)): counting noise under read-out noise.

    A detector gives ``gain`` units of A(x) per quantum and adds Gaussian noise: y = gain N + sigma noise with
    N ~ Poisson(A(x) / gain). That sum has exactly this mean and this variance, and this law is the normal one with
    them; draws, density and what a posterior is conditioned on are all the normal law's. The two differ where few
    quanta are counted: take :class:`PoissonMeasurement` there if sigma is small.

    Args:
        operator: A, an operator, a differentiable function or a physics object of deepinv.
        x: clean events, (..., *event).
        gain: units of A(x) per quantum, at least 0; a number or a tensor that broadcasts to A(x).
        sigma: standard deviation of the read-out noise in the units of A(x), greater than 0; a number or a tensor
            that broadcasts to A(x).
        event_dim: how many of the last dimensions of A(x) make one measurement; None takes all of them.
        validate_args: whether to check values; None takes Pyro's setting. Under ``torch.func.vmap``, which hides
            values, none are checked.

    Raises:
        ValueError: for a gain or sigma outside its domain or that does not broadcast to A(x); what
            :class:`Measurement` raises.
    """

    arg_constraints = {"loc": constraints.real, "sigma": constraints.positive}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        operator: object,
        x: Tensor,
        gain: Tensor | float,
        sigma: Tensor | float,
        event_dim: int | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(operator, x, event_dim, validate_args)
        self.gain = self._parameter("gain", gain, positive=False)
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
        """Standard deviation of y, of the shape of A(x)."""
        return self.variance.sqrt()

    @property
    def variance(self) -> Tensor:
        return self.sigma.square() + self.gain * self._mean.clamp(min=0)

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008 (immutable)
        mean = self._mean
        noise = torch.randn(self._extended_shape(sample_shape), dtype=mean.dtype, device=mean.device)
        return mean + self.scale * noise

    def log_prob_pointwise(self, value: Tensor) -> Tensor:
        self._check(value)
        variance = self.variance
        return -0.5 * ((value - self._mean).square() / variance + variance.log() + math.log(2 * math.pi))
