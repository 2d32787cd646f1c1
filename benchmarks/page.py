"""Tables as markdown, and the places of a page of docs/ that a script fills.

A script's results stand in a page between two comments,

    <!-- NAME of SCRIPT -->
    <!-- end of NAME -->

and what is written around them by hand stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["fill", "markdown", "table"]


def table(head: Iterable[str], lines: Iterable[Iterable[str]], rule: str = " --- ") -> str:
    """Lines of cells below a head, with ``rule`` under each of its columns, as a markdown table."""
    head = list(head)
    top, *body = ("| " + " | ".join(line) + " |" for line in (head, *lines))
    return "\n".join([top, "|" + "|".join([rule] * len(head)) + "|", *body])


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a markdown table."""
    head = list(rows[0])
    return table(head, ([row[key] for key in head] for row in rows))


def fill(page: Path, script: str, contents: Mapping[str, str]) -> None:
    """Replace what stands in the page's places of this script, {NAME: content}.

    Raises:
        ValueError: for a page without such a place; nothing is written then.
    """
    text = page.read_text()
    for name, content in contents.items():
        begin, end = f"<!-- {name} of {script} -->\n", f"<!-- end of {name} -->\n"
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            raise ValueError(f"got {name!r} for {page}, which lacks the lines {begin!r} and {end!r}; add these lines")
        text = f"{before}{begin}\n{content.strip()}\n\n{end}{after}"
    page.write_text(text)
