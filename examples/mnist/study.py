"""Class-conditional digits, inpainting and deblurring with the digits' prior: every run, one row each.

    python -m examples.mnist.study --mnist FOLDER --kernels FILE --weights WEIGHTS --out OUT

WEIGHTS is what examples/mnist/train.py made. OUT/rows.jsonl gets one line per run and OUT/pictures the pictures of the
first seed. Runs that are in OUT already are not done again, so that a study that was stopped goes on when the same
command is given again; examples/mnist/report.py makes tables and a figure of what is there.

A class: ten labels, n particles for n = 1, 2, 4, 16, 64, several independent filters where n is small; and as a
reference what the judge says of many draws of the prior, weighed by the guide. A picture:
held-out digits that the covariance was not measured on, different ones for every seed; the lower half hidden, or a
blur kernel after the other. A restoration runs independent filters, 16 unless said otherwise, and takes one draw from
each, so that a particle's descendants are not counted as draws of their own.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import smcdiff as sd
from benchmarks.machine import describe
from examples.mnist.classifiers import Guide, Judge
from examples.mnist.data import CALIBRATION, Digits, read_digits, read_kernels
from examples.mnist.programs import Classified, Measured, coverage, right, rmse
from smcdiff.infer import SMC

Row = dict[str, Any]
Pictures = dict[str, Tensor]
METHODS: dict[str, Callable[[Any], Any]] = {
    "TDS": sd.TDS,
    "Feynman-Kac steering": sd.FeynmanKacSteering,
    "Bootstrap": sd.Bootstrap,
}
#: Methods of the restorations, each with the particles of a filter.
RESTORERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "Adapted, n = 1": (sd.Adapted, 1),
    "Adapted, n = 4": (sd.Adapted, 4),
    "TDS, n = 4": (sd.TDS, 4),
    "TDS, shift at most 1, n = 4": (lambda model: sd.TDS(model, max_shift=1.0), 4),
    "TDS, widened twist, n = 4": (lambda model: sd.TDS(model, twist=sd.WidenedTwist()), 4),
    "DPS, step 0.3": (lambda model: sd.DPS(model, 0.3), 1),
    "DPS, step 1": (lambda model: sd.DPS(model, 1.0), 1),
    "DPS, step 3": (lambda model: sd.DPS(model, 3.0), 1),
}
#: Particles of a filter, and how many filters are run for each label.
PARTICLES = {1: 4, 2: 4, 4: 4, 16: 1, 64: 1}


@dataclass(frozen=True, eq=False)
class Setting:
    """All that a run needs.

    Args:
        prior: for every method but sd.Adapted, which takes a chain of its own from the same network.
        digits: the held-out ones that the covariance was not measured on.
        varied: (rows, columns) of bool, pixels that vary from digit to digit.
    """

    prior: sd.DiffusionPrior
    spectral: dict[str, sd.DiffusionPrior]
    guide: nn.Module
    judge: nn.Module
    digits: Digits
    varied: Tensor
    kernels: dict[str, Tensor]
    draws: int
    sigma: float


def load(weights: Path, mnist: Path, kernels: Path, steps: int, draws: int, sigma: float) -> Setting:
    """Weights and data.

    Raises:
        SystemExit: where some of it is not there.
    """
    missing = [name for name in ("prior/model_index.json", "guide.pt", "judge.pt") if not (weights / name).is_file()]
    if missing:
        raise SystemExit(f"no {', '.join(missing)} in {weights}; make them with python -m examples.mnist.train")
    digits = read_digits(mnist)
    held_out = digits.part("held out")
    guide, judge = Guide(), Judge()
    for name, network in (("guide", guide), ("judge", judge)):
        network.load_state_dict(torch.load(weights / f"{name}.pt", weights_only=True))
        network.eval().requires_grad_(False)
    folder = weights / "prior"
    return Setting(
        prior=sd.load_prior(folder, num_steps=steps),
        spectral={basis: sd.load_prior(folder, num_steps=steps, basis=basis) for basis in ("dct", "fft")},
        guide=guide,
        judge=judge,
        digits=Digits(held_out.images[CALIBRATION:], held_out.labels[CALIBRATION:]),
        varied=digits.part("prior").images[:, 0].std(0) > 0.5,
        kernels=read_kernels(kernels),
        draws=draws,
        sigma=sigma,
    )


def classes(setting: Setting, method: str, n: int, label: int, seed: int) -> tuple[Row, Pictures]:
    """Digits of one class."""
    chains = PARTICLES[n]
    kernel = METHODS[method](Classified(setting.prior, setting.guide))
    smc, seconds = timed(sd.SMC(kernel, n, chains, seed=1000 * seed + label, progress=False), torch.tensor(label))
    found = smc.weighted_samples()
    x = found.values["x"]
    share = right(found.log_w, setting.judge(x.flatten(0, 1)).unflatten(0, x.shape[:2]), label)
    ess, roots = smc.posterior.ess / n, smc.posterior.roots
    row = {
        "right": float(share.mean()),
        "ess": float(ess.mean()),
        "least ess": float(ess.amin(0).mean()),
        "roots": None if roots is None else float(roots[-1].double().mean()),
        "evidence": float(smc.log_evidence_per_chain.exp().mean()),
        "evaluations": sum(smc.network_evaluations),
        "seconds": seconds,
    }
    return row, {"draw": one_of_each(smc, label)[0]}


def reference(setting: Setting, seed: int, draws: int = 512) -> tuple[Row, Pictures]:
    """What exact posteriors of the classes are like, from many draws of the prior weighed by the guide."""
    generator = torch.Generator().manual_seed(500 + seed)
    started = time.process_time()
    x = torch.cat([setting.prior.chain.sample(min(64, draws - i), generator) for i in range(0, draws, 64)])
    log_w = setting.guide(x).log_softmax(1).T
    judged = setting.judge(x)
    share = [float(right(log_w[label][None], judged[None], label)) for label in range(10)]
    row = {
        "right": float(np.mean(share)),
        "sure": float((judged.softmax(1).amax(1) > 0.9).double().mean()),
        "seconds": time.process_time() - started,
    }
    return row, {"draw": x[0]}


def restoration(setting: Setting, task: str, method: str, number: int, seed: int) -> tuple[Row, Pictures]:
    """One held-out digit from half of its pixels or from a blurred picture."""
    index = int(torch.randperm(len(setting.digits.labels), generator=torch.Generator().manual_seed(seed))[number])
    truth, label = setting.digits.images[index], int(setting.digits.labels[index])
    unknown = setting.varied.clone()
    if task == "inpainting":
        seen = torch.ones(truth.shape, dtype=torch.bool)
        seen[:, truth.shape[-2] // 2 :] = False
        operator: Any = sd.Select(seen)
        unknown &= ~seen[0]
        basis = "dct"
    else:
        names = sorted(setting.kernels)
        operator = sd.Blur(setting.kernels[names[(3 * seed + number) % len(names)]])
        basis = "fft"
    clean = operator(truth)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7919 * seed + number))
    y = clean + setting.sigma * noise
    make, n = RESTORERS[method]
    prior = setting.spectral[basis] if method.startswith("Adapted") else setting.prior
    kernel = make(Measured(prior, operator, setting.sigma))
    smc, seconds = timed(sd.SMC(kernel, n, setting.draws, seed=seed, progress=False), y)
    draws = one_of_each(smc, seed)
    mean = draws.mean(0)
    row = {
        "error of the mean": rmse(truth, mean, unknown),
        "error of a draw": float(np.mean([rmse(truth, draw, unknown) for draw in draws])),
        "coverage": coverage(truth, draws, unknown[None], 0.9, seed=100 * seed + number),
        "misfit": float((operator(draws) - y).double().square().mean().sqrt()) / setting.sigma,
        "right": float((setting.judge(draws).argmax(1) == label).double().mean()),
        "ess": float(smc.posterior.ess.mean()) / n,
        "evaluations": sum(smc.network_evaluations) / setting.draws,
        "seconds": seconds,
    }
    shown = operator.adjoint(y) - (~seen).to(y.dtype) if task == "inpainting" else y
    return row, {"truth": truth, "measured": shown, "mean": mean, "draw": draws[0], "other draw": draws[-1]}


def one_of_each(smc: SMC, seed: int) -> Tensor:
    """(b, *event): one draw from each of a run's filters, by the weights within it."""
    found = smc.weighted_samples()
    log_w = found.log_w - found.log_w.amax(1, keepdim=True)
    index = torch.multinomial(log_w.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return found.values["x"][torch.arange(len(index)), index]


def timed(smc: SMC, *arguments: Tensor) -> tuple[SMC, float]:
    """A run and its processor time in seconds; DPS's word that it has no evidence is not repeated at every run."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the method's last step is a point mass")
        smc.run(*arguments)
    return smc, time.process_time() - started


def plan(setting: Setting, seeds: int, digits: int) -> Iterator[tuple[Row, Callable[[], tuple[Row, Pictures]]]]:
    """All runs: what identifies each, and what does it."""
    for seed in range(seeds):
        key: Row = {"seed": seed}
        yield {"task": "reference", **key}, lambda k=key: reference(setting, **k)  # type: ignore[misc]
        for task in ("inpainting", "deblurring"):
            for number in range(digits):
                for method in RESTORERS:
                    key = {"task": task, "method": method, "number": number, "seed": seed}
                    yield key, lambda k=key: restoration(setting, **k)  # type: ignore[misc]
        for n in PARTICLES:
            for label in range(10):
                for method in METHODS:
                    key = {"method": method, "n": n, "label": label, "seed": seed}
                    yield {"task": "class", **key}, lambda k=key: classes(setting, **k)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder with MNIST's test file")
    parser.add_argument("--kernels", type=Path, required=True, help="npz file with the blur kernels")
    parser.add_argument("--weights", type=Path, required=True, help="folder that examples/mnist/train.py made")
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows and pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits", type=int, default=3, help="held-out digits per seed and task")
    parser.add_argument("--steps", type=int, default=40, help="K, steps of the chain")
    parser.add_argument("--draws", type=int, default=16, help="independent filters of a restoration")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise of a measurement, on the scale [-1, 1]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    setting = load(
        arguments.weights, arguments.mnist, arguments.kernels, arguments.steps, arguments.draws, arguments.sigma
    )
    rows, pictures = arguments.out / "rows.jsonl", arguments.out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps, "draws": arguments.draws, "sigma": arguments.sigma}
    kept = arguments.out / "settings.json"
    if kept.exists() and json.loads(kept.read_text())["settings"] != settings:
        raise SystemExit(f"{kept} is of a study with other settings than {settings}; give another folder with --out")
    kept.write_text(json.dumps({"settings": settings, "machine": describe()}, indent=1) + "\n")
    done = [json.loads(line)["key"] for line in rows.read_text().splitlines()] if rows.exists() else []
    for key, work in plan(setting, arguments.seeds, arguments.digits):
        if key in done:
            continue
        row, shown = work()
        if key["seed"] == 0:
            name = " ".join(str(value) for value in key.values())
            arrays: dict[str, Any] = {k: v[0].half().numpy() for k, v in shown.items()}
            np.savez_compressed(pictures / f"{name}.npz", **arrays)
        with rows.open("a") as file:
            file.write(json.dumps({"key": key, **row}) + "\n")
        print(key, row, flush=True)


if __name__ == "__main__":
    main()
