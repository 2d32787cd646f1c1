r"""Restoration of a picture: the posterior of the scene given a picture of it, from many short particle filters.

The scene x has a diffusion prior, the picture is y = window(A(x)) + noise, and the posterior comes from b independent
chains of n particles. Where the noise is Gaussian with a known level and the prior knows its covariance of x_0 given
x_t, as those that ship do, they move by the tilted denoiser, :class:`smcdiff.Tilted`, pixels missing or not;
otherwise by twisted diffusion sampling with the widened twist, which did better there on real pictures. With thousands
of measured pixels the exact weights of so few particles collapse onto one of them. They are reported, and the pictures
are made from weights raised to the largest exponent that keeps half of the particles effective. Such pictures are close
to what the guided chains propose; the exponent says how close (1: the weights as they are, near 0: hardly weighted at
all).

References:
    L. Wu, B. Trippe, C. Naesseth, D. Blei, J. Cunningham, "Practical and Asymptotically Exact Conditional Sampling in
    Diffusion Models" (2023), arXiv 2306.17775: twisted diffusion sampling.
    E. Koblents, J. Miguez, "A population Monte Carlo scheme with transformed weights and its application to stochastic
    kinetic models" (2015), arXiv 1208.5600: tempered weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.verdict import Diagnostics, diagnose
from smcdiff.diffusion.adapters.diffusers import SpaceToDepth
from smcdiff.diffusion.denoiser import NetworkDenoiser
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import LogGrid, SinhGrid
from smcdiff.guidance.base import Method
from smcdiff.guidance.tds import TDS
from smcdiff.guidance.tilted import Tilted
from smcdiff.guidance.twists import WidenedTwist
from smcdiff.infer import SMC
from smcdiff.restoration.acquisition import Acquisition, Canvas

__all__ = ["Effort", "Job", "Restoration", "prepare"]

#: Pixels put through the network at once.
_BATCH_PIXELS = 16 * 64 * 64


@dataclass(frozen=True)
class Effort:
    """How much work to do.

    Args:
        particles: n, per chain.
        chains: b. Near collapse a chain gives about one independent draw, so chains count more than particles.
        steps: K, of the reverse chain.
        seed: of all the noise.
    """

    particles: int = 4
    chains: int = 16
    steps: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Restoration:
    """The posterior of a picture's scene.

    Args:
        y: the picture, (1, H, W).
        run: the particles, "x" being the part of the scene that the picture shows, with tempered weights.
        exponent: the weights of ``run`` are the exact ones to this power, and normalised.
        diagnostics: of the exact weights.
        acquisition: how the picture was taken.
        effort: the work done.
        seconds: the time it took.
    """

    y: Tensor
    run: Run
    exponent: float
    diagnostics: Diagnostics
    acquisition: Acquisition
    effort: Effort
    seconds: float

    @property
    def mean(self) -> Tensor:
        """Posterior mean of every pixel, (1, rows, columns) of the scene."""
        return self.run.mean("x")

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviation of every pixel."""
        return self.run.sd("x")

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of every pixel that holds this posterior mass.

        Raises:
            ValueError: for a mass outside (0, 1).
        """
        if not 0 < mass < 1:
            raise ValueError(f"got mass {mass}; expected a probability between 0 and 1")
        return self.run.quantile("x", (1 - mass) / 2), self.run.quantile("x", (1 + mass) / 2)

    def draws(self, number: int) -> Tensor:
        """(number, 1, rows, columns): particles at even steps of the cumulative weight, so from chains far apart."""
        cumulative = self.run.log_w.exp().flatten().cumsum(0)
        comb = (torch.arange(number, device=cumulative.device) + 0.5) / number * cumulative[-1]
        index = torch.searchsorted(cumulative, comb).clamp(max=len(cumulative) - 1)
        return self.run.values["x"].flatten(0, 1)[index]


@dataclass(frozen=True)
class Job:
    """A restoration that is ready to run; :func:`prepare` makes it.

    Args:
        y: the picture, (1, H, W).
        acquisition: how it was taken.
        prior: of scenes of the canvas's size.
        canvas: where the picture lies in the scene.
        effort: the work to do.
    """

    y: Tensor
    acquisition: Acquisition
    prior: DiffusionPrior
    canvas: Canvas
    effort: Effort

    def expected_seconds(self) -> float:
        """An estimate of the run's time: one pass of a few particles, forward and backward, scaled up."""
        total = self.effort.particles * self.effort.chains
        batch = min(self._max_batch, total)
        chain = self.prior.chain
        x = torch.zeros(batch, *chain.shape, dtype=chain.denoiser.dtype, device=chain.denoiser.device)
        backward = self.prior.chain.variance != "full"
        seconds = []
        for _ in range(2):  # the first pass also pays for what is done once
            started = time.perf_counter()
            with torch.set_grad_enabled(backward):
                state = x.requires_grad_(backward)
                mean = chain.estimate(chain.num_steps, state).mean
            if mean.requires_grad:
                torch.autograd.grad(mean.square().sum(), state)
            seconds.append(time.perf_counter() - started)
        passes = 1 if backward else 2  # the tilted denoiser takes two
        return min(seconds) * passes * self.effort.steps * total / batch

    def run(self, progress: bool = True) -> Restoration:
        """Run the particle filters and weigh their particles.

        Raises:
            FilterError: for a run whose result cannot stand, naming step, chain, fault and remedy.
        """
        effort, crop = self.effort, self.canvas.picture
        started = time.perf_counter()
        program = self.acquisition.program(self.prior, self.canvas)
        method: Method = TDS(program, twist=WidenedTwist(0.1), max_shift=0.3)
        if self.prior.chain.variance == "full":
            method = Tilted(program)
        smc = SMC(
            method,
            num_particles=effort.particles,
            num_chains=effort.chains,
            max_batch=self._max_batch,
            seed=effort.seed,
            progress=progress,
        )
        run = smc.run(self.acquisition.data(self.y)).posterior
        exact = dataclasses.replace(run, values={**run.values, "x": crop.of(run.values["x"])})
        tempered, exponent = exact.tempered(max(1.0, 0.5 * exact.log_w.numel()))
        return Restoration(
            y=self.y,
            run=tempered,
            exponent=exponent,
            diagnostics=diagnose(exact),
            acquisition=self.acquisition,
            effort=effort,
            seconds=time.perf_counter() - started,
        )

    @property
    def _max_batch(self) -> int:
        return max(1, _BATCH_PIXELS // (self.canvas.rows * self.canvas.columns))


def prepare(
    y: Tensor,
    acquisition: Acquisition,
    load: Callable[[tuple[int, int, int] | None], DiffusionPrior],
    effort: Effort = Effort(),
) -> Job:
    """Check the picture and make the prior at its size.

    Args:
        y: the picture on the scale [-1, 1], (1, H, W).
        acquisition: how it was taken.
        load: the prior for scenes of a shape (1, rows, columns); None asks for its own size. For a trained one
            ``lambda shape: smcdiff.load_prior("sem64", event_shape=shape)``.
        effort: the work to do.

    Raises:
        ValueError: for a picture of another shape or with values that are not finite, a prior of pictures with
            several channels, or a number of particles, chains or steps below 1.
    """
    if y.ndim != 3 or y.shape[0] != 1 or not bool(torch.isfinite(y).all()):
        raise ValueError(
            f"got a picture of shape {tuple(y.shape)}, finite: {bool(torch.isfinite(y).all())}; expected finite values "
            "of shape (1, rows, columns)"
        )
    for name in ("particles", "chains", "steps"):
        if getattr(effort, name) < 1:
            raise ValueError(f"got {name} {getattr(effort, name)}; expected at least 1")
    trained = load(None).chain.denoiser
    if trained.event_shape[0] != 1 or len(trained.event_shape) != 3:
        raise ValueError(
            f"got a prior of pictures of shape {tuple(trained.event_shape)}; expected grey ones, (1, rows, columns)"
        )
    canvas = acquisition.canvas(y.shape[1], y.shape[2], _block(trained))
    prior = load((1, canvas.rows, canvas.columns)).replace(num_steps=effort.steps)
    noise = acquisition.noise
    if prior.covariance is not None and not noise.width and not noise.shot:
        prior = prior.replace(variance="full", grid=SinhGrid())
    else:  # the larger variance keeps the fine grain that the prior has learned; see benchmarks/sem_restoration.py
        prior = prior.replace(variance="fixed_large", grid=LogGrid())
    return Job(y, acquisition, prior, canvas, effort)


def _block(denoiser: object) -> int:
    """The number that the sides of a network's pictures must divide by: 1 for anything but a U-Net."""
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else None
    if not isinstance(network, SpaceToDepth):
        return 1
    config: Any = network.unet.config
    return network.factor * int(2 ** (len(config.block_out_channels) - 1))
