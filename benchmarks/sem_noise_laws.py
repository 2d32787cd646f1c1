r"""Laws of a scanned picture's noise with unknown parameters, summed over a grid of them.

A picture y of a scene x, both (rows, columns) on the scale [-1, 1], is

    y = B_w x + sigma sqrt(v_h) e,    v_h = 1 - h + h max(1 + B_w x, 0.1),    Corr[e_ij, e_i,j+k] = rho^k,

with B_w a Gaussian blur of w pixels with mirrored borders and e standard normal, rows independent: sigma is the
deviation at mid-grey, h the share of it that grows with the signal, rho the correlation of neighbours in a row. With
r = (y - B_w x) / sqrt(v_h) the likelihood of all sigma and rho follows from four numbers,

    log p(y given x, theta) = - sum log v_h / 2 - N log sigma - (rows (columns - 1) / 2) log(1 - rho^2)
                              - (F + (A - 2 rho B + rho^2 C) / (1 - rho^2)) / (2 sigma^2) - N log(2 pi) / 2,
    F = sum r_i0^2,   A = sum r_ij^2,   B = sum r_ij r_i,j-1,   C = sum r_i,j-1^2    (j >= 1),

so that p(y given x) = sum of prior(theta) p(y given x, theta) over a grid, and p(theta given x, y), take no sampling.

A particle filter is *guided* at one theta_0, where the measurement is linear and Gaussian. Its final weights are
multiplied by p(y given x) / p(y_0 given x, theta_0), y_0 what the guide observes: the weights, and the mean of them,
are then those of the program with unknown theta, whatever theta_0 was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import pyro
import torch
from torch import Size, Tensor

import smcdiff as sd
from smcdiff.measurement.operators import LinearOperator, SpectralOperator, TransposeOperator
from smcdiff.measurement.svd import SVD
from smcdiff.restoration.acquisition import Whiten
from smcdiff.restoration.noise_level import FLOOR
from smcdiff.transforms import dct, identity, inverse_dct

__all__ = ["Family", "Guide", "Theta", "blur", "row_noise"]


@dataclass(frozen=True)
class Theta:
    """The parameters of a law.

    Args:
        sigma: standard deviation at mid-grey, greater than 0.
        rho: correlation of neighbours in a row, in [0, 1).
        h: share of the variance at mid-grey that is proportional to the signal, in [0, 1].
        w: width of the blur in pixels, at least 0.
    """

    sigma: float
    rho: float = 0.0
    h: float = 0.0
    w: float = 0.0


@dataclass(frozen=True)
class Guide:
    """What a particle filter is run on in place of the law with unknown parameters.

    Args:
        program: the Pyro program of a measurement y_0 with known parameters.
        y: y_0.
        log_prob: (..., 1, rows, columns) -> log p(y_0 given x), (...,) of float64.
    """

    program: Callable[..., Any]
    y: Tensor
    log_prob: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Family:
    """A law with unknown parameters, uniform on its grid (log sigma, rho, h and w each evenly spaced).

    Args:
        sigma, rho, h, w: the nodes of each parameter, (g,) of float64; a single node 0 leaves it out.
    """

    sigma: Tensor
    rho: Tensor
    h: Tensor
    w: Tensor

    @classmethod
    def of(cls, rho: bool = False, h: bool = False, w: bool = False) -> Family:
        """The family in which sigma and these are unknown."""
        none = torch.zeros(1, dtype=torch.float64)

        def nodes(wanted: bool, high: float, number: int) -> Tensor:
            return torch.linspace(0, high, number, dtype=torch.float64) if wanted else none

        sigma = torch.linspace(math.log(0.05), math.log(0.8), 240, dtype=torch.float64).exp()
        return cls(sigma, nodes(rho, 0.9, 91), nodes(h, 1.0, 41), nodes(w, 1.5, 61))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(h, w, rho, sigma): of the grid."""
        return len(self.h), len(self.w), len(self.rho), len(self.sigma)

    def log_joint(self, y: Tensor, x: Tensor) -> Tensor:
        """log of prior(theta) p(y given x, theta) for one scene x at every node, of the shape of the grid, float64."""
        y, x = y.double().reshape(y.shape[-2:]), x.double().reshape(x.shape[-2:])
        rows, columns = y.shape
        whole, rho = rows * columns, self.rho[:, None]
        scale = (1 - rho**2).log() * (rows * (columns - 1) / 2) + whole * self.sigma.log()
        found = torch.empty(self.shape, dtype=torch.float64)
        for j, w in enumerate(self.w):
            clean = blur(x, float(w))
            for i, h in enumerate(self.h):
                v = relative_variance(clean, float(h))
                r = (y - clean) / v.sqrt()
                first, now, before = r[:, :1].square().sum(), r[:, 1:], r[:, :-1]
                inner = now.square().sum() - 2 * rho * (now * before).sum() + rho**2 * before.square().sum()
                total = first + inner / (1 - rho**2)
                found[i, j] = -0.5 * v.log().sum() - scale - total / (2 * self.sigma**2)
        return found - whole * math.log(2 * math.pi) / 2 - math.log(found.numel())

    def log_prob(self, y: Tensor, x: Tensor) -> Tensor:
        """log p(y given x) with theta summed out, 0-d."""
        return self.log_joint(y, x).flatten().logsumexp(0)

    def marginals(self, log_joint: Tensor) -> dict[str, Tensor]:
        """{parameter: (g,)}, p(theta given x, y) of each parameter that is unknown."""
        p = log_joint.flatten().softmax(0).reshape(self.shape)
        axes = {"h": 0, "w": 1, "rho": 2, "sigma": 3}
        return {
            name: p.sum([other for other in range(4) if other != axis])
            for name, axis in axes.items()
            if self.shape[axis] > 1
        }

    def draw(self, log_joint: Tensor, generator: torch.Generator) -> Theta:
        """A draw of theta given x and y."""
        place = int(torch.multinomial(log_joint.flatten().softmax(0), 1, generator=generator))
        i, j, k, m = (int(index) for index in torch.unravel_index(torch.tensor(place), self.shape))
        return Theta(float(self.sigma[m]), float(self.rho[k]), float(self.h[i]), float(self.w[j]))

    def nearest(self, theta: Theta) -> Theta:
        """Theta with what this family leaves out put to 0, and the rest within the grid."""
        values = {
            name: min(max(getattr(theta, name), float(nodes[0])), float(nodes[-1]))
            for name, nodes in (("rho", self.rho), ("h", self.h), ("w", self.w), ("sigma", self.sigma))
        }
        return replace(theta, **values)


def relative_variance(clean: Tensor, h: float) -> Tensor:
    """v_h of a blurred scene."""
    return 1 - h + h * (1 + clean).clamp(min=FLOOR)


def blur(x: Tensor, w: float) -> Tensor:
    """B_w x over the last two axes: each cosine of frequency f (radians a pixel) times exp(-w^2 f^2 / 2)."""
    return x if w == 0 else inverse_dct(_gaussian(x, w) * dct(x))


def row_noise(theta: Theta, clean: Tensor, generator: torch.Generator) -> Tensor:
    """A draw of the noise on a blurred scene (..., rows, columns)."""
    white = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    columns = [white[..., 0]]
    for j in range(1, white.shape[-1]):
        columns.append(theta.rho * columns[-1] + math.sqrt(1 - theta.rho**2) * white[..., j])
    return theta.sigma * relative_variance(clean, theta.h).sqrt() * torch.stack(columns, -1)


def guide(y: Tensor, theta: Theta, prior: sd.DiffusionPrior, about: Tensor) -> Guide:
    """The program with known parameters that leads the particles.

    Where the variance does not depend on the signal it is diagonal in the cosines, in which the autoregression's
    covariance nearly is. Where it does, the variance is held at what it is about a scene, and the rows are whitened.

    Args:
        y: the picture, (1, rows, columns).
        about: a guess of the scene, of that shape.
    """
    operator: LinearOperator
    if theta.h == 0:
        rows, columns = y.shape[-2:]
        f = math.pi * torch.arange(columns, dtype=torch.float64) / columns
        precision = (1 - 2 * theta.rho * f.cos() + theta.rho**2) / (1 - theta.rho**2) / theta.sigma**2
        s = precision.sqrt().expand(rows, columns)
        operator, y_0 = _Cosines(s * _gaussian(y.double(), theta.w)), s * dct(y.double())
    else:
        weight = 1 / (theta.sigma * relative_variance(blur(about.double(), theta.w), theta.h).sqrt())
        operator, y_0 = _Rows(weight, theta), Whiten(theta.rho)(weight * y.double())
    seen = y_0.to(y.dtype)

    def program(measured: Tensor | None = None) -> Any:
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(operator, x, 1.0), obs=measured)

    def log_prob(x: Tensor) -> Tensor:
        r = (seen.double() - operator(x.double())).flatten(-3)
        return -0.5 * r.square().sum(-1) - 0.5 * r.shape[-1] * math.log(2 * math.pi)

    return Guide(program, seen, log_prob)


def _gaussian(x: Tensor, w: float) -> Tensor:
    """exp(-w^2 f^2 / 2) at every cosine of pictures like x, (rows, columns)."""
    rows, columns = ((math.pi * torch.arange(n, dtype=x.dtype) / n) ** 2 for n in x.shape[-2:])
    return (-0.5 * w**2 * (rows[:, None] + columns)).exp()


@final
@dataclass(frozen=True, eq=False)
class _Cosines(SpectralOperator):
    """y = s times the cosine coefficients of x.

    Args:
        s: (rows, columns), at least 0.
    """

    s: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.s.to(x.dtype) * dct(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return inverse_dct(self.s.to(y.dtype) * y)

    def svd(self, x: Tensor) -> SVD:
        return SVD(self.s.to(x.dtype)[None], dct, inverse_dct, identity, identity)

    def input_shape(self, shape: Size) -> Size:
        return shape


@final
@dataclass(frozen=True, eq=False)
class _Rows(TransposeOperator):
    """y = W_rho (weight B_w x).

    Args:
        weight: (1, rows, columns).
        theta: whose rho and w count.
    """

    weight: Tensor
    theta: Theta

    def __call__(self, x: Tensor) -> Tensor:
        return Whiten(self.theta.rho)(self.weight.to(x.dtype) * blur(x, self.theta.w))

    def adjoint(self, y: Tensor) -> Tensor:
        return blur(self.weight.to(y.dtype) * Whiten(self.theta.rho).adjoint(y), self.theta.w)
