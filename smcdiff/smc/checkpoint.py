r"""Checkpoints: a run that was killed goes on where it stood, and ends with the same numbers, bit for bit.

A checkpoint is a :class:`~smcdiff.smc.state.FilterState` in a file, with an identity: words that say of which run it
is. It is written beside the old one, flushed to the disk and then renamed over it, so that a process killed at any
moment leaves the old checkpoint or the new one, whole. A checkpoint of another run is refused, naming the words that
differ. A write that fails in the middle of a run is a warning: the run goes on, and the last good checkpoint stays.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smcdiff.smc.records import History, stack, unstack
from smcdiff.smc.state import FilterState

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Keeper",
    "Watch",
    "digest",
    "load",
    "save",
    "versions",
]

_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, or is of another run. The message says why and what to do."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written; the run goes on without it."""


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is kept.

    Args:
        path: the file; its folder must exist. Beside it a file with the suffix ``.part`` appears while it is written.
        identity: what the run's result depends on besides the filter's own numbers, {word: value}, for example
            ``{"program": ..., "prior": digest(weights), "data": digest(y)}``. A checkpoint with another is refused.
        every_seconds: write when so many seconds have passed since the last time; None for never.
        every_steps: write after every so many steps; None for never.

    Raises:
        ValueError: if neither interval is given, or one is not positive.
    """

    path: Path | str
    identity: Mapping[str, str]
    every_seconds: float | None = 60.0
    every_steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.every_seconds, self.every_steps) if value is not None]
        if not given or not all(value > 0 for value in given):
            raise ValueError(
                f"got every_seconds {self.every_seconds} and every_steps {self.every_steps}; expected a positive "
                "interval in seconds, in steps, or both"
            )


class Watch:
    """Says when a checkpoint is due: for the first and the last state of a run, and as often as was asked for.

    Args:
        checkpoint: how often.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._written = time.monotonic()
        #: Whether this run has kept a state already.
        self.kept_once = False

    def due(self, state: FilterState) -> bool:
        """Whether to write now."""
        seconds, steps = self._checkpoint.every_seconds, self._checkpoint.every_steps
        return (
            not self.kept_once
            or state.step == state.num_steps
            or (steps is not None and state.step % steps == 0)
            or (seconds is not None and time.monotonic() - self._written >= seconds)
        )

    def kept(self) -> None:
        """A state was kept, or could not be and the next try is to come as late as if it had."""
        self.kept_once = True
        self._written = time.monotonic()


class Keeper:
    """Writes the checkpoints of one run when they are due, and finds the one to start from.

    Args:
        checkpoint: where and how often.
        numbers: the words that the filter adds to the identity: seed, sizes, settings.
    """

    def __init__(self, checkpoint: Checkpoint, numbers: Mapping[str, str]) -> None:
        self._path = Path(checkpoint.path)
        self._identity = {**checkpoint.identity, **numbers, **versions()}
        self._watch = Watch(checkpoint)

    def start(self, device: torch.device) -> FilterState | None:
        """The state to go on from, or None where there is no checkpoint.

        Raises:
            CheckpointError: for a checkpoint that cannot be read or is of another run.
        """
        return load(self._path, self._identity, device) if self._path.exists() else None

    def due(self, state: FilterState) -> bool:
        """Whether to write now."""
        return self._watch.due(state)

    def keep(self, state: FilterState) -> None:
        """Write the state. What fails on the first write is an error, before much work is done; later a warning.

        Raises:
            CheckpointError: if the first checkpoint cannot be written.
        """
        try:
            save(self._path, state, self._identity)
        except CheckpointError as error:
            if not self._watch.kept_once:
                raise
            warnings.warn(f"{error}; the run goes on", CheckpointWarning, stacklevel=3)
        self._watch.kept()


def save(path: Path | str, state: FilterState, identity: Mapping[str, str]) -> None:
    """Write a checkpoint so that at any moment the old or the new one is there, whole.

    Raises:
        CheckpointError: if the file cannot be written; what was there before stays.
    """
    path = Path(path)
    part = path.with_suffix(".part")
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "identity": dict(identity), "state": _plain(state)}, buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(part)
        raise CheckpointError(
            f"the checkpoint {path} of {buffer.getbuffer().nbytes / 2**20:.1f} MiB could not be written: "
            f"{error.strerror or error}; free some space, or give a path in a folder that exists and can be written"
        ) from error


def load(path: Path | str, identity: Mapping[str, str], device: torch.device) -> FilterState:
    """Read a checkpoint of the run with this identity.

    Raises:
        CheckpointError: if the file cannot be read, or is of another format or another run; the words that differ are
            named.
    """
    remedy = "delete or rename it to start anew, or give another path"
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise CheckpointError(f"the checkpoint {path} has format {content['format']}, not {_FORMAT}; {remedy}")
        kept: dict[str, str] = content["identity"]
        other = [
            f"{word}: {kept.get(word, 'nothing')} there, {identity.get(word, 'nothing')} here"
            for word in sorted({*kept, *identity})
            if kept.get(word) != identity.get(word)
        ]
        if other:
            raise CheckpointError(f"the checkpoint {path} is of another run ({'; '.join(other)}); {remedy}")
        return _state(content["state"], device)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} could not be read ({error!r}); {remedy}") from error


def digest(*parts: Tensor | str | bytes) -> str:
    """A short fingerprint of tensors and texts, for the identity of a checkpoint; order, shape and dtype count."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            value = part.detach().cpu().contiguous()
            head = f"{value.dtype} {tuple(value.shape)}".encode()
            body = value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        else:
            head, body = type(part).__name__.encode(), part.encode() if isinstance(part, str) else part
        sha.update(len(head).to_bytes(8, "big") + head + len(body).to_bytes(8, "big") + body)
    return sha.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Which smcdiff and which torch this is, for the identity of a checkpoint."""
    try:
        version = metadata.version("smcdiff")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"smcdiff": version, "torch": str(torch.__version__)}


def _plain(state: FilterState) -> dict[str, Any]:
    """The state in tensors, numbers and dictionaries, all on the host and none a view."""
    history = stack(state.history, state.num_chains, state.num_particles)
    fields = ("log_w", "w", "ess", "log_z", "log_z_settled", "generator_state")
    kept = ("ess", "log_z", "resampled", "ancestors", "log_w")
    return {
        "step": state.step,
        "num_steps": state.num_steps,
        "particles": _host(state.particles),
        "faults": _host(state.faults),
        "summaries": _host(history.summaries),
        "history": _host({name: getattr(history, name) for name in kept if getattr(history, name) is not None}),
        **_host({name: getattr(state, name) for name in fields}),
    }


def _state(plain: dict[str, Any], device: torch.device) -> FilterState:
    """The inverse of :func:`_plain`."""

    def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in tensors.items()}

    kept = there(plain["history"])
    history = History(
        ess=kept["ess"],
        log_z=kept["log_z"],
        resampled=kept["resampled"],
        ancestors=kept.get("ancestors"),
        log_w=kept.get("log_w"),
        summaries=there(plain["summaries"]),
    )
    return FilterState(
        step=plain["step"],
        num_steps=plain["num_steps"],
        particles=there(plain["particles"]),
        faults=there(plain["faults"]),
        history=unstack(history, plain["step"] + 1),
        generator_state=plain["generator_state"],
        **there({name: plain[name] for name in ("log_w", "w", "ess", "log_z", "log_z_settled")}),
    )


def _host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself last, where folders can be synchronised."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:
        return
