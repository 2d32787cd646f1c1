"""Feynman-Kac models whose evidence and filtering laws are known exactly: Kalman and hidden Markov."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from smcdiff.smc import Move, Particles

CPU = torch.device("cpu")


def normal_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; mean, covariance) over the last axis."""
    root = torch.linalg.cholesky(covariance)
    z = torch.linalg.solve_triangular(root, (x - mean)[..., None], upper=False)[..., 0]
    return -0.5 * z.square().sum(-1) - root.diagonal().log().sum() - 0.5 * x.shape[-1] * math.log(2 * math.pi)


@dataclass(frozen=True)
class LinearGaussian:
    """x_0 ~ N(m, P), x_i = F x_{i-1} + N(0, Q), y_i = H x_i + N(0, R) for i = 0 ... K; ``y`` is (K + 1, d_y)."""

    m: Tensor
    P: Tensor
    F: Tensor
    Q: Tensor
    H: Tensor
    R: Tensor
    y: Tensor

    @classmethod
    def example(cls, d: int, num_steps: int, seed: int = 0) -> LinearGaussian:
        """A stable, anisotropic problem of dimension d with data drawn from it; fewer measurements than states."""
        g = torch.Generator().manual_seed(seed)

        def spd(k: int, scale: float) -> Tensor:
            a = torch.randn((k, k), generator=g, dtype=torch.float64)
            return scale * (a @ a.T / k + 0.5 * torch.eye(k, dtype=torch.float64))

        a = torch.randn((d, d), generator=g, dtype=torch.float64)
        F = 0.9 * a / torch.linalg.matrix_norm(a, 2)
        k = max(1, d - 1)
        H = torch.randn((k, d), generator=g, dtype=torch.float64)
        m, P, Q, R = torch.randn(d, generator=g, dtype=torch.float64), spd(d, 1.0), spd(d, 0.5), spd(k, 0.7)
        x = m + torch.linalg.cholesky(P) @ torch.randn(d, generator=g, dtype=torch.float64)
        y = []
        for _ in range(num_steps + 1):
            y.append(H @ x + torch.linalg.cholesky(R) @ torch.randn(k, generator=g, dtype=torch.float64))
            x = F @ x + torch.linalg.cholesky(Q) @ torch.randn(d, generator=g, dtype=torch.float64)
        return cls(m, P, F, Q, H, R, torch.stack(y))

    @property
    def num_steps(self) -> int:
        return self.y.shape[0] - 1

    @cached_property
    def kalman(self) -> tuple[Tensor, Tensor, Tensor]:
        """Filtering means (K + 1, d), covariances (K + 1, d, d) and log p(y_0 ... y_i), (K + 1,)."""
        mean, cov, log_z = self.m, self.P, torch.zeros((), dtype=torch.float64)
        means, covs, log_zs = [], [], []
        for i, y in enumerate(self.y):
            if i:
                mean, cov = self.F @ mean, self.F @ cov @ self.F.T + self.Q
            S = self.H @ cov @ self.H.T + self.R
            log_z = log_z + normal_log_prob(y, self.H @ mean, S)
            gain = cov @ self.H.T @ torch.linalg.inv(S)
            mean, cov = mean + gain @ (y - self.H @ mean), cov - gain @ self.H @ cov
            means.append(mean), covs.append(cov), log_zs.append(log_z)
        return torch.stack(means), torch.stack(covs), torch.stack(log_zs)

    @cached_property
    def joint(self) -> tuple[Tensor, Tensor]:
        """Posterior mean and covariance of (x_0 ... x_K) given all data, by one linear solve: (D,), (D, D)."""
        K, d = self.num_steps, self.m.shape[0]
        means, blocks = [self.m], {(0, 0): self.P}
        for i in range(1, K + 1):
            means.append(self.F @ means[-1])
            for j in range(i):
                blocks[i, j] = self.F @ blocks[i - 1, j]
                blocks[j, i] = blocks[i, j].T
            blocks[i, i] = self.F @ blocks[i - 1, i - 1] @ self.F.T + self.Q
        prior = torch.cat([torch.cat([blocks[i, j] for j in range(K + 1)], 1) for i in range(K + 1)])
        H = torch.block_diag(*[self.H] * (K + 1))
        gain = prior @ H.T @ torch.linalg.inv(H @ prior @ H.T + torch.block_diag(*[self.R] * (K + 1)))
        mean = torch.cat(means)
        mean = mean + gain @ (self.y.flatten() - H @ mean)
        assert mean.shape == ((K + 1) * d,)
        return mean, prior - gain @ H @ prior


@dataclass(frozen=True)
class Bootstrap:
    """The bootstrap filter of a linear-Gaussian model: moves by the dynamics, weighs by the likelihood."""

    model: LinearGaussian
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        shape = (num_chains, num_particles, self.model.m.shape[0])
        return self._weigh(0, self.model.m + self._noise(shape, self.model.P, generator))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        x = particles["x"].to(torch.float64)
        return self._weigh(i, x @ self.model.F.T + self._noise(x.shape, self.model.Q, generator))

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        """log p(y_i | x_i)."""
        return normal_log_prob(self.model.y[i], current["x"] @ self.model.H.T, self.model.R)

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        """log p(x_i | x_{i-1}); the potentials do not look back."""
        return normal_log_prob(current["x"], previous["x"] @ self.model.F.T, self.model.Q)

    def _noise(self, shape: tuple[int, ...], covariance: Tensor, generator: torch.Generator) -> Tensor:
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        return z @ torch.linalg.cholesky(covariance).T

    def _weigh(self, i: int, x: Tensor) -> Move:
        x = x.to(self.dtype)
        log_g = normal_log_prob(self.model.y[i], x.to(torch.float64) @ self.model.H.T, self.model.R)
        return Move({"x": x}, log_g.to(self.dtype))


@dataclass(frozen=True)
class Shifted:
    """A guided filter with a proposal that is off on purpose, N(F x + 0.3, 1.5 Q): its potentials look back."""

    model: LinearGaussian
    device: torch.device = CPU

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    def _laws(self, i: int, previous: Particles | None) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_i under the model."""
        return (self.model.m, self.model.P) if previous is None else (previous["x"] @ self.model.F.T, self.model.Q)

    def _move(self, i: int, previous: Particles | None, shape: tuple[int, ...], generator: torch.Generator) -> Move:
        mean, cov = self._laws(i, previous)
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = {"x": mean + 0.3 + z @ torch.linalg.cholesky(1.5 * cov).T}
        return Move(x, self.log_potential(i, previous, x))

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self._move(0, None, (num_chains, num_particles, self.model.m.shape[0]), generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        return self._move(i, particles, tuple(particles["x"].shape), generator)

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        mean, cov = self._laws(i, previous)
        x = current["x"]
        log_p = normal_log_prob(x, mean, cov) - normal_log_prob(x, mean + 0.3, 1.5 * cov)
        return log_p + normal_log_prob(self.model.y[i], x @ self.model.H.T, self.model.R)

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        return normal_log_prob(current["x"], previous["x"] @ self.model.F.T, self.model.Q)


@dataclass(frozen=True)
class OptimallyTwisted:
    """The guided filter with psi_i(x) = p(y_i ... y_K | x) and its own proposal.

    What divides out at the next step, p(y_{i+1} ... y_K | x_i), travels with the particles.
    """

    model: LinearGaussian
    device: torch.device = CPU

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    @cached_property
    def twists(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """psi_i(x) = exp(c - x' L x / 2 + v' x): (L, v, c) for i = 0 ... K, by the backward recursion."""
        s, out = self.model, []
        d = s.m.shape[0]
        L, v, c = torch.zeros((d, d), dtype=torch.float64), torch.zeros(d, dtype=torch.float64), torch.tensor(0.0)
        Ri = torch.linalg.inv(s.R)
        zero = torch.zeros(s.R.shape[0], dtype=torch.float64)
        for i in range(self.num_steps, -1, -1):
            if i < self.num_steps:  # integrate the next psi over x_{i+1} = F x + N(0, Q)
                S = torch.linalg.inv(torch.linalg.inv(s.Q) + L)
                root = torch.eye(d, dtype=torch.float64) - L @ S
                c = c + 0.5 * v @ S @ v - 0.5 * torch.logdet(torch.eye(d, dtype=torch.float64) + s.Q @ L)
                L, v = s.F.T @ root @ L @ s.F, s.F.T @ root @ v
            L, v = L + s.H.T @ Ri @ s.H, v + s.H.T @ Ri @ s.y[i]
            c = c + normal_log_prob(s.y[i], zero, s.R)
            out.append((L, v, c))
        return out[::-1]

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        d = self.model.m.shape[0]
        mean = self.model.m.expand(num_chains, num_particles, d)
        return self._move(0, mean, self.model.P, torch.zeros((num_chains, num_particles)), generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        mean = particles["x"] @ self.model.F.T
        return self._move(i, mean, self.model.Q, particles["log_ahead"], generator)

    def _move(self, i: int, mean: Tensor, cov: Tensor, log_ahead: Tensor, generator: torch.Generator) -> Move:
        L, v, c = self.twists[i]
        q_cov = torch.linalg.inv(torch.linalg.inv(cov) + L)
        q_mean = (mean @ torch.linalg.inv(cov) + v) @ q_cov
        z = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        x = q_mean + z @ torch.linalg.cholesky(q_cov).T
        log_psi = c - 0.5 * ((x @ L) * x).sum(-1) + x @ v
        log_g = normal_log_prob(x, mean, cov) - normal_log_prob(x, q_mean, q_cov) + log_psi - log_ahead
        return Move(
            {"x": x, "log_ahead": log_psi - normal_log_prob(self.model.y[i], x @ self.model.H.T, self.model.R)}, log_g
        )


@dataclass(frozen=True)
class HiddenMarkov:
    """States 0 ... S - 1, initial law (S,), transition (S, S), likelihood (K + 1, S) of the data at each step."""

    start: Tensor
    transition: Tensor
    likelihood: Tensor
    device: torch.device = CPU

    @classmethod
    def example(cls) -> HiddenMarkov:
        """Three sticky states, six steps, uneven on purpose: a particle with a large weight tends to get more of it.

        Without that correlation a filter that forgets its carried weights would have nearly no bias.
        """
        return cls(
            start=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
            transition=torch.tensor([[0.85, 0.1, 0.05], [0.05, 0.85, 0.1], [0.1, 0.05, 0.85]], dtype=torch.float64),
            likelihood=torch.tensor(
                [[0.9, 0.4, 0.2], [0.8, 0.5, 0.3], [0.9, 0.3, 0.4], [0.7, 0.3, 0.2], [0.5, 0.6, 0.2], [0.9, 0.4, 0.1],
                 [0.8, 0.3, 0.2]],
                dtype=torch.float64,
            ),
        )  # fmt: skip

    @property
    def num_steps(self) -> int:
        return self.likelihood.shape[0] - 1

    @cached_property
    def forward(self) -> Tensor:
        """Exact p(y_0 ... y_i, x_i = s), (K + 1, S)."""
        alpha = [self.start * self.likelihood[0]]
        for g in self.likelihood[1:]:
            alpha.append((alpha[-1] @ self.transition) * g)
        return torch.stack(alpha)

    @property
    def log_evidence(self) -> float:
        return math.log(self.forward[-1].sum().item())

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        law = self.start.expand(num_chains, num_particles, -1)
        return self._move(0, law, generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        return self._move(i, self.transition[particles["state"]], generator)

    def _move(self, i: int, law: Tensor, generator: torch.Generator) -> Move:
        u = torch.rand((*law.shape[:2], 1), generator=generator, dtype=torch.float64)
        state = (u >= law.cumsum(-1)[..., :-1]).sum(-1)
        return Move({"state": state}, self.likelihood[i][state].log())
