"""A Pyro program with its diffusion priors run as chains with a full covariance, and what a step of these foretells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance
from smcdiff.diffusion.covariance_models import CovarianceModel, Parts
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.kernels import full_transition
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.base import SiteStep, log_ratio

__all__ = ["Beside", "FullChains", "chain_against_own", "foretold"]


@dataclass(frozen=True, eq=False)
class FullChains:
    """The program with ``variance="full"`` at every diffusion prior.

    A prior without a covariance of its own has the given one. A prior with one keeps it, and what the given one says
    of each particle is kept beside.

    Args:
        model: a Pyro program.
        covariance: given for all priors; None for their own.
    """

    model: Callable[..., Any]
    covariance: CovarianceModel | None = None
    _known: WeakKeyDictionary[DiffusionPrior, DiffusionPrior] = field(default_factory=WeakKeyDictionary, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Full(self):
            return self.model(*args, **kwargs)

    def full(self, name: str, prior: DiffusionPrior) -> DiffusionPrior:
        """The prior with its full covariance.

        Raises:
            ValueError: for a prior without a covariance.
        """
        if prior not in self._known:
            own, given = prior.covariance, self.covariance
            if own is not None and given is not None and given is not own:
                covariance: CovarianceModel | None = Beside(own, given)
            else:
                covariance = own or given
            if covariance is None:
                raise ValueError(
                    f"got the diffusion prior {name!r} without a covariance of x_0 given x_t, which sd.Adapted needs; "
                    "measure it once with prior.calibrate(images), give sd.Adapted(model, covariance=...), or use "
                    "sd.TDS, which needs none"
                )
            self._known[prior] = prior.replace(variance="full", covariance=covariance)
        return self._known[prior]


@final
@dataclass(frozen=True, eq=False)
class Beside:
    """A chain's own covariance, and another one for a method beside it.

    Args:
        own: the covariance that the chain has.
        given: the other.
    """

    own: CovarianceModel
    given: CovarianceModel

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        before = {key: part for key, part in estimate.parts.items() if not key.startswith(_GIVEN)}
        own = self.own.parts(denoiser, x_t, level, replace(estimate, parts=before))
        given = self.given.parts(denoiser, x_t, level, replace(estimate, parts=_given(estimate.parts)))
        return {**own, **{f"{_GIVEN}{key}": part for key, part in given.items()}}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Covariance:
        return self.own.at(level, parts, like)

    def given_at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Covariance:
        """The other covariance of the same particles."""
        return self.given.at(level, _given(parts), like)


_GIVEN = "given/"


def _given(parts: Parts) -> Parts:
    """What the other covariance keeps, under its own names."""
    return {key[len(_GIVEN) :]: part for key, part in parts.items() if key.startswith(_GIVEN)}


class _Full(Messenger):
    """Puts the full chains in the place of the program's own."""

    def __init__(self, chains: FullChains) -> None:
        super().__init__()
        self._chains = chains

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], DiffusionPrior):
            msg["fn"] = self._chains.full(msg["name"], msg["fn"])


def foretold(step: SiteStep, covariance: Covariance, x_s: Tensor) -> tuple[Tensor, Covariance]:
    """m_st and C_st: what N(x0_hat, C_t) says of x_0 once x_s is seen."""
    to, mean = step.coefficients, step.estimate.mean
    if to.kappa == 0:  # x_s is b x_t + c x_0 itself
        return (x_s - to.b * step.x) / to.c, covariance.given(math.inf)
    given = covariance.given((to.c / to.kappa) ** 2)
    return mean + given.apply(to.c / to.kappa**2 * (x_s - to.b * step.x - to.c * mean)), given


def chain_against_own(step: SiteStep, covariance: Covariance, x_s: Tensor) -> Tensor:
    """log p(x_s given x_t) - log N(x_s; b x_t + c x0_hat, kappa^2 I + c^2 C_t), zero where C_t is the chain's own."""
    if not isinstance(step.program.latents[step.name].chain.covariance, Beside):
        return torch.zeros((), dtype=torch.float64, device=x_s.device)
    own = full_transition(step.coefficients, step.x, step.estimate.mean, covariance)
    return log_ratio(step.p, own, x_s)
