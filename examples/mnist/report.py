"""Tables and a figure of a study's runs.

    python -m examples.mnist.report OUT --figure docs/mnist.png --json benchmarks/results/mnist.json

OUT is the folder that examples/mnist/study.py filled. The tables are printed as markdown: mean over seeds and its
standard error, a seed's own value being the mean over its labels or digits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.page import markdown
from examples.mnist.study import METHODS, RESTORERS

Row = dict[str, Any]
CLASS = {"right": "right to the judge", "ess": "ESS / n, mean over steps", "least ess": "ESS / n, least"}
PICTURE = {
    "error of the mean": "error of the mean",
    "error of a draw": "error of a draw",
    "coverage": "coverage of 90 %",
    "misfit": "misfit / sigma",
    "right": "right to the judge",
    "ess": "ESS / n",
    "evaluations": "network evaluations",
    "seconds": "seconds for all draws",
}


def over_seeds(rows: list[Row], name: str, *, total: bool = False) -> tuple[float, float]:
    """Mean over seeds, and its standard error; a seed's value is the mean of its runs, or with ``total`` their sum."""
    seeds = sorted({row["key"]["seed"] for row in rows})
    reduce: Callable[[list[float]], Any] = np.sum if total else np.mean
    values = [float(reduce([row[name] for row in rows if row["key"]["seed"] == seed])) for seed in seeds]
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def chosen(rows: list[Row], **key: Any) -> list[Row]:
    """The rows whose keys agree."""
    return [row for row in rows if all(row["key"].get(name) == value for name, value in key.items())]


def values(rows: list[Row], name: str) -> list[Any]:
    """What a key takes; methods in the order of the study, all else rising."""
    order = [*METHODS, *RESTORERS]
    found = {row["key"][name] for row in rows}
    return sorted(found, key=order.index if name == "method" else None)


def shown(mean: float, error: float) -> str:
    """A mean and its error, at most two decimals; the mean alone where seeds do not differ."""
    if error == 0:
        return f"{mean:g}"
    if abs(mean) >= 1000:
        return f"{mean:.2g} ± {error:.1g}"
    places = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 2
    return f"{mean:.{places}f} ± {error:.{places}f}"


def class_table(rows: list[Row]) -> list[dict[str, str]]:
    """One line per method and n."""
    table = []
    for method in values(rows, "method"):
        for n in values(rows, "n"):
            runs = chosen(rows, method=method, n=n)
            if runs:
                line = {title: shown(*over_seeds(runs, name)) for name, title in CLASS.items()}
                line["sum of p(label)"] = shown(*over_seeds(runs, "evidence", total=True))
                table.append({"method": method, "n": str(n), **line})
    return table


def picture_table(rows: list[Row]) -> list[dict[str, str]]:
    """One line per method."""
    return [
        {
            "method": method,
            **{title: shown(*over_seeds(chosen(rows, method=method), n)) for n, title in PICTURE.items()},
        }
        for method in values(rows, "method")
    ]


def draw_figure(rows: list[Row], pictures: Path, file: Path) -> None:
    """Accuracy and effective sample size against n, digits of each class, and restorations."""
    plt.switch_backend("agg")
    figure = plt.figure(figsize=(11, 9.5), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[1.0, 0.75, 1.25])
    top, middle, bottom = parts
    found = [row for row in rows if row["key"]["task"] == "class"]
    accuracy, ess = top.subplots(1, 2)
    for method in values(found, "method"):
        ns = values(found, "n")
        for axes, name in ((accuracy, "right"), (ess, "ess")):
            points = [over_seeds(chosen(found, method=method, n=n), name) for n in ns]
            axes.errorbar(ns, *zip(*points, strict=True), marker="o", capsize=3, label=method)
    for axes, title in ((accuracy, "draws of the right class, to the judge"), (ess, "ESS / n, mean over steps")):
        axes.set(xscale="log", xticks=ns, xticklabels=ns, ylim=(0, 1.05), xlabel="particles n", title=title)
        axes.minorticks_off()
    for row in chosen(rows, task="reference"):
        accuracy.axhline(row["right"], color="grey", linestyle=":", linewidth=1)
    accuracy.legend()

    lines = [("TDS", 1), ("TDS", 4), ("TDS", 64), ("Feynman-Kac steering", 4), ("Bootstrap", 4)]
    middle.suptitle("one draw of each class, first seed")
    grid = middle.subplots(len(lines), 1)
    for axes, (method, n) in zip(grid, lines, strict=True):
        strip = [_picture(pictures / f"class {method} {n} {label} 0.npz", "draw") for label in range(10)]
        _show(axes, np.concatenate(strip, 1))
        axes.set_ylabel(f"{method}, n = {n}", rotation=0, ha="right", va="center")

    restored = [row for row in rows if row["key"]["task"] not in ("class", "reference")]
    for part, task in zip(bottom.subfigures(1, 2), ("inpainting", "deblurring"), strict=True):
        runs = chosen(restored, task=task, seed=0)
        methods, numbers = values(runs, "method"), values(runs, "number")[:2]
        part.suptitle(f"{task}: " + ("truth, measured, mean, two draws; " * len(numbers)).rstrip("; "), fontsize=9)
        for axes, method in zip(part.subplots(len(methods), 1), methods, strict=True):
            strip = [
                _picture(pictures / f"{task} {method} {number} 0.npz", name)
                for number in numbers
                for name in ("truth", "measured", "mean", "draw", "other draw")
            ]
            _show(axes, np.concatenate(strip, 1))
            axes.set_ylabel(method.replace(", ", "\n", 1), rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _picture(file: Path, name: str) -> np.ndarray:
    """One picture of a run; grey where the run was not done, and where it went astray."""
    if not file.exists():
        return np.zeros((32, 32), np.float32)
    with np.load(file) as arrays:
        return np.nan_to_num(arrays[name].astype(np.float32)).clip(-1, 1)


def _show(axes: Any, picture: np.ndarray) -> None:
    axes.imshow(picture, cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that the study filled")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="file to keep the tables in")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.out / "rows.jsonl").read_text().splitlines()]
    tables = {"class": class_table(chosen(rows, task="class"))}
    tables.update({task: picture_table(chosen(rows, task=task)) for task in ("inpainting", "deblurring")})
    names = {"right": "right to the judge", "sure": "judge above 0.9"}
    prior = chosen(rows, task="reference")
    tables["reference"] = [{title: shown(*over_seeds(prior, name)) for name, title in names.items()}] if prior else []
    for task, table in tables.items():
        print(f"\n{task}\n\n{markdown(table) if table else 'no runs'}")
    print(f"\n{sum(row['seconds'] for row in rows) / 60:.1f} minutes of processor time in {len(rows)} runs")
    if arguments.json:
        settings = json.loads((arguments.out / "settings.json").read_text())
        arguments.json.write_text(json.dumps({**settings, "tables": tables}, indent=1) + "\n")
    draw_figure(rows, arguments.out / "pictures", arguments.figure)


if __name__ == "__main__":
    main()
