r"""Quadrature over a few latents, for integrands that may be far narrower than the normal law they are taken under.

The integral of f over R^d, f = N(mean, diag(deviation^2)) times a likelihood, is taken at Gauss-Hermite nodes about f's
own mode, with f's own curvature there:

    integral of f  ~  sum_j w_j f(z_j) / N(z_j; mode, R R^T),      z_j = mode + R u_j.

The mode is that of an even grid under the normal law, refined by Newton's steps with differences for derivatives, each
row by itself. Everything is a fixed number of evaluations, and a function of the rows alone.

References:
    J. Naylor, A. Smith, "Applications of a Method for the Efficient Computation of Posterior Distributions" (1982):
    Gauss-Hermite quadrature about the integrand's own moments.
    Q. Liu, D. Pierce, "A Note on Gauss-Hermite Quadrature" (1994): about its mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Nodes", "hermite", "moments", "refined"]

#: Points of the even grid along each of d axes, and how many deviations it reaches from the mean.
GRIDS = {1: (9, 3.0), 2: (5, 2.4), 3: (3, 1.5)}
#: Newton's steps.
STEPS = 4
#: Of a step: by how much a scale may shrink and grow, and how far the centre may move in scales, which stay as they are
#: where it would move farther.
SHRINK, GROW, REACH = 8.0, 2.0, 3.0
#: How far below the best height seen before a step may lead; it is taken back where it leads farther down.
LOST = 2.0
#: Least variance of the nodes' own law, in units of R R^T.
LEAST = 0.1


@dataclass(frozen=True, eq=False)
class Nodes:
    """z_j = centre + R u_j with the weights of N(centre, R R^T).

    Args:
        z: (m, nodes, d), float64.
        log_rule: log w_j - log N(z_j; centre, R R^T), (m, nodes).
    """

    z: Tensor
    log_rule: Tensor

    @classmethod
    def about(cls, centre: Tensor, scale: Tensor, count: int) -> Nodes:
        """Gauss-Hermite nodes, ``count`` along each axis.

        Args:
            centre: (m, d).
            scale: R, (m, d, d), lower triangular or not.
        """
        u, log_w = hermite(count, centre.shape[1], centre.device)
        log_size = torch.linalg.slogdet(scale)[1][:, None]
        log_normal = -0.5 * (u.square().sum(1) + centre.shape[1] * math.log(2 * math.pi)) - log_size
        return cls(centre[:, None] + u @ scale.mT, log_w - log_normal)


def moments(nodes: Nodes, log_f: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log of the integral of f, (m,), and its mean (m, d) and a root of its covariance (m, d, d).

    Args:
        log_f: at the nodes, (m, nodes).
        scale: R of the nodes; in its units no variance is below ``LEAST``.
    """
    log_w = nodes.log_rule + log_f
    w = log_w.softmax(1)
    mean = (w[..., None] * nodes.z).sum(1)
    away = torch.linalg.solve_ex(scale[:, None], (nodes.z - mean[:, None])[..., None])[0][..., 0]
    values, vectors = _eigh(torch.einsum("mj,mja,mjb->mab", w, away, away))
    root = scale @ vectors * values.clamp(min=LEAST).sqrt()[:, None]
    return log_w.logsumexp(1), mean, root


def refined(log_f: Callable[[Tensor], Tensor], mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """About where f is highest, (m, d), and R there, (m, d, d), R R^T minus the inverse of log f's curvature.

    Args:
        log_f: of z (m, nodes, d), (m, nodes).
        mean, deviation: of the normal law that f is under, (m, d), float64.
    """
    d = mean.shape[1]
    count, reach = GRIDS[d]
    line = torch.linspace(-reach, reach, count, dtype=mean.dtype, device=mean.device)
    grid = torch.cartesian_prod(*(line,) * d).reshape(-1, d)
    centre, height = _highest(log_f, mean[:, None] + deviation[:, None] * grid)
    scale = torch.diag_embed(reach / (count - 1) * deviation)  # half a spacing
    stencil, place = _stencil(d, mean.device)
    best = centre
    for _ in range(STEPS):
        z = centre[:, None] + stencil @ scale.mT
        f = log_f(z)
        lost = f[:, :1] < height[:, None] - LOST
        top, index = f.max(1)
        best = torch.where((top > height)[:, None], z[torch.arange(len(z), device=z.device), index], best)
        height = torch.maximum(top, height)
        slope, curvature = _derivatives(f, place, d)
        values, vectors = _eigh(-curvature)
        move = (vectors.mT @ slope[..., None])[..., 0] / values.clamp(min=GROW**-2)
        far = move.abs() > REACH
        move = (vectors @ move.clamp(-REACH, REACH)[..., None])[..., 0]
        stepped = centre + (scale @ move[..., None])[..., 0]
        centre = torch.where(lost, best, stepped)
        precision = torch.where(far, 1.0, values.clamp(GROW**-2, SHRINK**2))
        scale = scale @ vectors * precision.rsqrt()[:, None]
    return centre, scale


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m, d) and eigenvectors (m, d, d); those of one number without asking the host, which CUDA's does."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0], torch.ones_like(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _highest(log_f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    height, index = log_f(z).max(1)
    return z[torch.arange(len(z), device=z.device), index], height


@functools.lru_cache(maxsize=16)
def hermite(count: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes (count^d, d) and log-weights (count^d,) that integrate under N(0, I) in d dimensions."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    line, log_w = (torch.from_numpy(part).to(device) for part in (x, np.log(w / w.sum())))
    nodes = torch.cartesian_prod(*(line,) * d).reshape(-1, d)
    return nodes, torch.cartesian_prod(*(log_w,) * d).reshape(-1, d).sum(1)


@functools.lru_cache(maxsize=16)
def _stencil(d: int, device: torch.device) -> tuple[Tensor, dict[tuple[int, int], int]]:
    """0, e_i, -e_i and e_i + e_j, and where e_i + e_j stands."""
    eye = torch.eye(d, dtype=torch.float64, device=device)
    pairs = [(i, j) for i in range(d) for j in range(i)]
    rows = [torch.zeros_like(eye[:1]), eye, -eye, *(eye[i : i + 1] + eye[j : j + 1] for i, j in pairs)]
    return torch.cat(rows), {pair: 1 + 2 * d + index for index, pair in enumerate(pairs)}


def _derivatives(f: Tensor, place: dict[tuple[int, int], int], d: int) -> tuple[Tensor, Tensor]:
    """Slope (m, d) and curvature (m, d, d) from values at the stencil, (m, nodes)."""
    middle, above, below = f[:, :1], f[:, 1 : 1 + d], f[:, 1 + d : 1 + 2 * d]
    curvature = torch.diag_embed(above + below - 2 * middle)
    for (i, j), at in place.items():
        mixed = f[:, at] - above[:, i] - above[:, j] + middle[:, 0]
        curvature[:, i, j] = curvature[:, j, i] = mixed
    return 0.5 * (above - below), curvature
