r"""The quadratic of a picture whose covariance and measurement are diagonal in one basis: everything elementwise.

Blur and Fourier, masks and pixels, white noise and any basis. The covariance may have a correction of low rank besides
(:class:`smcdiff.diffusion.covariance.Corrected`). Without one, C = V diag(v) V^T, J = V diag(j) V^T, c = V^T m and
slope g in coordinates,

    log of the integral     l + sum_i (g_i^2 v_i / (1 + v_i j_i) - log(1 + v_i j_i)) / 2
    x_0 given y             V (c + v g / (1 + v j) + sqrt(v / (1 + v j)) noise)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from smcdiff.diffusion.covariance import Corrected, Covariance, Diagonal
from smcdiff.guidance.gauss_newton import whitened
from smcdiff.guidance.picture import foretold_variance, innermost, picture_measurement
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Covariances, Noise, States
from smcdiff.guidance.singular import per_program
from smcdiff.measurement import GaussianMeasurement, Identity, LinearOperator, MixedMeasurement, PoissonMeasurement
from smcdiff.measurement.svd import reciprocal
from smcdiff.transforms import PIXELS, Basis, same_basis

__all__ = ["DiagonalExpansion", "DiagonalMeasurement", "diagonal_expansion", "diagonal_measurement", "measured_latent"]


@dataclass(frozen=True, eq=False)
class DiagonalMeasurement:
    """One picture under noise of known variance: log p(y given x_0) = constant - |seen - root V^T x_0|^2 / 2.

    Args:
        name: the picture's site.
        root: sqrt(j), (1, *shape).
        seen: V^T A^T Sigma^-1 z / root, (1, *shape).
        constant: the log-density where every coordinate is met.
        basis: V.
    """

    name: str
    root: Tensor
    seen: Tensor
    constant: float
    basis: Basis

    @property
    def expanded_at(self) -> States:
        return {}

    def condition(self, mean: States, covariance: Covariances) -> _DiagonalConditioned:
        m, c = mean[self.name], _in_coordinates(covariance[self.name])
        missing = self.seen - self.root * self.basis.to_spectral(m)
        value = self.constant - 0.5 * _sum(missing.square())
        return _DiagonalConditioned(self.name, m, c, value, self.root * missing, self.root.square(), self.basis)

    def expanded(self, program: Program, at: States) -> DiagonalExpansion:
        """The program's own law about ``at``, with this curvature."""
        value, gradient = slope_at(program, at, self.name)
        slope = self.basis.to_spectral(gradient)
        return DiagonalExpansion(self.name, at[self.name], value, slope, self.root.square(), self.basis)


@dataclass(frozen=True, eq=False)
class DiagonalExpansion:
    """One latent's quadratic about a state of each particle, the other latents as they are there.

    Args:
        name: the latent's site.
        at: where it is expanded, (m, *shape).
        value: l, (m,) of float64.
        slope: g in coordinates, (m, *shape).
        precision: j, (m or 1, *shape).
        basis: V.
    """

    name: str
    at: Tensor
    value: Tensor
    slope: Tensor
    precision: Tensor
    basis: Basis

    @property
    def expanded_at(self) -> States:
        return {self.name: self.at}

    def condition(self, mean: States, covariance: Covariances) -> _DiagonalConditioned:
        m, c = mean[self.name], _in_coordinates(covariance[self.name])
        d = self.basis.to_spectral(m - self.at)
        value = self.value + _sum((self.slope - 0.5 * self.precision * d) * d)
        return _DiagonalConditioned(self.name, m, c, value, self.slope - self.precision * d, self.precision, self.basis)


def _in_coordinates(covariance: Covariance) -> Diagonal | Corrected:
    """V^T C V."""
    assert isinstance(covariance, Diagonal | Corrected)
    return replace(covariance, basis=PIXELS)


@dataclass(frozen=True, eq=False)
class _DiagonalConditioned:
    name: str
    centre: Tensor  # m
    covariance: Diagonal | Corrected  # C in coordinates
    value: Tensor
    slope: Tensor  # g at m, in coordinates
    precision: Tensor  # j
    basis: Basis

    @cached_property
    def _posterior(self) -> Diagonal | Corrected:
        """P in coordinates."""
        return self.covariance.given(self.precision)

    def log_integral(self) -> Tensor:
        gained = _sum(self.slope * self._posterior.apply(self.slope))
        return self.value + 0.5 * (gained - self.covariance.log_det_gain(self.precision))

    def mean(self) -> States:
        return {self.name: self.centre + self.basis.from_spectral(self._posterior.apply(self.slope))}

    def draw(self, noise: Noise) -> States:
        shift = self._posterior.apply(self.slope) + self._posterior.draw(noise(self.centre.shape))
        return {self.name: self.centre + self.basis.from_spectral(shift)}


@per_program
def diagonal_measurement(program: Program, basis: Basis) -> DiagonalMeasurement | None:
    """The program as one picture that is measured coordinate by coordinate of a basis; None where it is not."""
    picture = picture_measurement(program)
    if picture is None or not picture.is_diagonal_in(basis):
        return None
    x = picture.x[None].double()
    precision, pull, squares = torch.zeros_like(x), torch.zeros_like(x), 0.0
    for site in picture.sites:
        power, svd = site.weight.square(), site.svd
        if site.even and svd is not None:
            power, s = power.flatten()[0], svd.singular_values
            precision = precision + power * s.square()
            if same_basis(svd, basis):
                pull = pull + power * s * svd.measurement_to_spectral(site.target)
            else:  # A^T A is a multiple of the identity
                pull = pull + power * basis.to_spectral(site.operator.adjoint(site.target)[None])
        else:  # pixel by pixel
            precision = precision + site.operator.adjoint(power * site.operator(torch.ones_like(x)))
            pull = pull + site.operator.adjoint(power * site.target)
        squares += float((site.weight * site.target).square().sum())
    root = precision.sqrt()
    seen = pull * reciprocal(root)
    constant = picture.constant - 0.5 * (squares - float(seen.square().sum()))
    return DiagonalMeasurement(picture.name, root.to(picture.x), seen.to(picture.x), constant, basis)


def slope_at(program: Program, at: States, name: str) -> tuple[Tensor, Tensor]:
    """log p(y given at), (m,) of float64, and the Gauss-Newton slope H^T r of one latent, (m, *shape)."""
    states = {site: value.detach() for site, value in at.items()}
    value = program.log_prob(states)

    def squares(site: str, fn: Distribution, y: Tensor) -> Tensor:
        return -0.5 * whitened(site, fn, y).square()

    with torch.enable_grad():
        states[name] = states[name].requires_grad_()
        (slope,) = torch.autograd.grad(program.log_prob(states, squares).sum(), states[name])
    return value, slope


@per_program
def measured_latent(program: Program, basis: Basis) -> str | None:
    """The one diffusion prior that all observed sites measure by operators with V as singular basis, other latents
    aside; None where there is none."""
    names = [name for name, latent in program.latents.items() if latent.is_diffusion]
    if len(names) != 1 or program.probe.weighted:
        return None
    x = program.probe.values[names[0]]
    for law in map(innermost, program.probe.laws.values()):
        if not isinstance(law, GaussianMeasurement | MixedMeasurement | PoissonMeasurement):
            return None
        if not isinstance(law.operator, LinearOperator) or law.x.shape != x.shape or not torch.equal(law.x, x):
            return None
        svd = law.operator.svd(x)
        if svd is None or not (same_basis(svd, basis) or isinstance(law.operator, Identity)):
            return None
    return names[0]


def diagonal_expansion(program: Program, at: States, name: str, basis: Basis) -> DiagonalExpansion:
    """The quadratic of the one measured latent about ``at``, the other latents held there.

    Where the noise is uneven and the basis is not the pixels', J has the mean precision.

    Args:
        at: of all latents, {site: (m, *shape)}.
        name: what :func:`measured_latent` found.
    """

    def precision(site: str, fn: Distribution, y: Tensor) -> Tensor:
        law: Any = innermost(fn)
        gain = law.gain if isinstance(law, PoissonMeasurement) else 1.0
        power = (gain**2 / foretold_variance(law, y)).expand(y.shape)
        if same_basis(basis, PIXELS):
            return law.operator.adjoint(power * law.operator(torch.ones_like(law.x)))
        return (power.mean() * law.operator.svd(law.x).singular_values.square()).expand(law.x.shape)

    def one(state: States) -> Tensor:
        return torch.stack([raw for raw, _ in program.scores(state, precision).values()]).sum(0)

    states = {site: value.detach() for site, value in at.items()}
    value, gradient = slope_at(program, states, name)
    precisions = torch.func.vmap(one)(states)
    return DiagonalExpansion(name, states[name], value, basis.to_spectral(gradient), precisions, basis)


def _sum(terms: Tensor) -> Tensor:
    return terms.reshape(len(terms), -1).sum(1, dtype=torch.float64)
