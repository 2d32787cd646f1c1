r"""The posterior score of a program, and the kernel Stein discrepancy against it.

The density whose score this is, exactly: with rho = sigma_t / alpha_t at a low noise level t of a diffusion prior p_0,

    pi_rho(x, u) proportional to (p_0 * N(0, rho^2 I))(x) p(u) p(y given x, u),

the posterior of the program with the diffusion prior blurred by noise of standard deviation rho, u the other latents on
the whole real line (a bounded latent enters through torch's ``biject_to`` of its support, with the Jacobian). Its score
in x is

    (x0_hat(alpha_t x) - x) / rho^2 + grad_x log p(y, u given x)

because E[x_0 given x_t] = x + rho^2 grad log (p_0 * N(0, rho^2 I))(x) at x_t = alpha_t x (Tweedie). p_0 is the law
that the denoiser stands for and not that of the discretised chain. Draws from the posterior itself differ from pi_rho
by terms of order rho^2; a network's error enters the score as its error over rho^2, which bounds rho from below.

References:
    X. Qiu, T. Yang, Z. Liu, G. Wang, L. Shen, "Beyond Accuracy: Evaluating Posterior Fidelity of Diffusion Inverse
    Solvers" (2026), arXiv 2602.04189.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

from smcdiff.diagnostics.stein import SteinDiscrepancy, kernel_stein_discrepancy, median_distance
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.validation.programs import Model

__all__ = ["PosteriorScore", "posterior_score", "stein_discrepancy"]


@dataclass(frozen=True)
class PosteriorScore:
    """grad log pi_rho at draws.

    Args:
        coordinates: {site: (S, *event)}, the draws; of a latent that is no diffusion prior, on the real line.
        score: {site: (S, *event)}, the gradient with respect to each.
        rho: {site: sigma_t / alpha_t} of each diffusion prior.
    """

    coordinates: dict[str, Tensor]
    score: dict[str, Tensor]
    rho: dict[str, float]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Coordinates and score of all sites in a row, (S, d) each."""
        coordinates = [self.coordinates[name].reshape(len(score), -1) for name, score in self.score.items()]
        scores = [score.reshape(len(score), -1) for score in self.score.values()]
        return torch.cat(coordinates, 1), torch.cat(scores, 1)


def posterior_score(
    model: Model, measurement: Mapping[str, Tensor], values: Mapping[str, Tensor], level: int = 1
) -> PosteriorScore:
    """The score of pi_rho at draws.

    Args:
        model: the program; called without arguments, conditioned on the measurement.
        measurement: {site: value}.
        values: {site: (S, *event)} of all latents, in the program's units.
        level: k of the chains' noise level at which the prior's score is taken, 1 ... K.

    Raises:
        ValueError: for a latent without values, a discrete one, a clipped chain or a level that there is not.
    """
    conditioned = pyro.condition(model, data=dict(measurement))
    chains = _chains(conditioned, values, level)
    latents = {name: values[name] for name in _latents(conditioned, values)}

    def to_real_line(value: dict[str, Tensor]) -> dict[str, Tensor]:
        site = _RealLine(value, inverse=True)
        with pyro.validation_enabled(False):
            site(conditioned)()
        return site.coordinates

    def log_density(u: dict[str, Tensor]) -> Tensor:
        site = _RealLine(u, inverse=False)
        with pyro.validation_enabled(False):
            trace = pyro.poutine.trace(site(conditioned)).get_trace()
            trace.compute_log_prob(site_filter=lambda name, there: _has_density(there))
        terms = [there["log_prob_sum"] for there in trace.nodes.values() if "log_prob_sum" in there]
        return torch.stack([*terms, *site.log_jacobians]).sum()

    with torch.no_grad():
        coordinates = torch.func.vmap(to_real_line)(latents)
    score = dict(torch.func.vmap(torch.func.grad(log_density))(coordinates))
    rho = {}
    for name, chain in chains.items():
        at = chain.levels[level]
        rho[name] = at.ratio
        with torch.no_grad():
            x0_hat = chain.estimate(level, at.alpha * coordinates[name]).mean
        score[name] = score[name] + (x0_hat - coordinates[name]) / at.ratio**2
    return PosteriorScore(coordinates, score, rho)


def stein_discrepancy(
    model: Model,
    measurement: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    *,
    log_w: Tensor | None = None,
    level: int = 1,
    scale: float | None = None,
    seed: int = 0,
) -> SteinDiscrepancy:
    """How far draws are from the program's posterior, without a ground truth.

    Args:
        model, measurement, values, level: as for :func:`posterior_score`.
        log_w: (S,), log-weights of the draws; None for equally weighted ones.
        scale: of the kernel; None takes the draws' median distance. Give one number to compare methods.
        seed: of the p-value's bootstrap.
    """
    x, score = posterior_score(model, measurement, values, level).flat()
    return kernel_stein_discrepancy(x, score, median_distance(x) if scale is None else scale, log_w, seed=seed)


def _latents(conditioned: Model, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """The laws of the latents, at the first of the draws."""
    first = pyro.condition(conditioned, data={name: value[0] for name, value in values.items()})
    with torch.no_grad():
        given = pyro.poutine.trace(first).get_trace().nodes
    there = {name: node for name, node in given.items() if node["type"] == "sample" and _has_law(node)}
    missing = sorted(name for name, node in there.items() if not node["is_observed"])
    if missing:
        raise ValueError(f"got no values of the latents {missing}; the score is that of all latents together")
    laws: dict[str, Any] = {name: node["fn"] for name, node in there.items() if name in values}
    for name, law in laws.items():
        if getattr(law.support, "is_discrete", False):
            raise ValueError(f"got the discrete latent {name!r}; a score needs continuous latents: sum it out by hand")
    return laws


def _chains(conditioned: Model, values: Mapping[str, Tensor], level: int) -> dict[str, ReverseChain]:
    laws = _latents(conditioned, values)
    chains = {name: law.chain for name, law in laws.items() if isinstance(law, DiffusionPrior)}
    for name, chain in chains.items():
        if not 1 <= level <= chain.num_steps:
            raise ValueError(f"got level {level}; expected an index from 1 to {chain.num_steps}, 1 the least noise")
        if chain.clip is not None:
            raise ValueError(
                f"got the diffusion prior {name!r} with clip {chain.clip}: a clipped estimate is no score. Take the "
                "prior without clip for this"
            )
    return chains


def _has_law(node: Any) -> bool:
    """Whether a sample node is neither a plate nor deterministic."""
    deterministic = bool(node["infer"] and node["infer"].get("_deterministic"))
    return not deterministic and not isinstance(node["fn"], _Subsample)


def _has_density(node: Any) -> bool:
    return _has_law(node) and not isinstance(node["fn"], DiffusionPrior)


class _RealLine(Messenger):
    """Gives latents their values, as they are or through ``biject_to`` of their support."""

    def __init__(self, given: Mapping[str, Tensor], inverse: bool) -> None:
        super().__init__()
        self.given, self.inverse = given, inverse
        self.coordinates: dict[str, Tensor] = {}
        self.log_jacobians: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.given:
            return
        value = self.given[name]
        if not isinstance(fn, DiffusionPrior):
            transform = biject_to(fn.support)
            if self.inverse:
                self.coordinates[name] = transform.inv(value)
            else:
                u, value = value, transform(value)
                self.log_jacobians.append(transform.log_abs_det_jacobian(u, value).sum())
        elif self.inverse:
            self.coordinates[name] = value
        msg["value"], msg["done"] = value, True
