r"""When a posterior says "80 % defect", is it right 80 % of the time? Decisions on wafer patches, on simulated data.

*Population.* A patch is one of a few templates, cut out of synthetic wafer pictures with and without their defect, plus
white noise of deviation s; with probability 0.3 it has a defect. It is measured blurred, binned to half its size, and
with noise of deviation sigma_y. Both ways to P(defect given y) are tried:

- *evidence*: two programs, "normal" and "defect", each with its templates as the prior, compared by their evidence;
- *draws*: one program with all templates; P(defect given y) is the posterior mean of P(defect given x).

The exact answer is known, log p(y given templates) being a sum of normal densities. With right priors the claims must
come true as often as claimed, up to chance; what the particles add is seen beside the exact answer.

*Fresh patches.* The same programs on patches of other wafers, which are no template: the claims of a posterior are
worth as much as its prior.

*Blur.* A random field seen through one of three point-spread functions of similar width: Gaussian, disc of defocus, and
motion. Which one was it?

    python examples/wafer_decisions.py --out build/wafer_decisions

References:
    A. P. Dawid, "The well-calibrated Bayesian", Journal of the American Statistical Association 77 (1982).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diagnostics.decisions import Reliability, defect_probability, program_probabilities, reliability
from smcdiff.transforms import hartley
from smcdiff.zoo.microscope import probe
from smcdiff.zoo.wafer import DEFECT_KINDS, Wafer

F64 = torch.float64
SIDE, S, SIGMA_Y, RATE = 12, 0.1, 0.5, 0.3


def patches(rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor]:
    """(number, 1, SIDE, SIDE) of each, without noise: places of a defect as they should be, and as they are.

    The kinds of defect take turns; the defect lies within two pixels of the middle.
    """
    wafer = Wafer(size=48, dose=math.inf)
    pairs = []
    for i in range(number):
        picture = wafer.draw(rng, defect=DEFECT_KINDS[i % len(DEFECT_KINDS)])
        middle = np.argwhere(picture.mask).mean(0) + rng.integers(-2, 3, 2)
        row, column = np.clip(middle.round().astype(int) - SIDE // 2, 0, wafer.size - SIDE)
        cut = slice(row, row + SIDE), slice(column, column + SIDE)
        pairs.append((picture.normal[cut], picture.clean[cut]))
    normal, defect = (torch.from_numpy(np.stack(side))[:, None] for side in zip(*pairs, strict=True))
    return normal, defect


@dataclass(frozen=True)
class Templates:
    """x ~ sum_c w_c N(template_c, S^2 I), measured by y = A x + SIGMA_Y noise.

    Args:
        means: the templates, (components, 1, SIDE, SIDE).
        weights: w, (components,), of sum 1.
    """

    means: Tensor
    weights: Tensor

    operator = sd.Compose(sd.Downsample(2), sd.Blur(torch.from_numpy(probe(1.2))))

    def program(self, num_steps: int = 6) -> Callable[..., Any]:
        eye = torch.eye(SIDE**2, dtype=F64)
        denoiser = sd.GaussianMixtureDenoiser(self.means, S**2 * eye, self.weights)
        prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=num_steps)

        def model(y: Tensor | None = None) -> Tensor:
            x = pyro.sample("x", prior)
            return pyro.sample("y", sd.GaussianMeasurement(self.operator, x, SIGMA_Y), obs=y)

        return model

    def log_evidence(self, y: Tensor) -> Tensor:
        """log p(y), exact."""
        pixels = torch.eye(SIDE**2, dtype=F64).reshape(-1, 1, SIDE, SIDE)
        a = self.operator(pixels).flatten(1).T
        covariance = S**2 * a @ a.T + SIGMA_Y**2 * torch.eye(len(a), dtype=F64)
        density = MultivariateNormal(self.operator(self.means).flatten(1), covariance)
        return (self.weights.log() + density.log_prob(y.reshape(1, -1))).logsumexp(0)

    def shares(self, x: Tensor) -> Tensor:
        """P(component given x), (m, components), exact."""
        away = (x[:, None] - self.means).flatten(2).square().sum(-1)
        return (self.weights.log() - 0.5 * away / S**2).softmax(1)


def measured(x: Tensor, generator: torch.Generator) -> Tensor:
    """y of a patch x."""
    mean = Templates.operator(x)
    return mean + SIGMA_Y * torch.randn(mean.shape, generator=generator, dtype=F64)


def run(model: Callable[..., Any], y: Tensor, seed: int) -> sd.SMC:
    """Eight chains of eight particles."""
    return sd.SMC(sd.Adapted(model), num_particles=8, num_chains=8, seed=seed, progress=False).run(y)


def decide(y: Tensor, normal: Templates, defect: Templates, both: Templates, seed: int) -> dict[str, float]:
    """P(defect given y) three ways, and whether the evidence supports a decision."""
    exact = {"normal": normal.log_evidence(y), "defect": defect.log_evidence(y)}
    log_odds = float(exact["defect"] - exact["normal"]) + math.log(RATE / (1 - RATE))
    chains = {}
    for name, templates in (("normal", normal), ("defect", defect)):
        chains[name] = run(templates.program(), y, seed).log_evidence_per_chain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # decisions that are not supported are counted
        programs = program_probabilities(chains, {"normal": 1 - RATE, "defect": RATE})
    smc = run(both.program(), y, seed + 1)
    known = len(normal.means)
    draws = defect_probability(smc.weighted_samples(), "x", lambda x: both.shares(x)[:, known:].sum(1).clamp(max=1))
    return {
        "exact": 1 / (1 + math.exp(-log_odds)),
        "evidence": float(programs.probability[1]),
        "draws": float(draws.probability),
        "supported": float(programs.supported),
        "error_normal": float(programs.log_evidence[0] - exact["normal"]),
        "error_defect": float(programs.log_evidence[1] - exact["defect"]),
    }


def kernels() -> dict[str, Tensor]:
    """Three point-spread functions of sum 1, all with a variance of 2, rows and columns together."""
    return {
        "gaussian": torch.from_numpy(probe(1.0)),
        "defocus": torch.from_numpy(probe(0.5, defocus=2 * math.sqrt(0.75))),
        "motion": torch.full((1, 5), 0.2, dtype=F64),
    }


@dataclass(frozen=True)
class Blurred:
    """A field of variance 1 and spectrum (1 + (8 f)^2)^-2, f in 1 / pixel, seen through a kernel with noise SIGMA.

    Args:
        kernel: (rows, columns).
        side: rows and columns of the field, which repeats itself.
    """

    kernel: Tensor
    side: int = 24

    SIGMA = 0.3

    @property
    def spectrum(self) -> Tensor:
        f = torch.fft.fftfreq(self.side, dtype=F64)
        density = (1 + 64 * (f[:, None] ** 2 + f**2)) ** -2
        return (density / density.mean())[None]

    def program(self, num_steps: int = 5) -> Callable[..., Any]:
        denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, self.side, self.side, dtype=F64), self.spectrum)
        prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=num_steps)

        def model(y: Tensor | None = None) -> Tensor:
            x = pyro.sample("x", prior)
            return pyro.sample("y", sd.GaussianMeasurement(sd.Blur(self.kernel), x, self.SIGMA), obs=y)

        return model

    def draw(self, generator: torch.Generator) -> Tensor:
        """A measurement."""
        white = torch.randn(2, 1, self.side, self.side, generator=generator, dtype=F64)
        return sd.Blur(self.kernel)(hartley(self.spectrum.sqrt() * white[0])) + self.SIGMA * white[1]

    def log_evidence(self, y: Tensor) -> Tensor:
        """log p(y), exact: frequency by frequency the transfer function scales the field's variance."""
        delta = torch.zeros(1, self.side, self.side, dtype=F64)
        delta[0, 0, 0] = 1.0
        transfer = torch.fft.fft2(sd.Blur(self.kernel)(delta)).abs()
        variance = transfer.square() * self.spectrum + self.SIGMA**2
        power = torch.fft.fft2(y, norm="ortho").abs().square()
        return -0.5 * (power / variance + (2 * math.pi * variance).log()).sum()


def name_the_blur(families: dict[str, Blurred], y: Tensor, seed: int) -> dict[str, list[float]]:
    """Probabilities of the families, exact and by evidence."""
    chains = {name: run(blurred.program(), y, seed).log_evidence_per_chain for name, blurred in families.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = program_probabilities(chains)
    exact = torch.stack([blurred.log_evidence(y) for blurred in families.values()])
    return {"exact": exact.softmax(0).tolist(), "evidence": found.probability.tolist()}


def study(problems: int, seed: int, templates: int = 14) -> dict[str, Any]:
    """All claims and what was true, with their reliability."""
    generator = torch.Generator().manual_seed(seed)
    cut_normal, cut_defect = patches(np.random.default_rng(seed), templates)
    equal = torch.full((templates,), 1 / templates, dtype=F64)
    normal, defect = Templates(cut_normal, equal), Templates(cut_defect, equal)
    both = Templates(torch.cat([cut_normal, cut_defect]), torch.cat([(1 - RATE) * equal, RATE * equal]))
    fresh = patches(np.random.default_rng(seed + 1), problems)
    result: dict[str, Any] = {"problems": problems, "seed": seed, "templates": templates, "populations": {}}
    for population in ("templates", "fresh patches"):
        claims = []
        for i in range(problems):
            true = int(torch.rand((), generator=generator) < RATE)
            if population == "templates":
                which = int(torch.randint(templates, (), generator=generator))
                x = (cut_normal, cut_defect)[true][which]
                x = x + S * torch.randn(x.shape, generator=generator, dtype=F64)
            else:
                x = fresh[true][i]
            claims.append({"true": true, **decide(measured(x, generator), normal, defect, both, 2 * i)})
        result["populations"][population] = claims
    families = {name: Blurred(kernel) for name, kernel in kernels().items()}
    blurs = []
    for i in range(2 * problems):
        true = int(torch.randint(len(families), (), generator=generator))
        y = list(families.values())[true].draw(generator)
        blurs.append({"true": true, **name_the_blur(families, y, i)})
    result["families"], result["blurs"] = list(families), blurs
    return result


def tables(result: dict[str, Any]) -> dict[str, Reliability]:
    """Reliability of each way to claim, by population; of a blur the probability of the family that was chosen."""
    found = {}
    for population, claims in result["populations"].items():
        true = torch.tensor([claim["true"] for claim in claims])
        for way in ("exact", "evidence", "draws"):
            found[f"{population}, {way}"] = reliability(torch.tensor([claim[way] for claim in claims]), true)
    true = torch.tensor([claim["true"] for claim in result["blurs"]])
    for way in ("exact", "evidence"):
        best = torch.tensor([claim[way] for claim in result["blurs"]]).max(1)
        found[f"blur, {way}"] = reliability(best.values.clamp(max=1), best.indices == true)
    return found


def figure(found: dict[str, Reliability], file: Path) -> None:
    """Claimed against observed, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {name.split(", ")[0]: None for name in found}
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, layout="constrained")
    for ax, panel in zip(axes, panels, strict=True):
        ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        ways = [name for name in found if name.split(", ")[0] == panel]
        for shift, name in zip((-0.012, 0.0, 0.012), ways, strict=False):
            table = found[name]
            reach = torch.stack([table.observed - table.low, table.high - table.observed]).clamp(min=0)
            ax.errorbar(
                table.claimed + shift,
                table.observed,
                reach,
                fmt="o",
                capsize=2,
                markersize=4,
                label=name.split(", ")[1],
            )
        ax.set(title=panel, xlabel="claimed probability", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        ax.legend(frameon=False, loc="upper left")
    axes[0].set_ylabel("came true")
    fig.savefig(file, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result and the figure")
    parser.add_argument("--problems", type=int, default=60, help="simulated problems of each population")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = study(arguments.problems, arguments.seed)
    found = tables(result)
    for name, table in found.items():
        print(f"\n{name}\n{table}")
    for population, claims in result["populations"].items():
        share = np.mean([claim["supported"] for claim in claims])
        errors = [claim[f"error_{name}"] for claim in claims for name in ("normal", "defect")]
        print(
            f"\n{population}: the evidence supports a decision on {share:.0%}; its error has the median "
            f"{np.median(np.abs(errors)):.2f} and 90 % below {np.quantile(np.abs(errors), 0.9):.2f} nats"
        )
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["reliability"] = {
        name: {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(table).items()}
        for name, table in found.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "wafer_decisions.json").write_text(json.dumps(result, indent=1) + "\n")
    figure(found, arguments.out / "wafer_decisions.png")
    print(f"\n{result['seconds']:.0f} s; {arguments.out / 'wafer_decisions.json'} and wafer_decisions.png written")


if __name__ == "__main__":
    main()
