"""A restoration as a folder of files: a report to open, pictures, plots, the ArviZ object, and a summary in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smcdiff.restoration.images import write_png
from smcdiff.restoration.restore import Restoration

__all__ = ["Truth", "psnr", "retention", "write_report"]

_DRAWS = 4

_FILES = """Files
  report.html      everything below on one page
  observation.png  the picture that was restored
  mean.png         posterior mean: the best guess of every pixel
  sd.png           posterior standard deviation of every pixel, black 0, white {largest:.3f}
  draws.png        {draws} draws from the posterior side by side: pictures that the data allow
  panel.png        all of these with scales
  evidence.png     effective sample size, surviving roots and running log-evidence over the steps
  posterior.nc     particles, weights, pointwise log-likelihood (ArviZ: arviz.from_netcdf)"""


@dataclass(frozen=True)
class Truth:
    """What is known of the scene where the picture was made up.

    Args:
        image: the scene, (1, rows, columns), of the shape of the restoration.
        clean: the scene without its grain.
        normal: the same without the defect.
        defect: its pixels that the defect changed, bool of the same shape.
        name: of the defect.
    """

    image: Tensor
    clean: Tensor
    normal: Tensor
    defect: Tensor
    name: str


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(4 / mean squared difference), on the scale [-1, 1]."""
    return 10 * math.log10(4 / float((image.double() - reference.double()).square().mean()))


def retention(images: Tensor, truth: Truth) -> Tensor:
    """How much of the defect is in images (..., 1, rows, columns): 0 as if it were not there, 1 all of it.

    With d = clean - normal on the defect's pixels it is <image - normal, d> / <d, d>.
    """
    change = (truth.clean - truth.normal).double()[truth.defect]
    seen = images.double()[..., truth.defect] - truth.normal.double()[truth.defect]
    return seen @ change / (change @ change)


def write_report(
    result: Restoration, folder: Path, truth: Truth | None = None, about: Mapping[str, str] | None = None
) -> str:
    """Write all files into ``folder``, which is made if need be, and return the summary.

    Args:
        result: the restoration.
        folder: to write to.
        truth: what is known of the scene.
        about: more to say of where the result comes from, such as its "command" and the "title" of its report.
    """
    from matplotlib.figure import Figure

    from smcdiff.diagnostics.arviz import write
    from smcdiff.diagnostics.export import run_groups
    from smcdiff.diagnostics.plots import plot_posterior, plot_steps
    from smcdiff.diagnostics.report import report

    folder.mkdir(parents=True, exist_ok=True)
    mean, sd, draws = result.mean, result.sd, result.draws(_DRAWS)
    write_png(folder / "observation.png", result.y)
    write_png(folder / "mean.png", mean)
    largest = max(float(sd.max()), 1e-6)
    write_png(folder / "sd.png", sd, low=0.0, high=largest)
    write_png(folder / "draws.png", torch.cat(list(draws), -1))
    references = ({} if truth is None else {"truth": truth.image}) | {"picture": result.y}
    panel = Figure(figsize=(9.6, 5.2))
    plot_posterior(mean, sd, draws, references, figure=panel)
    panel.savefig(folder / "panel.png", dpi=150)
    steps = Figure(figsize=(7.0, 5.0))
    plot_steps(result.run, figure=steps)
    steps.savefig(folder / "evidence.png", dpi=150)
    run = dataclasses.replace(
        result.run,
        constants={**result.run.constants, **({} if truth is None else {"x.truth": truth.image})},
        about={
            **result.run.about,
            **_settings(result),
            "noise": _law(result),
            "seconds": result.seconds,
            "verdict": result.diagnostics.verdict,
            **(about or {}),
        },
    )
    write(run_groups(run), folder / "posterior.nc")
    text = summary(result, truth) + "\n\n" + _FILES.format(largest=largest, draws=_DRAWS) + "\n"
    (folder / "summary.txt").write_text(text)
    (folder / "report.html").write_text(report(run, str(run.about.get("title", "Restoration")), text), encoding="utf-8")
    return text


def summary(result: Restoration, truth: Truth | None = None) -> str:
    """What was done, what came out, and how far to trust it."""
    settings = "  ".join(f"{name} {value:g}" for name, value in _settings(result).items())
    noise = result.acquisition.noise
    lines = [
        f"Restored a picture of {result.y.shape[-2]} x {result.y.shape[-1]} pixels in {result.seconds:.0f} s",
        f"  {settings}",
        f"  {_law(result)} (grey values from -1, black, to 1, white)",
    ]
    if noise.width:
        sigma = result.run
        lines.append(
            f"  sigma is unknown, prior LogNormal(log {noise.sigma:.4g}, {noise.width:g}); posterior mean "
            f"{float(sigma.mean('sigma')):.4g}, 90 % interval {float(sigma.quantile('sigma', 0.05)):.4g} to "
            f"{float(sigma.quantile('sigma', 0.95)):.4g}"
        )
    lines += ["", "What to trust"]
    diagnostics = result.diagnostics
    lines += [f"  {line}" for line in str(diagnostics).splitlines()]
    lines += ["", *_about_pictures(result)]
    return "\n".join(lines + ([] if truth is None else ["", *_against(truth, result)]))


def _about_pictures(result: Restoration) -> list[str]:
    if result.exponent == 1:
        return ["The pictures use the exact weights (tempering exponent 1)."]
    chains = result.effort.chains
    return [
        f"The pictures use the weights to the power {result.exponent:.3g} (tempering exponent), because the exact ones",
        f"leave {result.diagnostics.pooled_ess:.1f} of {result.run.log_w.numel()} particles. They show what the guided "
        "chains propose, corrected only in part:",
        f"take the mean as a good restoration, and the standard deviation as a guide, from about {chains} independent",
        "draws, to where the data leave room. It is not an error bar that was proved right. The verdict above is that",
        "of the exact weights; posterior.nc holds both, as log_weight and exact_log_weight.",
    ]


def _against(truth: Truth, result: Restoration) -> list[str]:
    low, high = result.interval(0.9)
    inside = ((truth.image >= low) & (truth.image <= high)).double()
    there = truth.defect
    values, weights = retention(result.run.values["x"], truth), result.run.log_w.exp()
    kept = float((weights * values).sum())
    spread = math.sqrt(float((weights * (values - kept) ** 2).sum()))
    lines = [
        "Against the truth, which is known here",
        f"  PSNR of the posterior mean  {psnr(result.mean, truth.image):.2f} dB",
        f"  inside the 90 % interval    {100 * float(inside.mean()):.1f} % of all pixels, "
        f"{100 * float(inside[there].mean()):.1f} % of the defect's",
        f"  the defect ({truth.name}, {int(there.sum())} pixels): {100 * kept:.0f} % +- {100 * spread:.0f} % of it is "
        "kept; 0 % is a normal wafer",
    ]
    if result.y.shape == truth.image.shape:
        lines.insert(1, f"  PSNR of the picture         {psnr(result.y, truth.image):.2f} dB")
        lines.append(f"  of it in the picture before restoration: {100 * float(retention(result.y, truth)):.0f} %")
    return lines


def _law(result: Restoration) -> str:
    noise = result.acquisition.noise
    law = f"{'shot' if noise.shot else 'Gaussian'} noise, sigma {noise.sigma:.4g}"
    return law + (f", row correlation {noise.row_correlation:.2f}" if noise.row_correlation else "")


def _settings(result: Restoration) -> dict[str, int]:
    effort = result.effort
    return {"particles": effort.particles, "chains": effort.chains, "steps": effort.steps, "seed": effort.seed}
