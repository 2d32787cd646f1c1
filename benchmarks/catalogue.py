"""The methods that the comparisons run, by name, each with the settings that suit many weighted particles.

A method that is not installed is left out. What is listed here is how each does its best, with the chain's optimal
variance; where it is as published, one particle to a chain, the comparison says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CATALOGUE", "Entry", "available"]


@dataclass(frozen=True)
class Entry:
    """One method with its settings.

    Args:
        name: in tables.
        module: below ``smcdiff.guidance``.
        cls: the class, made with the program as its first argument.
        settings: keyword arguments of the class.
        published: settings of the published algorithm with one particle; None where the method is about weights.
        twist: (module, class) of the twist, made without arguments; None for the method's own.
        weighted: whether it is run with many weighted particles as well.
        variance: of the chain, for many particles.
        last_ratio: sigma / alpha of the last level before 0, in deviations of the data, on a grid that stops early.
    """

    name: str
    module: str
    cls: str
    settings: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] | None = None
    twist: tuple[str, str] | None = None
    weighted: bool = True
    variance: Literal["posterior", "optimal", "full"] = "optimal"
    last_ratio: float = 0.1

    def load(self) -> Callable[..., Any]:
        """The method as a function of the program and settings.

        Raises:
            ImportError, AttributeError: where it is not there.
        """
        cls = _get(self.module, self.cls)
        twist = {} if self.twist is None else {"twist": _get(*self.twist)()}
        return lambda model, **settings: cls(model, **{**twist, **settings})


def _get(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"smcdiff.guidance.{module}"), name)


_FLOOR = {"min_variance": 1.0}

CATALOGUE = (
    Entry("Adapted", "adapted", "Adapted", published={}, variance="full", last_ratio=1.0),
    Entry("Tilted", "tilted", "Tilted", published={}, variance="full"),
    Entry("TDS, Tweedie twist", "tds", "TDS", published={}, twist=("twists", "TweedieTwist")),
    Entry("TDS, PiGDM twist", "tds", "TDS", published={}, twist=("pigdm", "PiGDMTwist")),
    Entry("TDS, DMPS twist", "tds", "TDS", published={}, twist=("dmps", "DMPSTwist")),
    Entry("TDS, widened twist", "tds", "TDS", published={}, twist=("twists", "WidenedTwist")),
    Entry("TDS, point twist", "tds", "TDS", published={}, twist=("twists", "PointTwist")),
    Entry("MMPS, 5 iterations", "mmps", "MMPS", {"iterations": 5}, published={"iterations": 5}),
    Entry("TMPD", "tmpd", "TMPD", published={}),
    Entry("PiGDM", "pigdm", "PiGDM", published={}),
    Entry("DMPS", "dmps", "DMPS", {"gain": 1.0}, published={}),
    Entry("DDSMC", "ddsmc", "DDSMC", published={}),
    Entry("MCGDiff", "mcgdiff", "MCGDiff", published={}),
    Entry("MCGDiff, variance 0.1", "mcgdiff", "MCGDiff", {"variance": 0.1}),
    Entry("FPS, own paths", "fps", "FPS", {"seed": None}, published={"seed": None}),
    Entry("FPS, one path", "fps", "FPS", published={}),
    Entry("DDRM", "ddrm", "DDRM", _FLOOR, published={}),
    Entry("DDNM", "ddnm", "DDNM", _FLOOR, published={}),
    Entry("DDNM+", "ddnm", "DDNMPlus", _FLOOR, published={}),
    Entry("BO-DDNM", "ddnm", "BODDNM", published={}),
    Entry("DiffPIR", "diffpir", "DiffPIR", _FLOOR, published={}),
    Entry("DPS", "dps", "DPS", published={}, weighted=False),
    Entry("bootstrap", "bootstrap", "Bootstrap"),
)


def available(names: list[str] | None = None) -> tuple[list[Entry], dict[str, str]]:
    """The entries that can be loaded, and why the others cannot, {name: reason}.

    Args:
        names: which; None for all.

    Raises:
        ValueError: for a name that is not in the catalogue.
    """
    known = {entry.name: entry for entry in CATALOGUE}
    missing = sorted(set(names or ()) - set(known))
    if missing:
        raise ValueError(f"got the methods {missing}; expected some of {sorted(known)}")
    found, reasons = [], {}
    for name in names or known:
        try:
            known[name].load()
        except (ImportError, AttributeError) as error:
            reasons[name] = str(error)
        else:
            found.append(known[name])
    return found, reasons
