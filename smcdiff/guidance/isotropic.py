r"""A measurement of something known up to white noise: the Gaussian algebra that several methods share.

With x_0 ~ N(m, v I) and y = A x_0 + sigma_y noise, A = U diag(s) V^T,

    y ~ N(A m, v A A^T + sigma_y^2 I),
    E[x_0 given y] = m + v A^T (v A A^T + sigma_y^2 I)^-1 (y - A m),

both coordinate by coordinate in the singular basis: no large numbers are subtracted where sigma_y is small.
"""

from __future__ import annotations

from torch import Tensor

from smcdiff.guidance.singular import SingularMeasurement

__all__ = ["log_marginal", "pull"]


def log_marginal(here: SingularMeasurement, mean: Tensor, variance: float) -> Tensor:
    """log N(y; A m, v A A^T + sigma_y^2 I) for means m of shape (m, *event): (m,), float64, differentiable in m.

    Args:
        variance: v, at least 0.
    """
    centre = here.s * here.svd.to_spectral(mean)
    return here.log_density(here.y, centre, variance * here.s.square() + here.sigma_y**2, here.seen)


def pull(here: SingularMeasurement, mean: Tensor, variance: float) -> Tensor:
    """A^T (v A A^T + sigma_y^2 I)^-1 (y - A m) for means m of shape (m, *event), of that shape.

    Args:
        variance: v, at least 0.
    """
    residual = here.y - here.s * here.svd.to_spectral(mean)
    return here.svd.from_spectral(here.s / (variance * here.s.square() + here.sigma_y**2) * residual)
