r"""A kernel's width by the evidence of the program given the width.

    p(width given y) proportional to p(width) Z(width),      p(x given y) = E[p(x given y, width) given y],

with Z the evidence that a particle filter estimates. All widths are run with the same noise, so that the estimates move
together and their ratios, which alone matter, are far more exact than any of them. In u = log width: ``COARSE`` nodes
over the prior, and a parabola through the best and its neighbours gives a first normal law of u; ``ROUNDS`` times three
nodes within ``REACH`` deviations of it, and a parabola through these, give the next; then the nodes of a ``FINE``-point
Gauss-Hermite rule for the last, weighed by what p Z is of that law there.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

import smcdiff as sd
from examples.wafer_study import programs
from examples.wafer_study.problems import Problem
from examples.wafer_study.scores import Posterior
from smcdiff.measurement.psf import gaussian_psf

__all__ = ["by_evidence", "parabola", "tempered"]

COARSE = 7
ROUNDS = 2
REACH = 1.5
FINE = 3
SCOUTS = 2  # particles of a run that only looks for the place of the nodes


def parabola(u: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the normal law whose log is the parabola through the best node and its neighbours.

    Where the best node is the first or the last, the law is that node with the spread of the nodes.
    """
    i = int(value.argmax())
    if 0 < i < len(u) - 1:
        second, first, _ = np.polyfit(u[i - 1 : i + 2] - u[i], value[i - 1 : i + 2], 2)
        return float(u[i] - first / (2 * second)), float(math.sqrt(-0.5 / second))
    return float(u[i]), float(u[1] - u[0])


def tempered(smc: sd.SMC) -> torch.Tensor:
    """(b, n): the weights of a run's particles to the power that leaves half of them effective, as restorations do."""
    run, _ = smc.posterior.tempered(0.5 * smc.posterior.log_w.numel())
    return run.log_w.exp()


def by_evidence(problem: Problem, prior: sd.DiffusionPrior, particles: int, chains: int) -> Posterior:
    """Draws of x, one set for each of the last nodes."""
    law = programs.PHYSICAL
    evaluations = [0, 0]

    def run(u: float, particles: int, chains: int) -> sd.SMC:
        model = programs.of_width(prior, math.exp(u), problem.sigma)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smc = sd.SMC(sd.Tilted(model), particles, chains, seed=problem.number, progress=False).run(problem.y)
        for i, number in enumerate(smc.network_evaluations):
            evaluations[i] += number
        return smc

    def log_posterior(u: float, smc: sd.SMC) -> np.ndarray:
        """(chains,), up to a constant."""
        log_z: np.ndarray = smc.log_evidence_per_chain.numpy()
        return log_z - 0.5 * ((u - math.log(law.median)) / law.spread) ** 2

    coarse = math.log(law.median) + law.spread * np.linspace(-2.5, 2.5, COARSE)
    values = np.array([log_posterior(u, run(u, SCOUTS, 1))[0] for u in coarse])
    mean, sd_u = parabola(coarse, values)
    for _ in range(ROUNDS):
        near = mean + sd_u * np.array([-REACH, 0.0, REACH])
        mean, sd_u = parabola(near, np.array([log_posterior(u, run(u, SCOUTS, 1))[0] for u in near]))
    points, rule = np.polynomial.hermite_e.hermegauss(FINE)
    nodes = mean + sd_u * points
    runs = [run(u, particles, chains) for u in nodes]
    found = np.stack([log_posterior(u, smc) for u, smc in zip(nodes, runs, strict=True)])
    log_w = np.log(rule)[:, None] + found + 0.5 * points[:, None] ** 2
    shares = np.exp(log_w - log_w.max(0))
    share = (shares / shares.sum(0)).mean(1)  # of the nodes, every chain alike
    x = torch.cat([smc.weighted_samples().values["x"].flatten(0, 1) for smc in runs])
    w = torch.cat([float(s) * tempered(smc).flatten() for s, smc in zip(share, runs, strict=True)])
    kernels = gaussian_psf(torch.tensor(np.exp(nodes)), law.size)
    kernel = torch.einsum("n,n...->...", torch.tensor(share), kernels).float()
    centre = float((share * nodes).sum())
    spread = math.sqrt(float((share * (nodes - centre) ** 2).sum()))
    draws = particles * chains
    own = w.unflatten(0, (len(nodes), draws)).sum(0)  # a particle has the same noise at all nodes: one draw
    more = {"log width": centre, "sd of log width": spread, "effective draws": float(1 / own.square().sum())}
    return Posterior(x, w, kernel, evaluations[0] / draws, evaluations[1] / draws, more)
