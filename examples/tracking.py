r"""Tracking by bearings alone: the evidence of a nonlinear Pyro state-space model against a grid filter.

A boat drifts in the plane. An observer who sails past measures the direction in which it lies, and nothing else,

    x_0 ~ N(m, r^2 I),    x_i = x_{i-1} + v + s e_i,    y_i ~ VonMises(bearing of x_i from o_i, kappa),

with o_i the known place of the observer; the distance is learned only because the observer moves. With two dimensions
the evidence p(y_0, ..., y_K) is also known by a filter on a grid, in which a move is one matrix product per axis. Two
particle filters are compared with it: one that moves by the model, and one whose guide proposes from the model
linearised in the bearing. Both are unbiased; they differ in how much they scatter.

    python examples/tracking.py

References:
    N. Gordon, D. Salmond, A. Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation", IEE
    Proceedings F 140 (1993): bearings-only tracking with particles.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff.smc import FilterResult, ParticleFilter
from smcdiff.state_space import StateSpaceModel


def bearing(x: Tensor, observer: Tensor) -> Tensor:
    """Direction of x, (..., 2), from the observer, (2,), in radians from the first axis."""
    return torch.atan2(x[..., 1] - observer[1], x[..., 0] - observer[0])


class Boat:
    """The model; lengths in kilometres. A step's arguments are the bearing, radians, and the observer's place."""

    def __init__(self, r: float = 1.0, s: float = 0.15, kappa: float = 400.0) -> None:
        self.m = torch.tensor([0.0, 5.0], dtype=torch.float64)
        self.v = torch.tensor([0.2, -0.05], dtype=torch.float64)
        self.r, self.s, self.kappa = r, s, kappa

    def init(self, state: Any, y: Tensor, observer: Tensor) -> None:
        state["x"] = pyro.sample("x", dist.Normal(self.m, self.r).to_event(1))
        pyro.sample("y", dist.VonMises(bearing(state["x"], observer), self.kappa), obs=y)

    def step(self, state: Any, y: Tensor, observer: Tensor) -> None:
        state["x"] = pyro.sample("x", dist.Normal(state["x"] + self.v, self.s).to_event(1))
        pyro.sample("y", dist.VonMises(bearing(state["x"], observer), self.kappa), obs=y)


class Linearised:
    """Proposes from the normal law that the bearing, linearised at the predicted place, leaves of the prediction."""

    def __init__(self, model: Boat) -> None:
        self.model = model

    def init(self, state: Any, y: Tensor, observer: Tensor) -> None:
        self.propose(self.model.m, self.model.r, y, observer)

    def step(self, state: Any, y: Tensor, observer: Tensor) -> None:
        self.propose(state["x"] + self.model.v, self.model.s, y, observer)

    def propose(self, mean: Tensor, s: float, y: Tensor, observer: Tensor) -> None:
        """Covariance s^2 (I - u u' g) with u the direction across the line of sight, in which the bearing moves."""
        sight = mean - observer
        distance = torch.linalg.vector_norm(sight, dim=-1, keepdim=True)
        across = torch.stack((-sight[..., 1], sight[..., 0]), -1) / distance
        gain = s**2 / (s**2 + distance**2 / self.model.kappa)
        error = torch.remainder(y - bearing(mean, observer) + math.pi, 2 * math.pi) - math.pi
        covariance = s**2 * (
            torch.eye(2, dtype=torch.float64) - gain[..., None] * across[..., None] * across[..., None, :]
        )
        location = mean + gain * distance * error[..., None] * across
        pyro.sample("x", dist.MultivariateNormal(location, covariance))


def simulate(model: Boat, num_bearings: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bearings, (K + 1,), drawn from the model (normal noise for the compass, as good as von Mises), and observers."""
    noise = torch.randn((num_bearings, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    i = torch.arange(num_bearings, dtype=torch.float64)
    observers = torch.stack((-3 + 0.5 * i, torch.sin(i / 3)), -1)
    steps = torch.cat((model.m + model.r * noise[:1, :2], model.v + model.s * noise[1:, :2]))
    x = steps.cumsum(0)
    y = torch.stack([bearing(place, o) for place, o in zip(x, observers, strict=True)])
    return y + noise[:, 2] / math.sqrt(model.kappa), observers


def log_evidence(model: Boat, y: Tensor, observers: Tensor, nodes: int = 240) -> float:
    """log p(y) by the rectangle rule on an even grid of nodes x nodes places around the boat's expected path.

    The grid moves with the drift. The integrands are smooth away from the observer and vanish at the rim, so the rule
    converges faster than any power of the spacing once that is below s.
    """
    half = 6.0 * math.hypot(model.r, model.s * math.sqrt(len(y)))
    axis = torch.linspace(-half, half, nodes, dtype=torch.float64)
    dx = float(axis[1] - axis[0])
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1) + model.m
    move = dist.Normal(axis[:, None], model.s).log_prob(axis).exp() * dx
    density = dist.Normal(model.m, model.r).log_prob(places).sum(-1).exp()
    log_z = 0.0
    for i in range(len(y)):
        if i:
            places, density = places + model.v, move.T @ density @ move
        density = density * dist.VonMises(bearing(places, observers[i]), model.kappa).log_prob(y[i]).exp()
        total = density.sum() * dx**2
        log_z, density = log_z + float(total.log()), density / total
    return log_z


def run(
    num_bearings: int = 25, num_particles: int = 1000, num_chains: int = 100, seed: int = 0
) -> tuple[float, dict[str, FilterResult]]:
    """The reference and, by the name of the guide, the runs."""
    model = Boat()
    y, observers = simulate(model, num_bearings, seed)
    guides = {"the model": None, "linearised": Linearised(model)}
    results = {
        name: ParticleFilter().run(
            StateSpaceModel(model, guide, list(zip(y[1:], observers[1:], strict=True)), init_args=(y[0], observers[0])),
            num_particles=num_particles,
            num_chains=num_chains,
            seed=seed + 1,
        )
        for name, guide in guides.items()
    }
    return log_evidence(model, y, observers), results


def table(reference: float, results: dict[str, FilterResult]) -> str:
    """What the script prints."""
    lines = [
        f"log-evidence by the grid filter {reference:.4f}",
        f"{'guide':<14} {'all chains':>11} {'one chain, sd':>14} {'resamplings':>12}",
    ]
    for name, result in results.items():
        resampled = float(result.records.resampled.sum(0).double().mean())
        lines.append(f"{name:<14} {result.log_evidence:>11.4f} {result.log_z.std():>14.3f} {resampled:>12.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*run()))
