"""Posterior predictive checks and measurement splitting on programs; the formulas are in
:mod:`smcdiff.diagnostics.predictive`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, Normal, Poisson

from smcdiff.diagnostics.predictive import (
    HeldOutScore,
    PredictiveCheck,
    held_out_score,
    posterior_predictive_p,
    split_gaussian,
    split_poisson,
)
from smcdiff.measurement import GaussianMeasurement, PoissonMeasurement
from smcdiff.validation.programs import Model, latent_values, log_likelihood, replicate

__all__ = ["Discrepancy", "MeasurementSplit", "predictive_check", "split_measurement"]

#: (one draw's latents, a measurement) -> a number, larger where they fit worse.
Discrepancy = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor | float]


def predictive_check(
    model: Model,
    measurement: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    discrepancy: Discrepancy | None = None,
    *,
    log_w: Tensor | None = None,
    seed: int = 0,
) -> PredictiveCheck:
    """The posterior predictive p-value of draws, one replicated measurement each.

    Args:
        model: the program; called without arguments it draws its measurement.
        measurement: {site: value}.
        values: {site: (S, *event)} of all latents.
        discrepancy: T; by default -log p(y given latents), for Gaussian noise half the squared weighted residual.
        log_w: (S,), log-weights of the draws.
        seed: of the replicated measurements.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        latents = latent_values(model, values, tuple(measurement))
        again = replicate(model, latents, tuple(measurement))
    number = len(next(iter(again.values())))
    each = [{name: value[i] for name, value in again.items()} for i in range(number)]
    if discrepancy is None:
        observed = -log_likelihood(model, latents, measurement)
        replicated = -log_likelihood(model, latents, again, measurement_of_each=True)
    else:
        draws = [{name: value[i] for name, value in latents.items()} for i in range(number)]
        observed, replicated = (
            torch.stack([torch.as_tensor(discrepancy(draw, y)).double() for draw, y in zip(draws, ys, strict=True)])
            for ys in ([measurement] * number, each)
        )
    return posterior_predictive_p(observed, replicated, log_w)


@dataclass(frozen=True)
class MeasurementSplit:
    """A measurement in two parts that are independent given the latents.

    Args:
        program: the program of the first part, conditioned on it: what to infer from.
        first, second: the parts, {site: value}.
        test: the program of the second part, unconditioned.
    """

    program: Model
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    test: Model

    def score(self, values: Mapping[str, Tensor], log_w: Tensor | None = None) -> HeldOutScore:
        """The held-out score of draws {site: (S, *event)} that were inferred from the first part."""
        latents = latent_values(self.test, values, tuple(self.second))
        return held_out_score(log_likelihood(self.test, latents, self.second), log_w)

    def check(self, values: Mapping[str, Tensor], log_w: Tensor | None = None, seed: int = 0) -> PredictiveCheck:
        """The predictive p-value of the second part, which was not used to infer the draws."""
        return predictive_check(self.test, self.second, values, log_w=log_w, seed=seed)


def split_measurement(
    model: Model, measurement: Mapping[str, Tensor], share: float = 0.5, seed: int = 0
) -> MeasurementSplit:
    """Split every measured value of a program with Gaussian noise of known level, or Poisson noise.

    Args:
        model: the program; called without arguments it draws its measurement.
        measurement: {site: value}.
        share: of the information, that goes into the first part, in (0, 1).
        seed: of the split.

    Raises:
        ValueError: for a share outside (0, 1).
        TypeError: for another noise law, or a noise level that is itself uncertain.
    """
    names = tuple(measurement)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(seed)
        conditioned = pyro.condition(model, data=dict(measurement))
        runs = [pyro.poutine.trace(conditioned).get_trace().nodes for _ in range(2)]
    generator = torch.Generator().manual_seed(seed)
    first, second = {}, {}
    for name, y in measurement.items():
        law = _innermost(runs[0][name]["fn"])
        if isinstance(law, Poisson | PoissonMeasurement):
            first[name], second[name] = split_poisson(y, share, generator)
        else:
            sigma = _sigma(name, law)
            if not torch.equal(sigma, _sigma(name, _innermost(runs[1][name]["fn"]))):
                raise TypeError(
                    f"got the measurement {name!r} whose noise level depends on latents; it can be split for a known "
                    "level only. Leave values out instead, with sd.Select"
                )
            first[name], second[name] = split_gaussian(y, sigma, share, generator)
    fit, test = _Thinned(names, share)(model), _Thinned(names, 1 - share)(model)
    return MeasurementSplit(pyro.condition(fit, data=first), first, second, test)


class _Thinned(Messenger):
    """Gives the sites of the measurement the law of a share of their information."""

    def __init__(self, names: tuple[str, ...], share: float) -> None:
        super().__init__()
        self.names, self.share = names, share

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["fn"] = _thinned(msg["name"], msg["fn"], self.share)


def _thinned(name: str, law: Any, share: float) -> Any:
    """The same law with ``share`` times the information, in Gaussian variances or in Poisson rates."""
    if isinstance(law, Independent):
        return _thinned(name, law.base_dist, share).to_event(law.reinterpreted_batch_ndims)
    if isinstance(law, Poisson):
        return dist.Poisson(share * law.rate)
    if isinstance(law, Normal):
        return dist.Normal(law.loc, law.scale / math.sqrt(share))
    new: Any = copy.copy(law)
    if isinstance(law, PoissonMeasurement):
        new._mean, new.gain, new.background = share * law._mean, share * law.gain, share * law.background
        return new
    new.sigma = _sigma(name, law) / math.sqrt(share)
    return new


def _sigma(name: str, law: Any) -> Tensor:
    if isinstance(law, GaussianMeasurement):
        return law.sigma
    if isinstance(law, Normal):
        return law.scale
    raise TypeError(
        f"got the measurement {name!r} with the law {type(law).__name__}; a measurement is split for Gaussian and "
        "Poisson noise. Leave values out instead, with sd.Select"
    )


def _innermost(law: Any) -> Any:
    while isinstance(law, Independent):
        law = law.base_dist
    return law
