r"""How a program's likelihood is made a quadratic: which of the three ways its operators and covariances allow.

one basis            C and A^T A are diagonal in one basis (blur and Fourier, masks and pixels, white noise and
                     any): elementwise
few measured values  H written out: any program, any covariance
neither              conjugate gradients, for linear operators with a covariance that all particles share
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from smcdiff.diffusion.covariance import Covariance, Diagonal
from smcdiff.guidance.conjugate_gradients import ConjugateGradients, IterativeInformation, LinearSystem
from smcdiff.guidance.gauss_newton import DiagonalInformation, Information, States, few_measurements
from smcdiff.guidance.program import Program
from smcdiff.measurement import GaussianMeasurement, Identity, LinearOperator, PoissonMeasurement
from smcdiff.transforms import PIXELS, Basis, same_basis

__all__ = ["informed"]

_WHO = "sd.Adapted"


def informed(
    program: Program,
    mean: States,
    covariances: dict[str, Covariance],
    max_measurements: int,
    settings: ConjugateGradients,
) -> Information:
    """The log-likelihood's quadratic about ``mean``.

    Args:
        mean: {site: (m, *shape)}, latents that are not held.
        covariances: of these, given x_t.
        max_measurements: up to so many measured values H is written out.
        settings: of the conjugate gradients.

    Raises:
        TypeError: where none of the three ways is open, with what to do.
    """
    count = sum(value.numel() for value in program.observed.values())
    site = _measured_directly(program, covariances)
    if site is not None:
        covariance = covariances[site]
        assert isinstance(covariance, Diagonal)
        operators = [_base(law).operator for law in program.probe.laws.values()]
        if (len(mean) == 1 or count > max_measurements) and _in_basis(operators, covariance.basis, mean[site][0]):
            return _diagonal(program, mean, site, covariance.basis)
        if count > max_measurements and len(mean) == 1 and len(covariance.variance) == 1:
            value, gradient = _slope(program, mean, site)
            system = _system(program, site, covariance.basis, settings)
            return IterativeInformation(site, mean[site].detach(), value, gradient, system)
    if count <= max_measurements:
        return few_measurements(program, {**_held(program, mean), **mean}, _WHO)
    raise TypeError(
        f"{_WHO} got {count} measured values of {sorted(mean)} and found no way to condition on them: it needs one "
        "diffusion prior measured by linear operators under Gaussian or Poisson noise, with a covariance diagonal in "
        "the operators' basis, or one covariance for all particles and no other latent. Use another covariance, "
        f"sd.as_linear for an operator that is linear, max_measurements >= {count} if memory allows, or sd.TDS"
    )


def _held(program: Program, mean: States) -> States:
    """The held latents' noise for each particle."""
    first = next(iter(mean.values()))
    return {name: noise.repeat_interleave(len(first) // len(noise), 0) for name, noise in program.held.items()}


def _measured_directly(program: Program, covariances: dict[str, Covariance]) -> str | None:
    """The one diffusion prior that linear operators measure at all observed sites, its covariance diagonal, or None."""
    names = [name for name, latent in program.latents.items() if latent.is_diffusion]
    if len(names) != 1 or program.probe.weighted or not isinstance(covariances[names[0]], Diagonal):
        return None
    x = program.probe.values[names[0]]
    for law in program.probe.laws.values():
        base = _base(law)
        if not isinstance(base, GaussianMeasurement | PoissonMeasurement):
            return None
        if not isinstance(base.operator, LinearOperator) or base.x.shape != x.shape or not torch.equal(base.x, x):
            return None
    return names[0]


def _in_basis(operators: list[LinearOperator], basis: Basis, x: Tensor) -> bool:
    """Whether A^T A of all operators is diagonal in the basis."""
    for operator in operators:
        svd = operator.svd(x)
        if svd is None or not (isinstance(operator, Identity) or same_basis(svd, basis)):
            return False
    return True


def _slope(program: Program, mean: States, site: str) -> tuple[Tensor, Tensor]:
    """l and its gradient with respect to one latent."""
    at = {name: value.detach() for name, value in {**_held(program, mean), **mean}.items()}
    with torch.enable_grad():
        at[site] = at[site].requires_grad_()
        value = program.log_prob(at)
        (gradient,) = torch.autograd.grad(value.sum(), at[site])
    return value.detach(), gradient


def _system(program: Program, site: str, basis: Basis, settings: ConjugateGradients) -> LinearSystem:
    """J of a program without latents other than the picture, made once per program."""
    key = (site, basis, settings)
    if key not in program.cache:
        x = program.probe.values[site].double()
        laws = [(_base(law), program.observed[name]) for name, law in program.probe.laws.items()]
        scales = []
        for law, y in laws:
            # counts' variance at the measurement itself: the same for all particles
            variance = law.variance if isinstance(law, GaussianMeasurement) else y.clamp(min=1.0)
            scales.append(variance.double().rsqrt())
        slopes = [1.0 if isinstance(law, GaussianMeasurement) else law.gain for law, _ in laws]

        def forward(v: Tensor) -> Tensor:
            rows = [
                (scale * slope * law.operator(v.to(law.x.dtype)).double()).flatten(1)
                for (law, _), scale, slope in zip(laws, scales, slopes, strict=True)
            ]
            return torch.cat(rows, 1)

        def backward(w: Tensor) -> Tensor:
            total, start = torch.zeros((), dtype=torch.float64, device=w.device), 0
            for (law, y), scale, slope in zip(laws, scales, slopes, strict=True):
                part = w[:, start : start + y.numel()].reshape(-1, *y.shape)
                start += y.numel()
                total = total + law.operator.adjoint((scale * slope * part).to(law.x.dtype)).double()
            return total

        program.cache[key] = LinearSystem(forward, backward, basis, x, settings)
    return program.cache[key]


def _diagonal(program: Program, mean: States, site: str, basis: Basis) -> DiagonalInformation:
    """The quadratic of the one diffusion prior; other latents stay at their estimates."""
    value, gradient = _slope(program, mean, site)
    at = {name: state.detach() for name, state in {**_held(program, mean), **mean}.items()}

    def precision_of(name: str, fn: Distribution, y: Tensor) -> Tensor:
        """Diagonal of A^T Sigma^-1 A in the basis; where Sigma is not one number, by its mean precision."""
        law: Any = _base(fn)
        assert isinstance(law, GaussianMeasurement | PoissonMeasurement)
        s = law.operator.svd(law.x).singular_values
        precision = 1 / law.variance
        if not (basis is PIXELS and precision.shape == law.x.shape):
            precision = precision.mean()
        slope = law.gain if isinstance(law, PoissonMeasurement) else 1.0
        return ((s * slope).square() * precision).expand(law.x.shape)

    def one(state: States) -> Tensor:
        return torch.stack([raw for raw, _ in program.scores(state, precision_of).values()]).sum(0)

    precision = torch.func.vmap(one)(at)
    return DiagonalInformation(site, at[site], value, gradient, precision, basis)


def _base(law: Any) -> Any:
    while isinstance(law, Independent):
        law = law.base_dist
    return law
