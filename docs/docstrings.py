"""Docstrings as reStructuredText: the library writes them as plain text for readers of the source.

In plain text a formula is an indented paragraph, ``|r|`` a norm and ``x_`` a letter; in reStructuredText they would be
a quotation, a substitution and a link. This extension turns formulas into literal blocks, entries of "References:" into
a list, and takes the meaning from every other sign that has one, except backquotes, which both read alike.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from smcdiff.diagnostics.provenance import section

if TYPE_CHECKING:
    from sphinx.application import Sphinx

#: Sections that napoleon knows, and that are written here.
_SECTIONS = {"Args:", "Raises:", "Returns:", "Yields:"}
_REFERENCES = "References:"
#: Roles and literals stay as they are: :class:`X`, ``x``, `x`.
_MARKED = re.compile(r"(?::\w+:)?`[^`]+`|``.+?``")
_SPECIAL = re.compile(r"[\\*|`]|(?<=\w)_(?!\w)")
#: autodoc's mark of a name that is to be shown without its module.
_QUALIFIED = re.compile(r"~(?:\w+\.)*(\w+)")
#: A paragraph set in columns is a table.
_COLUMNS = re.compile(r"\S {3,}\S")
#: "L. Wu" at the start of a paragraph would begin a list numbered with letters, "(a)" too.
_ENUMERATOR = re.compile(r"^(\(?(?:[A-Za-z]|\d+|[ivxlcdmIVXLCDM]+)[.)])(?=\s)")


def escaped(text: str) -> str:
    """A line of prose without a sign that means something to reStructuredText."""
    parts, end = [], 0
    for marked in _MARKED.finditer(text):
        parts += [_SPECIAL.sub(r"\\\g<0>", text[end : marked.start()]), marked[0]]
        end = marked.end()
    parts.append(_SPECIAL.sub(r"\\\g<0>", text[end:]))
    return _ENUMERATOR.sub(r"\\\1", "".join(parts))


def to_rst(lines: list[str]) -> list[str]:
    """A docstring, its margin removed, as reStructuredText with sections for napoleon."""
    found: list[str] = []
    papers = section("\n".join(lines))
    within = ""  # the section that a paragraph belongs to
    literal = False  # whether the paragraph before ended in "::"
    for blank, group in groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        if blank:
            found.append("")
            continue
        indented = paragraph[0].startswith("    ")
        if not indented:
            within = paragraph[0].strip() if paragraph[0].strip() in {*_SECTIONS, _REFERENCES} else ""
        if within == _REFERENCES:
            if not indented:  # the list is written once, at its heading
                found += [".. rubric:: References", "", *_bullets(papers), ""]
            continue
        if literal and indented:
            found += paragraph
            continue
        literal = not indented and paragraph[-1].rstrip().endswith("::")
        if indented and not within:
            found += [".. code-block:: text", "", *paragraph]
        elif not within and any(_COLUMNS.search(line) for line in paragraph):
            found += [".. code-block:: text", "", *(f"    {line}" for line in paragraph)]
        else:
            found += [_line(line) for line in _apart(paragraph)]
    return found


def _line(line: str) -> str:
    text = line.lstrip()
    return line[: len(line) - len(text)] + (text if text in _SECTIONS else escaped(text))


def _apart(paragraph: list[str]) -> Iterator[str]:
    """The paragraph with an empty line before a list that follows its first sentence directly."""
    for previous, line in zip(["", *paragraph], paragraph, strict=False):
        starts = line.lstrip().startswith("- ") and not previous.lstrip().startswith("- ")
        if starts and previous and not previous.startswith(" " * (len(line) - len(line.lstrip()) + 1)):
            yield ""
        yield line


def _bullets(papers: list[str]) -> Iterator[str]:
    return (f"- {escaped(paper)}" for paper in papers)


def _convert(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(inspect.cleandoc("\n".join(lines)).splitlines())


def _signature(
    app: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, annotation: str | None
) -> tuple[str | None, str | None] | None:
    """Short names everywhere, and none for protocols and exceptions, which are not called by a reader."""
    if what in ("class", "exception") and signature in ("(*args, **kwargs)", "()"):
        return "", annotation
    if signature and "<factory>" in signature:  # is no Python, so that Sphinx would print the names in full
        return _QUALIFIED.sub(r"\1", signature).replace("<factory>", "..."), annotation
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _convert, priority=400)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
