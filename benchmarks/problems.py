r"""Problems with a closed-form posterior and evidence, on which methods are compared.

Prior and measurement are

    x ~ sum_c w_c N(mu_c, C) in R^d,      y = A x + sigma_y noise,

so that, with S = A C A^T + sigma_y^2 I and K = C A^T S^-1,

    p(y)            = sum_c w_c N(y; A mu_c, S)
    p(x given y)    = sum_c w'_c N(mu_c + K (y - A mu_c), C - K A C),     w'_c proportional to w_c N(y; A mu_c, S).

The public problem of 25 components is that of G. Cardoso, Y. Janati El Idrissi, S. Le Corff, E. Moulines, "Monte Carlo
Guided Diffusion for Bayesian Linear Inverse Problems" (2023), arXiv 2308.07983: components at (-8 i, -8 j, -8 i, -8 j,
...), i, j = -2 ... 2, with C = I, weights from squared normal draws, A with Gaussian singular vectors and singular
values uniform on (0, 1), sigma_y uniform on (0, largest singular value).

How far draws are from the posterior is measured by the sliced Wasserstein distance, the mean over directions of the
distance between sorted projections. Even exact draws are not at zero: two sets of them are a *floor* apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd

__all__ = ["MixtureProblem", "Yardstick", "sliced_wasserstein"]


@dataclass(frozen=True, eq=False)
class MixtureProblem:
    """A mixture prior, a linear measurement, and what follows from them.

    Args:
        means: mu, (components, d).
        weights: w, (components,), with sum 1.
        A: (dim y, d).
        y: (dim y,).
        sigma_y: standard deviation of the noise.
        covariance: C of all components, (d, d); None for I.
    """

    means: Tensor
    weights: Tensor
    A: Tensor
    y: Tensor
    sigma_y: float
    covariance: Tensor | None = None

    @classmethod
    def public(cls, d: int, dim_y: int, seed: int) -> MixtureProblem:
        """An instance of the public problem.

        Args:
            d: dimension of x, even.
            dim_y: number of measured values.
            seed: of the instance.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator)

        places = [(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
        means = torch.tensor(places, dtype=torch.float64).repeat(1, d // 2)
        weights = normal(len(means)).square()
        weights = weights / weights.sum()
        left, _, right = torch.linalg.svd(normal(dim_y, d), full_matrices=False)
        sizes = uniform(dim_y).sort(descending=True).values
        A = left * sizes @ right
        c = torch.multinomial(weights, 1, generator=generator)[0]
        x = means[c] + normal(d)
        sigma_y = float(uniform(1) * sizes[0])
        return cls(means, weights, A, A @ x + sigma_y * normal(dim_y), sigma_y)

    @property
    def d(self) -> int:
        return self.means.shape[1]

    @property
    def denoiser(self) -> sd.GaussianMixtureDenoiser:
        """The exact denoiser of the prior."""
        C = torch.eye(self.d, dtype=torch.float64) if self.covariance is None else self.covariance
        return sd.GaussianMixtureDenoiser(self.means, C, self.weights)

    def program(self, prior: sd.DiffusionPrior) -> object:
        """The Pyro program of the measurement."""
        operator = sd.Matrix(self.A)

        def model(y: Tensor | None = None) -> Tensor:
            x = pyro.sample("x", prior)
            return pyro.sample("y", sd.GaussianMeasurement(operator, x, self.sigma_y), obs=y)

        return model

    @cached_property
    def _spread(self) -> Tensor:
        """A C, (dim y, d)."""
        return self.A if self.covariance is None else self.A @ self.covariance

    @cached_property
    def _total(self) -> Tensor:
        """S, (dim y, dim y)."""
        return self._spread @ self.A.mT + self.sigma_y**2 * torch.eye(len(self.y), dtype=torch.float64)

    @cached_property
    def _root(self) -> Tensor | None:
        """The Cholesky factor of C; None for I."""
        return None if self.covariance is None else torch.linalg.cholesky(self.covariance)

    @cached_property
    def _log_joint(self) -> Tensor:
        """log w_c N(y; A mu_c, S), (components,)."""
        return self.weights.log() + MultivariateNormal(self.means @ self.A.mT, self._total).log_prob(self.y)

    @property
    def log_evidence(self) -> float:
        """log p(y)."""
        return float(self._log_joint.logsumexp(0))

    @property
    def posterior_weights(self) -> Tensor:
        """w', (components,)."""
        return self._log_joint.softmax(0)

    @cached_property
    def gain(self) -> Tensor:
        """K, (d, dim y)."""
        return torch.linalg.solve(self._total, self._spread).mT

    def posterior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x given y, (d,) and (d, d)."""
        centres = self.means + (self.y - self.means @ self.A.mT) @ self.gain.mT
        mean = self.posterior_weights @ centres
        away = centres - mean
        C = torch.eye(self.d, dtype=torch.float64) if self.covariance is None else self.covariance
        within = C - self.gain @ self._spread
        return mean, within + (self.posterior_weights[:, None] * away).mT @ away

    def posterior_draws(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws of x given y, (n, d): a draw of a component's x and of y's noise, moved to meet y."""
        c = torch.multinomial(self.posterior_weights, n, replacement=True, generator=generator)
        x = torch.randn((n, self.d), dtype=torch.float64, generator=generator)
        x = self.means[c] + (x if self._root is None else x @ self._root.mT)
        noise = torch.randn((n, len(self.y)), dtype=torch.float64, generator=generator)
        return x + (self.y - x @ self.A.mT - self.sigma_y * noise) @ self.gain.mT

    def mode_weights(self, x: Tensor, w: Tensor) -> Tensor:
        """How much of the weighted draws belongs to each component, (components,): the mean of its share of x.

        Args:
            x: (n, d).
            w: (n,), with sum 1.
        """
        means = self.means
        if self._root is not None:
            x, means = (torch.linalg.solve_triangular(self._root, v.mT, upper=False).mT for v in (x, means))
        fit = self.weights.log() - 0.5 * torch.cdist(x, means).square()
        return w @ fit.softmax(1)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean over directions of the Wasserstein-1 distance between projected draws.

    Args:
        a, b: as many draws in each, (n, d).
        directions: unit vectors, (d, number).
    """
    return float((_projected(a, directions) - _projected(b, directions)).abs().mean())


class Yardstick:
    """Sliced Wasserstein distances from a posterior, and the floor that exact draws reach.

    Both are means over independent sets of exact draws, along the same directions.

    Args:
        problem: whose posterior.
        n: number of draws in a set.
        seed: of directions and exact draws.
        directions: number of directions.
        repeats: number of sets.
    """

    def __init__(self, problem: MixtureProblem, n: int, seed: int, directions: int = 500, repeats: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        unit = torch.randn((problem.d, directions), dtype=torch.float64, generator=generator)
        self._directions = unit / unit.norm(dim=0)
        self._references, floors = [], []
        for _ in range(repeats):
            reference, again = (_projected(problem.posterior_draws(n, generator), self._directions) for _ in range(2))
            self._references.append(reference)
            floors.append(float((again - reference).abs().mean()))
        self.floor = sum(floors) / repeats

    def distance(self, x: Tensor) -> float:
        """Of n draws from the posterior.

        Args:
            x: (n, d).
        """
        projected = _projected(x, self._directions)
        return sum(float((projected - reference).abs().mean()) for reference in self._references) / len(
            self._references
        )


def _projected(x: Tensor, directions: Tensor) -> Tensor:
    """Sorted projections, (n, directions)."""
    return (x @ directions).sort(0).values
