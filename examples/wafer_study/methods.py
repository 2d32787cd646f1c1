"""The study's methods: each turns a measured picture into weighted draws.

Steps, particles and step sizes are the same for all pictures. The step sizes of DPS and BlindDPS are the best of three
or four that were tried on two other pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

import smcdiff as sd
from examples.wafer_study import programs
from examples.wafer_study.measurements import gaussian
from examples.wafer_study.problems import Problem
from examples.wafer_study.quadrature import by_evidence, tempered
from examples.wafer_study.scores import Posterior
from smcdiff.diffusion.adapters.diffusers import SpaceToDepth

__all__ = ["METHODS", "Parts", "Size", "load"]

WRONG = 1.4  # how many times too wide the wrong operator is


@dataclass(frozen=True)
class Size:
    """How much work a run is.

    Args:
        steps: of the chains of the particle methods and of the conditional network.
        dps_steps: of DPS and BlindDPS.
        particles, chains: of the particle methods; their product is the number of draws of the conditional network.
        alone: runs of the methods of one particle.
    """

    steps: int = 30
    dps_steps: int = 100
    particles: int = 4
    chains: int = 4
    alone: int = 8

    @property
    def draws(self) -> int:
        return self.particles * self.chains


@dataclass(frozen=True, eq=False)
class Parts:
    """The networks and the size of the runs."""

    weights: Path
    size: Size

    def wafer(self, steps: int) -> sd.DiffusionPrior:
        """The chain that keeps a picture's grain."""
        return sd.load_prior("wafer64", num_steps=steps, variance="fixed_large", grid=sd.LogGrid())

    def calibrated(self) -> sd.DiffusionPrior:
        """The chain with the calibrated covariance."""
        return sd.load_prior("wafer64", num_steps=self.size.steps, variance="full", grid=sd.KarrasGrid(), basis="fft")

    def kernels(self, steps: int) -> sd.DiffusionPrior:
        """The learned prior of kernels."""
        return sd.load_prior(self.weights / "kernels28", num_steps=steps, variance="fixed_large", grid=sd.LogGrid())

    def conditional(self) -> ConditionalNetwork:
        """The trained conditional network."""
        return ConditionalNetwork(self.weights / "conditional")


class ConditionalNetwork:
    """x0_hat(x_t, y) of the network that train_conditional.py made."""

    def __init__(self, folder: Path) -> None:
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet", local_files_only=True, low_cpu_mem_usage=False)
        self.network = SpaceToDepth(unet.float(), 2).eval().requires_grad_(False)

    def __call__(self, x_t: Tensor, y: Tensor, level: sd.NoiseLevel) -> sd.Estimate:
        v = self.network(torch.cat([x_t, y.expand_as(x_t)], 1), level.t - 1)
        return sd.Estimate(sd.from_velocity(x_t, v, level))

    def prior(self, y: Tensor, like: sd.DiffusionPrior) -> sd.DiffusionPrior:
        """The chain of ``like`` with this network's estimates: what the network alone draws from, given y."""
        chain = like.chain

        def network(x_t: Tensor, time: float) -> Tensor:
            v: Tensor = self.network(torch.cat([x_t, y.expand_as(x_t)], 1), time)
            return v

        denoiser = sd.NetworkDenoiser(
            network, chain.shape, sd.from_velocity, dtype=torch.float32, device=torch.device("cpu")
        )
        return sd.DiffusionPrior(denoiser, chain.schedule, chain.num_steps, variance=chain.variance, grid=sd.LogGrid())


def load(weights: Path, size: Size) -> Parts:
    """The parts; the networks are read when a method needs them.

    Raises:
        SystemExit: where a trained network is not there.
    """
    for name in ("kernels28", "conditional"):
        if not (weights / name / "model_index.json").is_file():
            raise SystemExit(f"no {name} in {weights}; examples/wafer_study/README.md says how to train it")
    return Parts(weights, size)


def conditional(problem: Problem, parts: Parts) -> Posterior:
    """The conditional network alone, as published."""
    prior = parts.conditional().prior(problem.y, parts.wafer(parts.size.steps))
    generator = torch.Generator().manual_seed(problem.number)
    x = prior.chain.sample(parts.size.draws, generator)
    return _equal(x, None, parts.size.steps, 0)


def corrected(problem: Problem, parts: Parts) -> Posterior:
    """The conditional network as a proposal; the unconditional prior and the known operator weigh."""
    model = programs.known(parts.wafer(parts.size.steps), problem.kernel, problem.sigma)
    kernel = sd.Conditional(model, parts.conditional(), twist=sd.WidenedTwist(0.1))
    return _filter(kernel, problem, parts.size)


def dps(problem: Problem, parts: Parts, kernel: Tensor | None = None, step: float = 1.0) -> Posterior:
    """DPS with the known operator."""
    kernel = problem.kernel if kernel is None else kernel
    model = programs.known(parts.wafer(parts.size.dps_steps), kernel, problem.sigma)
    return _alone(sd.DPS(model, step), problem, parts.size)


def dps_wrong(problem: Problem, parts: Parts) -> Posterior:
    """DPS with a kernel that is too wide."""
    return dps(problem, parts, gaussian(torch.tensor(WRONG * problem.setting.width)))


def blind_dps(problem: Problem, parts: Parts, step: float = 1.0, kernel_step: float = 1.0) -> Posterior:
    """BlindDPS as published: a diffusion prior of the kernel and the l0 regulariser."""
    steps = parts.size.dps_steps
    model = programs.learned(parts.wafer(steps), parts.kernels(steps), problem.sigma)
    rules = {"x": sd.ConstantStep(step), "k": sd.ConstantStep(kernel_step)}
    return _alone(sd.BlindDPS(model, rules, sd.KernelNorm("k", 0.1, 0)), problem, parts.size)


def blind_dps_physical(problem: Problem, parts: Parts, step: float = 1.0, kernel_step: float = 0.3) -> Posterior:
    """BlindDPS with the width of a Gaussian in place of the kernel's pixels."""
    model = programs.any_kernel(parts.wafer(parts.size.dps_steps), programs.PHYSICAL, problem.sigma)
    rules = {"x": sd.ConstantStep(step), "psf_sigma": sd.ConstantStep(kernel_step)}
    return _alone(sd.BlindDPS(model, rules), problem, parts.size)


def blind_dps_simplex(problem: Problem, parts: Parts, step: float = 1.0, kernel_step: float = 0.3) -> Posterior:
    """BlindDPS with the logistic-normal kernel."""
    model = programs.any_kernel(parts.wafer(parts.size.dps_steps), programs.SIMPLEX, problem.sigma)
    rules = {"x": sd.ConstantStep(step), "psf_logits": sd.ConstantStep(kernel_step)}
    return _alone(sd.BlindDPS(model, rules), problem, parts.size)


def tilted(problem: Problem, parts: Parts) -> Posterior:
    """Tilted with the known operator: the reference of the blind methods."""
    model = programs.known(parts.calibrated(), problem.kernel, problem.sigma)
    smc = _run(sd.Tilted(model), problem, parts.size.particles, parts.size.chains)
    return _posterior(smc.weighted_samples().values["x"], tempered(smc), None, smc, parts.size.draws)


def blind_physical(problem: Problem, parts: Parts) -> Posterior:
    """Blind SMC, picture and width together: Adapted by linearisation."""
    model = programs.any_kernel(parts.calibrated(), programs.PHYSICAL, problem.sigma)
    return _filter(sd.Adapted(model), problem, parts.size)


def blind_marginal(problem: Problem, parts: Parts) -> Posterior:
    """Blind SMC, the width integrated out in twist and proposal."""
    model = programs.any_kernel(parts.calibrated(), programs.PHYSICAL, problem.sigma)
    return _filter(sd.Marginalised(model), problem, parts.size)


def blind_evidence(problem: Problem, parts: Parts) -> Posterior:
    """Blind SMC, the width by the evidence of Tilted runs and the picture given each width."""
    return by_evidence(problem, parts.calibrated(), parts.size.particles, parts.size.chains)


def blind_simplex(problem: Problem, parts: Parts) -> Posterior:
    """Blind SMC with the logistic-normal kernel: twisted diffusion sampling."""
    model = programs.any_kernel(parts.wafer(parts.size.steps), programs.SIMPLEX, problem.sigma)
    return _filter(_twisted(model), problem, parts.size)


def blind_learned(problem: Problem, parts: Parts) -> Posterior:
    """Blind SMC with the diffusion prior of kernels: twisted diffusion sampling."""
    model = programs.learned(parts.wafer(parts.size.steps), parts.kernels(parts.size.steps), problem.sigma)
    return _filter(_twisted(model), problem, parts.size)


#: By name, in the order of the tables.
METHODS: dict[str, Callable[[Problem, Parts], Posterior]] = {
    "conditional network": conditional,
    "conditional network, corrected": corrected,
    "DPS, known operator": dps,
    "DPS, wrong operator": dps_wrong,
    "Tilted, known operator": tilted,
    "BlindDPS, learned kernels (published)": blind_dps,
    "BlindDPS, physical kernel": blind_dps_physical,
    "BlindDPS, simplex kernel": blind_dps_simplex,
    "blind SMC, learned kernels": blind_learned,
    "blind SMC, simplex kernel": blind_simplex,
    "blind SMC, physical kernel": blind_physical,
    "blind SMC, physical kernel integrated out": blind_marginal,
    "blind SMC, physical kernel by evidence": blind_evidence,
}


def _twisted(model: programs.Program) -> sd.TDS:
    return sd.TDS(model, twist=sd.WidenedTwist(0.1), max_shift=0.3)


def _filter(kernel: object, problem: Problem, size: Size) -> Posterior:
    """A run of particle filters; every chain counts alike."""
    smc = _run(kernel, problem, size.particles, size.chains)
    w = smc.weighted_samples().log_w.softmax(1) / size.chains
    values = smc.weighted_samples().values
    return _posterior(values["x"], w, values.get("psf"), smc, size.draws)


def _alone(kernel: object, problem: Problem, size: Size) -> Posterior:
    """Runs of one particle."""
    smc = _run(kernel, problem, 1, size.alone)
    values = smc.weighted_samples().values
    w = torch.full((size.alone, 1), 1 / size.alone, dtype=torch.float64)
    return _posterior(values["x"], w, values.get("psf"), smc, size.alone)


def _run(kernel: object, problem: Problem, particles: int, chains: int) -> sd.SMC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run without evidence says so
        return sd.SMC(kernel, particles, chains, seed=problem.number, progress=False).run(problem.y)


def _posterior(x: Tensor, w: Tensor, kernel: Tensor | None, smc: sd.SMC, draws: int) -> Posterior:
    forward, back = (evaluations / draws for evaluations in smc.network_evaluations)
    mean = None if kernel is None else torch.einsum("d,d...->...", w.flatten(), kernel.flatten(0, 1).double()).float()
    return Posterior(x.flatten(0, 1), w.flatten(), mean, forward, back, {})


def _equal(x: Tensor, kernel: Tensor | None, forward: float, back: float) -> Posterior:
    return Posterior(x, torch.full((len(x),), 1 / len(x), dtype=torch.float64), kernel, forward, back, {})
