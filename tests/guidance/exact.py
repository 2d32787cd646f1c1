"""Closed forms that the methods are held against: the law of a chain with a Gaussian prior, and its posteriors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd


@dataclass(frozen=True)
class NormalLaw:
    """N(mean, covariance)."""

    mean: Tensor
    covariance: Tensor

    def given(self, A: Tensor, y: Tensor, sigma: float) -> tuple[NormalLaw, float]:
        """The posterior under y = A x + sigma noise, and the log-evidence."""
        total = A @ self.covariance @ A.mT + sigma**2 * torch.eye(len(y), dtype=y.dtype)
        gain = self.covariance @ A.mT @ torch.linalg.inv(total)
        law = NormalLaw(self.mean + gain @ (y - A @ self.mean), self.covariance - gain @ A @ self.covariance)
        return law, float(MultivariateNormal(A @ self.mean, total).log_prob(y))


def chain_law(prior: sd.DiffusionPrior, mean: Tensor, covariance: Tensor) -> NormalLaw:
    """The exact law of x_0 under the discretised chain of a Gaussian prior, by the recursion of its two moments."""
    chain, eye = prior.chain, torch.eye(len(mean), dtype=mean.dtype)
    law = NormalLaw(torch.zeros_like(mean), chain.initial_scale**2 * eye)
    for k in range(chain.num_steps, 0, -1):
        step = chain.step(k)
        alpha, sigma = step.t.alpha, step.t.sigma
        pull = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        forward = step.b * eye + step.c * pull
        offset = step.c * (mean - alpha * pull @ mean)
        left = covariance - alpha * pull @ covariance  # of x_0 given x_t
        spread = {
            "posterior": step.kappa**2 * eye,
            "fixed_large": (step.beta if step.s.sigma > 0 else 0.0) * eye,
            "optimal": (step.kappa**2 + step.c**2 * float(left.trace()) / len(mean)) * eye,
            "full": step.kappa**2 * eye + step.c**2 * left,
        }[chain.variance]
        law = NormalLaw(forward @ law.mean + offset, forward @ law.covariance @ forward.mT + spread)
    return law


def chain_density(prior: sd.DiffusionPrior, grid: Tensor) -> Tensor:
    """The exact density of x_0 on an even grid, under the discretised chain of any one-dimensional prior."""
    chain, width = prior.chain, float(grid[1] - grid[0])
    density = torch.exp(-0.5 * (grid / chain.initial_scale) ** 2)
    density = density / density.sum() / width
    for k in range(chain.num_steps, 0, -1):
        law = chain.transition(k, grid[:, None], chain.estimate(k, grid[:, None]))
        scale = law.variance.sqrt()  # every step of an optimal-variance chain has a density
        kernel = torch.exp(-0.5 * ((grid - law.mean) / scale) ** 2) / scale / np.sqrt(2 * np.pi)
        density = density @ kernel * width
    return density


def check_evidence(smc: sd.SMC, log_z: float, worst: float = 0.05) -> None:
    """The mean of exp(log_z) over chains agrees with the truth within 5 of its standard errors, which are small.

    With 5 standard errors from b >= 24 chains a true method fails with probability below 1e-4 times that of a
    t-distribution's tail being this heavy, 2 P(t_23 > 5) = 5e-5; the seeds are fixed, so it fails always or never.
    """
    ratio = (smc.log_evidence_per_chain - log_z).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < worst, f"the evidence is too noisy to test anything: {error}"
    assert abs(float(ratio.mean()) - 1) < 5 * error + 1e-12, (float(ratio.mean()), error)


def weighted_moments(smc: sd.SMC, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean, its standard error over chains, and covariance of a vector-valued site."""
    samples = smc.weighted_samples()
    w, x = samples.log_w.exp(), samples.values[site]
    x = x.flatten(2) if x.ndim > 2 else x[..., None]
    mean = torch.einsum("bn,bnd->d", w, x)
    chain_w = w.sum(1)
    chain_mean = torch.einsum("bn,bnd->bd", w, x) / chain_w[:, None]
    error = (chain_w[:, None] ** 2 * (chain_mean - mean) ** 2).sum(0).sqrt()
    centred = x - mean
    return mean, error, torch.einsum("bn,bnd,bne->de", w, centred, centred)
