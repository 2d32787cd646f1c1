r"""Stochastic volatility: the evidence of a Pyro state-space model, with three guides, against quadrature.

The log-variance of daily returns is a stationary autoregression that nobody sees,

    x_0 ~ N(mu, s^2 / (1 - phi^2)),    x_i = mu + phi (x_{i-1} - mu) + s e_i,    y_i ~ N(0, exp(x_i)).

The state has one dimension, so the evidence p(y_0, ..., y_K) is also known by quadrature on a grid. Three filters are
compared with it: one that moves by the model, one whose guide looks at y_i before it proposes x_i, and one whose guide
looks at all returns and says by pyro.factor how well a particle is placed for those to come. All three are unbiased;
they differ in how much they scatter.

    python examples/stochastic_volatility.py

References:
    S. Kim, N. Shephard, S. Chib, "Stochastic volatility: likelihood inference and comparison with ARCH models", Review
    of Economic Studies 65 (1998): the model.
    M. K. Pitt, N. Shephard, "Filtering via simulation: auxiliary particle filters", Journal of the American Statistical
    Association 94 (1999): proposals for it.
    P. Guarniero, A. M. Johansen, A. Lee, "The iterated auxiliary particle filter", Journal of the American Statistical
    Association 112 (2017), arXiv:1511.06286: Gaussian twists for it.
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


class Volatility:
    """The model: level mu and persistence phi of the log-variance, standard deviation s of its innovations."""

    def __init__(self, mu: float = -1.0, phi: float = 0.97, s: float = 0.3) -> None:
        self.mu, self.phi, self.s = mu, phi, s
        self.stationary = s / math.sqrt(1 - phi**2)

    def mean(self, x: Tensor) -> Tensor:
        """Of x_i given x_{i-1} = x."""
        return self.mu + self.phi * (x - self.mu)

    def init(self, state: Any, y: Tensor) -> None:
        state["x"] = pyro.sample("x", dist.Normal(y.new_tensor(self.mu), self.stationary))
        pyro.sample("y", dist.Normal(0.0, (state["x"] / 2).exp()), obs=y)

    def step(self, state: Any, y: Tensor) -> None:
        state["x"] = pyro.sample("x", dist.Normal(self.mean(state["x"]), self.s))
        pyro.sample("y", dist.Normal(0.0, (state["x"] / 2).exp()), obs=y)


class Informed:
    """Proposes from the normal law that the curvature of log p(x_i | x_{i-1}) p(y_i | x_i) suggests."""

    def __init__(self, model: Volatility) -> None:
        self.model = model

    def init(self, state: Any, y: Tensor) -> None:
        self.propose(y.new_tensor(self.model.mu), self.model.stationary, y)

    def step(self, state: Any, y: Tensor) -> None:
        self.propose(self.model.mean(state["x"]), self.model.s, y)

    def propose(self, mean: Tensor, s: float, y: Tensor) -> None:
        """Two Newton steps from the mean, in which log p(y | x) = -(x + y^2 exp(-x)) / 2 + const."""
        x = mean
        for _ in range(2):
            pull = y**2 * (-x).exp() / 2
            variance = 1 / (s**-2 + pull)
            x = x + variance * ((mean - x) / s**2 + pull - 0.5)
        pyro.sample("x", dist.Normal(x, variance.sqrt()))


class LookingAhead:
    """Proposes and twists by the normal law that touches the posterior of the whole path at its mode.

    There log p(y_i | x_i) = b_i z - c_i z^2 / 2 + const to second order, z = x_i - mu, and going back from psi_K = 1,

        log psi_i(z) = v_i z - L_i z^2 / 2,    L_i = phi^2 A / (1 + s^2 A),    v_i = phi B / (1 + s^2 A),

    with A = c + L and B = b + v at i + 1.
    """

    def __init__(self, model: Volatility, y: Tensor) -> None:
        self.model, phi, s = model, model.phi, model.s
        self.b, self.c = self._expansion(y)
        self.L, self.v = torch.zeros_like(y), torch.zeros_like(y)
        for i in range(len(y) - 2, -1, -1):
            A, B = self.c[i + 1] + self.L[i + 1], self.b[i + 1] + self.v[i + 1]
            self.L[i], self.v[i] = phi**2 * A / (1 + s**2 * A), phi * B / (1 + s**2 * A)

    def _expansion(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """b and c at the mode of the path, found by Newton's method; the log-posterior is concave."""
        phi, s, count = self.model.phi, self.model.s, len(y)
        difference = torch.eye(count, dtype=y.dtype) - phi * torch.diag(torch.ones(count - 1, dtype=y.dtype), -1)
        variances = torch.full_like(y, s**2)
        variances[0] = self.model.stationary**2
        precision = difference.T @ (difference / variances[:, None])
        z = torch.zeros_like(y)
        for _ in range(30):
            c = y**2 * (-z - self.model.mu).exp() / 2
            b = c - 0.5 + c * z
            z = torch.linalg.solve(precision + torch.diag(c), b)
        return b, c

    def init(self, state: Any, y: Tensor) -> None:
        self.i = 0
        self.propose(y.new_tensor(self.model.mu), self.model.stationary)

    def step(self, state: Any, y: Tensor) -> None:
        self.i += 1
        self.propose(self.model.mean(state["x"]), self.model.s)

    def propose(self, mean: Tensor, s: float) -> None:
        b, c, L, v, mu = self.b[self.i], self.c[self.i], self.L[self.i], self.v[self.i], self.model.mu
        variance = 1 / (s**-2 + c + L)
        x = pyro.sample("x", dist.Normal(mu + variance * ((mean - mu) / s**2 + b + v), variance.sqrt()))
        pyro.factor("ahead", v * (x - mu) - L * (x - mu) ** 2 / 2)


def simulate(model: Volatility, num_returns: int, seed: int) -> Tensor:
    """Returns y_0, ..., y_K drawn from the model, float64."""
    noise = torch.randn((2, num_returns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = [model.mu + model.stationary * noise[0, 0]]
    for e in noise[0, 1:]:
        x.append(model.mean(x[-1]) + model.s * e)
    return (torch.stack(x) / 2).exp() * noise[1]


def log_evidence(model: Volatility, y: Tensor, nodes: int = 600) -> float:
    """log p(y) by the rectangle rule over x on an even grid of eight stationary standard deviations to either side.

    The integrands are smooth and vanish at the ends, so the rule converges faster than any power of the spacing.
    """
    x = model.mu + torch.linspace(-8, 8, nodes, dtype=torch.float64) * model.stationary
    log_dx = (x[1] - x[0]).log()
    log_p = dist.Normal(model.mean(x)[:, None], model.s).log_prob(x) + log_dx
    likelihood = dist.Normal(0.0, (x / 2).exp())
    log_alpha = dist.Normal(model.mu, model.stationary).log_prob(x) + log_dx + likelihood.log_prob(y[0])
    for value in y[1:]:
        log_alpha = (log_alpha[:, None] + log_p).logsumexp(0) + likelihood.log_prob(value)
    return float(log_alpha.logsumexp(0))


def run(
    num_returns: int = 100, num_particles: int = 200, num_chains: int = 100, seed: int = 0
) -> tuple[float, dict[str, FilterResult]]:
    """The reference and, by the name of the guide, the runs."""
    model = Volatility()
    y = simulate(model, num_returns, seed)
    guides = {"the model": None, "informed": Informed(model), "looking ahead": LookingAhead(model, y)}
    results = {
        name: ParticleFilter().run(
            StateSpaceModel(model, guide, y[1:], init_args=(y[0],)),
            num_particles=num_particles,
            num_chains=num_chains,
            seed=seed + 1,
        )
        for name, guide in guides.items()
    }
    return log_evidence(model, y), results


def table(reference: float, results: dict[str, FilterResult]) -> str:
    """What the script prints."""
    lines = [
        f"log-evidence by quadrature {reference:.4f}",
        f"{'guide':<14} {'all chains':>11} {'one chain, sd':>14} {'resamplings':>12}",
    ]
    for name, result in results.items():
        resampled = float(result.records.resampled.sum(0).double().mean())
        lines.append(f"{name:<14} {result.log_evidence:>11.4f} {result.log_z.std():>14.3f} {resampled:>12.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*run()))
