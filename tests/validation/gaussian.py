"""A Gaussian prior measured pixel by pixel: its exact posterior under the discretised chain, and known-bad ones."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.validation.posteriors import PosteriorDraws
from tests.guidance.exact import chain_law

F64 = torch.float64
D = 64
SIGMA = 1.0
PRIOR = sd.DiffusionPrior(
    sd.GaussianDenoiser(torch.zeros(D, dtype=F64), torch.ones(D, dtype=F64)),
    sd.VPSchedule(),
    2,
    variance="optimal",
    grid=sd.KarrasGrid(),
)
_LAW = chain_law(PRIOR, torch.zeros(D, dtype=F64), torch.eye(D, dtype=F64))
#: Variance of every entry under the chain, whose covariance is a multiple of the identity and whose mean is 0.
VARIANCE = float(_LAW.covariance[0, 0])


def model(y=None):
    x = pyro.sample("x", PRIOR)
    return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, SIGMA), obs=y)


def posterior(y: Mapping[str, Tensor], width: float = 1.0, sigma: float = SIGMA, number: int = 19) -> PosteriorDraws:
    """Draws from the exact posterior, ``width`` times as wide, for noise taken to be ``sigma``."""
    gain = VARIANCE / (VARIANCE + sigma**2)
    spread = width * (sigma**2 * gain) ** 0.5
    return PosteriorDraws({"x": gain * y["y"] + spread * torch.randn(number, D, dtype=F64)})


def from_prior(y: Mapping[str, Tensor], number: int = 19) -> PosteriorDraws:
    return PosteriorDraws({"x": VARIANCE**0.5 * torch.randn(number, D, dtype=F64)})
