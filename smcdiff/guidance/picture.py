r"""A program seen as one picture under a linear measurement, for conditioning that is linear algebra alone.

    r(x) = Sigma^(-1/2) (z - A x),        log p(y given x)  ~  constant - r(x)^T r(x) / 2,

all observed sites together. It is exact for Gaussian noise. Counts and noise that grows with the signal are given the
variance that the measurement itself foretells, which is the same for all particles and shows where to expand the law
as it is (:mod:`smcdiff.guidance.information`).

A site's scale multiplies Sigma^-1, and what its mask leaves out has no weight, both where they are the same for every
picture. An affine measurement, such as that of the intensity (x + 1) / 2 of a picture on [-1, 1], has its offset taken
to z.
Laws that carry no operator, such as ``dist.Normal(blur(x), 0.1).to_event(3)``, are asked for their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, Poisson

from smcdiff.guidance.program import Program
from smcdiff.guidance.singular import per_program
from smcdiff.measurement import (
    GaussianMeasurement,
    LinearOperator,
    MixedMeasurement,
    Operator,
    PoissonMeasurement,
    as_linear,
    gaussian_moments,
)
from smcdiff.measurement.svd import SVD
from smcdiff.transforms import PIXELS, Basis, same_basis

__all__ = ["LinearSite", "PictureMeasurement", "foretold_variance", "innermost", "picture_measurement"]


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One observed site: r(x) = weight (target - A x), elementwise.

    Args:
        operator: A.
        svd: of A on such pictures of float64, where a fast one is known.
        target: z, of the shape of A x, float64.
        weight: Sigma^(-1/2), of that shape, float64.
        even: whether the weight is one number.
    """

    operator: LinearOperator
    svd: SVD | None
    target: Tensor
    weight: Tensor
    even: bool

    def is_diagonal_in(self, basis: Basis) -> bool:
        """Whether A^T Sigma^-1 A is diagonal in the basis."""
        if self.svd is None:
            return False
        s = self.svd.singular_values
        if self.even and bool((s == s.flatten()[0]).all()):
            return True  # a multiple of the identity is so in every basis
        return same_basis(self.svd, basis) and (self.even or same_basis(basis, PIXELS))


@dataclass(frozen=True, eq=False)
class PictureMeasurement:
    """What a program says of its one picture.

    Args:
        name: the diffusion prior's site.
        x: a picture, (*shape), whose shape, dtype and device count.
        sites: the observed ones.
        constant: log p(y given x) where r = 0.
        exact: whether this is the program's likelihood, and not only near it.
    """

    name: str
    x: Tensor
    sites: tuple[LinearSite, ...]
    constant: float
    exact: bool

    def is_diagonal_in(self, basis: Basis) -> bool:
        """Whether A^T Sigma^-1 A of all sites is diagonal in the basis."""
        return all(site.is_diagonal_in(basis) for site in self.sites)


@per_program
def picture_measurement(program: Program) -> PictureMeasurement | None:
    """The program as one picture, linearly measured, or None where it is something else.

    It is something else with other latents, held ones too, with a law other than the normal, Poisson's and the mixed
    one, a mean that is not affine in the picture, or a mask or scale that depends on it.
    """
    (name, latent), *others = program.latents.items()
    if others or not latent.is_diffusion:
        return None
    x = program.probe.values[name]
    counts = _counts(program, name, x)
    if counts is None:
        return None
    sites, constant = [], 0.0
    for site, law in program.probe.laws.items():
        found = _linear_site(program, name, site, law, x, counts[site])
        if found is None:
            return None
        made, level = found
        sites.append(made)
        constant += level
    exact = all(isinstance(innermost(law), GaussianMeasurement | Normal) for law in program.probe.laws.values())
    return PictureMeasurement(name, x, tuple(sites), constant, exact)


def innermost(law: Any) -> Any:
    """A law without ``to_event``."""
    while isinstance(law, Independent):
        law = law.base_dist
    return law


def _counts(program: Program, latent: str, x: Tensor) -> dict[str, Tensor] | None:
    """How often each value of each site counts, by scale and mask; None where that depends on the picture."""

    def ones(site: str, law: Distribution, value: Tensor) -> Tensor:
        return torch.ones(value.shape, dtype=torch.float64, device=value.device)

    def at(state: Tensor) -> dict[str, Tensor]:
        return {site: weigh(raw) for site, (raw, weigh) in program.scores({latent: state}, ones).items()}

    found = at(x)
    if program.probe.weighted:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
        for other in (at(1e3 * noise), at(-1e3 * noise)):  # far out, to both sides of any threshold on a pixel
            if not all(torch.equal(count, other[site]) for site, count in found.items()):
                return None
    return found


def _linear_site(
    program: Program, latent: str, site: str, law: Distribution, x: Tensor, count: Tensor
) -> tuple[LinearSite, float] | None:
    base, y = innermost(law), program.observed[site].double()
    measured = isinstance(base, GaussianMeasurement | PoissonMeasurement | MixedMeasurement)
    if measured and base.x.shape == x.shape and torch.equal(base.x, x):
        affine = _affine(base.operator, x)
    elif isinstance(base, GaussianMeasurement | MixedMeasurement | Normal | Poisson):
        affine = _affine(_Mean(program, latent, site, x.ndim), x)
    else:
        return None
    if affine is None:
        return None
    operator, offset = affine
    gain = base.gain.double() if isinstance(base, PoissonMeasurement) else 1.0
    background = base.background.double() if isinstance(base, PoissonMeasurement) else 0.0
    variance = foretold_variance(base, y).expand(y.shape)
    weight = (gain * variance.rsqrt()).expand(y.shape) * count.sqrt()
    constant = -0.5 * float((count * (variance.log() + math.log(2 * math.pi))).sum())
    even = bool((weight == weight.flatten()[0]).all())
    target = (y - background) / gain - offset
    return LinearSite(operator, operator.svd(x.double()), target, weight, even), constant


def foretold_variance(law: Any, y: Tensor) -> Tensor:
    """The variance of a measurement, of the dtype of y, given what was measured where it depends on the picture."""
    if isinstance(law, PoissonMeasurement | Poisson):
        return y.clamp(min=1.0)
    if isinstance(law, MixedMeasurement):
        return law.sigma.to(y).square() + law.gain.to(y) * y.clamp(min=0.0)
    return law.variance.to(y)


def _affine(operator: Operator | Callable[[Tensor], Tensor], x: Tensor) -> tuple[LinearOperator, Tensor] | None:
    """A and b of an operator A x + b, tried on random pictures; None for one that is not affine."""
    if isinstance(operator, LinearOperator):
        return operator, torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.no_grad():
        offset = operator(torch.zeros_like(x))
    try:
        return as_linear(lambda v: operator(v) - offset.to(v.dtype), x), offset.double()
    except (TypeError, RuntimeError):
        return None


@dataclass(frozen=True, eq=False)
class _Mean:
    """The mean of an observed site as a function of the picture, (..., *shape), through the program."""

    program: Program
    latent: str
    site: str
    ndim: int

    def __call__(self, x: Tensor) -> Tensor:
        one: Callable[[Tensor], Tensor] = self._of_one
        for _ in range(x.ndim - self.ndim):
            one = torch.func.vmap(one)
        return one(x)

    def _of_one(self, x: Tensor) -> Tensor:
        def mean(name: str, fn: Distribution, value: Tensor) -> Tensor:
            known = gaussian_moments(fn)
            loc = innermost(fn).mean if known is None else known.loc
            return loc.expand(value.shape)

        return self.program.scores({self.latent: x}, mean)[self.site][0]
