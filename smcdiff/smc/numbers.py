"""What a run is asked for besides its model and filter, checked and put into words in one place."""

from __future__ import annotations

from dataclasses import dataclass

from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.records import Records

__all__ = ["Numbers", "check_integer", "look_every"]

#: How often at most a run is looked at while it goes; every look waits for the device once.
_LOOKS = 50


@dataclass(frozen=True)
class Numbers:
    """The numbers of a run; nothing is checked before :meth:`check`.

    Args:
        num_particles: n, of each chain.
        num_chains: b, independent particle systems.
        seed: of all the noise.
        records: what to keep of the steps; None for ``Records()``.
    """

    num_particles: int
    num_chains: int
    seed: int
    records: Records | None = None

    @property
    def kept(self) -> Records:
        """What to keep of the steps."""
        return Records() if self.records is None else self.records

    def check(self, feynman_kac: FeynmanKac) -> None:
        """See that a run of the model can have these numbers.

        Raises:
            ValueError: for a number that is out of range.
        """
        check_integer("num_particles", self.num_particles, 1)
        check_integer("num_chains", self.num_chains, 1)
        check_integer("seed", self.seed, 0)
        check_integer("num_steps of the Feynman-Kac model", feynman_kac.num_steps, 0)

    def words(self, feynman_kac: FeynmanKac, settings: object) -> dict[str, str]:
        """What a checkpoint must have in common with such a run of a filter with these settings."""
        records = self.kept
        return {
            "filter": repr(settings),
            "model": f"{type(feynman_kac).__module__}.{type(feynman_kac).__qualname__}",
            "steps": str(feynman_kac.num_steps),
            "device": feynman_kac.device.type,
            "particles": str(self.num_particles),
            "chains": str(self.num_chains),
            "seed": str(self.seed),
            "records": f"ancestors {records.ancestors}, log_weights {records.log_weights}, {sorted(records.summaries)}",
        }


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless the value is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"got {name} = {value!r}; expected an integer of at least {least}")


def look_every(num_steps: int) -> int:
    """Every how many steps to look at a run: some 50 times in all."""
    return -(-num_steps // _LOOKS) or 1
