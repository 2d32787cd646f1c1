r"""Particle-marginal Metropolis-Hastings: moves on static parameters by an unbiased estimate of their evidence.

With a prior N(0, I) on theta and an estimate Zhat(theta) >= 0 of p(y given theta) with E[Zhat] = p(y given theta), the
chain that proposes theta' = theta + step_size noise and accepts with probability

    min(1, N(theta'; 0, I) Zhat(theta') / (N(theta; 0, I) Zhat(theta))),

keeping the estimate of a state as long as it stays there, has the exact posterior p(theta given y) as its law. The
noise of Zhat costs acceptances, not correctness; a standard deviation of log Zhat near 1.2 is about best. An estimate
may be zero, log Zhat = -inf: such a proposal is rejected, and a chain that starts there takes the first other one.

References:
    C. Andrieu, A. Doucet, R. Holenstein, "Particle Markov chain Monte Carlo methods", Journal of the Royal Statistical
    Society B 72 (2010), section 2.4.2.
    A. Doucet, M. Pitt, G. Deligiannidis, R. Kohn, "Efficient implementation of Markov chain Monte Carlo when using an
    unbiased likelihood estimator", Biometrika 102 (2015), arXiv:1210.1871.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MarginalMetropolis", "MarginalState"]


@dataclass(frozen=True)
class MarginalState:
    """Where b parallel chains stand.

    Args:
        theta: (b, d).
        log_z: the estimate of log p(y given theta) that was made when a chain came to its theta, (b,).
        kept: what the estimate brought along for each chain, {name: (b, *shape)}: for example a path that was drawn.
        accepted: whether the last proposal was accepted, (b,) of bool.
    """

    theta: Tensor
    log_z: Tensor
    kept: dict[str, Tensor]
    accepted: Tensor


@dataclass(frozen=True)
class MarginalMetropolis:
    """Random-walk particle-marginal Metropolis-Hastings under the prior N(0, I).

    Args:
        estimate: (theta (b, d), generator) -> (log Zhat (b,), what to keep of it {name: (b, *shape)}).
        step_size: standard deviation of the random walk, positive.

    Raises:
        ValueError: for a step size that is not positive.
    """

    estimate: Callable[[Tensor, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
    step_size: float = 0.5

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"got step_size {self.step_size}; expected a positive standard deviation")

    def first(self, theta: Tensor, generator: torch.Generator) -> MarginalState:
        """The chains at theta (b, d)."""
        log_z, kept = self.estimate(theta, generator)
        return MarginalState(theta, log_z, kept, torch.ones_like(log_z, dtype=torch.bool))

    def update(self, state: MarginalState, generator: torch.Generator) -> MarginalState:
        """One proposal for each chain, accepted or not."""
        noise: dict[str, Any] = {"dtype": state.theta.dtype, "device": state.theta.device, "generator": generator}
        theta = state.theta + self.step_size * torch.randn(state.theta.shape, **noise)
        log_z, kept = self.estimate(theta, generator)
        log_prior_ratio = 0.5 * (state.theta**2 - theta**2).sum(-1)
        accepted = torch.rand(len(theta), **noise).log() < log_prior_ratio + log_z - state.log_z

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(accepted.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return MarginalState(
            theta=chosen(theta, state.theta),
            log_z=chosen(log_z, state.log_z),
            kept={name: chosen(value, state.kept[name]) for name, value in kept.items()},
            accepted=accepted,
        )
