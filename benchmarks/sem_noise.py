r"""Real low-dose SEM pictures with unknown noise and blur: what is calibrated, what is not, and why.

    python benchmarks/sem_noise.py --data ../shared/data/sem

64 x 64 crops of held-out low-dose frames, and controls made from draws of the prior ``sem64`` with noise of a known
law, under programs that differ in what they take the noise to be (benchmarks/sem_noise_laws.py has the laws):

    white                 level unknown
    correlated            level and row correlation unknown
    signal                white, level and the share that grows with the signal unknown (sd.MixedMeasurement's law)
    correlated, blurred   level, row correlation and width of a Gaussian blur unknown
    correlated, signal    level, row correlation and share unknown

The few unknown numbers are summed over a grid. The particles are led by sd.Tilted at one value of them, found by short
pilot runs, and reweighted to the program in which they are unknown; the weights and the evidence are exact for any
guide, and degenerate: pictures, intervals and checks are made from all particles alike, which are independent draws of
the guided chains.

``log_z`` is the log of the mean weight of a chain, unbiased for the evidence before the logarithm and so mostly too
low; ``bound`` is the mean log-weight, a lower bound on average; ``cumulant`` adds half the variance of the log-weights,
which would be the evidence if they were normal. One program is called better by evidence where its bound is above both
the other's log_z and the other's cumulant.

Coverage is the share of pixels whose randomised rank among the draws lies in the central part of that mass: exact for
exact draws, however few. It is given against the reference as sem_restoration.py registers it (whole pixels, whole
frame), against the reference moved by the part of a pixel that brings it nearest to the posterior mean, and with the
mean difference of the two taken off as well.

Results are kept line by line in benchmarks/results/sem_noise.jsonl; a run that was stopped goes on, and one without
--data only writes the page's tables and figures again (benchmarks/sem_noise_page.py).
"""

from __future__ import annotations

import argparse
import base64
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import Kept
from machine import describe
from scipy.ndimage import shift as shifted
from scipy.optimize import minimize
from sem_noise_laws import Family, Theta, blur, guide, row_noise
from sem_noise_page import write_page
from sem_noise_statistics import coverage, evidence, psnr, statistics
from sem_restoration import grey_scale, registered_pair
from torch import Tensor

import smcdiff as sd
from smcdiff.diagnostics.predictive import posterior_predictive_p
from smcdiff.restoration.noise_level import estimate_row_correlation, estimate_sigma

RESULTS = Path(__file__).parent / "results" / "sem_noise.jsonl"
SIDE, MARGIN = 64, 8
TUNE_ON = range(3, 41, 5)
PROGRAMS = {
    "white": Family.of(),
    "correlated": Family.of(rho=True),
    "signal": Family.of(h=True),
    "correlated, blurred": Family.of(rho=True, w=True),
    "correlated, signal": Family.of(rho=True, h=True),
}
#: {control: its law, whether it is clipped as an 8-bit frame is, the programs it is put under}.
CONTROLS = {
    "white": (Theta(0.18), False, ("white", "correlated")),
    "correlated": (Theta(0.18, rho=0.5), False, ("white", "correlated")),
    "correlated, clipped": (Theta(0.18, rho=0.5), True, ("white", "correlated")),
    "correlated, signal, clipped": (
        Theta(0.18, rho=0.5, h=1.0),
        True,
        ("white", "correlated", "correlated, signal"),
    ),
}


@dataclass(frozen=True)
class Picture:
    """A measurement and what it is held against, (1, 64, 64) on the scale [-1, 1].

    Args:
        y: the measurement.
        reference: the scene, MARGIN pixels wider on every side where it is a frame's.
        ends: the grey values at which y is clipped, on that scale.
    """

    y: Tensor
    reference: Tensor
    ends: tuple[float, float]

    @property
    def truth(self) -> Tensor:
        return self.moved((0.0, 0.0))

    def moved(self, by: tuple[float, float]) -> Tensor:
        """The reference moved by parts of a pixel."""
        wide = self.reference[0].double()
        margin = (wide.shape[0] - SIDE) // 2
        if any(by):
            wide = torch.from_numpy(shifted(wide.numpy(), by, order=3, mode="nearest"))
        return wide[margin : margin + SIDE, margin : margin + SIDE][None]


def frame(data: Path, number: int, gain: float, offset: float) -> Picture:
    """The middle of a held-out frame, on the grey scale of the high dose."""
    low, high = registered_pair(data, f"{number:03d}", SIDE + 2 * MARGIN)
    low = low[MARGIN:-MARGIN, MARGIN:-MARGIN]
    y, reference = (torch.from_numpy(2 * v - 1)[None] for v in ((low - offset) / gain, high))
    return Picture(y.float(), reference, ends(gain, offset))


def control(kind: str, number: int, prior: sd.DiffusionPrior, gain: float, offset: float) -> Picture:
    """A draw of the prior with noise of a known law."""
    theta, clipped, _ = CONTROLS[kind]
    x = prior.chain.sample(1, torch.Generator().manual_seed(1000 + number))[0].double()
    y = x + row_noise(theta, x, torch.Generator().manual_seed(2000 + number))
    black, white = ends(gain, offset)
    return Picture((y.clamp(black, white) if clipped else y).float(), x, (black, white))


def ends(gain: float, offset: float) -> tuple[float, float]:
    """Black and white of a low-dose frame on [-1, 1] of the high dose."""
    return 2 * (0 - offset) / gain - 1, 2 * (1 - offset) / gain - 1


def first_theta(y: Tensor, family: Family) -> Theta:
    """Read off the picture."""
    rho = estimate_row_correlation(y)
    return family.nearest(Theta(estimate_sigma(y, row_correlation=rho), rho, h=0.5, w=0.3))


@dataclass(frozen=True)
class Draws:
    """Particles of the guided chains, with what is known of the noise given each.

    Args:
        x: (b, n, 1, 64, 64).
        log_w: (b, n), log-weights of the program with unknown theta whose mean over a chain is its evidence.
        log_joint: (b n, *grid).
        theta: mean of theta over all particles alike.
    """

    x: Tensor
    log_w: Tensor
    log_joint: Tensor
    theta: Theta


def draws(
    picture: Picture,
    family: Family,
    theta: Theta,
    about: Tensor,
    prior: sd.DiffusionPrior,
    n: int,
    b: int,
    seed: int,
) -> Draws:
    """Run the guide and reweight."""
    lead = guide(picture.y, theta, prior, about)
    smc = sd.SMC(sd.Tilted(lead.program), n, b, seed=seed, max_batch=16, progress=False).run(lead.y)
    run = smc.posterior
    x = run.values["x"]
    log_joint = torch.stack([family.log_joint(picture.y, one) for one in x.flatten(0, 1)])
    # pooled log-weights sum to 1 over chains and particles; times b n Z they are the weights whose mean is Z
    exact = run.log_w + smc.log_evidence + math.log(run.log_w.numel())
    ratio = log_joint.flatten(1).logsumexp(1).reshape(exact.shape) - lead.log_prob(x)
    found = {name: mean for name, (mean, _) in moments(family, log_joint).items()}
    return Draws(x, exact + ratio, log_joint, family.nearest(Theta(**{**vars(theta), **found})))


def moments(family: Family, log_joint: Tensor, log_w: Tensor | None = None) -> dict[str, tuple[float, float]]:
    """{parameter: (mean, standard deviation)} over particles, alike or by their weights (b n,)."""
    each = [family.marginals(one) for one in log_joint]
    weights = torch.full((len(each),), 1 / len(each)).double() if log_w is None else log_w.softmax(0)
    found = {}
    for name in each[0]:
        nodes, p = getattr(family, name), weights @ torch.stack([marginal[name] for marginal in each])
        mean = float(p @ nodes)
        found[name] = (mean, math.sqrt(max(float(p @ (nodes - mean) ** 2), 0.0)))
    return found


def checks(picture: Picture, family: Family, found: Draws, seed: int) -> dict[str, dict[str, float]]:
    """Posterior predictive p-values, with the means of what they compare."""
    generator = torch.Generator().manual_seed(seed)
    seen: list[dict[str, float]] = []
    again: list[dict[str, float]] = []
    for x, log_joint in zip(found.x.flatten(0, 1), found.log_joint, strict=True):
        theta = family.draw(log_joint, generator)
        clean = blur(x.double(), theta.w)
        replicated = clean + row_noise(theta, clean, generator)
        seen.append(statistics(picture.y.double(), clean, picture.ends))
        again.append(statistics(replicated, clean, picture.ends))
    result = {}
    for name in seen[0]:
        observed, replicas = (torch.tensor([one[name] for one in rows]).double() for rows in (seen, again))
        p = posterior_predictive_p(observed, replicas).p_value
        result[name] = {"p": p, "observed": float(observed.mean()), "replicated": float(replicas.mean())}
    return result


def against(x: Tensor, picture: Picture, seed: int, is_frame: bool) -> dict[str, Any]:
    """Errors and coverage of draws, with the parts of registration and grey scale taken off one after the other."""
    mean, truth = x.flatten(0, 1).double().mean(0), picture.truth
    found: dict[str, Any] = {
        "psnr": psnr(mean, truth),
        "psnr of y": psnr(picture.y.double(), truth),
        "sd": float(x.flatten(0, 1).double().std(0).square().mean().sqrt()),
        "coverage": coverage(x.flatten(0, 1), truth, seed),
    }
    if is_frame:
        by = nearest_shift(mean, picture)
        moved = picture.moved(by)
        bias = float((mean - moved).mean())
        found |= {
            "shift": by,
            "bias": bias,
            "psnr registered": psnr(mean, moved),
            "coverage registered": coverage(x.flatten(0, 1), moved, seed),
            "psnr registered, levelled": psnr(mean, moved + bias),
            "coverage registered, levelled": coverage(x.flatten(0, 1), moved + bias, seed),
            "reference noise": estimate_sigma(truth, row_correlation=estimate_row_correlation(truth)),
        }
    return found


def nearest_shift(mean: Tensor, picture: Picture) -> tuple[float, float]:
    """Rows and columns by which the reference has the least squared distance from a mean, their own means aside."""

    def distance(by: Any) -> float:
        return float((mean - picture.moved((float(by[0]), float(by[1])))).var())

    start = np.array([[0.01, 0.01], [0.31, 0.01], [0.01, 0.31]])
    found = minimize(distance, start[0], method="Nelder-Mead", options={"initial_simplex": start, "xatol": 0.01})
    return float(found.x[0]), float(found.x[1])


def measured(picture: Picture, program: str, prior: sd.DiffusionPrior, options: Any, is_frame: bool) -> dict[str, Any]:
    """All that is said of one picture under one program."""
    family, started, cpu = PROGRAMS[program], time.perf_counter(), time.process_time()
    theta = first_theta(picture.y, family)
    about = blur(picture.y.double(), 1.5)
    short = prior.replace(num_steps=12)
    for seed in range(options.pilots):
        found = draws(picture, family, theta, about, short, 4, 1, 100 + seed)
        theta, about = found.theta, found.x.flatten(0, 1).double().mean(0)
    found = draws(picture, family, theta, about, prior, options.particles, options.chains, 0)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "seconds": seconds,
        "processor seconds": cpu,
        "guide": vars(theta),
        "theta": moments(family, found.log_joint),
        "theta by weight": moments(family, found.log_joint, found.log_w.flatten()),
        **evidence(found.log_w),
        "checks": checks(picture, family, found, 1),
        **against(found.x, picture, 2, is_frame),
        "picture": {"mean": packed(found.x.flatten(0, 1).mean(0)), "sd": packed(10 * found.x.flatten(0, 1).std(0) - 1)},
    }


def packed(image: Tensor) -> str:
    """A picture on [-1, 1] as text, 8 bits a pixel."""
    grey = ((image[0].clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    return base64.b64encode(grey.tobytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with low_dose and high_dose; without it, only the page")
    parser.add_argument("--frames", type=int, nargs="*", default=[41, 42, 44, 46, 48, 50], help="numbers of the pairs")
    parser.add_argument("--controls", type=int, default=2, help="draws of the prior per law of the noise")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pilots", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="elsewhere, the page is left as it is")
    options = parser.parse_args()
    if options.data is not None:
        if not (options.data / "low_dose").is_dir() or not (options.data / "high_dose").is_dir():
            raise SystemExit(
                f"skipped: {options.data} does not hold the folders low_dose and high_dose of the SEM pairs; nothing "
                "was measured. Give their place with --data"
            )
        measure(options)
    if options.results == RESULTS:
        write_page(options.results)


def measure(options: Any) -> None:
    """Run what is not in the results yet."""
    torch.set_num_threads(1)
    kept = Kept(options.results, ("kind", "number", "program", "particles", "chains", "steps"))
    effort = {"particles": options.particles, "chains": options.chains, "steps": options.steps}
    prior = sd.load_prior("sem64").replace(num_steps=options.steps, grid=sd.KarrasGrid(), variance="full")
    gain, offset = grey_scale([registered_pair(options.data, f"{n:03d}", 128) for n in TUNE_ON])
    todo = [("frame", n) for n in options.frames] + [(kind, n) for kind in CONTROLS for n in range(options.controls)]
    first = {options.frames[0]} if options.frames else set()
    for kind, number in todo:
        names = list(PROGRAMS) if kind == "frame" else list(CONTROLS[kind][2])
        names = [name for name in names if {"kind": kind, "number": number, "program": name, **effort} not in kept]
        if not names:
            continue
        is_frame = kind == "frame"
        picture = frame(options.data, number, gain, offset) if is_frame else control(kind, number, prior, gain, offset)
        for name in names:
            row = {"kind": kind, "number": number, "program": name, **effort}
            row |= measured(picture, name, prior, options, is_frame)
            shown = row.pop("picture")
            if is_frame and number in first:
                row["picture"] = {**shown, "low": packed(picture.y), "high": packed(picture.truth)}
            row |= {"ends": picture.ends, "grey scale": [gain, offset], "machine": describe()}
            if not is_frame:
                row["truth"] = vars(CONTROLS[kind][0])
            kept.add(row)
            print(kind, number, name, f"{row['seconds']:.0f} s", row["theta"], f"log_z {row['pooled']:.1f}", flush=True)


if __name__ == "__main__":
    main()
