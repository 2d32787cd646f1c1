"""A Pyro program as its own simulator: draws of latents and measurement, and the likelihood of given latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["Model", "Simulation", "latent_values", "log_likelihood", "replicate", "simulate"]

#: A Pyro program that needs no arguments, such as ``model(y=None)``.
Model = Callable[..., Any]


@dataclass(frozen=True)
class Simulation:
    """One draw of everything.

    Args:
        values: of the latents, {site: (*event)}.
        measurement: {site: its value}.
    """

    values: dict[str, Tensor]
    measurement: dict[str, Tensor]


def simulate(model: Model, observed: tuple[str, ...]) -> Simulation:
    """Draw latents and measurement from the program, by torch's global generator.

    Args:
        model: called without arguments, so that it draws its measurement.
        observed: the sites of the measurement.

    Raises:
        ValueError: where a site is missing, is observed already, or nothing is latent.
    """
    with torch.no_grad():
        nodes = pyro.poutine.trace(model).get_trace().nodes
    sites = {name: site for name, site in nodes.items() if _is_random(site)}
    missing = [name for name in observed if name not in sites]
    if missing or not observed:
        raise ValueError(f"got the measured sites {list(observed)}; expected some of the program's sites {list(sites)}")
    fixed = [name for name, site in sites.items() if site["is_observed"]]
    if fixed:
        raise ValueError(
            f"got the sites {fixed} observed or weighed by pyro.factor though the program was called without "
            "arguments; its prior and measurement cannot be drawn then. Let it draw them, as model(y=None) does"
        )
    values: dict[str, Any] = {name: site["value"] for name, site in sites.items() if name not in observed}
    if not values:
        raise ValueError(f"got a program without latents beside the measured sites {list(observed)}")
    measurement: dict[str, Any] = {name: sites[name]["value"] for name in observed}
    return Simulation(values, measurement)


def latent_values(model: Model, values: Mapping[str, Tensor], observed: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of the values that belong to latents of the program.

    Raises:
        ValueError: if a latent has none.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        latents = simulate(model, observed).values
    missing = sorted(latents.keys() - values.keys())
    if missing:
        raise ValueError(f"got no values of the latents {missing}, only of {sorted(values)}")
    return {name: values[name].detach() for name in latents}


def log_likelihood(
    model: Model,
    values: Mapping[str, Tensor],
    measurement: Mapping[str, Tensor],
    *,
    measurement_of_each: bool = False,
) -> Tensor:
    """log p(measurement given latents), (m,), float64.

    Args:
        values: {site: (m, *event)} of all latents.
        measurement: {site: value}, or {site: (m, *shape)}, one for each draw, with ``measurement_of_each``.
    """

    def one(value: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False):
            conditioned = pyro.condition(model, data={**y, **value})
            trace = pyro.poutine.trace(conditioned).get_trace()
            trace.compute_log_prob(site_filter=lambda name, site: name in y)
        terms = [trace.nodes[name]["log_prob_sum"].to(torch.float64) for name in y]
        return torch.stack(terms).sum()

    with torch.no_grad():
        in_dims = (0, 0 if measurement_of_each else None)
        found: Tensor = torch.func.vmap(one, in_dims=in_dims)(dict(values), dict(measurement))
    return found


def replicate(model: Model, values: Mapping[str, Tensor], observed: tuple[str, ...]) -> dict[str, Tensor]:
    """A new measurement for each draw of the latents, {site: (m, *shape)}, by torch's global generator."""
    number = len(next(iter(values.values())))
    drawn: list[dict[str, Any]] = []
    with torch.no_grad():
        for i in range(number):
            conditioned = pyro.condition(model, data={name: value[i] for name, value in values.items()})
            nodes = pyro.poutine.trace(conditioned).get_trace().nodes
            drawn.append({name: nodes[name]["value"] for name in observed})
    return {name: torch.stack([each[name] for each in drawn]) for name in observed}


def _is_random(site: Any) -> bool:
    """Whether it is a sample site, and neither a plate nor deterministic."""
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample):
        return False
    return not (site["infer"] and site["infer"].get("_deterministic"))
