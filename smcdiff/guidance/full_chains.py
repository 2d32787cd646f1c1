"""A Pyro program with its diffusion priors run as chains with a full covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyro.poutine.messenger import Messenger

from smcdiff.diffusion.covariance_models import CovarianceModel
from smcdiff.diffusion.prior import DiffusionPrior

__all__ = ["FullChains"]


@dataclass(frozen=True, eq=False)
class FullChains:
    """The program with ``variance="full"`` at every diffusion prior.

    Args:
        model: a Pyro program.
        covariance: of the priors that have none; None leaves no prior without one.
    """

    model: Callable[..., Any]
    covariance: CovarianceModel | None = None
    _known: dict[int, tuple[DiffusionPrior, DiffusionPrior]] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Full(self):
            return self.model(*args, **kwargs)

    def full(self, name: str, prior: DiffusionPrior) -> DiffusionPrior:
        """The prior with its full covariance.

        Raises:
            ValueError: for a prior without a covariance.
        """
        if id(prior) not in self._known:
            covariance = prior.covariance or self.covariance
            if covariance is None:
                raise ValueError(
                    f"got the diffusion prior {name!r} without a covariance of x_0 given x_t, which sd.Adapted needs; "
                    "measure it once with prior.calibrate(images), give sd.Adapted(model, covariance=...), or use "
                    "sd.TDS, which needs none"
                )
            self._known[id(prior)] = (prior, prior.replace(variance="full", covariance=covariance))
        return self._known[id(prior)][1]


class _Full(Messenger):
    """Puts the full chains in the place of the program's own."""

    def __init__(self, chains: FullChains) -> None:
        super().__init__()
        self._chains = chains

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], DiffusionPrior):
            msg["fn"] = self._chains.full(msg["name"], msg["fn"])
