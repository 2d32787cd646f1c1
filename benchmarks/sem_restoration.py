"""Restoration of real low-dose SEM pictures, held against their high-dose twins.

    python benchmarks/sem_restoration.py --data ../shared/data/sem --out sem_restoration.json

Each held-out low-dose frame (041 ... 050) is restored from itself alone, as ``smcdiff restore FRAME --prior sem64
--noise shot`` does it, and compared with the high-dose frame of the same field: the mean PSNR of the posterior mean,
next to that of the frame itself and of the best Gaussian blur and the best non-local means of it, and the share of
reference pixels inside the posterior's 90 % interval. The parameters of both filters are the best for the mean PSNR
over some of the training pairs (001 ... 040).

The two frames of a pair are shifted against each other by a few pixels. The shift is the peak of the cross-correlation
of the two, each less its mean and under a Hann window, in whole pixels: nothing is interpolated. The grey scales of the
two dwell times differ too (low = gain * high + offset); gain and offset are fitted to the training pairs together, and
every low-dose frame is put on the scale of the high dose before anything else (--no-calibrate leaves this out). The
reference carries noise of its own and is not moved by parts of a pixel, so there is a ceiling to every PSNR here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.filters import gaussian, window
from skimage.registration import phase_cross_correlation
from skimage.restoration import denoise_nl_means

from smcdiff.restoration.acquisition import sharp
from smcdiff.restoration.images import read_image
from smcdiff.restoration.noise_level import Noise, estimate_row_correlation, estimate_sigma
from smcdiff.restoration.restore import Effort, Restoration, prepare
from smcdiff.zoo import load_prior

Array = NDArray[np.float64]
Pair = tuple[Array, Array]
Filter = Callable[[Array], Array]

_KINDS = ("low_dose", "high_dose")
_GAUSSIAN: dict[str, list[Any]] = {"sigma": [0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}
_NON_LOCAL_MEANS: dict[str, list[Any]] = {
    "patch_size": [5, 7, 9],
    "patch_distance": [3, 5, 7],
    "h": [0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.16],
    "sigma": [0.0, 0.05, 0.08],
}


def registered_pair(data: Path, name: str, crop: int) -> Pair:
    """The low-dose frame and the part of the high-dose frame that shows the same, on the scale [0, 1].

    Args:
        data: folder with ``low_dose`` and ``high_dose``.
        name: of the pair, such as 041.
        crop: side of the square in the middle, in pixels; 0 for all that both frames show.
    """
    low, high = ((read_image(data / kind / f"{name}.png")[0].double().numpy() + 1) / 2 for kind in _KINDS)
    taper = window("hann", low.shape)
    shift, _, _ = phase_cross_correlation(
        (low - low.mean()) * taper, (high - high.mean()) * taper, normalization=None, upsample_factor=1
    )
    down, right = (int(s) for s in shift)
    rows, columns = low.shape
    high = np.roll(high, (down, right), (0, 1))
    top, bottom, left, end = max(down, 0), rows + min(down, 0), max(right, 0), columns + min(right, 0)
    if crop:
        top, left = (rows - crop) // 2, (columns - crop) // 2
        bottom, end = top + crop, left + crop
    return low[top:bottom, left:end], high[top:bottom, left:end]


def psnr(image: Array, reference: Array) -> float:
    """In dB, for grey values on the scale [0, 1]."""
    return float(-10 * np.log10(np.mean((image - reference) ** 2)))


def grey_scale(pairs: list[Pair]) -> tuple[float, float]:
    """Gain and offset of low = gain * high + offset, by least squares over all pixels of the pairs."""
    low, high = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    gain, offset = np.polyfit(high, low, 1)
    return float(gain), float(offset)


def gaussian_blur(**parameters: Any) -> Filter:
    return lambda low: np.asarray(gaussian(low, **parameters))


def non_local_means(**parameters: Any) -> Filter:
    return lambda low: np.asarray(denoise_nl_means(low, fast_mode=True, **parameters))


def tuned(
    family: Callable[..., Filter], grid: dict[str, list[Any]], pairs: list[Pair]
) -> tuple[Filter, dict[str, Any]]:
    """The filter of a family with the highest mean PSNR over the pairs, and its parameters."""
    choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    score = [float(np.mean([psnr(family(**choice)(low), high) for low, high in pairs])) for choice in choices]
    best = choices[int(np.argmax(score))]
    return family(**best), best


def restored(low: Array, prior: str, shot: bool, effort: Effort) -> Restoration:
    """The posterior of one frame; the noise level is a latent, its first value read off the frame."""
    y = torch.from_numpy(2 * low - 1).float()[None]
    rho = estimate_row_correlation(y, shot)
    noise = Noise(estimate_sigma(y, shot, rho), width=0.3, shot=shot, row_correlation=rho)
    job = prepare(y, sharp(noise), lambda shape: load_prior(prior, event_shape=shape), effort)
    return job.run(progress=sys.stderr.isatty())


def measured(low: Array, high: Array, options: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """What the benchmark says of our posterior of one frame."""
    result = restored(low, options.prior, options.noise == "shot", effort)
    x = torch.from_numpy(2 * high - 1)[None]
    lower, upper = result.interval(0.9)
    noise = result.acquisition.noise
    return {
        "posterior mean": psnr((result.mean[0].numpy() + 1) / 2, high),
        "one draw": psnr((result.draws(1)[0, 0].double().numpy() + 1) / 2, high),
        "inside 90 %": float(((x >= lower) & (x <= upper)).double().mean()),
        "mean sd": float(result.sd.mean()) / 2,
        "sigma": float(result.run.mean("sigma")),
        "row correlation": noise.row_correlation,
        "tempering exponent": result.exponent,
        "log_z of each chain": result.diagnostics.log_z.tolist(),
        "seconds": result.seconds,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A markdown table: one line per picture and one of means."""
    columns = ["low dose", "Gaussian blur", "non-local means", "posterior mean", "one draw", "inside 90 %"]
    columns = [column for column in columns if all(column in row for row in rows.values())]
    rows = {**rows, "mean": {c: float(np.mean([row[c] for row in rows.values()])) for c in columns}}

    def cell(column: str, value: float) -> str:
        return f"{100 * value:.1f} %" if column == "inside 90 %" else f"{value:.2f}"

    lines = ["| picture | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([name, *(cell(c, row[c]) for c in columns)]) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with low_dose and high_dose")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--crop", type=int, default=128, help="side of the square in the middle; 0 for whole frames")
    parser.add_argument("--pictures", type=int, nargs="+", default=list(range(41, 51)), help="numbers of the pairs")
    parser.add_argument("--tune-on", type=int, nargs="+", default=list(range(3, 41, 5)), help="pairs to tune on")
    parser.add_argument("--prior", default="sem64", help="shipped name or diffusers pipeline folder")
    parser.add_argument("--noise", choices=("shot", "gaussian"), default="shot")
    parser.add_argument("--particles", type=int, default=Effort.particles)
    parser.add_argument("--chains", type=int, default=Effort.chains)
    parser.add_argument("--steps", type=int, default=Effort.steps)
    parser.add_argument("--seed", type=int, default=Effort.seed)
    parser.add_argument("--calibrate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--filters-only", action="store_true", help="leave out the posterior")
    options = parser.parse_args()
    if not all((options.data / kind).is_dir() for kind in _KINDS):
        raise SystemExit(
            f"skipped: {options.data} does not hold the folders low_dose and high_dose of the SEM pairs; nothing was "
            "measured. Give their place with --data"
        )

    started = time.time()
    pairs = [registered_pair(options.data, f"{n:03d}", options.crop or 128) for n in options.tune_on]
    gain, offset = grey_scale(pairs) if options.calibrate else (1.0, 0.0)
    pairs = [((low - offset) / gain, high) for low, high in pairs]
    blur, blur_parameters = tuned(gaussian_blur, _GAUSSIAN, pairs)
    means, means_parameters = tuned(non_local_means, _NON_LOCAL_MEANS, pairs)
    print(
        f"Gaussian blur {blur_parameters}, non-local means {means_parameters} ({time.time() - started:.0f} s)",
        flush=True,
    )
    effort = Effort(options.particles, options.chains, options.steps, options.seed)
    report: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "grey scale": {"gain": gain, "offset": offset},
        "filters": {"Gaussian blur": blur_parameters, "non-local means": means_parameters},
        "machine": {"processor": platform.machine(), "system": platform.platform(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "numpy", "scikit-image")},
        "pictures": {},
    }
    for number in options.pictures:
        name = f"{number:03d}"
        low, high = registered_pair(options.data, name, options.crop)
        low = (low - offset) / gain
        row = {
            "low dose": psnr(low, high),
            "Gaussian blur": psnr(blur(low), high),
            "non-local means": psnr(means(low), high),
        }
        if not options.filters_only:
            row |= measured(low, high, options, effort)
        report["pictures"][name] = row
        options.out.write_text(json.dumps(report, indent=2) + "\n")  # what is done so far
        print(name, {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}, flush=True)
    print(f"\nPSNR in dB against the high-dose frame, crop {options.crop or 'none'}\n\n{table(report['pictures'])}")


if __name__ == "__main__":
    main()
