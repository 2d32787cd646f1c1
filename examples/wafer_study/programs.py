"""The study's Pyro programs: y = k * x + sigma noise, with the kernel known or a latent of one of three priors."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from torch import Tensor

import smcdiff as sd
from examples.wafer_study.measurements import SIZE
from smcdiff.measurement.psf import gaussian_psf
from smcdiff.measurement.psf_priors import GaussianPSF, KernelPrior, SimplexKernel

__all__ = ["PHYSICAL", "SIMPLEX", "Program", "any_kernel", "known", "learned", "of_width"]

Program = Callable[..., Tensor]

#: A Gaussian whose width is known to a factor of about two.
PHYSICAL = GaussianPSF(size=SIZE, median=1.4, spread=0.4)
#: Any kernel near a Gaussian of that median width.
SIMPLEX = SimplexKernel(gaussian_psf(torch.tensor(1.4), 17), spread=1.0, correlation=2.0)


def known(prior: sd.DiffusionPrior, kernel: Tensor, sigma: float) -> Program:
    """The kernel is given."""
    blur = sd.Blur(kernel)

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(blur, x, sigma), obs=y)

    return model


def any_kernel(prior: sd.DiffusionPrior, kernels: KernelPrior, sigma: float) -> Program:
    """The kernel has a prior of its own, which makes the site "psf"."""

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        kernel = kernels.sample("psf", like=x)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel), x, sigma), obs=y)

    return model


def of_width(prior: sd.DiffusionPrior, width: float, sigma: float) -> Program:
    """A Gaussian kernel of this width."""
    return known(prior, gaussian_psf(torch.tensor(width), PHYSICAL.size), sigma)


def learned(prior: sd.DiffusionPrior, kernels: sd.DiffusionPrior, sigma: float) -> Program:
    """The kernel is a picture of a diffusion prior of its own, on [-1, 1]."""

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior)
        k = pyro.sample("k", kernels)
        kernel = sd.normalised_kernel(k.clamp(min=-1))[..., 0, :, :]
        pyro.deterministic("psf", kernel, event_dim=2)
        return pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel), x, sigma), obs=y)

    return model
