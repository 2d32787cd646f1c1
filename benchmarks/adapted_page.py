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
    "MMPS",
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
    "least ESS",
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
            cells = [row["prior"], row["task"], row["method"], f"refused: {row['failed'][:60]} …", *[""] * 9]
        else:
            broken = row["psnr"] < 0
            cells = [
                row["prior"],
                row["task"],
                row["method"],
                f"{row['chains']} × {row['particles']}",
                f"{row['forward']:.0f} + {row['backward']:.0f}",
                number(row["sumvar"], 0),
                number(min(row["ess"]) if row["ess"] else None, 1),
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
    """A panel for each prior (a row) and problem, a colour and a mark for each method."""
    shown = [row for row in rows if row.get("psnr", -1) > 0 and row["picture"] == 0]
    priors, tasks = (sorted({row[key] for row in shown}) for key in ("prior", "task"))
    drawing, axes = plt.subplots(len(priors), len(tasks), figsize=(9.5, 5.6), squeeze=False, sharex=True)
    for i, prior in enumerate(priors):
        for ax, task in zip(axes[i], tasks, strict=True):
            for number, method in enumerate(METHODS):
                for row in shown:
                    if (row["prior"], row["task"], row["method"]) == (prior, task, method):
                        cost, error = row["forward"] + row["backward"], 2 * 10 ** (-row["psnr"] / 20)
                        mark = "osDv^<>PX*hp"[number % 12]
                        ax.semilogx(cost, error, mark, color=f"C{number % 10}", markersize=8, alpha=0.75, label=method)
            ax.set(title=f"{prior}, {task}", xlim=(20, 4000))
        axes[i, 0].set_ylabel("root mean square error\nof the mean, on [-1, 1]")
    for ax in axes[-1]:
        ax.set_xlabel("network evaluations a draw")
    found = {label: mark for ax in axes.flat for mark, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [method for method in METHODS if method in found]
    drawing.tight_layout(rect=(0, 0.12, 1, 1))
    drawing.legend([found[name] for name in names], names, loc="lower center", ncols=5, fontsize=9, frameon=False)
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
