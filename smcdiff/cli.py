"""The command line: ``smcdiff demo``, ``smcdiff restore IMAGE`` and ``smcdiff report RUN``.

Noise levels are on the scale of grey values from -1 (black) to 1 (white): a standard deviation of 5 grey levels of 255
is 10 / 255 = 0.039.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from smcdiff.restoration.acquisition import Acquisition, blurred, coarse, masked, sharp
from smcdiff.restoration.demo import make_demo
from smcdiff.restoration.images import Crop, read_image, read_mask
from smcdiff.restoration.noise_level import Noise, estimate_row_correlation, estimate_sigma
from smcdiff.restoration.report import Truth, write_report
from smcdiff.restoration.restore import Effort, prepare
from smcdiff.zoo import load_prior

__all__ = ["main"]

_WIDTH = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after a message for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.line = shlex.join(["smcdiff", *arguments])
    try:
        options.command(options)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"smcdiff: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smcdiff", description="Posterior sampling with diffusion priors.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="restore a synthetic wafer picture with a rare defect",
        description="Draw a synthetic wafer picture with one rare defect, blur it, add noise, restore it, and compare "
        "with the truth. About half a minute on two CPU cores.",
    )
    demo.set_defaults(command=_demo)
    demo.add_argument("--out", type=Path, default=Path("smcdiff-demo"), help="folder to write to (%(default)s)")
    restore = commands.add_parser(
        "restore",
        help="restore a picture of your own",
        description="Restore a PNG or TIFF picture, 8 or 16 bit, grey or colour (made grey), of any size.",
    )
    restore.set_defaults(command=_restore)
    restore.add_argument("image", type=Path, help="the picture")
    restore.add_argument(
        "--prior", default="sem64", help="sem64, wafer64, or a diffusers pipeline folder (%(default)s)"
    )
    restore.add_argument(
        "--operator",
        choices=("identity", "blur", "mask", "downsample"),
        default="identity",
        help="what happened to the scene besides noise (%(default)s)",
    )
    restore.add_argument("--psf-sigma", type=float, help="blur: width of the Gaussian point-spread function, pixels")
    restore.add_argument("--mask", type=Path, help="mask: a picture of the same size, bright where IMAGE was measured")
    restore.add_argument("--factor", type=int, help="downsample: restored pixels per pixel of IMAGE, along a side")
    restore.add_argument(
        "--sigma",
        type=_sigma,
        default="estimate",
        help="standard deviation of the noise where black is -1 and white 1, or 'estimate': read a first value off the "
        f"picture and infer sigma with the prior LogNormal(log value, {_WIDTH}) (%(default)s)",
    )
    restore.add_argument(
        "--noise",
        choices=("gaussian", "shot"),
        default="gaussian",
        help="shot: the variance grows with the brightness, as it does where electrons or photons are counted; sigma "
        "is then that at mid-grey (%(default)s)",
    )
    restore.add_argument(
        "--row-correlation",
        type=_correlation,
        default="auto",
        help="correlation of the noise of neighbours in a row, which a fast scan brings about: a number, 'estimate', "
        "or 'auto', which is 'estimate' with --sigma estimate and no mask, and otherwise 0",
    )
    restore.add_argument("--crop", type=_crop, metavar="TOP,LEFT,HEIGHT,WIDTH", help="restore this part of the picture")
    restore.add_argument("--white", type=float, help="grey value of white in the file, such as 4095 for 12-bit data")
    restore.add_argument("--out", type=Path, required=True, help="folder to write to")
    report = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        description="Write one self-contained HTML page about a run: verdict, pictures, tables, versions, how to "
        "reproduce it, and the papers of the methods used.",
    )
    report.set_defaults(command=_report)
    report.add_argument(
        "run", type=Path, help="a file written by smc.save, or a folder written by smcdiff restore or smcdiff demo"
    )
    report.add_argument("--out", type=Path, help="the page (report.html in the folder, or beside the file)")
    report.add_argument("--title", help="of the page")
    for command in (demo, restore):
        command.add_argument("--particles", type=int, default=4, help="particles per chain (%(default)s)")
        command.add_argument("--chains", type=int, default=16, help="independent chains (%(default)s)")
        steps = 30 if command is demo else 50
        command.add_argument("--steps", type=int, default=steps, help="steps of the reverse chain (%(default)s)")
        command.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _sigma(text: str) -> float | None:
    return None if text == "estimate" else _number(text, "a number or 'estimate'")


def _correlation(text: str) -> float | str:
    return text if text in ("estimate", "auto") else _number(text, "a number, 'estimate' or 'auto'")


def _number(text: str, expected: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}") from None


def _crop(text: str) -> Crop:
    try:
        top, left, height, width = (int(part) for part in text.split(","))
        return Crop(top, left, height, width)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected TOP,LEFT,HEIGHT,WIDTH in pixels, such as 0,0,128,128"
        ) from None


def _demo(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    demo = make_demo(options.seed)
    print(f"A wafer of 64 x 64 pixels with a defect ({demo.truth.name}), blurred and noisy.")
    _run(demo.y, demo.acquisition, "wafer64", options, "Restoration of a synthetic wafer", demo.truth)


def _restore(options: argparse.Namespace) -> None:
    wanted = {"blur": "psf_sigma", "mask": "mask", "downsample": "factor"}
    for operator, name in wanted.items():
        flag, given = f"--{name.replace('_', '-')}", getattr(options, name) is not None
        if given != (options.operator == operator):
            raise ValueError(f"--operator {operator} and {flag} go together; give both or neither")
    y = read_image(options.image, options.crop, options.white)
    mask = None if options.mask is None else read_mask(options.mask, options.crop)
    if mask is not None and mask.shape != y.shape:
        raise ValueError(
            f"got a mask of {mask.shape[1]} x {mask.shape[2]} pixels for a picture of {y.shape[1]} x {y.shape[2]}; "
            "expected the same size"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    noise = _noise(options, y, mask)
    acquisition = sharp(noise)
    if options.operator == "blur":
        acquisition = blurred(noise, options.psf_sigma)
    elif options.operator == "downsample":
        acquisition = coarse(noise, options.factor)
    elif mask is not None:
        acquisition = masked(noise, mask)
    _run(y, acquisition, options.prior, options, f"Restoration of {options.image.name}")


def _noise(options: argparse.Namespace, y: Tensor, mask: Tensor | None) -> Noise:
    shot, rho = options.noise == "shot", options.row_correlation
    if rho == "auto":
        rho = "estimate" if options.sigma is None and mask is None else 0.0
    if rho == "estimate":
        rho = estimate_row_correlation(y, shot)
        print(f"Estimated row correlation of the noise: {rho:.2f}")
    if options.sigma is not None:
        return Noise(options.sigma, shot=shot, row_correlation=rho)
    sigma = estimate_sigma(y, shot, rho, mask)
    print(f"First estimate of sigma: {sigma:.4f}; its prior is LogNormal(log {sigma:.4f}, {_WIDTH})")
    return Noise(sigma, _WIDTH, shot, rho)


def _run(
    y: Tensor,
    acquisition: Acquisition,
    prior: str,
    options: argparse.Namespace,
    title: str,
    truth: Truth | None = None,
) -> None:
    effort = Effort(options.particles, options.chains, options.steps, options.seed)
    job = prepare(y, acquisition, lambda shape: load_prior(prior, event_shape=shape), effort)
    print(
        f"{effort.chains} chains of {effort.particles} particles, {effort.steps} steps, on a scene of "
        f"{job.canvas.rows} x {job.canvas.columns} pixels: about {_duration(job.expected_seconds())} on this machine.",
        flush=True,
    )
    about = {"title": title, "prior": prior, "command": options.line}
    text = write_report(job.run(progress=not options.quiet), options.out, truth, about)
    print(f"\n{text}\nWritten to {options.out}")


def _report(options: argparse.Namespace) -> None:
    from smcdiff.diagnostics.arviz import read
    from smcdiff.diagnostics.export import from_groups
    from smcdiff.diagnostics.report import find_run, report

    file = find_run(options.run)
    run = from_groups(read(file))
    words = options.run / "summary.txt" if options.run.is_dir() else None
    summary = words.read_text() if words is not None and words.is_file() else ""
    title = options.title or str(run.about.get("title", f"Posterior of {file.name}"))
    out = options.out or (file.with_name("report.html") if options.run.is_dir() else file.with_suffix(".html"))
    out.write_text(report(run, title, summary), encoding="utf-8")
    print(f"Written to {out}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
