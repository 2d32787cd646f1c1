"""How close a coarse chain with the full covariance comes to the trained model.

Unconditional draws of a shipped prior: the chain with ``variance="full"`` on the noise levels of ``sd.SinhGrid`` and on
those of ``sd.KarrasGrid``, and beside it on the latter with ``variance="posterior"`` and ``"fixed_large"``, at 10, 20
and 50 steps, each against as many draws of the 1000-step chain with the posterior variance. Distances between the two
laws:

    patches     sliced Wasserstein-1 distance of 8 x 8 patches, grey values on [-1, 1]
    spectrum    root mean square over 16 rings of frequency of the difference in log mean power
    pictures    energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of pictures, unbiased, |.| the root mean square
    bands       the same of the logarithms of each picture's powers in the rings, every ring scaled to variance 1

Pictures that the prior was trained on are held against the same draws: for wafer64 from its generator, for sem64 crops
of the frames 001 to 040 of the folder ``--sem``, where it is given; ``spectrum to data`` is each chain's to them.

The first two are means over random halves, of the coarse draws and of the 1000-step draws; the floor is what two
disjoint halves of the 1000-step draws have between them. Beside the energy distances stands p, the share of 999 random
relabellings of the draws that have one as large: below 0.01 the two laws differ visibly with that many draws. The
floor's row has the energy distances of two halves of the 1000-step draws.

    python benchmarks/full_chain.py wafer64 sem64 --draws 64 --threads 1

Draws are kept in the folder ``--keep``, 16 at a time, and made once. Results are in results/full_chain.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from page import markdown
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.kernels import Variance
from smcdiff.restoration.images import read_image
from smcdiff.training import random_crops
from smcdiff.transforms import dct
from smcdiff.zoo.wafer import Wafer

RESULTS = Path(__file__).with_name("results") / "full_chain.json"
SET, HALVES, RELABELLINGS, RINGS = 16, 20, 999, 16
Grid = sd.SinhGrid | sd.KarrasGrid | sd.LinspaceGrid
#: {name of a chain: variance, grid}; the first one is the reference, with 1000 steps.
LAWS: dict[str, tuple[Variance, Grid]] = {
    "posterior, all steps": ("posterior", sd.LinspaceGrid()),
    "full, SinhGrid": ("full", sd.SinhGrid()),
    "full, KarrasGrid": ("full", sd.KarrasGrid()),
    "posterior, KarrasGrid": ("posterior", sd.KarrasGrid()),
    "fixed_large, KarrasGrid": ("fixed_large", sd.KarrasGrid()),
}
REFERENCE = ("posterior, all steps", 1000)
CHAINS = [(law, steps) for steps in (10, 20, 50) for law in list(LAWS)[1:]]


def patches(x: Tensor, size: int = 8) -> Tensor:
    """(number, size^2): the patches on a regular grid."""
    return x.unfold(-2, size, size).unfold(-2, size, size).reshape(-1, size * size)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256) -> float:
    """Mean over random directions of the Wasserstein-1 distance of the projections."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(a.shape[1], directions, generator=generator, dtype=a.dtype)
    theta = theta / theta.norm(dim=0)
    return float(((a @ theta).sort(0)[0] - (b @ theta).sort(0)[0]).abs().mean())


def ring_powers(x: Tensor) -> Tensor:
    """Mean power of each picture in rings of frequency, (number, RINGS)."""
    power = dct(x - x.mean((-2, -1), keepdim=True)).square().mean(1)
    frequency = torch.arange(x.shape[-1]) / x.shape[-1]
    ring = ((frequency[:, None] ** 2 + frequency**2).sqrt() * RINGS).long().clamp(max=RINGS - 1)
    return torch.stack([power[:, ring == r].mean(1) for r in range(RINGS)], 1)


def spectrum(a: Tensor, b: Tensor) -> float:
    logs = ring_powers(a).mean(0).log() - ring_powers(b).mean(0).log()
    return float(logs.square().mean().sqrt())


def energy(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Energy distance of two samples (number, features), unbiased, and the p-value of their being of one law."""
    pooled = torch.cat([a, b]).double()
    distances = torch.cdist(pooled, pooled) / pooled.shape[1] ** 0.5
    n, m = len(a), len(b)
    generator = torch.Generator().manual_seed(0)

    def distance(order: Tensor) -> float:
        d = distances[order][:, order]
        across, within_a, within_b = d[:n, n:].mean(), d[:n, :n].sum() / (n * (n - 1)), d[n:, n:].sum() / (m * (m - 1))
        return float(2 * across - within_a - within_b)

    found = distance(torch.arange(n + m))
    others = [distance(torch.randperm(n + m, generator=generator)) for _ in range(RELABELLINGS)]
    return found, (1 + sum(other >= found for other in others)) / (1 + RELABELLINGS)


def halves(a: Tensor, b: Tensor | None) -> tuple[float, float]:
    """Distances of patches and spectra, means over random halves; of ``a`` with itself where there is no b."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(HALVES):
        order = torch.randperm(len(a), generator=generator)
        one, other = a[order[: len(a) // 2]], a[order[len(a) // 2 :]]
        if b is not None:
            other = b[torch.randperm(len(b), generator=generator)[: len(b) // 2]]
        found.append((sliced_wasserstein(patches(one), patches(other)), spectrum(one, other)))
    return sum(one for one, _ in found) / HALVES, sum(two for _, two in found) / HALVES


def compared(x: Tensor, reference: Tensor | None) -> dict[str, float]:
    """All distances of draws x to the reference; of the two halves of x where there is none."""
    near, far = (x, reference) if reference is not None else x.chunk(2)
    of_patches, of_spectra = halves(x, reference)
    bands_near, bands_far = ring_powers(near).log(), ring_powers(far).log()
    scale = bands_far.std(0)
    of_pictures, p_pictures = energy(near.flatten(1), far.flatten(1))
    of_bands, p_bands = energy(bands_near / scale, bands_far / scale)
    return {
        "patches": of_patches,
        "spectrum": of_spectra,
        "pictures": of_pictures,
        "pictures p": p_pictures,
        "bands": of_bands,
        "bands p": p_bands,
    }


def draws(prior_name: str, law: str, steps: int, number: int, keep: Path) -> tuple[Tensor, float]:
    """Draws of a chain, kept in sets, and processor seconds for each."""
    variance, grid = LAWS[law]
    parts, seconds = [], []
    for start in range(0, number, SET):
        path = keep / f"{prior_name}_{law.replace(', ', '_').replace(' ', '_')}_{steps}_{start}.pt"
        if not path.is_file():
            prior = sd.load_prior(prior_name).replace(num_steps=steps, variance=variance, grid=grid)
            began = time.process_time()
            generator = torch.Generator().manual_seed(100_000 * steps + start)
            x = prior.chain.sample(SET, generator)
            torch.save({"x": x, "seconds": (time.process_time() - began) / SET}, path)
        found = torch.load(path)
        parts.append(found["x"])
        seconds.append(found["seconds"])
    return torch.cat(parts)[:number], sum(seconds) / len(seconds)


def trained_on(prior_name: str, number: int, sem: Path | None) -> Tensor | None:
    """Pictures of a prior's training data, turned and mirrored as there."""
    generator = torch.Generator().manual_seed(1)
    if prior_name == "wafer64":
        frames = torch.from_numpy(Wafer(defect_rate=0.03).draw_images(np.random.default_rng(1), number))
    elif prior_name == "sem64" and sem:
        frames = torch.stack([read_image(sem / f"{name:03d}.png") for name in range(1, 41)])
    else:
        return None
    return random_crops(frames.float(), number, 64, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("priors", nargs="*", default=["wafer64", "sem64"])
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "full_chain_draws")
    parser.add_argument("--sem", type=Path, help="folder of the high-dose SEM frames")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.keep.mkdir(parents=True, exist_ok=True)
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows: list[dict[str, Any]] = [row for row in kept if row["prior"] not in arguments.priors]
    for prior in arguments.priors:
        coarse = {chain: draws(prior, *chain, arguments.draws, arguments.keep) for chain in CHAINS}
        reference, seconds = draws(prior, *REFERENCE, arguments.draws, arguments.keep)
        data = trained_on(prior, arguments.draws, arguments.sem)
        laws = {("two halves of the reference", REFERENCE[1]): (reference, seconds), **coarse}
        if data is not None:
            laws[("pictures of its training data", 0)] = (data, 0.0)
        for (chain, steps), (x, taken) in laws.items():
            distances: dict[str, Any] = compared(x, None if x is reference else reference)
            of_data = None if data is None or x is data else halves(x, data)[1]
            row = {"prior": prior, "chain": chain, "steps": steps, "draws": arguments.draws, **distances}
            rows.append({**row, "spectrum to data": of_data, "seconds per draw": taken, "machine": describe()})
    result = {"rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(report(rows))


def report(rows: list[dict[str, Any]]) -> str:
    return markdown([{key: _shown(value) for key, value in row.items() if key != "machine"} for row in rows])


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
