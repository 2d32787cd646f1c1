r"""What went wrong in a run, kept on the device and raised when somebody looks.

Every fault is kept as the first step at which each chain had it, so a filter's loop never waits for the device.
:func:`check` costs one synchronisation; a filter calls it when the run ends and whenever progress is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.state import FilterState

__all__ = ["NEVER", "DescribesSteps", "FilterError", "all_zero", "check"]

#: In place of a step: this chain never had the fault.
NEVER = 2**62

NOT_A_NUMBER = (
    "the incremental log-weight log_g of a particle is NaN or +inf; look at the densities, the twist and the network "
    "of this step: a scale that underflows, a division by zero or a value that is not finite in the inputs"
)
ALL_ZERO = (
    "all weights are zero, so nothing is left to resample; use more particles, a proposal that reaches the data or a "
    "wider twist, and check that the observation is possible under the model"
)


class FilterError(ArithmeticError):
    """A run whose result cannot stand. The message names the step, the chains, what happened and the remedy."""


@runtime_checkable
class DescribesSteps(Protocol):
    """A Feynman-Kac model that names its steps in its own words, for error messages."""

    def describe(self, i: int) -> str:
        """Name of move i, for example ``"k = 93, t = 0.62"``."""


def merge(faults: Mapping[str, Tensor], step: int | Tensor, flags: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First steps (b,) of all faults, after ``flags`` (b,) of bool were found at ``step``, a number or 0-d int64."""
    merged = dict(faults)
    for name, flag in flags.items():
        here = torch.where(flag, step, NEVER)
        merged[name] = torch.minimum(merged[name], here) if name in merged else here
    return merged


def all_zero(state: FilterState) -> Tensor:
    """Chains (b,) of bool whose first fault is that all weights were zero: their estimate of Z is zero."""
    others = [step for name, step in state.faults.items() if name != ALL_ZERO]
    return state.faults[ALL_ZERO] < torch.stack(others).amin(0)


def check(state: FilterState, feynman_kac: FeynmanKac, *, zero_allowed: bool = False) -> None:
    """Raise if a chain has had a fault up to ``state``. Synchronises with the host once.

    A fault brings others in its train, so each chain is reported by its earliest one; at the same step those that the
    model named come before a log-weight that is not a number, and that before weights that are all zero.

    Args:
        zero_allowed: weights that are all zero are an estimate of zero and no error, where they are a chain's first
            fault: see :func:`all_zero`.

    Raises:
        FilterError: naming step, chains, fault and remedy.
    """
    names = sorted(state.faults, key=lambda name: (name == ALL_ZERO, name == NOT_A_NUMBER))
    if not names:
        return
    table = torch.stack([state.faults[name] for name in names]).tolist()
    found: dict[tuple[int, str], list[int]] = {}
    for chain, steps in enumerate(zip(*table, strict=True)):
        first = min(steps)
        name = names[steps.index(first)]
        if first != NEVER and not (zero_allowed and name == ALL_ZERO):
            found.setdefault((first, name), []).append(chain)
    if found:
        (step, name), chains = min(found.items(), key=lambda item: item[0][0])
        also = sorted({chain for others in found.values() for chain in others} - set(chains))
        raise FilterError(
            f"the particle filter failed at step {step} of {state.num_steps}{_described(feynman_kac, step)}"
            f" in {_chains(chains)} of {state.num_chains}: {name}" + (f" (later also {_chains(also)})" if also else "")
        )


def _described(feynman_kac: FeynmanKac, step: int) -> str:
    return f" ({feynman_kac.describe(step)})" if isinstance(feynman_kac, DescribesSteps) else ""


def _chains(chains: list[int]) -> str:
    shown = ", ".join(str(chain) for chain in chains[:8]) + (f" and {len(chains) - 8} more" if len(chains) > 8 else "")
    return f"chain{'s' if len(chains) > 1 else ''} {shown}"
