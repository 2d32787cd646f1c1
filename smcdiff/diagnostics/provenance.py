"""Where a result comes from: versions, settings in words, and the papers of the methods that made it.

The papers are read off the docstrings of the objects themselves, from their section "References:", so that what a
report cites is what the code says it implements.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata

from torch import Tensor

__all__ = ["describe", "read_references", "references", "section", "versions", "write_references"]

_PACKAGES = ("smcdiff", "torch", "pyro-ppl", "numpy")
_AUTHOR = re.compile(r"[A-Z]\.[A-Z. -]* ?[A-Z]")


def versions() -> dict[str, str]:
    """Versions of Python, this library and what it computes with, {"version of NAME": version}."""
    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # used from its source tree
            found[package] = str(getattr(sys.modules.get(package), "__version__", "unknown"))
    return {f"version of {name}": version for name, version in found.items()}


def describe(value: object, leave_out: Iterable[str] = ("model",)) -> str:
    """A dataclass in words, its fields in words too: ``TDS(twist=WidenedTwist(width=0.1), max_shift=0.3)``."""
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}" if value.numel() > 4 else str(value.tolist())
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__qualname__", repr(value)) if callable(value) else repr(value)
    parts = [
        f"{field.name}={describe(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if field.repr and field.init and field.name not in set(leave_out)
    ]
    return f"{type(value).__name__}({', '.join(parts)})"


def references(*objects: object) -> list[str]:
    """The papers that these objects' classes name in their docstrings or their modules', each once.

    The values of a dataclass's fields count as well: the twist of a method, the resampler of a filter.
    """
    found: dict[str, str] = {}
    for value in _with_fields(objects):
        kind = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
        if not kind.__module__.startswith("smcdiff."):
            continue
        module = importlib.import_module(kind.__module__)
        for doc in (inspect.getdoc(kind), inspect.getdoc(module)):
            for paper in section(doc or ""):
                found.setdefault(_title(paper), paper)
    return list(found.values())


def section(doc: str) -> list[str]:
    """The entries of a docstring's section "References:", one string each, in order."""
    lines = inspect.cleandoc(doc).splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "References:"), None)
    if start is None:
        return []
    entries: list[str] = []
    for line in lines[start + 1 :]:
        if not line.strip() or not line.startswith(" "):
            break
        text = line.strip()
        if entries and not (_AUTHOR.match(text) and entries[-1].endswith(".")):
            entries[-1] += f" {text}"
        else:
            entries.append(text)
    return entries


def write_references(papers: Iterable[str]) -> str:
    """References as one string, for an attribute."""
    return json.dumps(list(papers), ensure_ascii=False)


def read_references(text: str) -> list[str]:
    """What :func:`write_references` wrote."""
    return [str(paper) for paper in json.loads(text)]


def _with_fields(objects: Iterable[object]) -> Iterable[object]:
    for value in objects:
        yield value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _with_fields(
                inner
                for field in dataclasses.fields(value)
                if dataclasses.is_dataclass(inner := getattr(value, field.name))
            )


def _title(paper: str) -> str:
    """What tells a paper from others: its title, between quotation marks, without case and punctuation."""
    quoted = re.search(r'"(.+?)"', paper)
    return re.sub(r"\W+", " ", (quoted[1] if quoted else paper).lower()).strip()
