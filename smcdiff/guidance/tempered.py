r"""Twist tempering: psi_t^lambda(t), with exponents that a pilot run chooses and the main run keeps.

A twist that is too sure at high noise makes the weights uneven there. Raised to an exponent lambda(t) in [0, 1] it is
still a twist, and any exponents leave the evidence unbiased as long as they do not depend on the run they are used in.
The pilot therefore is a run of its own: at every step it takes the largest exponent, never smaller than the one before,
that keeps the effective sample size of that step's weights above a set share of the particles in every chain. At t = 0
the likelihood itself stands, exponent 1.

This mends a twist that tells particles apart too sharply within one step, as the point twist does at small noise, where
it even diverges. It does not see a twist that is evenly too sure of all particles and drags them along: widen that one.

References:
    A. Jasra, D. Stephens, A. Doucet, T. Tsagaris, "Inference for Levy-driven stochastic volatility models via adaptive
    sequential Monte Carlo", Scandinavian Journal of Statistics 38 (2011): exponents by the effective sample size.
    A. Beskos, A. Jasra, N. Kantas, A. Thiery, "On the convergence of adaptive sequential Monte Carlo methods" (2016),
    arXiv 1306.6462: what adapting within the run itself costs, which a pilot avoids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from smcdiff.guidance.base import Prediction, Twist
from smcdiff.guidance.program import Program
from smcdiff.guidance.tds import TDS
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from smcdiff.smc.feynman_kac import Move, Particles
from smcdiff.smc.weights import weigh

__all__ = ["TemperedTwist", "tempered"]


@dataclass(frozen=True)
class TemperedTwist:
    """log psi_t = lambda_k log psi_t of another twist, k the index of the noise level.

    Args:
        twist: the twist to temper.
        exponents: lambda_k for k = 1 ... K, each in [0, 1].

    Raises:
        ValueError: for an exponent outside [0, 1], or, in a run, for another number of exponents than steps.
    """

    twist: Twist
    exponents: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 <= exponent <= 1 for exponent in self.exponents):
            raise ValueError(f"got exponents {self.exponents}; expected each in [0, 1]")

    def log_psi(self, prediction: Prediction) -> Tensor:
        if len(self.exponents) != prediction.program.num_steps:
            raise ValueError(
                f"got {len(self.exponents)} exponents for a chain of {prediction.program.num_steps} steps; temper the "
                "twist again with this program"
            )
        return self.exponents[prediction.k - 1] * self.twist.log_psi(prediction)


def tempered(
    kernel: TDS,
    *args: Any,
    ess_share: float = 0.5,
    num_particles: int = 64,
    num_chains: int = 4,
    seed: int = 0,
    **kwargs: Any,
) -> TDS:
    """The same method with its twist tempered, by a pilot run on the program's arguments.

    The main run must take another seed than the pilot's for its evidence to be unbiased.

    Args:
        kernel: the method.
        args, kwargs: what the program is called with, measurements among them.
        ess_share: least effective sample size of a step's weights, as a share of the particles, in (0, 1).
        num_particles, num_chains, seed: of the pilot.

    Raises:
        ValueError: for a share outside (0, 1).
        FilterError: if the pilot fails.
    """
    if not 0 < ess_share < 1:
        raise ValueError(f"got ess_share {ess_share}; expected a share of the particles in (0, 1)")
    if "twist" not in {field.name for field in fields(kernel)}:
        raise TypeError(f"got {type(kernel).__name__}, whose twist is its own; tempering takes one such as sd.TDS")
    pilot = _Pilot(TwistedModel(Program(kernel.model, args, kwargs), kernel), ess_share)
    every_step = ParticleFilter(ess_threshold=1.0)
    every_step.run(pilot, num_particles=num_particles, num_chains=num_chains, seed=seed)
    return replace(kernel, twist=TemperedTwist(kernel.twist, tuple(pilot.exponents[-2::-1])))


class _Pilot:
    """A twisted model whose particles carry the untempered twist and its gradient; it chooses exponents as it goes.

    It synchronises with the host at every step: only a pilot may.
    """

    def __init__(self, inner: TwistedModel, ess_share: float) -> None:
        self.inner, self.ess_share = inner, ess_share
        #: Exponents of levels K ... 0, in that order, in what has been run so far.
        self.exponents: list[float] = []

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def describe(self, i: int) -> str:
        return f"{self.inner.describe(i)}, in the pilot run of the tempering"

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        self.exponents = []
        move = self.inner.initial(num_chains, num_particles, generator)
        return self._choose(move, torch.zeros_like(move.log_g), 0.0)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        now = self.exponents[-1]
        scaled = {
            name: now * value if name == "log_psi" or name.endswith("/gradient") else value
            for name, value in particles.items()
        }
        move = self.inner.step(i, scaled, generator)
        without_twist = move.log_g - move.particles["log_psi"]
        if i == self.num_steps:
            self.exponents.append(1.0)
            return move
        return self._choose(move, without_twist, now)

    def _choose(self, move: Move, log_g: Tensor, least: float) -> Move:
        """The largest exponent in [``least``, 1] that keeps the effective sample size, by bisection."""
        log_psi = move.particles["log_psi"]
        wanted = self.ess_share * log_psi.shape[1]

        def keeps(exponent: float) -> bool:
            return bool((weigh(log_g + exponent * log_psi).ess >= wanted).all())

        low, high = least, 1.0
        if keeps(high):
            low = high
        while high - low > 1e-3:
            middle = 0.5 * (low + high)
            low, high = (middle, high) if keeps(middle) else (low, middle)
        self.exponents.append(low)
        return Move(move.particles, log_g + low * log_psi, move.faults)
