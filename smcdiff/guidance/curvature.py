r"""A program's likelihood about a state, with its curvature known only by its diagonal in a basis.

    log p(y given x_0)  ~  l + g^T d - d^T V diag(j) V^T d / 2,      d = x_0 - m,

l and g are the program's own; j is the diagonal of V^T J V, J = A^T Sigma^-1 A, measured once per program by random
signs (exact where J is diagonal in V), times how precise the noise is at the state. For programs that no exact
quadratic is known of: a window onto a blurred scene under an unknown noise level, say. The weights see the likelihood
as it is, so that the coarseness costs effective particles and no exactness.

References:
    M. Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines" (1990).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from smcdiff.guidance.elementwise import DiagonalExpansion
from smcdiff.guidance.gauss_newton import whitened, whitened_residual
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import States
from smcdiff.guidance.singular import per_program
from smcdiff.transforms import Basis

__all__ = ["Survey", "curvature_expansion", "gradient", "survey"]

#: Random vectors of the diagonal.
PROBES = 32


@dataclass(frozen=True, eq=False)
class Survey:
    """J of a program at its probe.

    Args:
        diagonal: of V^T J V, (1, *shape).
        mean: of the diagonal.
        precision: sum over the measured values of 1 / Var[y given x_0] there.
    """

    diagonal: Tensor
    mean: float
    precision: Tensor


def curvature_expansion(program: Program, at: States, name: str, basis: Basis) -> DiagonalExpansion:
    """The quadratic of one latent about ``at``, the others held there.

    Args:
        at: of all latents, {site: (m, *shape)}.
        name: the latent.
    """
    known = survey(program, name, basis)
    value, slope = gradient(program, at, name)
    size = _precision(program, at) / known.precision
    precision = known.diagonal * size.to(slope.dtype).reshape(-1, *(1,) * (slope.ndim - 1))
    return DiagonalExpansion(name, at[name].detach(), value, basis.to_spectral(slope), precision, basis)


def gradient(program: Program, at: States, name: str) -> tuple[Tensor, Tensor]:
    """log p(y given at), (m,) of float64, and its gradient with respect to one latent, (m, *shape)."""
    fixed = {site: value.detach() for site, value in at.items()}
    with torch.enable_grad():
        fixed[name] = fixed[name].requires_grad_()
        value = program.log_prob(fixed)
        (slope,) = torch.autograd.grad(value.sum(), fixed[name])
    return value.detach(), slope


@per_program
def survey(program: Program, name: str, basis: Basis) -> Survey:
    """J at the program's probe: by products with it alone."""
    probe = program.probe_states
    x = probe[name]

    def residual(picture: Tensor) -> Tensor:
        return whitened_residual(program, {**probe, name: picture})

    at_probe, back = torch.func.vjp(residual, x)[:2]  # u -> H^T u, whose own transpose is v -> H v
    ahead = torch.func.vjp(lambda u: back(u)[0], torch.zeros_like(at_probe))[1]

    def product(v: Tensor) -> Tensor:
        (image,) = back(ahead(v)[0])
        assert isinstance(image, Tensor)
        return image

    generator = torch.Generator(x.device).manual_seed(0)
    total = torch.zeros_like(x)
    for _ in range(PROBES):
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
        total = total + signs * basis.to_spectral(product(basis.from_spectral(signs[None])[0])[None])[0]
    diagonal = (total / PROBES).clamp(min=0)[None]
    batch = {site: value[None] for site, value in probe.items()}
    return Survey(diagonal, float(diagonal.mean()), _precision(program, batch))


def _precision(program: Program, at: States) -> Tensor:
    """Sum over the measured values of 1 / Var[y given x_0], (m,): |Sigma^(-1/2) 1|^2."""

    def one(state: States) -> Tensor:
        def squares(shift: float) -> Tensor:
            def score(name: str, fn: Distribution, value: Tensor) -> Tensor:
                return whitened(name, fn, value + shift)

            rows = program.scores(state, score).values()
            return torch.cat([(raw * weigh(torch.ones_like(raw)).sqrt()).flatten() for raw, weigh in rows])

        return (squares(1.0) - squares(0.0)).square().sum()

    with torch.no_grad():
        found: Tensor = torch.func.vmap(one)({site: value.detach() for site, value in at.items()})
    return found
