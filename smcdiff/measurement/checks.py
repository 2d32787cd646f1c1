"""Checks of what a measurement is made of."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

__all__ = ["broadcasts", "holds", "is_validating", "require_finite"]


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of that shape can be expanded to the other, without enlarging it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def is_validating() -> bool:
    """Whether values are to be checked: Pyro's setting, see ``pyro.enable_validation``."""
    return bool(pyro.settings.get("validate_distributions_torch"))


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; True also under ``torch.func.vmap``, where no value can be read."""
    try:
        return bool(condition.all())
    except RuntimeError:
        return True


def require_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        ValueError: for a value that is not finite.
    """
    finite = torch.isfinite(value)
    if not holds(finite):
        bad = int((~finite).sum())
        raise ValueError(f"got {name} with {bad} NaN or infinite values of {value.numel()}; expected finite numbers")
