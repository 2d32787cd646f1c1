"""The samplers of deepinv and azula on the problem of peers.py; run there in an environment of its own.

    python peers_side.py FOLDER

reads FOLDER/problem.pt and writes one file of draws and one line of JSON for each sampler, or the reason it has none.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sampler = Callable[[], Tensor]


def define_missing_operators() -> None:
    """torchvision's wheel for the CPU lacks these, and cannot be imported without."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # the definitions live as long as this does


class Counted(torch.autograd.Function):
    """x itself; counts the passes back."""

    passes = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Counted.passes += len(gradient)
        return gradient


class Prior:
    """E[x_0 given x_0 + sigma noise] of the Gaussian prior, for pictures (m, 1, side, side) on the scale [-1, 1]."""

    def __init__(self, problem: dict[str, Any]) -> None:
        self.basis, self.spectrum = problem["basis"], problem["spectrum"]
        self.forward = 0

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        self.forward += len(x)
        v = self.basis.to(x.dtype)
        noise = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2  # one, or one for each picture
        gain = self.spectrum.to(x.dtype) / (self.spectrum.to(x.dtype) + noise)
        return Counted.apply(((gain * (x.flatten(1) @ v)) @ v.mT).reshape(x.shape))


def of_azula(problem: dict[str, Any], prior: Prior) -> Iterator[tuple[str, int, Sampler]]:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance.dps import DPSSampler
    from azula.guidance.mmps import MMPSDenoiser
    from azula.guidance.tds import TDSSampler
    from azula.guidance.tmpd import TMPDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VPSchedule
    from azula.sample import DDPMSampler

    class Exact(Denoiser):
        schedule = VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
            alpha, sigma = self.schedule(t)
            return DiracPosterior(prior(x_t / alpha, sigma / alpha))

    y, mask, noise, draws = problem["y"], problem["mask"], problem["sigma_y"], problem["draws"]
    seen, measured, shape = mask > 0, problem["y"][problem["mask"] > 0], tuple(problem["y"].shape)
    exact = Exact()

    def A(x: Tensor) -> Tensor:
        return x[..., seen]

    def start(sampler: Any, number: int) -> Tensor:
        return sampler.init((number, *shape), dtype=y.dtype)

    def run(sampler: Any, number: int = draws) -> Tensor:
        return sampler(start(sampler, number))

    def one_by_one() -> Tensor:
        sampler = DPSSampler(exact, measured, A, steps=1000, silent=True, dtype=y.dtype)
        return torch.cat([run(sampler, 1) for _ in range(problem["few draws"])])

    def point(x0_hat: Tensor, ratio: Tensor) -> Tensor:
        return -0.5 * ((measured - A(x0_hat)) / noise) ** 2

    def widened(x0_hat: Tensor, ratio: Tensor) -> Tensor:
        variance = noise**2 + ratio**2 / (1 + ratio**2)
        return -0.5 * ((measured - A(x0_hat)) ** 2 / variance + variance.log())

    def ddpm(denoiser: Any) -> Sampler:
        return lambda: run(DDPMSampler(denoiser, steps=100, silent=True, dtype=y.dtype))

    def tds(twist: Callable[[Tensor, Tensor], Tensor]) -> Sampler:
        return lambda: run(TDSSampler(exact, twist, steps=100, silent=True, dtype=y.dtype))

    yield "azula DPS, one at a time", 1000, one_by_one
    yield (
        "azula DPS, in one batch",
        1000,
        lambda: run(DPSSampler(exact, measured, A, steps=1000, silent=True, dtype=y.dtype)),
    )
    yield "azula TMPD", 100, ddpm(TMPDenoiser(exact, measured, A, noise**2))
    yield "azula MMPS, 1 iteration", 100, ddpm(MMPSDenoiser(exact, measured, A, IsotropicCovariance(noise**2)))
    yield (
        "azula MMPS, 5 iterations",
        100,
        ddpm(MMPSDenoiser(exact, measured, A, IsotropicCovariance(noise**2), iterations=5)),
    )
    yield f"azula TDS, point twist, n = {draws}", 100, tds(point)
    yield f"azula TDS, PiGDM twist, n = {draws}", 100, tds(widened)


def of_deepinv(problem: dict[str, Any], prior: Prior) -> Iterator[tuple[str, int, Sampler]]:
    import deepinv
    import numpy as np
    from deepinv.sampling import DDRM, DPS, DDPMSolver, DiffPIR, PosteriorDiffusion, VariancePreservingDiffusion
    from deepinv.sampling.noisy_datafidelity import PiGDMDataFidelity

    class Exact(torch.nn.Module):
        """deepinv's pictures are on [0, 1]."""

        def forward(self, x: Tensor, sigma: Any, *args: Any, **kwargs: Any) -> Tensor:
            return (prior(2 * x - 1, 2 * torch.as_tensor(sigma)) + 1) / 2

    draws, noise = problem["draws"], problem["sigma_y"] / 2
    physics = deepinv.physics.Inpainting(
        img_size=tuple(problem["y"].shape),
        mask=problem["mask"].float(),
        noise_model=deepinv.physics.GaussianNoise(noise),
    )
    y = ((problem["y"] + problem["mask"]) / 2).float().expand(draws, *problem["y"].shape).clone()

    def centred(x: Tensor) -> Tensor:
        return 2 * x - 1

    times = torch.linspace(1, 0, 101, dtype=torch.float64)
    pigdm = PosteriorDiffusion(
        data_fidelity=PiGDMDataFidelity(),
        denoiser=Exact(),
        sde=VariancePreservingDiffusion(alpha=1.0),
        solver=DDPMSolver(timesteps=times),
    )
    yield "deepinv DPS", 1000, lambda: centred(DPS(Exact(), num_steps=1001)(y, physics, seed=1))
    yield "deepinv DDRM", 100, lambda: centred(DDRM(Exact(), sigmas=np.linspace(1, 0, 100))(y, physics))
    yield "deepinv DiffPIR", 100, lambda: centred(DiffPIR(Exact(), deepinv.optim.data_fidelity.L2())(y, physics))
    yield "deepinv PiGDM", 100, lambda: centred(pigdm(y, physics, seed=1))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    define_missing_operators()
    problem = torch.load(folder / "problem.pt")
    for library, samplers in (("deepinv", of_deepinv), ("azula", of_azula)):
        prior = Prior(problem)
        try:
            named = list(samplers(problem, prior))
        except Exception as error:  # whatever an import brings
            print(json.dumps({"name": library, "reason": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        version = importlib.metadata.version(library)
        for name, steps, sampler in named:
            torch.manual_seed(0)
            prior.forward = Counted.passes = 0
            start = time.process_time()
            try:
                x = sampler()
            except Exception as error:
                print(json.dumps({"name": name, "reason": f"{type(error).__name__}: {error}"}), flush=True)
                continue
            seconds = time.process_time() - start
            file = f"{name.replace(' ', '_').replace(',', '')}.pt"
            torch.save(x.double(), folder / file)
            row = {"name": name, "version": version, "steps": steps, "file": file, "draws": len(x)}
            row |= {"forward": prior.forward / len(x), "backward": Counted.passes / len(x), "seconds": seconds / len(x)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
