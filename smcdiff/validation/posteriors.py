"""What a calibration study examines: a function from a measurement to posterior draws."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor

from smcdiff.guidance.base import Method
from smcdiff.infer import SMC
from smcdiff.smc import ParticleFilter

__all__ = ["Posterior", "PosteriorDraws", "SMCPosterior"]


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws of all latents of a program.

    Args:
        values: {site: (S, *event)}, in the program's own units; sites that are not latents are left aside.
        log_w: (S,), their log-weights up to a constant; None for equally weighted draws.
    """

    values: Mapping[str, Tensor]
    log_w: Tensor | None = None


class Posterior(Protocol):
    """A method of inference. Noise from torch's global generator, so that the study's seeds rule it."""

    def __call__(self, measurement: Mapping[str, Tensor]) -> PosteriorDraws:
        """Draws from the posterior given the measurement, {site: value}."""


@dataclass(frozen=True)
class SMCPosterior:
    """One draw from each of L independent chains of a method.

    Each chain has n particles; one of them is drawn by its weight. So the L draws are independent, with the law of a
    particle of one chain: exact as n grows, and the method's own law, weights left aside, for n = 1. Several particles
    of one chain are relatives, whose ranks are not uniform even where the posterior is exact.

    Args:
        kernel: a method applied to the program, such as ``sd.TDS(model)``.
        num_particles: n.
        num_draws: L.
        filter: how particles are resampled, and when.
        max_batch: largest number of particles put through the network at once; None takes what fits.
    """

    kernel: Method
    num_particles: int
    num_draws: int
    filter: ParticleFilter = field(default_factory=ParticleFilter)
    max_batch: int | None = None

    @property
    def identity(self) -> str:
        """The method and its numbers in words, without the program."""
        kernel: Any = self.kernel
        settings = [f"{f.name}={getattr(kernel, f.name)!r}" for f in dataclasses.fields(kernel) if f.name != "model"]
        numbers = f"{self.num_particles} particles, {self.num_draws} draws, {self.filter!r}"
        return f"{type(kernel).__name__}({', '.join(settings)}), {numbers}"

    def __call__(self, measurement: Mapping[str, Tensor]) -> PosteriorDraws:
        kernel: Any = self.kernel
        conditioned = dataclasses.replace(kernel, model=pyro.condition(kernel.model, data=dict(measurement)))
        smc = SMC(
            conditioned,
            self.num_particles,
            self.num_draws,
            filter=self.filter,
            max_batch=self.max_batch,
            progress=False,
        )
        with warnings.catch_warnings():
            # a run without evidence has draws all the same, and they are what is examined
            warnings.filterwarnings("ignore", message="the method's last step is a point mass")
            samples = smc.run().weighted_samples()
        w = smc.posterior.within_chain_log_w.exp()
        index = torch.multinomial(w.cpu(), 1)[:, 0].to(w.device)
        chain = torch.arange(self.num_draws, device=w.device)
        return PosteriorDraws({name: value[chain, index] for name, value in samples.values.items()})
