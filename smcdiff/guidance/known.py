r"""Particles whose measured part is drawn from a law of its own: the step that ILVR, RePaint and replacement share.

In the coordinates V^T x_s of A = U diag(s) V^T the measurement knows those with s > 0,

    y_bar = s^+ U^T y = V^T x_0 + (sigma_y / s) noise.

They are drawn from a normal law that y_bar gives, the others from the chain's own step: q is normal with independent
coordinates, so it has a density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import SiteStep
from smcdiff.guidance.singular import SingularMeasurement, step_variance
from smcdiff.measurement.svd import reciprocal
from smcdiff.transforms import same_basis

__all__ = ["clean_variance", "variance_in", "with_known"]


def clean_variance(here: SingularMeasurement) -> Tensor:
    """(sigma_y / s)^2, the variance of y_bar about V^T x_0, and 0 where nothing is known."""
    return (here.sigma_y * reciprocal(here.s)).square()


def with_known(step: SiteStep, here: SingularMeasurement, mean: Tensor, variance: Tensor) -> Gaussian:
    """q: the known coordinates from N(mean, variance), the others as p has them.

    Where p is a point mass, so is q.

    Args:
        mean, variance: of V^T x_s, broadcastable to it; what they hold of unknown coordinates does not matter.
    """
    centre = here.svd.from_spectral(torch.where(here.seen, mean, here.svd.to_spectral(step.p.mean)))
    own = variance_in(step, here)
    return Gaussian(centre, None) if own is None else Gaussian(centre, torch.where(here.seen, variance, own), here.svd)


def variance_in(step: SiteStep, here: SingularMeasurement) -> Tensor | None:
    """The variance of the coordinates V^T x_s under p, or None for a point mass.

    Where p is not diagonal in V it is averaged over the event: q may have any.
    """
    if isinstance(step.p, Gaussian) and same_basis(step.p.basis, here.svd):
        return step.p.variance
    return step_variance(step)
