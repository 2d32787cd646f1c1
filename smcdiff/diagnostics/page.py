"""One self-contained HTML page: text, tables and pictures, nothing fetched from anywhere.

Pictures are data URIs, there is no script, and the page's own policy forbids the browser to load anything else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["code", "figure", "listing", "page", "paragraph", "section", "table", "verdict"]

_STYLE = """
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 24px 32px 64px; }
h1 { font-size: 26px; margin: 8px 0 4px; }
h2 { font-size: 20px; margin: 36px 0 8px; border-bottom: 1px solid #ccc; padding-bottom: 4px; }
p, ol { max-width: 46em; }
.lead { color: #555; margin-top: 0; }
.verdict { border-left: 8px solid; padding: 12px 18px; margin: 18px 0; background: #f5f5f5; }
.verdict strong { font-size: 20px; }
.good { border-color: #009e73; }
.doubtful { border-color: #e69f00; }
.bad { border-color: #d55e00; }
.verdict ul { margin: 8px 0 0; padding-left: 20px; }
table { border-collapse: collapse; margin: 12px 0; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid #ddd; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 16px 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: 14px; max-width: 50em; }
pre { background: #f5f5f5; padding: 10px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts))


def section(title: str, parts: Sequence[str]) -> str:
    """A heading and what stands under it."""
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p class={kind!r}>{escape(text)}</p>" if kind else f"<p>{escape(text)}</p>"


def verdict(level: str, headline: str, items: Sequence[tuple[str, str, str]]) -> str:
    """The verdict's box.

    Args:
        level: "good", "doubtful" or "bad", which colours it.
        headline: one sentence.
        items: (level, reason, remedy) of each finding.
    """
    rows = "".join(
        f"<li><b>{escape(name)}:</b> {escape(reason)} <i>{escape(remedy)}</i></li>" for name, reason, remedy in items
    )
    findings = f"<ul>{rows}</ul>" if rows else ""
    return f'<div class="verdict {escape(level)}"><strong>{escape(headline)}</strong>{findings}</div>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table; with a head, all columns but the first hold numbers, and without, the first column holds names."""
    lines = ["<table>"]
    if head:
        first, *others = head
        lines.append(f"<tr><th>{escape(first)}</th>{_cells('th', others, ' class=number')}</tr>")
    for first, *others in rows:
        kind = " class=number" if head else ""
        lines.append(f"<tr><th>{escape(first)}</th>{_cells('td', others, kind)}</tr>")
    return "\n".join([*lines, "</table>"])


def listing(items: Sequence[str]) -> str:
    """A numbered list."""
    return "\n".join(["<ol>", *(f"<li>{escape(item)}</li>" for item in items), "</ol>"])


def code(text: str) -> str:
    """Commands or output, as they stand."""
    return f"<pre>{escape(text)}</pre>"


def figure(picture: Figure, caption: str, dpi: int = 110) -> str:
    """A Matplotlib figure with a caption, which also stands for it where it cannot be seen."""
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=dpi)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text = escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _cells(tag: str, texts: Sequence[str], attributes: str) -> str:
    return "".join(f"<{tag}{attributes}>{escape(text)}</{tag}>" for text in texts)
