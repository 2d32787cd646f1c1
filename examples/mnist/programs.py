r"""The two Pyro programs of the study, and what their posteriors are judged by.

a class        x ~ prior,  label ~ Categorical(softmax(guide(x)))
a picture      x ~ prior,  y ~ N(A x, sigma^2 I)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.diagnostics.ranks import randomised_pit

__all__ = ["Classified", "Measured", "coverage", "right", "rmse"]

#: Steps between black and white that coverage tells apart: MNIST's black is exactly -1, a draw's is within 0.02 of it.
GREYS = 16


@dataclass(frozen=True, eq=False)
class Classified:
    """x ~ prior, label ~ Categorical(softmax(guide(x))).

    Args:
        prior: of one picture.
        guide: (m, *event) -> (m, classes), the logits.
    """

    prior: sd.DiffusionPrior
    guide: Callable[[Tensor], Tensor]

    def __call__(self, label: Tensor | None = None) -> Any:
        x = pyro.sample("x", self.prior)
        return pyro.sample("label", dist.Categorical(logits=self.guide(x[None])[0]), obs=label)


@dataclass(frozen=True, eq=False)
class Measured:
    """x ~ prior, y ~ N(A x, sigma^2 I).

    Args:
        prior: of one picture.
        operator: A.
        sigma: standard deviation of the noise, positive.
    """

    prior: sd.DiffusionPrior
    operator: Callable[[Tensor], Tensor]
    sigma: float

    def __call__(self, y: Tensor | None = None) -> Any:
        x = pyro.sample("x", self.prior)
        return pyro.sample("y", sd.GaussianMeasurement(self.operator, x, self.sigma), obs=y)


def right(log_w: Tensor, logits: Tensor, label: int) -> Tensor:
    """(b,): probability that a draw from each chain is of class ``label`` to a judge.

    Args:
        log_w: (b, n), log-weights, not normalised.
        logits: (b, n, classes), the judge's.
    """
    return (log_w.softmax(1) * (logits.argmax(-1) == label)).sum(1)


def rmse(truth: Tensor, estimate: Tensor, where: Tensor) -> float:
    """Root mean square error over the pixels ``where`` is True, on the pictures' scale."""
    return float((estimate - truth)[..., where].double().square().mean().sqrt())


def coverage(truth: Tensor, draws: Tensor, where: Tensor, level: float, seed: int) -> float:
    """Share of the pixels ``where`` is True whose truth lies in the central interval of that level.

    Values are rounded to 17 shades of grey and ties broken at random. If truth and draws are exchangeable, as they are
    for draws from the posterior of the law that the truth was drawn from, its expected value is the level.

    Args:
        truth: (*event).
        draws: (L, *event), equally weighted.
    """

    def shades(x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * (GREYS / 2)).round()[..., where]

    uniform = torch.rand(int(where.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = randomised_pit(shades(truth), shades(draws), uniform)
    return float(((2 * u - 1).abs() <= level).double().mean())
