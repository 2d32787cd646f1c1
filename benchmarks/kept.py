"""Results of a long comparison, a line of JSON for each finished run: a script that was stopped goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Kept"]


class Kept:
    """A file of finished runs.

    Args:
        path: of the file; made where it is missing.
        keys: the entries that name a run; of two lines with the same the later one counts.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self._path, self._keys = path, keys
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._rows[self._name(row)] = row

    def __contains__(self, row: dict[str, Any]) -> bool:
        return self._name(row) in self._rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def add(self, row: dict[str, Any]) -> None:
        """Write a finished run down."""
        self._rows[self._name(row)] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _name(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in self._keys)
