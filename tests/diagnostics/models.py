"""Runs for the tests of diagnostics: made-up tensors, and real runs on a Gaussian problem that is solved exactly."""

from __future__ import annotations

import functools

import pyro
import torch

import smcdiff as sd
from smcdiff.diagnostics import Run

F64 = torch.float64
SHAPE = (1, 3, 4)


def random_run() -> Run:
    """Every kind of variable, with numbers that mean nothing."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    b, n, steps = 3, 8, 5
    return Run(
        values={
            "x": randn(b, n, 1, 4, 6),
            "kernel": randn(b, n, 1, 3, 3),
            "scope/sigma": randn(b, n).double(),
            "flag": randn(b, n, 2) > 0,
            "half": randn(b, n).bfloat16(),
        },
        log_w=3 * randn(b, n),
        log_z=100 * randn(b),
        ess=randn(steps, b).double().exp(),
        log_z_path=randn(steps, b).double(),
        roots=torch.arange(steps * b).reshape(steps, b),
        entropy=randn(steps, b).double().abs(),
        resampled=randn(steps, b) > 0,
        ancestors=torch.randint(n, (steps, b, n), generator=generator),
        log_z_variance=randn(b).double().square(),
        log_likelihood={"y": randn(b, n, 1, 4, 6), "total": randn(b, n)},
        observed={"y": randn(1, 4, 6), "total": randn(2, 5)},
        constants={"exposure": randn(1, 4, 6), "x.truth": randn(1, 4, 6)},
        about={"seed": 7, "method": "TDS", "share": 0.25},
    )


def model(y: torch.Tensor | None = None, gain: torch.Tensor | None = None) -> torch.Tensor:
    """A picture of independent standard normal pixels, its noise level, and the two seen through a gain."""
    prior = sd.DiffusionPrior(
        sd.GaussianDenoiser(torch.zeros(SHAPE, dtype=F64), torch.ones(SHAPE, dtype=F64)), sd.VPSchedule(), 12
    )
    x = pyro.sample("x", prior)
    sigma = pyro.sample("sigma", pyro.distributions.LogNormal(torch.tensor(-0.5, dtype=F64), 0.3))
    gain = torch.ones((), dtype=F64) if gain is None else gain
    pyro.deterministic("brightness", x.mean())
    return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), gain * x, sigma), obs=y)


Y = torch.linspace(-1.5, 1.5, 12, dtype=F64).reshape(SHAPE)
GAIN = torch.tensor(1.5, dtype=F64)


@functools.cache
def real_run() -> sd.SMC:
    """A run of four chains on that program."""
    return sd.SMC(sd.TDS(model, sd.TweedieTwist()), 16, 4, seed=1, progress=False).run(Y, gain=GAIN)
