r"""The quadratic of a picture whose covariance and measurement have no basis in common, by conjugate gradients.

With C = V diag(v) V^T shared by all particles and J = A^T Sigma^-1 A the same for all, P = (C^-1 + J)^-1 is applied by
preconditioned conjugate gradients in the coordinates of V, a draw of N(m + P g, P) by perturbing and solving,

    m + P (g + C^(-1/2) e_1 + A^T Sigma^(-1/2) e_2),       e_1, e_2 standard normal,

and log det(I + C J), one number for all particles, from a Cholesky factor where the event is small and by stochastic
Lanczos quadrature elsewhere: with the same probes at every step, so that only its error at the highest noise and the
differences between steps enter the evidence, and nothing of it the weights. All in float64.

A solve stops when every particle's residual is below ``tolerance`` of its right-hand side in the norm of the
preconditioner, so that g^T P g, and with it a log-weight, is off by about tolerance^2 of itself.

References:
    G. Papandreou, A. Yuille, "Gaussian Sampling by Local Perturbations" (2010): perturb and optimise.
    S. Ubaru, J. Chen, Y. Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature" (2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance, Diagonal
from smcdiff.guidance.gauss_newton import States
from smcdiff.transforms import Basis

__all__ = ["ConjugateGradients", "IterativeInformation", "LinearSystem"]


@dataclass(frozen=True)
class ConjugateGradients:
    """How systems are solved.

    Args:
        tolerance: of a solve, relative, in (0, 1).
        max_iterations: of a solve, and of a Lanczos recursion.
        probes: random vectors of a log-determinant.
        exact_entries: events of up to so many entries have their log-determinant from a Cholesky factor; larger ones
            only that of the highest noise, up to four times as many.

    Raises:
        ValueError: for a value outside its domain.
    """

    tolerance: float = 1e-6
    max_iterations: int = 300
    probes: int = 16
    exact_entries: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or self.max_iterations < 1 or self.probes < 1 or self.exact_entries < 0:
            raise ValueError(f"got {self}; expected a tolerance in (0, 1) and positive numbers")


class LinearSystem:
    """J of one program, and what was computed of it once.

    Args:
        forward: x -> Sigma^(-1/2) A x for events (m, *event), the measured values of a particle in a row.
        backward: its transpose.
        basis: V.
        event: an event, (*event), whose device counts.
        settings: how systems are solved.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], Tensor],
        basis: Basis,
        event: Tensor,
        settings: ConjugateGradients,
    ) -> None:
        self.forward, self.backward, self.basis, self.settings = forward, backward, basis, settings
        self.shape, self.device = event.shape, event.device
        self._offset: Tensor | None = None

    def information(self, c: Tensor) -> Tensor:
        """V^T J V c, coordinates (m, *event) of float64."""
        return self.basis.to_spectral(self.backward(self.forward(self.basis.from_spectral(c))))

    @cached_property
    def _signs(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (max(self.settings.probes, 32), *self.shape)
        return torch.randint(0, 2, shape, generator=generator, device=self.device).double() * 2 - 1

    @cached_property
    def diagonal(self) -> Tensor:
        """About the diagonal of V^T J V, (1, *event): Hutchinson's estimate, for the preconditioner alone."""
        estimate = (self._signs * self.information(self._signs)).mean(0, keepdim=True)
        return estimate.clamp(min=0.0) + 1e-3 * estimate.mean().clamp(min=0.0)

    def solve(self, v: Tensor, right: Tensor) -> Tensor:
        """(diag(1/v) + V^T J V)^-1 right by preconditioned conjugate gradients, (m, *event)."""
        root = v.sqrt()
        scale = (
            1 + v * self.diagonal
        ).rsqrt()  # with C taken out and J by its diagonal the spectrum is near 1

        def apply(z: Tensor) -> Tensor:
            w = scale * z
            return scale * (w + root * self.information(root * w))

        b = scale * root * right
        z = torch.zeros_like(b)
        residual, direction = b, b
        norm = start = _squares(b)
        for _ in range(self.settings.max_iterations):
            image = apply(direction)
            step = norm / _dot(direction, image).clamp(min=torch.finfo(torch.float64).tiny)
            z = z + step * direction
            residual = residual - step * image
            after = _squares(residual)
            direction = residual + after / norm.clamp(min=torch.finfo(torch.float64).tiny) * direction
            norm = after
            if bool((norm <= self.settings.tolerance**2 * start).all()):
                break
        return root * scale * z

    def log_det(self, v: Tensor) -> Tensor:
        """log det(I + C J), 0-d: exact for small events."""
        if not bool((v > 0).any()):
            return v.new_zeros(())
        d = v[0].numel()
        if d <= self.settings.exact_entries:
            return self._exact_log_det(v)
        rough = self._lanczos_log_det(v)
        if self._offset is None:  # the first covariance asked for is that of the highest noise
            few = d <= 4 * self.settings.exact_entries
            self._offset = self._exact_log_det(v) - rough if few else torch.zeros_like(rough)
        return rough + self._offset

    def _exact_log_det(self, v: Tensor) -> Tensor:
        d = v[0].numel()
        eye = torch.eye(d, dtype=torch.float64, device=v.device).reshape(d, *self.shape)
        root = v.sqrt()
        rows = torch.cat([(root * self.information(root * part)).flatten(1) for part in eye.split(256)])
        matrix = 0.5 * (rows + rows.mT) + torch.eye(d, dtype=torch.float64, device=v.device)
        return 2 * torch.linalg.cholesky_ex(matrix)[0].diagonal().log().sum()

    def _lanczos_log_det(self, v: Tensor) -> Tensor:
        """tr log B + sum log(1 + v j), B = S (I + C^1/2 J C^1/2) S close to one, S^2 = 1 / (1 + v j)."""
        root, scale = v.sqrt(), (1 + v * self.diagonal).rsqrt()
        probes = self._signs[: self.settings.probes]

        def apply(z: Tensor) -> Tensor:
            w = scale * z
            return scale * (w + root * self.information(root * w))

        q = probes / _squares(probes).sqrt()
        before, beta = torch.zeros_like(q), torch.zeros_like(_squares(q))
        alphas, betas, kept = [], [], []
        for _ in range(min(40, self.settings.max_iterations)):
            kept.append(q)
            w = apply(q) - beta * before
            alpha = _dot(w, q)
            w = w - alpha * q
            for old in kept:  # full reorthogonalisation: the recursion is short
                w = w - _dot(w, old) * old
            alphas.append(alpha.flatten())
            beta = _squares(w).sqrt()
            betas.append(beta.flatten())
            before, q = q, w / beta.clamp(min=1e-12)
        tri = torch.diag_embed(torch.stack(alphas, -1))
        off = torch.stack(betas, -1)[:, :-1]
        tri = tri + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        values, vectors = torch.linalg.eigh(tri)
        trace = (vectors[:, 0].square() * values.clamp(min=1e-12).log()).sum(-1).mean() * v[0].numel()
        return trace + torch.log1p(v * self.diagonal).sum()


@dataclass(frozen=True, eq=False)
class IterativeInformation:
    """The quadratic of one picture, by conjugate gradients.

    Args:
        site: the latent.
        at: m, where the quadratic is expanded, (m, *shape).
        value: l, (m,) of float64.
        gradient: g, (m, *shape).
        system: J.
    """

    site: str
    at: Tensor
    value: Tensor
    gradient: Tensor
    system: LinearSystem

    def condition(self, mean: States, covariance: dict[str, Covariance]) -> _IterativeConditioned:
        c = covariance[self.site]
        assert isinstance(c, Diagonal)
        to = self.system.basis.to_spectral
        d = to((mean[self.site] - self.at).double())
        image = self.system.information(d)
        slope = to(self.gradient.double())
        value = self.value + _dot(slope - 0.5 * image, d).flatten()
        return _IterativeConditioned(self.site, mean[self.site], c.variance.double(), value, slope - image, self.system)


@dataclass(frozen=True, eq=False)
class _IterativeConditioned:
    site: str
    mean: Tensor
    variance: Tensor
    value: Tensor
    slope: Tensor
    system: LinearSystem

    def log_integral(self) -> Tensor:
        gained = _dot(self.slope, self.system.solve(self.variance, self.slope)).flatten()
        return self.value + 0.5 * (gained - self.system.log_det(self.variance))

    def draw(self, noise: Any) -> States:
        system = self.system
        first = noise(self.mean.shape).double()
        second = noise(system.forward(self.mean.double()).shape).double()
        safe = self.variance.clamp(min=torch.finfo(torch.float64).tiny)
        right = self.slope + first * safe.rsqrt() + system.basis.to_spectral(system.backward(second))
        away = system.basis.from_spectral(system.solve(self.variance, right))
        return {self.site: self.mean + away.to(self.mean.dtype)}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each particle, with the event's axes kept."""
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))


def _squares(a: Tensor) -> Tensor:
    return _dot(a, a)
