"""What else brings the weights of a whole picture nearer to each other: each remedy beside the run without it.

On the noise levels of ``sd.SinhGrid``, 30 steps; the last four on the picture of ``wafer64`` under noise of 0.25 on all
pixels of adapted_networks.py, the first three on four pictures drawn by each chain from its own law, with 2 chains of 8
particles:

    grid           sd.Tilted on the noise levels of three grids
    size           the same on pictures of 32 x 32, with the network alone and averaged over its symmetries
    training       sd.Tilted with the network that ships and with one trained further (--trained FOLDER, which
                   examples/train_prior.py makes, see there), each alone and averaged over its symmetries

    symmetries     the network averaged over the eight symmetries of a square, in chain and proposal
    tempering      the widened twist of sd.TDS raised to exponents that a pilot run chooses (sd.tempered)
    Gibbs          sweeps of conditional SMC with sd.Adapted on from a filter's path; how many sweeps bring another x_0
    local          each block of pixels resampled by its own share of the log-weights

The log-weights of sd.Adapted under white noise are sums over coordinates,

    log_g = -(|e_s|^2 - |e_st|^2) / 2 + const,      e = V (v + sigma^2)^(-1/2) V^T (y - m),

with m_s, v_s what the network says at x_s and m_st, v_st what was foretold. V (.) V^T brings them back to the pixels,
whose squares are summed block by block. Particles put together from blocks are no draws of the proposal, so the method
is biased: its bias is measured on a Gaussian field of 32 x 32 pixels whose covariance twist and proposal are told
wrongly (0.7 of it), against the exact posterior. ``error`` there is the root mean square over pixels of the posterior
mean's error and ``deviation`` the mean ratio of deviations, both over the exact deviation; 0 and 1 are right, and the
error of 64 exact draws is 0.125.

    python benchmarks/remedies.py [--remedies local symmetries ...] [--trained FOLDER] [--report]

A line of results/remedies.jsonl for each finished run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from adapted_networks import STEPS, increments, log_w, problem
from kept import Kept
from machine import describe
from page import markdown
from torch import Tensor

import smcdiff as sd
from smcdiff.diffusion.covariance import Diagonal
from smcdiff.smc.conditional import ConditionalSMC, Past
from smcdiff.smc.resampling import Systematic

RESULTS = Path(__file__).with_name("results") / "remedies.jsonl"
KEYS = ("remedy", "case")
SIGMA = 0.25
Row = dict[str, Any]


def trained() -> sd.DiffusionPrior:
    prior: sd.DiffusionPrior = sd.load_prior("wafer64", basis="dct")
    return prior.replace(num_steps=STEPS, grid=sd.SinhGrid(), variance="full")


def measured(prior: sd.DiffusionPrior) -> tuple[Tensor, Tensor]:
    """A picture drawn from the prior, and y."""
    x = prior.chain.sample(1, torch.Generator().manual_seed(1000))[0]
    return x, x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(2000))


def program(prior: sd.DiffusionPrior) -> Callable[..., None]:
    def model(y: Tensor | None = None) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), SIGMA), obs=y)

    return model


def weighed(method: Any, y: Tensor, x: Tensor, particles: int, chains: int) -> Row:
    """Spread of the log-weights of a run, of its evidence, and the error of its plain mean."""
    records = sd.Records(ancestors=True, summaries={"log_w": log_w})
    smc = sd.SMC(method, particles, chains, seed=0, max_batch=16, records=records, progress=False).run(y)
    log_z = smc.log_evidence_per_chain
    mean = smc.posterior.values["x"].flatten(0, 1).mean(0)
    return {
        "summed variance": float(increments(smc).sum()),
        "log Z between chains": float(log_z.max() - log_z.min()),
        "PSNR": psnr(mean, x),
        "passes": sum(smc.network_evaluations) / (particles * chains),
    }


def psnr(mean: Tensor, x: Tensor) -> float:
    return -10 * math.log10(float((mean - x).square().mean()) / 4)


def tilted(prior: sd.DiffusionPrior, task: str, pictures: int = 4) -> Row:
    """Means over pictures drawn from the prior."""
    operator, sigma, _ = problem(task)
    found = []
    for picture in range(pictures):
        x = prior.chain.sample(1, torch.Generator().manual_seed(100 + picture))[0]
        clean = operator(x)
        y = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(picture))

        def model(y: Tensor | None = None) -> None:
            pyro.sample("y", sd.GaussianMeasurement(operator, pyro.sample("x", prior), sigma), obs=y)

        found.append(weighed(sd.Tilted(model), y, x, 8, 2))
    return {key: sum(row[key] for row in found) / pictures for key in found[0]}


def grids() -> Iterator[tuple[str, Callable[[], Row]]]:
    for name in ("wafer64", "sem64"):
        for task in ("denoise", "deblur"):
            prior = sd.load_prior(name, basis=problem(task)[2]).replace(num_steps=STEPS, variance="full")
            for grid in (sd.KarrasGrid(), sd.LogGrid(), sd.SinhGrid()):
                used = prior.replace(grid=grid)
                yield f"{name}, {task}, {type(grid).__name__}", lambda p=used, t=task: tilted(p, t)


def sizes() -> Iterator[tuple[str, Callable[[], Row]]]:
    for name in ("wafer64", "sem64"):
        for task in ("denoise", "deblur"):
            prior = sd.load_prior(name, event_shape=(1, 32, 32), basis=problem(task)[2])
            prior = prior.replace(num_steps=STEPS, grid=sd.SinhGrid(), variance="full")
            averaged = prior.replace(denoiser=sd.SymmetricDenoiser(prior.chain.denoiser))
            for kind, used in (("alone", prior), ("averaged", averaged)):
                yield f"{name}, {task}, 32 x 32, {kind}", lambda p=used, t=task: tilted(p, t)


def training(trained: Path | None) -> Iterator[tuple[str, Callable[[], Row]]]:
    for task in ("denoise", "deblur"):
        shipped = sd.load_prior("wafer64", basis=problem(task)[2])
        shipped = shipped.replace(num_steps=STEPS, grid=sd.SinhGrid(), variance="full")
        priors = {"shipped": shipped}
        if trained:
            priors["trained further"] = shipped.replace(denoiser=sd.load_prior(str(trained)).chain.denoiser)
        for name, prior in priors.items():
            averaged = prior.replace(denoiser=sd.SymmetricDenoiser(prior.chain.denoiser))
            for kind, used in (("alone", prior), ("averaged", averaged)):
                yield f"{task}, {name}, {kind}", lambda p=used, t=task: tilted(p, t)


def symmetries() -> Iterator[tuple[str, Callable[[], Row]]]:
    prior = trained()
    x, y = measured(prior)
    averaged = prior.replace(denoiser=sd.SymmetricDenoiser(prior.chain.denoiser))
    for name, used in (("one network", prior), ("eight", averaged)):
        for method in (sd.Adapted, sd.Tilted):
            yield f"{method.__name__}, {name}", lambda m=method, p=used: weighed(m(program(p)), y, x, 8, 2)


def tempering() -> Iterator[tuple[str, Callable[[], Row]]]:
    prior = trained()
    x, y = measured(prior)
    plain = sd.TDS(program(prior), sd.WidenedTwist(0.1), max_shift=0.3)
    yield "TDS, widened", lambda: weighed(plain, y, x, 16, 2)

    def with_pilot() -> Row:
        kernel = sd.tempered(plain, y, ess_share=0.5, num_particles=16, num_chains=1, seed=9)
        exponents = getattr(kernel.twist, "exponents", ())
        return {**weighed(kernel, y, x, 16, 2), "median exponent": sorted(exponents)[len(exponents) // 2]}

    yield "TDS, widened and tempered", with_pilot


def gibbs() -> Iterator[tuple[str, Callable[[], Row]]]:
    prior = trained()
    x, y = measured(prior)

    def sweeps(past: Past) -> Row:
        chain = sd.ParticleGibbs(sd.Adapted(program(prior)), 16, 6, 2, moves=ConditionalSMC(past=past), seed=0,
                                 max_batch=16, progress=False)  # fmt: skip
        found = chain.run(y).get_samples(group_by_chain=True)["x"]
        changed = (found[:, 1:] != found[:, :-1]).flatten(2).any(2)
        return {"sweeps with another x_0": float(changed.double().mean()), "PSNR": psnr(found[:, -1].mean(0), x)}

    for past in (Past.TRACED, Past.ANCESTOR_SAMPLED):
        yield past.value, lambda p=past: sweeps(p)


def local() -> Iterator[tuple[str, Callable[[], Row]]]:
    prior = trained()
    x, y = measured(prior)
    for side in (64, 32, 16, 8, 0):

        def picture(side: int = side) -> Row:
            parts = [localised(prior, None, y, SIGMA, 16, side, seed) for seed in range(2)]
            values, w = (torch.stack([part[i] for part in parts]).flatten(0, 1) for i in (0, 1))
            mean = (w * values).sum(0) / 2
            return {"PSNR": psnr(mean, x), "spread in a block": sum(part[2] for part in parts) / 2}

        name = f"blocks of {side}" if side else "unweighted"
        yield f"wafer64, {name}", picture
        if side < 64:
            yield f"Gaussian field, {name}", lambda s=side: field(s)


def field(block: int, size: int = 32, particles: int = 64, seeds: int = 8) -> Row:
    """Error of the posterior of a Gaussian field whose covariance is told wrongly, in exact deviations."""
    frequency = torch.arange(size, dtype=torch.float64)
    spectrum = (1 + frequency[:, None] ** 2 + frequency**2)[None] ** -1.5
    spectrum = spectrum / spectrum.mean()
    basis = sd.transforms.DCT
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, size, size, dtype=torch.float64), spectrum, basis)
    schedule = sd.VPSchedule(1e-4, 1e-4 + (2e-2 - 1e-4) * 1299 / 999, 1300)
    prior = sd.DiffusionPrior(denoiser, schedule, STEPS, variance="full", grid=sd.KarrasGrid())
    told, sigma = sd.SpectralCovariance(0.7 * spectrum, "dct"), 0.5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, size, size, generator=generator, dtype=torch.float64)
    y = basis.from_spectral(spectrum.sqrt() * noise[:1])[0] + sigma * noise[1]
    gain = spectrum / (spectrum + sigma**2)
    exact = basis.from_spectral(gain * basis.to_spectral(y[None]))[0]
    units = basis.from_spectral(torch.eye(size**2, dtype=torch.float64).reshape(-1, 1, size, size))
    deviation = (units.square() * (sigma**2 * gain).reshape(-1, 1, 1, 1)).sum(0).sqrt()
    errors, ratios = [], []
    for seed in range(seeds):
        values, w, _ = localised(prior, told, y, sigma, particles, block, seed)
        mean = (w * values).sum(0)
        errors.append(float(((mean - exact) / deviation).square().mean()))
        ratios.append(float((((w * (values - mean) ** 2).sum(0)).sqrt() / deviation).mean()))
    return {"error": (sum(errors) / seeds) ** 0.5, "deviation": sum(ratios) / seeds}


@torch.no_grad()
def localised(
    prior: sd.DiffusionPrior, told: Any, y: Tensor, sigma: float, n: int, side: int, seed: int
) -> tuple[Tensor, Tensor, float]:
    """A filter whose blocks are resampled by themselves; blocks as large as the picture give the exact filter.

    Args:
        told: covariance of twist and proposal; None for the prior's own.
        side: of a block, in pixels; 0 for the proposal alone, without weights.

    Returns:
        x_0 (n, *event), its weights in each pixel (n, *event), and the summed variance of a block's log-increments.
    """
    chain, model = prior.chain, told or prior.covariance
    basis = sd.transforms.DCT
    generator = torch.Generator().manual_seed(seed)
    resampler, weighted, side = Systematic(), side > 0, side or chain.shape[-1]
    shape = (n, *chain.shape)

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=y.dtype)

    def blocks(pixels: Tensor) -> Tensor:
        """Sums over blocks, (blocks, n)."""
        return pixels.unfold(-2, side, side).unfold(-2, side, side).sum((1, -1, -2)).flatten(1).mT

    def spread_out(values: Tensor) -> Tensor:
        """(blocks, n) at each pixel, (n, 1, rows, columns)."""
        rows = shape[-2] // side
        return values.mT.reshape(n, 1, rows, -1).repeat_interleave(side, -2).repeat_interleave(side, -1)

    def white(residual: Tensor, variance: Tensor) -> Tensor:
        return basis.from_spectral(basis.to_spectral(residual) / variance.sqrt())

    def variance_at(which: Any, k: int) -> Tensor:
        found = which.at(chain.levels[k], {}, x)
        assert isinstance(found, Diagonal)
        return found.variance

    x = chain.initial_mean + chain.initial_scale * noise()
    log_weights = torch.zeros((shape[-2] // side) ** 2, n, dtype=torch.float64)
    total = 0.0
    for k in range(chain.num_steps, 0, -1):
        to, v = chain.step(k), variance_at(model, k)
        m = chain.denoise(x, chain.levels[k])
        p = v / (1 + v / sigma**2)
        first = m + basis.from_spectral(p / sigma**2 * basis.to_spectral(y - m))
        clean = first + basis.from_spectral(p.sqrt() * noise())
        foretold = to.b * x + to.c * m
        x = to.b * x + to.c * clean + to.kappa * noise()
        if to.kappa == 0:  # the last step: x is x_0, drawn from p(x_0 given x_t, y)
            before = 0 * x
            after = before
        else:
            known = v / (1 + (to.c / to.kappa) ** 2 * v)
            moved = to.c / to.kappa**2 * (x - foretold)
            before = white(y - m - basis.from_spectral(known * basis.to_spectral(moved)), known + sigma**2)
            after = white(y - chain.denoise(x, chain.levels[k - 1]), variance_at(model, k - 1) + sigma**2)
        log_g = 0.5 * (before.square() - after.square())
        if told is not None:  # the chain's own step against the one that was told
            spread, own = to.kappa**2 + to.c**2 * v, to.kappa**2 + to.c**2 * variance_at(prior.covariance, k)
            gone = x - foretold
            log_g = log_g + 0.5 * (white(gone, spread).square() - white(gone, own).square())
        of_blocks = blocks(log_g).double()
        total += float(of_blocks.var(1).mean())
        log_weights = log_weights + weighted * of_blocks
        w = log_weights.softmax(1)
        if k > 1:
            low = 1 / w.square().sum(1) < 0.5 * n
            ancestors = resampler(w, generator)
            ancestors = torch.where(low[:, None], ancestors.sort(1).values, torch.arange(n))
            x = x.gather(0, spread_out(ancestors).expand(shape))
            log_weights = torch.where(low[:, None], 0.0, log_weights)
    return x, spread_out(log_weights.softmax(1)).to(x.dtype), total


REMEDIES: dict[str, Callable[[Path | None], Iterator[tuple[str, Callable[[], Row]]]]] = {
    "grid": lambda _: grids(),
    "size": lambda _: sizes(),
    "training": training,
    "symmetries": lambda _: symmetries(),
    "tempering": lambda _: tempering(),
    "Gibbs": lambda _: gibbs(),
    "local": lambda _: local(),
}


def report(rows: list[Row], remedies: Iterable[str] = REMEDIES) -> str:
    """A table for each remedy."""
    parts = []
    for remedy in remedies:
        here = [row for row in rows if row["remedy"] == remedy]
        if not here:
            continue
        figures = [key for row in here for key in row if key not in (*KEYS, "seconds", "machine")]
        head = list(dict.fromkeys(figures))
        lines = [
            {remedy: row["case"], **{key: f"{row[key]:.4g}" if key in row else "–" for key in head}} for row in here
        ]
        parts.append(markdown(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remedies", nargs="+", choices=list(REMEDIES), default=list(REMEDIES))
    parser.add_argument("--trained", type=Path, help="folder of a wafer64 that was trained further")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(RESULTS, KEYS)
    for remedy in () if arguments.report else arguments.remedies:
        for case, run in REMEDIES[remedy](arguments.trained):
            row: Row = {"remedy": remedy, "case": case}
            if row in kept:
                continue
            started = time.process_time()
            row |= run()
            row |= {"seconds": time.process_time() - started, "machine": describe()}
            kept.add(row)
            print(json.dumps({key: value for key, value in row.items() if key != "machine"}), flush=True)
    print(report(kept.rows))


if __name__ == "__main__":
    main()
