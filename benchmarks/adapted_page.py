"""The tables and the figure of docs/adapted.md from what its scripts left in benchmarks/results.

python benchmarks/adapted_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import adapted_memory
import fields
import full_chain
import matplotlib.pyplot as plt
import remedies
from kept import Kept
from page import fill, markdown, table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "adapted_networks.jsonl"
PAGE = HERE.parent / "docs" / "adapted.md"
FIGURE = HERE.parent / "docs" / "_static" / "adapted.png"


def number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if abs(value) >= 1e5 else f"{value:.{digits}f}"


#: In the order of the table.
METHODS = (
    "tilted",
    "tilted, Karras grid",
    "tilted, symmetric",
    "adapted",
    "adapted, Free Hunch",
    "adapted, doubled",
    "adapted, isotropic",
    "TDS, widened",
    "TDS, PiGDM",
    "TDS, point",
    "DDRM",
    "DiffPIR",
    "DPS",
)
HEAD = (
    "prior",
    "problem",
    "method",
    "particles",
    "passes forward + back",
    "summed variance, nats²",
    "roots",
    "log Z between chains, nats",
    "PSNR, dB",
    "in 90 % interval",
    "exact draws would",
    "seconds a particle",
)


def networks_table(rows: Iterable[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "failed" in row:
            cells = [row["prior"], row["task"], row["method"], f"refused: {row['failed'][:60]} …", *[""] * 8]
        else:
            broken = row["psnr"] < 0
            cells = [
                row["prior"],
                row["task"],
                row["method"],
                f"{row['chains']} × {row['particles']}",
                f"{row['forward']:.0f} + {row['backward']:.0f}",
                number(row["sumvar"], 0),
                "none resampled" if row["method"].startswith("tilted") else number(row["roots"], 1),
                number(row["log_z_range"], 1),
                "diverged" if broken else number(row["psnr"], 2),
                "–" if broken else f"{100 * row['coverage']:.1f} %",
                "–" if broken else f"{100 * row['nominal']:.1f} %",
                number(row["seconds_per_particle"], 2),
            ]
        lines.append(cells)
    return table(HEAD, lines, rule="---")


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for each picture."""
    pictures = sorted({row["picture"] for row in rows})
    return "\n\n".join(networks_table(row for row in rows if row["picture"] == picture) for picture in pictures)


def figure(rows: list[dict[str, Any]]) -> None:
    shown = [row for row in rows if row.get("psnr", -1) > 0 and row["picture"] == 0]
    panels = sorted({(row["prior"], row["task"]) for row in shown})
    drawing, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2), squeeze=False, sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        for row in shown:
            if (row["prior"], row["task"]) == panel:
                cost = row["forward"] + row["backward"]
                ax.semilogx(cost, 10 ** (-row["psnr"] / 20) * 2, "o", color="tab:blue")
                ax.annotate(row["method"], (cost, 10 ** (-row["psnr"] / 20) * 2), fontsize=7, xytext=(3, 3),
                            textcoords="offset points")  # fmt: skip
        ax.set(title=" ".join(panel), xlabel="network evaluations")
        ax.margins(x=0.4)
    axes[0, 0].set_ylabel("root mean square error of the mean, on [-1, 1]")
    drawing.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    drawing.savefig(FIGURE, dpi=110)


def main() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows.sort(key=lambda row: (row["picture"], row["prior"], row["task"], METHODS.index(row["method"])))
    fields_rows = [json.loads(line) for line in fields.RESULTS.read_text().splitlines()]
    memory = json.loads(adapted_memory.RESULTS.read_text())["rows"]
    tried = Kept(remedies.RESULTS, remedies.KEYS).rows
    contents = {
        "fields": fields.tables(fields_rows),
        "table": tables(rows),
        "memory": markdown([{"method": row["method"], "MB": f"{row['MB']:.0f}"} for row in memory]),
        "chains": full_chain.report(json.loads(full_chain.RESULTS.read_text())["rows"]),
        "grid": remedies.report(tried, ["grid"]),
        "remedies": remedies.report(tried, [name for name in remedies.REMEDIES if name != "grid"]),
    }
    fill(PAGE, "benchmarks/adapted_page.py", contents)
    figure(rows)


if __name__ == "__main__":
    main()
