r"""A log-likelihood as a quadratic, and what it does to a normal x_0: the two questions a proposal asks.

    log p(y given x_0)  ~  l + g^T d - d^T J d / 2,      d = x_0 - m.

Under x_0 ~ N(m, C) everything that the locally optimal proposal needs is then in closed form, P = (C^-1 + J)^-1:

    log of the integral of the quadratic     l + g^T P g / 2 - log det(I + C J) / 2
    x_0 given y                              N(m + P g, P)

Three kinds do this: in coordinates where C and J are both diagonal (:mod:`smcdiff.guidance.elementwise`), in the space
of few measured values (:mod:`smcdiff.guidance.gauss_newton`), and by conjugate gradients, for pictures whose C and J
have no basis in common (:mod:`smcdiff.guidance.conjugate_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance

__all__ = ["Conditioned", "Covariances", "Information", "Noise", "States"]

#: Of the latents that move, {site: (m, *shape)}.
States = dict[str, Tensor]
Covariances = dict[str, Covariance]
#: Makes standard normal numbers of a shape.
Noise = Callable[[torch.Size], Tensor]


class Conditioned(Protocol):
    """x_0 ~ N(m, C) of m particles, and what the measurement makes of it."""

    def log_integral(self) -> Tensor:
        """log of the integral of N(x_0; m, C) exp(l + g^T d - d^T J d / 2) over x_0, (m,) of float64."""

    def mean(self) -> States:
        """m + P g of the latents that the quadratic conditions."""

    def draw(self, noise: Noise) -> States:
        """A draw of N(m + P g, P), of the latents that the quadratic conditions."""


class Information(Protocol):
    """The quadratic of m particles, or one for all."""

    @property
    def expanded_at(self) -> States:
        """Where it was expanded, for a program that is to be expanded there again; empty where that does not matter."""

    def condition(self, mean: States, covariance: Covariances) -> Conditioned:
        """The quadratic under N(mean, covariance), where ``mean`` need not be where it was expanded."""
