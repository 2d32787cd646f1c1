"""The tables and figures of docs/wafer_study.md from the rows of study.py.

    python -m examples.wafer_study.report OUT

Intervals are 90 % bootstrap intervals over pictures. The rows are copied to benchmarks/results/wafer_study.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from benchmarks.page import fill, table
from examples.wafer_study.methods import METHODS
from examples.wafer_study.problems import CONTRAST, SETTINGS, differing, problem
from examples.wafer_study.scores import exact_coverage

ROOT = Path(__file__).parents[2]
PAGE, KEPT = ROOT / "docs" / "wafer_study.md", ROOT / "benchmarks" / "results" / "wafer_study.jsonl"
DECISIONS = KEPT.with_name("wafer_decisions.json")
STATIC = ROOT / "docs" / "_static"
FALSE_ALARMS = 0.1

Row = dict[str, Any]
Statistic = Callable[[list[Row]], float]
Table = tuple[list[str], list[list[str]]]  # head and lines


def mean_of(key: str, where: Callable[[Row], bool] = lambda row: True) -> Statistic:
    """The mean of an entry over the rows that have it."""

    def statistic(rows: list[Row]) -> float:
        values = [row[key] for row in rows if key in row and where(row)]
        return float(np.mean(values)) if values else float("nan")

    return statistic


def recall(rows: list[Row]) -> float:
    """Share of the pictures with a defect whose statistic exceeds all but 10 % of the pictures without."""
    without = sorted(row["statistic"] for row in rows if row["defect"] == "none")
    with_ = [row["statistic"] for row in rows if row["defect"] != "none"]
    if not without or not with_:
        return float("nan")
    return float(np.mean(np.array(with_) > np.quantile(without, 1 - FALSE_ALARMS)))


def hallucination(rows: list[Row]) -> float:
    """Share of the pictures without a defect that are said to have one with more than even odds."""
    values = [row["probability"] > 0.5 for row in rows if not row["truth differs"]]
    return float(np.mean(values)) if values else float("nan")


def brier(rows: list[Row]) -> float:
    """Mean squared error of the probability of a defect."""
    return float(np.mean([(row["probability"] - row["truth differs"]) ** 2 for row in rows]))


def interval(rows: list[Row], statistic: Statistic, digits: int = 2, scale: float = 1.0) -> str:
    """The statistic and its bootstrap interval over pictures."""
    value = statistic(rows) * scale
    if np.isnan(value):
        return "–"
    rng = np.random.default_rng(0)
    again = [statistic([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(400)]
    low, high = np.nanquantile(again, [0.05, 0.95]) * scale
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


DEFECTS: dict[str, Statistic] = {
    "retention, kinds it saw": mean_of("retention", lambda row: row["defect"] == "seen"),
    "retention, unseen kinds": mean_of("retention", lambda row: row["defect"] == "unseen"),
    "recall at 10 % false alarms": recall,
    "hallucinations": hallucination,
    "Brier score": brier,
}
PICTURES: dict[str, tuple[Statistic, int, float]] = {
    "PSNR of the mean, dB": (mean_of("psnr"), 1, 1.0),
    "kernel error": (mean_of("kernel error"), 3, 1.0),
    "in 50 %, outside": (mean_of("coverage 0.5"), 0, 100.0),
    "in 50 %, defect": (mean_of("coverage 0.5 in the defect"), 0, 100.0),
    "in 90 %, outside": (mean_of("coverage 0.9"), 0, 100.0),
    "in 90 %, defect": (mean_of("coverage 0.9 in the defect"), 0, 100.0),
}


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method that has some, in the order of the study."""
    found = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    return {name: chosen for name, chosen in found.items() if chosen}


def defect_table(rows: list[Row]) -> Table:
    found = by_method(rows).items()
    lines = [[name, str(len(r)), *(interval(r, s) for s in DEFECTS.values())] for name, r in found]
    return ["method", "pictures", *DEFECTS], lines


def picture_table(rows: list[Row]) -> Table:
    def work(r: list[Row]) -> list[str]:
        draws = round(mean_of("effective draws")(r))
        exact = ", ".join(f"{100 * exact_coverage(draws, mass):.0f}" for mass in (0.5, 0.9))
        passes = f"{mean_of('forward')(r):.0f} + {mean_of('back')(r):.0f}"
        return [exact, passes, f"{mean_of('seconds')(r):.0f}"]

    head = [
        "method",
        *PICTURES,
        "in 50 %, 90 %: as many exact draws",
        "passes a draw, forward + back",
        "seconds a picture",
    ]
    lines = [
        [name, *(interval(r, s, digits, scale) for s, digits, scale in PICTURES.values()), *work(r)]
        for name, r in by_method(rows).items()
    ]
    return head, lines


def setting_table(rows: list[Row]) -> Table:
    """Retention, PSNR and hallucinations for each dose and blur."""
    head = ["method"]
    for s in SETTINGS:
        head.append(f"blur {s.width} px, dose {s.dose:g}" + ("" if s.trained else " (not trained)"))

    def cell(r: list[Row]) -> str:
        return f"{mean_of('retention')(r):.2f} / {mean_of('psnr')(r):.1f} dB / {hallucination(r):.2f}" if r else "–"

    lines = [
        [name, *(cell([row for row in r if (row["width"], row["dose"]) == (s.width, s.dose)]) for s in SETTINGS)]
        for name, r in by_method(rows).items()
    ]
    return head, lines


def decision_table(result: dict[str, Any]) -> Table:
    """The reliability of examples/wafer_decisions.py."""
    lines = []
    for name, found in result["reliability"].items():
        bins = [
            f"{claimed:.2f} → {observed:.2f}"
            for claimed, observed, count in zip(found["claimed"], found["observed"], found["count"], strict=True)
            if count
        ]
        score = [f"{found['brier']:.3f}", f"{found['brier_expected']:.3f}", f"{found['brier_z']:+.1f}"]
        lines.append([name, str(sum(found["count"])), "; ".join(bins), *score])
    return ["claims", "number", "claimed → came true", "Brier score", "expected if right", "z"], lines


def middle(kernel: np.ndarray, half: int = 7) -> np.ndarray:
    """The middle of a kernel, 2 half + 1 pixels a side, zeros where it ends before."""
    padded = np.pad(kernel, half + 1)
    centre = half + 1 + len(kernel) // 2
    return padded[centre - half : centre + half + 1, centre - half : centre + half + 1]


def gallery(folder: Path, number: int, out: Path) -> None:
    """Truth and measurement, and of each method: mean, spread, probability map and kernel."""
    given = problem(number)
    found = {name: np.load(folder / f"{number:02d} {name}.npz") for name in METHODS}
    figure, axes = plt.subplots(len(found) + 1, 4, figsize=(7.2, 1.75 * (len(found) + 1)), layout="constrained")
    grey = {"cmap": "gray", "vmin": -1, "vmax": 1}
    truth = differing(given.x[None], given.normal)[0, 0] > CONTRAST
    top = [(given.x[0], grey, "truth"), (given.y[0], grey, "measurement")]
    top += [(truth.float(), {"cmap": "magma", "vmin": 0, "vmax": 1}, "true defect windows")]
    top += [(middle(given.kernel.numpy()), {"cmap": "magma"}, "true kernel")]
    for axis, (picture, style, title) in zip(axes[0], top, strict=True):
        axis.imshow(torch.as_tensor(picture), **style)
        axis.set_title(title, fontsize=8)
    for line, (name, kept) in zip(axes[1:], found.items(), strict=True):
        line[0].imshow(kept["mean"][0].astype(float), **grey)
        line[1].imshow(kept["sd"][0].astype(float), cmap="viridis", vmin=0, vmax=0.4)
        line[2].imshow(kept["chance"][0].astype(float), cmap="magma", vmin=0, vmax=1)
        if "kernel" in kept:
            line[3].imshow(middle(kept["kernel"].astype(float)), cmap="magma")
        line[0].set_ylabel(name.replace(", ", ",\n").replace(" (", "\n("), fontsize=7)
    for axis, title in zip(axes[1], ("mean", "standard deviation", "probability of a defect", "kernel"), strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        if not axis.images:
            axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=72)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(128).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gallery", type=int, nargs="*", default=[0, 4, 9])
    arguments = parser.parse_args()
    lines = [line for path in sorted(arguments.out.glob("rows.*.jsonl")) for line in path.read_text().splitlines()]
    rows: list[Row] = sorted(
        map(json.loads, lines), key=lambda row: (row["number"], list(METHODS).index(row["method"]))
    )
    sizes = {row["size"] for row in rows}
    if len(sizes) != 1:
        raise SystemExit(f"got runs of the sizes {sorted(sizes)} in {arguments.out}; a page is of one size")
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {"defects": defect_table(rows), "pictures": picture_table(rows), "settings": setting_table(rows)}
    if DECISIONS.is_file():
        tables["decisions"] = decision_table(json.loads(DECISIONS.read_text()))
    contents = {name: table(head, lines, rule="---") for name, (head, lines) in tables.items()}
    fill(PAGE, "examples/wafer_study/report.py", contents)
    for number in arguments.gallery:
        gallery(arguments.out / "pictures", number, STATIC / f"wafer_study_{number}.png")


if __name__ == "__main__":
    main()
