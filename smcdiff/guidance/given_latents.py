r"""A program's measurement of its one picture, given its other latents: linear with Gaussian noise, at many values of
them at once.

    log p(y given x_0, z)  =  constant(z) - |seen(z) - root(z) V^T x_0|^2 / 2

where operator and covariance are diagonal in one basis V and the noise is white: elementwise, for pictures of any size;
with few measured values by their rows written out (:mod:`smcdiff.guidance.gauss_newton`), for any operator, any
covariance and noise of any variances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from smcdiff.diffusion.covariance import Corrected, Covariance, Dense, Diagonal, LowRank
from smcdiff.guidance.elementwise import measured_latent
from smcdiff.guidance.gauss_newton import FewMeasurements, few_measurements, whitened_residual
from smcdiff.guidance.picture import innermost
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Noise, States
from smcdiff.guidance.singular import per_program
from smcdiff.measurement import GaussianMeasurement, MixedMeasurement, gaussian_moments
from smcdiff.measurement.svd import reciprocal
from smcdiff.transforms import Basis, same_basis

__all__ = ["AtLatents", "GivenLatents", "given_latents"]


class AtLatents(Protocol):
    """The measurement at some latents of each of m particles."""

    def log_integral(self, mean: Tensor, covariance: Covariance) -> Tensor:
        """log of the integral of N(x_0; mean, covariance) p(y given x_0, z) over x_0, (m, nodes) of float64."""

    def draw(self, mean: Tensor, covariance: Covariance, chosen: Tensor, noise: Noise) -> Tensor:
        """x_0 from N(mean, covariance) given y and the chosen z of each particle, (m, *shape).

        Args:
            chosen: index of the z, (m,).
        """


class GivenLatents(Protocol):
    """The measurement as a function of the latents."""

    def at(self, latents: States) -> AtLatents:
        """At these values, {site: (m, nodes, *shape)}."""


def given_latents(
    program: Program, name: str, held: States, covariance: Covariance, max_measurements: int
) -> GivenLatents:
    """The measurement of a picture as a function of the latents that are neither the picture nor held.

    Args:
        name: of the picture.
        held: states of latents that stay as they are, {site: (m, *shape)}.
        covariance: of the picture.
        max_measurements: up to so many measured values are written out.

    Raises:
        TypeError: where neither way is open, with what to do.
    """
    if isinstance(covariance, Diagonal) and _white(program, covariance.basis):
        return _Spectral(program, name, held, covariance.basis)
    count = sum(value.numel() for value in program.observed.values())
    if count > max_measurements:
        raise TypeError(
            f"sd.Marginalised got {count} measured values and no basis that operator and covariance have in common: "
            f"more than {max_measurements} need sd.GaussianMeasurement with one noise level, an operator with a fast "
            "svd such as a circular blur, and a covariance diagonal in its basis, such as that of a prior calibrated "
            'with basis="fft". Use sd.Adapted'
        )
    _check_linear(program, name)
    return _Few(program, name, held)


@per_program
def _white(program: Program, basis: Basis) -> bool:
    """Whether the picture is measured in this basis under white Gaussian noise."""
    laws = [innermost(law) for law in program.probe.laws.values()]
    even = all(isinstance(law, GaussianMeasurement) and law.sigma.numel() == 1 for law in laws)
    return even and measured_latent(program, basis) is not None


@per_program
def _check_linear(program: Program, name: str) -> None:
    """Refuse noise that is not Gaussian or depends on the picture, and means that are not affine in it."""
    for site, law in program.probe.laws.items():
        base = innermost(law)
        if gaussian_moments(base) is None or isinstance(base, MixedMeasurement):
            raise TypeError(
                f"sd.Marginalised needs Gaussian noise that does not depend on the picture; the observed site {site!r} "
                f"has the law {type(base).__name__}. Use sd.Adapted"
            )
    states = program.probe_states
    x = states[name]

    def residual(picture: Tensor) -> Tensor:
        return whitened_residual(program, {**states, name: picture})

    ends = [residual(scale * x) for scale in (0.0, 1.0, 2.0)]  # an odd function passes at -1, 0, 1
    size = max(float(end.abs().max()) for end in ends)
    if float((ends[0] + ends[2] - 2 * ends[1]).abs().max()) > 100 * torch.finfo(x.dtype).eps * size:
        raise TypeError(
            "sd.Marginalised needs a measurement whose mean is linear in the picture and whose noise does not depend "
            "on it; this program's is not. Use sd.Adapted"
        )


@dataclass(frozen=True, eq=False)
class _Spectral:
    program: Program
    name: str
    held: States
    basis: Basis

    def at(self, latents: States) -> _SpectralAt:
        program, name, basis = self.program, self.name, self.basis
        x = torch.zeros_like(program.probe.values[name])

        def numbers(site: str, fn: Distribution, y: Tensor) -> Tensor:
            law: Any = innermost(fn)
            svd = law.operator.svd(law.x)
            s = svd.singular_values.expand(x.shape).double()
            seen = svd.measurement_to_spectral(y) if same_basis(svd, basis) else basis.to_spectral(y)  # sd.Identity
            power = law.sigma.double().reshape(()) ** -2
            y = y.double()
            constant = -0.5 * (power * y.square().sum() + y.numel() * (math.log(2 * math.pi) - power.log()))
            return torch.cat(((power * s.square()).flatten(), (power * s * seen).flatten(), constant[None]))

        def one(state: States) -> Tensor:
            return torch.stack([raw for raw, _ in program.scores({**state, name: x}, numbers).values()]).sum(0)

        rows = torch.func.vmap(one)(_flat(latents, self.held))
        m, nodes = next(iter(latents.values())).shape[:2]
        precision, pull, constant = rows.reshape(m, nodes, -1).split((x.numel(), x.numel(), 1), 2)
        shape = (m, nodes, *x.shape)
        root = precision.reshape(shape).sqrt()
        seen = pull.reshape(shape) * reciprocal(root)
        return _SpectralAt(root, seen, constant[..., 0] + 0.5 * _sum(seen.square()), basis)


@dataclass(frozen=True, eq=False)
class _SpectralAt:
    root: Tensor  # (m, nodes, *shape), as seen
    seen: Tensor
    constant: Tensor
    basis: Basis

    def log_integral(self, mean: Tensor, covariance: Covariance) -> Tensor:
        missing, information = self._missing(mean, covariance)
        return self.constant - 0.5 * _sum(missing.square() / (1 + information) + torch.log1p(information))

    def draw(self, mean: Tensor, covariance: Covariance, chosen: Tensor, noise: Noise) -> Tensor:
        assert isinstance(covariance, Diagonal)
        place = torch.arange(len(chosen), device=chosen.device), chosen
        missing, information = (part[place] for part in self._missing(mean, covariance))
        spread = covariance.variance.double() / (1 + information)
        shift = spread * self.root[place] * missing + spread.sqrt() * noise(mean.shape)
        return mean + self.basis.from_spectral(shift.to(mean.dtype))

    def _missing(self, mean: Tensor, covariance: Covariance) -> tuple[Tensor, Tensor]:
        assert isinstance(covariance, Diagonal)
        missing = self.seen - self.root * self.basis.to_spectral(mean).double()[:, None]
        return missing, self.root.square() * covariance.variance.double()[:, None]


@dataclass(frozen=True, eq=False)
class _Few:
    program: Program
    name: str
    held: States

    def at(self, latents: States) -> _FewAt:
        m, nodes = next(iter(latents.values())).shape[:2]
        x = self.program.probe.values[self.name]
        origin = torch.zeros_like(x).expand(m * nodes, *x.shape)
        rows = few_measurements(self.program, {self.name: origin}, _flat(latents, self.held))
        return _FewAt(self.name, rows, m, nodes)


@dataclass(frozen=True, eq=False)
class _FewAt:
    name: str
    rows: FewMeasurements
    m: int
    nodes: int

    def log_integral(self, mean: Tensor, covariance: Covariance) -> Tensor:
        means = {self.name: mean.repeat_interleave(self.nodes, 0)}
        found = self.rows.condition(means, {self.name: _repeated(covariance, self.nodes)})
        return found.log_integral().reshape(self.m, self.nodes)

    def draw(self, mean: Tensor, covariance: Covariance, chosen: Tensor, noise: Noise) -> Tensor:
        place = torch.arange(len(chosen), device=chosen.device) * self.nodes + chosen
        rows = self.rows
        at, h = ({name: part[place] for name, part in parts.items()} for parts in (rows.at, rows.rows))
        own = FewMeasurements(at, rows.constant[place], rows.residual[place], h)
        return own.condition({self.name: mean}, {self.name: covariance}).draw(noise)[self.name]


def _flat(latents: States, held: States) -> States:
    """All but the picture, particles and nodes in one axis."""
    nodes = next(iter(latents.values())).shape[1]
    still = {name: state.repeat_interleave(nodes, 0) for name, state in held.items()}
    return {**{name: state.flatten(0, 1) for name, state in latents.items()}, **still}


def _repeated(covariance: Covariance, times: int) -> Covariance:
    """The covariance with each particle's own as often in a row."""

    def rows(part: Tensor) -> Tensor:
        return part if len(part) == 1 else part.repeat_interleave(times, 0)

    if isinstance(covariance, Diagonal):
        return replace(covariance, variance=rows(covariance.variance))
    if isinstance(covariance, LowRank):
        mixing = None if covariance.mixing is None else rows(covariance.mixing)
        return replace(covariance, variance=rows(covariance.variance), factors=rows(covariance.factors), mixing=mixing)
    if isinstance(covariance, Corrected):
        v, w, core = (rows(part) for part in (covariance.variance, covariance.factors, covariance.core))
        return Corrected(v, w, core, covariance.basis)
    assert isinstance(covariance, Dense)
    return Dense(rows(covariance.matrix))


def _sum(terms: Tensor) -> Tensor:
    return terms.flatten(2).sum(2)
