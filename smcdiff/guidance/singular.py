r"""A linear-Gaussian measurement in the singular basis of its operator, where every coordinate stands alone.

With A = U diag(s) V^T and white noise, y = A x_0 + sigma_y noise is, coordinate by coordinate of V^T x_0,

    y_i = s_i x_i + sigma_y noise_i,    y_i = (U^T y)_i,

and what of y lies outside the range of A says nothing of x_0. The methods that work in this basis propose
independent coordinates in it; the helpers here are what they share.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.kernels import Gaussian
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.base import Prediction, SiteStep
from smcdiff.guidance.linear import linear_measurement
from smcdiff.guidance.program import Program
from smcdiff.measurement.svd import SVD, reciprocal

__all__ = [
    "SingularMeasurement",
    "SingularTwist",
    "at_least",
    "check_floor",
    "check_share",
    "conjugate",
    "eps_hat",
    "last_step",
    "per_program",
    "singular_measurement",
    "step_variance",
]

P = ParamSpec("P")
R = TypeVar("R")


def per_program(function: Callable[Concatenate[Program, P], R]) -> Callable[Concatenate[Program, P], R]:
    """Remember the results for as long as the program lives: what waits for the device is then asked for only once."""
    kept: weakref.WeakKeyDictionary[Program, dict[Hashable, R]] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def remembered(program: Program, /, *args: P.args, **kwargs: P.kwargs) -> R:
        results = kept.setdefault(program, {})
        key = (args, tuple(kwargs.items()))
        if key not in results:
            results[key] = function(program, *args, **kwargs)
        return results[key]

    return remembered


@dataclass(frozen=True, eq=False)
class SingularMeasurement:
    """y_i = s_i x_i + sigma_y noise_i.

    Args:
        name: the site of x_0.
        svd: of the operator; the basis V.
        s: singular values, which broadcast against x; 0 where nothing is seen.
        y: U^T y, of the shape of x, 0 where s is.
        sigma_y: standard deviation of the noise, in the units of y.
        log_outside: log-density of the part of y outside the range of A, the same for all x_0.
    """

    name: str
    svd: SVD
    s: Tensor
    y: Tensor
    sigma_y: float
    log_outside: float

    @property
    def seen(self) -> Tensor:
        """Where s > 0."""
        return self.s > 0

    @property
    def x(self) -> Tensor:
        """y_i / s_i where s > 0 and 0 elsewhere: V^T A^+ y, of the shape of x."""
        return self.y * reciprocal(self.s)

    @property
    def ratio(self) -> Tensor:
        """sigma_y / s_i, the noise in units of x_i; infinite where s = 0."""
        return self.sigma_y / self.s

    def log_density(self, y: Tensor, mean: Tensor, variance: Tensor, where: Tensor) -> Tensor:
        """(m,), float64: log N(y_i; mean_i, variance_i), in the units of y, summed over ``where``; and log_outside."""
        variance = torch.where(where, variance, 1.0)
        terms = (y - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi)
        return self.log_outside - 0.5 * torch.where(where, terms, 0.0).flatten(1).sum(1, dtype=torch.float64)


@per_program
def singular_measurement(program: Program, who: str) -> SingularMeasurement:
    """The program's measurement in the singular basis of its operator.

    Args:
        who: needs it, for the errors.

    Raises:
        TypeError: for a program that is not one linear-Gaussian measurement, an operator without a fast svd, or a
            noise level that differs between measured values.
    """
    problem = linear_measurement(program, who)
    svd, sigma_y = problem.require_svd(who), problem.scalar_sigma(who)
    y = svd.measurement_to_spectral(problem.y)
    s = svd.singular_values.expand(y.shape)
    rest = problem.y - svd.measurement_from_spectral(y)
    hidden = problem.y.numel() - int((s > 0).sum())
    log_outside = -0.5 * (float(rest.square().sum()) / sigma_y**2 + hidden * math.log(2 * math.pi * sigma_y**2))
    return SingularMeasurement(problem.latent, svd, s, y, sigma_y, log_outside)


@dataclass(frozen=True)
class SingularTwist:
    r"""psi_t(x_t) = prod_i N(y_i; s_i (V^T x0_hat)_i, s_i^2 v_t + sigma_y^2): the likelihood of x_0 about x0_hat.

    v_t is the variance of x_0 given x_t where the denoiser knows it, and sigma_t^2 / (sigma_t^2 + alpha_t^2), right
    for data of unit variance, where it does not. It takes no gradient of the network.

    Args:
        who: needs it, for the errors.

    References:
        J. Song, A. Vahdat, M. Mardani, J. Kautz, "Pseudoinverse-Guided Diffusion Models for Inverse Problems" (2023),
        ICLR: the Gaussian about x0_hat and its variance.
    """

    who: str = "the twist in the singular basis"

    def log_psi(self, prediction: Prediction) -> Tensor:
        here = singular_measurement(prediction.program, self.who)
        estimate = prediction.estimates[here.name]
        level = prediction.program.latents[here.name].chain.levels[prediction.k]
        x0_hat = here.svd.to_spectral(estimate.mean.detach())
        v = _clean_variance(estimate, level)
        return here.log_density(here.y, here.s * x0_hat, here.s**2 * v + here.sigma_y**2, here.seen)


def step_variance(step: SiteStep) -> Tensor | None:
    """The variance of the chain's step, its mean over the event, one per particle or for all; None for a point mass.

    Of a law whose covariance is not diagonal it is estimated from what the denoiser says of the variance of x_0.
    """
    if isinstance(step.p, Gaussian):
        return None if step.p.variance is None else _mean_over_event(step.p.variance, step.x)
    coefficients = step.coefficients
    return coefficients.kappa**2 + coefficients.c**2 * _clean_variance(step.estimate, coefficients.t)


def conjugate(
    mean: Tensor, variance: Tensor, y: Tensor, noise: Tensor | float, here: SingularMeasurement
) -> tuple[Gaussian, Tensor]:
    """The law of x ~ N(mean, variance I) given y_i = s_i x_i + noise of variance ``noise``, and its gain of y_i.

    Args:
        mean: (m, *shape), in the event's own entries.
        variance: one per particle or for all.
        y: in the singular basis.
    """
    gain = variance * here.s / (variance * here.s**2 + noise)
    shift = gain * (y - here.s * here.svd.to_spectral(mean))
    return Gaussian(mean + here.svd.from_spectral(shift), variance * (1 - gain * here.s), here.svd), gain


def last_step(step: SiteStep, x0: Tensor, here: SingularMeasurement) -> Gaussian:
    """The law of x_0 at the end of a published chain: the point ``x0``, or a density where the chain has one.

    With a density the published point has none to weigh, so x_0 is drawn from the chain's law given y.
    """
    variance = step_variance(step)
    if variance is None:
        return Gaussian(x0, None)
    law, _ = conjugate(step.p.mean, variance, here.y, here.sigma_y**2, here)
    return law


def at_least(share: float, step: SiteStep, variance: Tensor) -> Tensor:
    """The variance of a proposal, raised to this share of the chain's own where it is below."""
    chain = step_variance(step)
    assert chain is not None  # before the last step every chain has a density
    return torch.maximum(variance, share * chain)


def eps_hat(step: SiteStep) -> Tensor:
    """(x_t - alpha_t x0_hat) / sigma_t."""
    level = step.coefficients.t
    return (step.x - level.alpha * step.estimate.mean) / level.sigma


def check_share(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a share outside (0, 1], or [0, 1] with ``zero``."""
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        wanted = "a share in [0, 1]" if zero else "a share in (0, 1], as 0 leaves a step without noise and density"
        raise ValueError(f"got {name} {value}; expected {wanted}")


def check_floor(min_variance: float) -> None:
    """Refuse a least variance below 0."""
    if not min_variance >= 0:
        raise ValueError(f"got min_variance {min_variance}; expected at least 0, which is as published")


def _clean_variance(estimate: Estimate, level: NoiseLevel) -> Tensor:
    """v_t of :class:`SingularTwist`, one per particle or for all."""
    mean = estimate.mean
    if estimate.variance is None:
        unit = level.sigma**2 / (level.sigma**2 + level.alpha**2)
        return mean.new_full((1,) * mean.ndim, unit)
    return _mean_over_event(estimate.variance.detach(), mean)


def _mean_over_event(variance: Tensor, like: Tensor) -> Tensor:
    """(m or 1, 1, ...): the mean over the event, which is the same in every basis."""
    variance = variance.expand(len(variance), *like.shape[1:])
    return variance.flatten(1).mean(1).reshape(-1, *(1,) * (like.ndim - 1))
