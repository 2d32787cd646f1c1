"""A program with its chains unrolled: the executable definition of what a filter targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.distributions import Delta
from pyro.poutine import block
from pyro.poutine.messenger import Messenger

from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.guidance.latents import from_standard_normal
from smcdiff.guidance.program import Program

__all__ = ["unroll"]


def unroll(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same Pyro program with one sample site per step of every latent's chain.

    A latent ``x`` of K steps becomes the sites ``x_K``, ..., ``x_0``: for a diffusion prior the chain of the picture,
    for any other latent the chain of its standard normal noise. ``pyro.poutine.trace`` of it gives the joint density
    of the whole path and the measurement.

    Args:
        model: a Pyro program that observes something when it is called.
    """

    def unrolled(*args: Any, **kwargs: Any) -> Any:
        with block():  # the program is looked at without the handlers that unrolled itself runs under
            program = Program(model, args, kwargs)
        return _Unroll(program)(model)(*args, **kwargs)

    return unrolled


class _Unroll(Messenger):
    """Replaces each latent site by its chain."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def _pyro_sample(self, msg: Any) -> None:
        latent = self.program.latents.get(str(msg["name"]))
        if latent is None or msg["is_observed"]:
            return
        state = latent.chain(latent.name)
        value = state if isinstance(msg["fn"], DiffusionPrior) else from_standard_normal(msg["fn"], state)
        msg["value"] = value  # from here on the site is a deterministic function of its chain
        msg["fn"] = Delta(value, event_dim=value.ndim - len(msg["fn"].batch_shape)).mask(False)
        msg["infer"] = {"_deterministic": True}
        msg["is_observed"] = msg["done"] = True
