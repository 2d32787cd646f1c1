"""New draws from a program: measurements given its latents, latents from its prior; and what it was called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from smcdiff.guidance.program import Program

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """A program as it was called, measurements among its arguments.

    Args:
        model: the Pyro program.
        args, kwargs: what it was called with.
        program: the same with its latents and their chains.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    program: Program

    def measurements(self, values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """y ~ p(y given latents), one for each of m values of the latents, {observed site: (m, *its shape)}.

        The program is run once for each of them, which a Python loop does. A part of the measurement that another
        part depends on is drawn as well.

        Args:
            values: {site: (m, *event)}, in the program's own units.
            seed: of the noise.
        """
        latents = {name: values[name] for name in self.program.latents}
        number = len(next(iter(latents.values())))
        unmeasured = pyro.poutine.uncondition(self.model)
        drawn = []
        with torch.random.fork_rng(_devices(self.program.device)), torch.no_grad():
            torch.manual_seed(seed)
            for i in range(number):
                program = pyro.poutine.condition(unmeasured, data={name: value[i] for name, value in latents.items()})
                nodes: Any = pyro.poutine.trace(program).get_trace(*self.args, **self.kwargs).nodes
                drawn.append({name: nodes[name]["value"] for name in self.program.observed})
        return {name: torch.stack([each[name] for each in drawn]) for name in self.program.observed}

    def prior(self, number: int, seed: int, max_batch: int | None = None) -> dict[str, Tensor]:
        """Draws of the latents from the prior, {site: (number, *event)}: every reverse chain from its beginning.

        Args:
            number: of draws.
            seed: of the noise.
            max_batch: largest number of them put through the network at once.
        """
        generator = torch.Generator(self.program.device).manual_seed(seed)
        size = max_batch or number
        states = {
            name: torch.cat(
                [latent.chain.sample(min(size, number - start), generator) for start in range(0, number, size)]
            )
            for name, latent in self.program.latents.items()
        }
        with torch.no_grad():
            return self.program.values(states)

    def constants(self) -> dict[str, Tensor]:
        """The tensors that the program was called with besides its measurements, by the names of its parameters."""
        try:
            bound = inspect.signature(self.model).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):  # a callable without a signature
            return {}
        measured = list(self.program.observed.values())
        return {
            name: value
            for name, value in bound.items()
            if isinstance(value, Tensor)
            and not value.is_complex()
            and not any(value.shape == y.shape and torch.equal(value, y) for y in measured)
        }


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
