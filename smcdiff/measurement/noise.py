"""The moments of a noise law, for the methods that need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.measurement.continuous import MixedMeasurement
from smcdiff.measurement.distributions import GaussianMeasurement, PoissonMeasurement

__all__ = ["Moments", "gaussian_moments", "poisson_moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of every pixel of a measurement whose pixels are independent.

    Args:
        loc: E[y], (*batch, *event).
        variance: Var[y], of the same shape.
    """

    loc: Tensor
    variance: Tensor


def gaussian_moments(law: object) -> Moments | None:
    """The moments of a Gaussian law with independent pixels, or None for any other law.

    It knows :class:`GaussianMeasurement`, :class:`MixedMeasurement`, whose variance depends on x, and ``Normal``, also
    within any number of ``to_event``. A ``MultivariateNormal`` has correlated pixels and a masked distribution has
    pixels without a law: both give None.
    """
    base = _innermost(law)
    if isinstance(base, GaussianMeasurement | MixedMeasurement | torch.distributions.Normal):
        return Moments(base.mean, base.variance)
    return None


def poisson_moments(law: object) -> Moments | None:
    """The moments, both the rate, of a Poisson law with independent pixels, or None for any other law.

    It knows :class:`PoissonMeasurement` and ``Poisson``, also within any number of ``to_event``.
    """
    base = _innermost(law)
    if isinstance(base, PoissonMeasurement | torch.distributions.Poisson):
        return Moments(base.mean, base.variance)
    return None


def _innermost(law: object) -> object:
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return law
