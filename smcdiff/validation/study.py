r"""Calibration studies: simulate from a program, infer, rank; N times, each on its own seed and kept in its own file.

A replication draws latents and a measurement from the program itself (from the sampler's own discretised chain, so that
what is tested is the inference and not the discretisation), has the posterior drawn from the measurement alone, and
ranks the truth among the draws. The reference point of TARP is the likeliest of M further prior draws: it depends on
the measurement, as it must to tell a posterior from the prior, and not on the truth.

A replication's noise depends on the study's seed and its own number alone. So it does not matter in which order, in how
many processes and after how many interruptions the replications run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.diagnostics.calibration import Calibration
from smcdiff.diagnostics.coverage import tarp_pit
from smcdiff.diagnostics.ranks import randomised_pit
from smcdiff.validation.posteriors import Posterior, PosteriorDraws, SMCPosterior
from smcdiff.validation.programs import Model, Simulation, log_likelihood, simulate

__all__ = ["CalibrationStudy", "Quantity", "StudyError"]

#: (one draw's latents {site: (*event)}, the measurement {site: value}) -> a tensor of any shape.
Quantity = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

_Parts = dict[str, dict[str, Tensor]]


class StudyError(RuntimeError):
    """A folder that holds another study, or results that are not there. The message says what to do."""


class CalibrationStudy:
    """Simulation-based calibration, coverage and TARP of a posterior, on any Pyro program.

    Args:
        model: the program; called without arguments it draws its latents and its measurement.
        posterior: from a measurement to posterior draws; for a method of this library, :class:`SMCPosterior`.
        num_replications: N.
        observed: the sites of the measurement.
        quantities: more test quantities, {name: function of one draw and the measurement}.
        num_draws: L, draws that the truth is ranked among; None for all, which equally weighted draws alone allow.
            Weighted draws are resampled to L, which should be well below their effective sample size.
        num_references: M prior draws, of which the one that fits the measurement best is TARP's reference; 1 for a
            reference that does not depend on the measurement.
        seed: of the whole study.
        folder: where every finished replication is kept, in a file of its own, and found again; None keeps them in
            memory. Several processes may share it, each running some of the replications.
        name: of the posterior, in the folder's identity.
        progress: show a progress bar.

    Raises:
        ValueError: for numbers out of range, or quantities with names of the study's own.
    """

    def __init__(
        self,
        model: Model,
        posterior: Posterior,
        num_replications: int,
        *,
        observed: tuple[str, ...] = ("y",),
        quantities: Mapping[str, Quantity] | None = None,
        num_draws: int | None = None,
        num_references: int = 4,
        seed: int = 0,
        folder: Path | str | None = None,
        name: str = "",
        progress: bool = True,
    ) -> None:
        least = {"num_replications": num_replications, "num_references": num_references, "num_draws": num_draws or 1}
        for word, number in least.items():
            if number < 1:
                raise ValueError(f"got {word} {number}; expected at least 1")
        self.model, self.posterior, self.num_replications = model, posterior, num_replications
        self._observed, self._quantities = observed, dict(quantities or {})
        self._num_draws, self._num_references, self._seed = num_draws, num_references, seed
        self._progress = progress
        self._name = posterior.identity if isinstance(posterior, SMCPosterior) and not name else name
        self._store: _Memory | _Folder = _Memory() if folder is None else _Folder(Path(folder))

    def run(self, replications: Iterable[int] | None = None) -> CalibrationStudy:
        """Run what is not there yet, of all replications or of these; returns itself.

        Raises:
            StudyError: for a folder that holds another study.
            ValueError: for a program that cannot be simulated, or a posterior that lacks a latent.
        """
        wanted = range(self.num_replications) if replications is None else replications
        self._store.claim(self._identity())
        missing = [i for i in wanted if i not in self._store]
        for i in tqdm(missing, unit="replication", disable=not self._progress, leave=False):
            with _seeded(self._seed, i):
                self._store.put(i, self._replication())
        return self

    @property
    def result(self) -> Calibration:
        """The calibration, from the replications that are finished.

        Raises:
            StudyError: if none is, or they differ in the number of draws.
        """
        parts = [self._store.get(i) for i in range(self.num_replications) if i in self._store]
        if not parts:
            raise StudyError("no replication is finished; call run first")
        numbers = {int(part["numbers"]["num_draws"]) for part in parts}
        if len(numbers) > 1:
            raise StudyError(f"got posteriors with {sorted(numbers)} draws; let each have as many, or give num_draws")
        pit, tarp = (
            {name: torch.stack([part[group][name] for part in parts]) for name in parts[0][group]}
            for group in ("pit", "tarp")
        )
        return Calibration(pit, tarp, numbers.pop())

    def _replication(self) -> _Parts:
        """One replication, in whatever state torch's global generator is."""
        simulation = simulate(self.model, self._observed)
        references = [simulate(self.model, self._observed).values for _ in range(self._num_references)]
        draws = self._equally_weighted(self.posterior(simulation.measurement), simulation)
        truth_first = {
            name: torch.cat((truth[None].to(draws[name]), draws[name])) for name, truth in simulation.values.items()
        }
        pit = {
            name: randomised_pit(both[0], both[1:], torch.rand(both.shape[1:], dtype=torch.float64))
            for name, both in self._all_quantities(truth_first, simulation).items()
        }
        best = self._likeliest(references, simulation)
        tarp = {
            name: tarp_pit(both[0].cpu(), both[1:].cpu(), best[name].cpu(), torch.rand((), dtype=torch.float64))
            for name, both in truth_first.items()
        }
        number = len(next(iter(draws.values())))
        return {"pit": pit, "tarp": tarp, "numbers": {"num_draws": torch.tensor(number)}}

    def _all_quantities(self, values: Mapping[str, Tensor], simulation: Simulation) -> dict[str, Tensor]:
        """Every test quantity of the truth and the draws, {name: (1 + L, *shape)}, on the host."""
        found: dict[str, Tensor] = {}
        for name, both in values.items():
            found[name] = both
            if both[0].numel() > 1:
                flat = both.reshape(len(both), -1).to(torch.float64)
                found[f"{name} mean"], found[f"{name} rms"] = flat.mean(1), flat.square().mean(1).sqrt()
        found["log_likelihood"] = log_likelihood(self.model, values, simulation.measurement)
        number = len(found["log_likelihood"])
        for name, quantity in self._quantities.items():
            if name in found:
                raise ValueError(f"got a quantity named {name!r}, which the study has itself; give it another name")
            each = [
                quantity({site: both[i] for site, both in values.items()}, simulation.measurement)
                for i in range(number)
            ]
            found[name] = torch.stack([torch.as_tensor(value) for value in each])
        return {name: both.detach().cpu() for name, both in found.items()}

    def _likeliest(self, references: list[dict[str, Tensor]], simulation: Simulation) -> dict[str, Tensor]:
        if len(references) == 1:
            return references[0]
        together = {name: torch.stack([each[name] for each in references]) for name in references[0]}
        return references[int(log_likelihood(self.model, together, simulation.measurement).argmax())]

    def _equally_weighted(self, posterior: PosteriorDraws, simulation: Simulation) -> dict[str, Tensor]:
        """L equally weighted draws of every latent."""
        missing = sorted(simulation.values.keys() - posterior.values.keys())
        if missing:
            raise ValueError(f"got a posterior without the latents {missing}; it has {sorted(posterior.values)}")
        draws = {name: posterior.values[name].detach() for name in simulation.values}
        for name, truth in simulation.values.items():
            if draws[name].shape[1:] != truth.shape:
                got = tuple(draws[name].shape)
                raise ValueError(f"got draws of {name!r} of shape {got}; expected (draws, *{tuple(truth.shape)})")
        size, wanted = len(next(iter(draws.values()))), self._num_draws
        if posterior.log_w is not None:
            if wanted is None:
                raise ValueError(
                    "got weighted draws and no num_draws; give a number well below their effective sample size, to "
                    "which they are resampled"
                )
            log_w = posterior.log_w.detach().cpu().to(torch.float64)
            index = torch.multinomial((log_w - log_w.max()).exp(), wanted, replacement=True)
        elif wanted is None or wanted == size:
            return draws
        elif wanted > size:
            raise ValueError(f"got {size} draws; expected at least num_draws, {wanted}")
        else:
            index = torch.randperm(size)[:wanted]
        return {name: value[index.to(value.device)] for name, value in draws.items()}

    def _identity(self) -> dict[str, str]:
        """What the replications depend on, in words; the program by what it draws on the study's seed."""
        with _seeded(self._seed, -1):
            simulation = simulate(self.model, self._observed)
            fit = log_likelihood(
                self.model, {name: value[None] for name, value in simulation.values.items()}, simulation.measurement
            )
        drawn = {**simulation.values, **simulation.measurement}
        return {
            "posterior": self._name,
            "seed": str(self._seed),
            "draws": str(self._num_draws),
            "references": str(self._num_references),
            "quantities": ", ".join(self._quantities),
            "program": "; ".join(f"{n} {tuple(v.shape)}: {float(v.double().sum()):.5g}" for n, v in drawn.items()),
            "likelihood": f"{float(fit[0]):.5g}",
        }


class _Memory:
    """Finished replications of a study that is not kept."""

    def __init__(self) -> None:
        self._parts: dict[int, _Parts] = {}

    def claim(self, identity: Mapping[str, str]) -> None:
        """Nothing to compare with."""

    def __contains__(self, i: int) -> bool:
        return i in self._parts

    def get(self, i: int) -> _Parts:
        return self._parts[i]

    def put(self, i: int, part: _Parts) -> None:
        self._parts[i] = part


class _Folder:
    """Finished replications in a folder, a file each; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def claim(self, identity: Mapping[str, str]) -> None:
        """Make the folder this study's, or find that it is.

        Raises:
            StudyError: if it is another's.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "study.json"
        if not path.exists():
            self._write(path, json.dumps(dict(identity), indent=1).encode())
        kept = json.loads(path.read_text())
        other = [
            f"{word}: {kept.get(word, 'nothing')} there, {identity.get(word, 'nothing')} here"
            for word in sorted({*kept, *identity})
            if kept.get(word) != identity.get(word)
        ]
        if other:
            raise StudyError(f"the folder {self._folder} holds another study ({'; '.join(other)}); give another folder")

    def __contains__(self, i: int) -> bool:
        return self._path(i).exists()

    def get(self, i: int) -> _Parts:
        part: _Parts = torch.load(self._path(i), weights_only=True)
        return part

    def put(self, i: int, part: _Parts) -> None:
        buffer = io.BytesIO()
        torch.save(part, buffer)
        self._write(self._path(i), buffer.getvalue())

    def _path(self, i: int) -> Path:
        return self._folder / f"replication_{i:06d}.pt"

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def _seeded(seed: int, i: int) -> Iterator[None]:
    """torch's global generators on the seed of replication i, and afterwards as they were."""
    own = int.from_bytes(hashlib.sha256(f"{seed} {i}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(own)
        yield
