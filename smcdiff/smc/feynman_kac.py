r"""What a particle filter runs: a Feynman-Kac model.

A Feynman-Kac model is a law of paths together with potentials,

    Q(x_{0:K}) proportional to  M_0(x_0) G_0(x_0)  prod_{i=1}^{K} M_i(x_i | x_{i-1}) G_i(x_{i-1}, x_i),

and its normalising constant Z. A filter moves n particles by the kernels M_i and weighs them by the potentials G_i;
it needs no densities of the M_i, only draws. For a *guided* filter M_i is a proposal q and

    G_i = p(x_i | x_{i-1}) psi_i(x_i) / (q(x_i | x_{i-1}) psi_{i-1}(x_{i-1})),

which leaves Z, the evidence, as it was.

References:
    P. Del Moral, "Feynman-Kac Formulae", Springer (2004).
    N. Chopin, O. Papaspiliopoulos, "An Introduction to Sequential Monte Carlo", Springer (2020), chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["FeynmanKac", "Move", "Particles"]

#: What the particles carry, by name: tensors of shape (b, n, *event), b chains of n particles. All of it is resampled.
Particles = dict[str, Tensor]


@dataclass(frozen=True)
class Move:
    """Particles that have just been moved, and their incremental weights.

    Args:
        particles: what the moved particles carry, each entry of shape (b, n, *event).
        log_g: log G_i of each particle, shape (b, n), in nats.
        faults: what went wrong in which chain, {a sentence that names it: (b,) of bool}. The filter keeps the first
            step of each and raises when it next looks, so that naming a fault costs no synchronisation.
    """

    particles: Particles
    log_g: Tensor
    faults: Mapping[str, Tensor] = field(default_factory=dict)


class FeynmanKac(Protocol):
    """A Feynman-Kac model with K = ``num_steps`` moves after the initial one.

    Both methods draw all their noise from ``generator`` and never synchronise with the host.
    """

    @property
    def num_steps(self) -> int:
        """K."""

    @property
    def device(self) -> torch.device:
        """Where the particles live."""

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        """Draw x_0 from M_0; ``log_g`` is log G_0."""

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """Move the particles from i - 1 to i, for i = 1 ... K; ``log_g`` is log G_i."""
