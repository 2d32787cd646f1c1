"""The tables, the sentences with numbers and the figures of docs/sem_noise.md, from benchmarks/results/sem_noise.jsonl.

python benchmarks/sem_noise.py
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from page import fill, table
from PIL import Image
from sem_noise_statistics import decided

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "sem_noise.md"
PROGRAMS = ("white", "correlated", "signal", "correlated, blurred", "correlated, signal")
CHECKS = ("row lag 1", "row lag 2", "column lag 1", "variance against signal", "clipped")
COVERAGES = ("coverage", "coverage registered", "coverage registered, levelled")
LETTERS = {"sigma": "σ", "rho": "ρ", "h": "h", "w": "w"}

Row = dict[str, Any]


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def mean(rows: list[Row], value: Callable[[Row], float]) -> float:
    return float(np.mean([value(row) for row in rows]))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def spread(row: Row) -> float:
    """From the lowest to the highest chain."""
    return float(max(row["log_z"]) - min(row["log_z"]))


def differences(frames: list[Row], better: str, worse: str) -> list[tuple[Row, Row]]:
    """Pairs of rows of the same picture."""
    return [
        (a, b)
        for a in of(frames, program=better)
        for b in of(frames, program=worse)
        if (a["kind"], a["number"]) == (b["kind"], b["number"])
    ]


def verdict(pairs: list[tuple[Row, Row]]) -> str:
    for_it, against = sum(decided(a, b) for a, b in pairs), sum(decided(b, a) for a, b in pairs)
    return f"{for_it} for it, {against} against, {len(pairs) - for_it - against} open"


QUESTIONS = (
    ("correlated", "white"),
    ("signal", "white"),
    ("correlated, signal", "correlated"),
    ("correlated, blurred", "correlated"),
)


def evidence_table(rows: list[Row]) -> str:
    lines = []
    kinds = ["frame", *dict.fromkeys(row["kind"] for row in rows if row["kind"] != "frame")]
    for kind in kinds:
        for better, worse in QUESTIONS:
            pairs = differences(of(rows, kind=kind), better, worse)
            if not pairs:
                continue
            gains = [a["pooled"] - b["pooled"] for a, b in pairs]
            bounds = [a["bound"] - b["bound"] for a, b in pairs]
            chains = [spread(row) for pair in pairs for row in pair]
            lines.append(
                [
                    "real frames" if kind == "frame" else f"control: {kind}",
                    f"{better} over {worse}",
                    f"{np.mean(gains):+.0f} ({min(gains):+.0f} … {max(gains):+.0f})",
                    f"{np.mean(bounds):+.0f} ({min(bounds):+.0f} … {max(bounds):+.0f})",
                    f"{np.mean(chains):.0f} (up to {max(chains):.0f})",
                    verdict(pairs),
                ]
            )
    head = ["pictures", "program over program", "log Z, nats", "lower bound, nats", "between chains, nats", "decided"]
    return table(head, lines)


def runs_table(rows: list[Row]) -> str:
    lines = []
    for row in of(rows, kind="frame"):
        theta = ", ".join(f"{LETTERS[name]} {m:.3f} ± {s:.3f}" for name, (m, s) in sorted(row["theta"].items()))
        lines.append(
            [
                f"{row['number']:03d}",
                row["program"],
                ", ".join(f"{value:.0f}" for value in row["log_z"]),
                f"{row['bound']:.0f}",
                f"{row['cumulant']:.0f}",
                f"{row['variance']:.0f}",
                f"{row['ess']:.1f} of {row['draws']}",
                theta,
            ]
        )
    head = ["frame", "program", "log Z of each chain", "bound", "cumulant", "variance, nats²", "ESS", "posterior"]
    return table(head, lines)


def calibration_table(rows: list[Row]) -> str:
    lines = []
    for row_group, label in _groups(rows):
        for program in PROGRAMS:
            some = of(row_group, program=program)
            if not some:
                continue
            nineties = [row["coverage"]["90"] for row in some]
            lines.append(
                [
                    label,
                    program,
                    f"{mean(some, lambda row: row['psnr']):.2f}",
                    f"{mean(some, lambda row: row['sd']):.3f}",
                    percent(mean(some, lambda row: row["coverage"]["50"])),
                    f"{percent(float(np.mean(nineties)))} ({percent(min(nineties))} … {percent(max(nineties))})",
                    percent(mean(some, lambda row: row["coverage"]["90 dark"])),
                    percent(mean(some, lambda row: row["coverage"]["90 bright"])),
                ]
            )
    head = ["pictures", "program", "PSNR, dB", "posterior sd", "50 %", "90 % (range)", "90 %, dark", "90 %, bright"]
    return table(head, lines)


def _groups(rows: list[Row]) -> list[tuple[list[Row], str]]:
    kinds = ["frame", *dict.fromkeys(row["kind"] for row in rows if row["kind"] != "frame")]
    return [(of(rows, kind=kind), "real frames" if kind == "frame" else f"control: {kind}") for kind in kinds]


def reference_table(rows: list[Row]) -> str:
    lines = []
    for program in PROGRAMS:
        some = of(rows, kind="frame", program=program)
        if some:
            lines.append(
                [program]
                + [f"{mean(some, lambda row, key=key: row[key]):.2f}" for key in _PSNRS]
                + [percent(mean(some, lambda row, key=key: row[key]["50"])) for key in COVERAGES]
                + [percent(mean(some, lambda row, key=key: row[key]["90"])) for key in COVERAGES]
            )
    head = ["program", "PSNR", "registered", "levelled", "50 %", "registered", "levelled"]
    return table([*head, "90 %", "registered", "levelled"], lines)


_PSNRS = ("psnr", "psnr registered", "psnr registered, levelled")


def checks_table(rows: list[Row]) -> str:
    lines = []
    for group, label in _groups(rows):
        for program in PROGRAMS:
            some = of(group, program=program)
            if not some:
                continue
            cells = []
            for name in CHECKS:
                found = [row["checks"][name] for row in some]
                p = [check["p"] for check in found]
                seen, again = (float(np.mean([check[side] for check in found])) for side in ("observed", "replicated"))
                bad = sum(value in (0.0, 1.0) for value in p)
                cells.append(f"{seen:.3f} / {again:.3f}; {bad} of {len(p)}")
            lines.append([label, program, *cells])
    return table(["pictures", "program", *CHECKS], lines)


def parameters_table(rows: list[Row]) -> str:
    """Of the controls, beside the truth."""
    lines = []
    for group, label in _groups(rows)[1:]:
        for program in PROGRAMS:
            some = of(group, program=program)
            if not some:
                continue
            cells = []
            for name in ("sigma", "rho", "h"):
                if name in some[0]["theta"]:
                    values = [row["theta"][name] for row in some]
                    shown = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in values)
                else:
                    shown = "–"
                cells.append(f"{shown} ({some[0]['truth'][name]:g})")
            lines.append([label, program, *cells])
    return table(["pictures", "program", "σ (truth)", "ρ (truth)", "h (truth)"], lines)


def numbers(rows: list[Row]) -> str:
    """Sentences with the numbers of the frames."""
    frames = of(rows, kind="frame", program="white")
    shifts = [float(np.hypot(*row["shift"])) for row in of(rows, kind="frame")]
    biases = [abs(row["bias"]) for row in of(rows, kind="frame")]
    noise = [row["reference noise"] for row in frames]
    clipped = [row["checks"]["clipped"]["observed"] for row in frames]
    both = of(rows, kind="frame", program="correlated, signal")
    h = [row["theta"]["h"][0] for row in [*both, *of(rows, kind="frame", program="signal")]]
    blurred = [row["theta"]["w"] for row in of(rows, kind="frame", program="correlated, blurred")]
    controls = [row for row in rows if row["kind"] != "frame"]
    by_kind = {kind: of(controls, kind=kind, program="white") for kind in dict.fromkeys(r["kind"] for r in controls)}
    cut = ", ".join(
        f"{kind} {percent(mean(some, lambda row: row['checks']['clipped']['observed']))}"
        for kind, some in by_kind.items()
        if "clipped" in kind
    )
    first = rows[0]
    return "\n".join(
        [
            f"- {len(frames)} frames ({', '.join(str(row['number']).zfill(3) for row in frames)}), "
            f"{first['chains']} chains of {first['particles']} particles, {first['steps']} steps; all "
            f"{len(rows)} runs took {sum(row['processor seconds'] for row in rows) / 60:.0f} minutes of one core.",
            f"- PSNR of the low-dose crops themselves: {mean(frames, lambda row: row['psnr of y']):.2f} dB.",
            f"- Clipped pixels of the frames: {percent(min(clipped))} to {percent(max(clipped))}; of the clipped "
            f"controls: {cut}.",
            f"- The reference's own noise, read off it: {min(noise):.3f} to {max(noise):.3f} on [-1, 1].",
            f"- Remaining shift of the reference against the posterior means: {np.mean(shifts):.2f} pixels on average, "
            f"up to {max(shifts):.2f}. Remaining difference of the mean grey: {np.mean(biases):.3f} on average, up to "
            f"{max(biases):.3f}.",
            f"- The share h of the noise that grows with the signal: {min(h):.2f} to {max(h):.2f} over frames and both "
            "programs.",
            "- Width of the blur, posterior mean ± standard deviation, pixels: "
            + ", ".join(f"{m:.2f} ± {s:.2f}" for m, s in blurred)
            + ".",
        ]
    )


BLOCKS: dict[str, Callable[[list[Row]], str]] = {
    "numbers": numbers,
    "evidence": evidence_table,
    "runs": runs_table,
    "calibration": calibration_table,
    "reference": reference_table,
    "checks": checks_table,
    "parameters": parameters_table,
}


def unpacked(text: str) -> Any:
    grey = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    side = round(len(grey) ** 0.5)
    return grey.reshape(side, side) / 127.5 - 1


def pictures(rows: list[Row]) -> None:
    shown = [row for row in rows if "picture" in row]
    if not shown:
        return
    drawing, axes = plt.subplots(2, len(shown) + 1, figsize=(1.7 * (len(shown) + 1), 3.7))
    high = unpacked(shown[0]["picture"]["high"])
    panels = [[("low dose", unpacked(shown[0]["picture"]["low"])), ("high dose", high)]]
    for row in shown:
        sd = (unpacked(row["picture"]["sd"]) + 1) / 10
        panels.append([(row["program"], unpacked(row["picture"]["mean"])), ("standard deviation", sd)])
    for column, pair in zip(axes.T, panels, strict=True):
        for ax, (title, image) in zip(column, pair, strict=True):
            scale = (0, 0.15) if title.startswith("standard") else (-1, 1)
            ax.imshow(image, cmap="gray", vmin=scale[0], vmax=scale[1])
            ax.set_title(title, fontsize=7)
            ax.axis("off")
    drawing.tight_layout(pad=0.8, h_pad=1.5)
    drawing.savefig(DOCS / "sem_noise_pictures.png", dpi=80)
    plt.close(drawing)
    with Image.open(DOCS / "sem_noise_pictures.png") as drawn:  # grey with 96 levels takes half the room
        grey = drawn.convert("L").quantize(96)
    grey.save(DOCS / "sem_noise_pictures.png", optimize=True)


def coverage_figure(rows: list[Row]) -> None:
    groups = _groups(rows)
    drawing, axes = plt.subplots(1, len(groups), figsize=(2.3 * len(groups), 2.9), sharey=True)
    for ax, (group, label) in zip(axes, groups, strict=True):
        programs = [program for program in PROGRAMS if of(group, program=program)]
        for level, colour in (("50", "tab:blue"), ("90", "tab:orange")):
            ax.axhline(float(level), color=colour, lw=0.8, ls="--")
            for place, program in enumerate(programs):
                values = [100 * row["coverage"][level] for row in of(group, program=program)]
                ax.plot([place] * len(values), values, "o", ms=4, color=colour, alpha=0.7)
        ax.set_xticks(range(len(programs)), programs, rotation=60, ha="right", fontsize=7)
        ax.set_title(label.replace(": ", ":\n"), fontsize=8)
        ax.margins(x=0.25)
        ax.set_ylim(0, 100)
    axes[0].set_ylabel("pixels inside, %", fontsize=8)
    drawing.tight_layout(pad=0.4)
    drawing.savefig(DOCS / "sem_noise_coverage.png", dpi=90)
    plt.close(drawing)


def write_page(results: Path) -> None:
    """Put tables and figures of these results into the page."""
    rows: list[Row] = list(
        {
            tuple(row[key] for key in ("kind", "number", "program")): row
            for row in (json.loads(line) for line in results.read_text().splitlines())
        }.values()
    )
    fill(PAGE, "benchmarks/sem_noise_page.py", {name: block(rows) for name, block in BLOCKS.items()})
    pictures(rows)
    coverage_figure(rows)
