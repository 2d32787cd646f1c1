r"""The quadratic of a picture whose covariance and measurement have no basis in common, by conjugate gradients.

With C = V diag(v) V^T and J = A^T Sigma^-1 A the same for all particles, P = (C^-1 + J)^-1 is applied by preconditioned
conjugate gradients in the coordinates of V, and a draw of N(m + P g, P) made by perturbing and solving,

    m + P (g + C^(-1/2) e_1 + A^T Sigma^(-1/2) e_2),       e_1, e_2 standard normal.

In the coordinates where C is the identity the matrix is M = I + C^(1/2) J C^(1/2), with no eigenvalue below 1. A solve
that leaves a residual rho is therefore off by e with e^T M e <= |rho|^2. Half of e^T M e is the error of a
log-integral, and for a draw it is the Kullback-Leibler divergence of its law from N(m + P g, P), both in nats. A solve
stops when |rho|^2 / 2 is below ``tolerance`` for every particle.

log det M is one number for all particles: it enters the evidence and not the weights. It comes from a Cholesky factor
where the picture is small, and by Lanczos quadrature with probing vectors elsewhere: random signs on pixels of one
colour, colours repeating every few pixels, so that pixels near each other are never mixed. The vectors are the same at
every noise level. What enters the evidence is the determinant at the highest noise, found once with more care, and
differences between covariances that are nearly the same; on a 32 x 32 picture with half of its pixels seen and the
covariance of a trained network these are off by half a nat in 500.

References:
    G. Papandreou, A. Yuille, "Gaussian Sampling by Local Perturbations" (2010): perturb and optimise.
    S. Ubaru, J. Chen, Y. Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature" (2017).
    J. Tang, Y. Saad, "A probing method for computing the diagonal of a matrix inverse" (2012): probing by colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Diagonal
from smcdiff.guidance.elementwise import slope_at
from smcdiff.guidance.picture import LinearSite, PictureMeasurement
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Covariances, Noise, States
from smcdiff.measurement import LinearOperator
from smcdiff.measurement.compose import diagonal_part
from smcdiff.transforms import Basis

__all__ = ["ConjugateGradients", "IterativeMeasurement", "LinearSystem"]

#: Random vectors for the preconditioner, and steps of a Lanczos recursion.
_FOR_DIAGONAL, _STEPS = 64, 15


@dataclass(frozen=True)
class ConjugateGradients:
    """How systems are solved.

    Args:
        tolerance: bound on what a solve may cost, in nats: the error of a log-integral, and the divergence of the law
            of a draw; positive.
        max_iterations: of a solve; a solve that needs more is used as it is.
        colours: distance in pixels of those that share a probing vector of a log-determinant; it takes colours^2
            vectors, and twice the distance at the highest noise.
        exact_entries: pictures of up to so many entries have their log-determinants from a Cholesky factor; larger
            ones only that of the highest noise, up to four times as many.

    Raises:
        ValueError: for a value outside its domain.
    """

    tolerance: float = 1e-3
    max_iterations: int = 500
    colours: int = 6
    exact_entries: int = 1024

    def __post_init__(self) -> None:
        whole = min(self.max_iterations, self.colours) >= 1 and self.exact_entries >= 0
        if not 0 < self.tolerance < float("inf") or not whole:
            raise ValueError(f"got {self}; expected a positive tolerance in nats and positive whole numbers")


class LinearSystem:
    """J of one program in the coordinates of V, and what was computed of it once.

    Args:
        picture: the program.
        basis: V.
        highest: v at the highest noise, (1, *shape) or broadcastable to it.
        settings: how systems are solved.
    """

    def __init__(
        self, picture: PictureMeasurement, basis: Basis, highest: Tensor, settings: ConjugateGradients
    ) -> None:
        self.picture, self.basis, self.settings = picture, basis, settings
        self._highest = highest.double().expand(1, *picture.x.shape)
        self._weights = [site.weight.to(picture.x) for site in picture.sites]
        self._targets = [site.target.to(picture.x) for site in picture.sites]
        self._parts = [_Part.of(site, picture.x, basis) for site in picture.sites]
        self._log_dets: dict[bytes, Tensor] = {}

    @property
    def num_values(self) -> int:
        """Measured values of all sites."""
        return sum(site.target.numel() for site in self.picture.sites)

    def residual(self, x: Tensor) -> Tensor:
        """r(x), (m, values)."""
        rows = [
            (weight * (target - site.operator(x))).flatten(1)
            for site, weight, target in zip(self.picture.sites, self._weights, self._targets, strict=True)
        ]
        return torch.cat(rows, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Sigma^(-1/2) A x, (m, values)."""
        rows = [
            (weight * site.operator(x)).flatten(1)
            for site, weight in zip(self.picture.sites, self._weights, strict=True)
        ]
        return torch.cat(rows, 1)

    def backward(self, r: Tensor) -> Tensor:
        """A^T Sigma^(-1/2) r, (m, *shape)."""
        parts = r.split([target.numel() for target in self._targets], 1)
        total = torch.zeros((), dtype=r.dtype, device=r.device)
        for site, weight, part in zip(self.picture.sites, self._weights, parts, strict=True):
            total = total + site.operator.adjoint(weight * part.unflatten(1, weight.shape))
        return total

    def information(self, c: Tensor) -> Tensor:
        """V^T J V c for coordinates (m, *shape): in the picture's own precision, which a solve's residual stands."""
        near = c.to(self.picture.x.dtype)
        parts = [part.information(near, self.basis) for part in self._parts]
        return torch.stack(parts).sum(0).to(c.dtype) if len(parts) > 1 else parts[0].to(c.dtype)

    def solve(self, v: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """x = (diag(1/v) + V^T J V)^-1 right, (m, *shape) of float64, and right^T x, (m,).

        Args:
            right: sqrt(v) times the right-hand side, so that v may be 0.
        """
        scale, matrix = self._preconditioned(v)
        residual = scale * right
        z, direction, norm = torch.zeros_like(residual), residual.clone(), _squares(residual)
        bound = 2 * self.settings.tolerance
        for _ in range(self.settings.max_iterations):
            image = matrix(direction)
            step = norm / _dot(direction, image).clamp(min=_TINY)
            z.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1)
            after = _squares(residual)
            direction.mul_(after / norm.clamp(min=_TINY)).add_(residual)
            norm = after
            if bool((norm <= bound).all()) and bool((_squares(residual / scale) <= bound).all()):  # scale is at most 1
                break
        white = scale * z
        return v.sqrt() * white, _dot(white, right).flatten()

    def log_det(self, v: Tensor) -> Tensor:
        """log det(I + C J), 0-d, computed once per covariance, and 0 for C = 0.

        Of large pictures :attr:`_offset` is added, the same at all noise levels. In the evidence, which has that of the
        highest noise and then differences, it sets the first one right and cancels in the others.
        """
        v = v.double().expand(1, *self.picture.x.shape)
        key = v.cpu().numpy().tobytes()
        if key not in self._log_dets:
            if not bool((v > 0).any()):
                found = torch.zeros((), dtype=v.dtype, device=v.device)
            elif self._dense is not None:
                found = self._exact_log_det(v, self._dense)
            else:
                found = self._lanczos_log_det(v, self.settings.colours) + self._offset
            self._log_dets[key] = found
        return self._log_dets[key]

    @cached_property
    def _offset(self) -> Tensor:
        """What the probing vectors of all noise levels miss at the highest."""
        rough = self._lanczos_log_det(self._highest, self.settings.colours)
        if self.picture.x.numel() <= 4 * self.settings.exact_entries:
            return self._exact_log_det(self._highest, self._matrix()) - rough
        return self._lanczos_log_det(self._highest, 2 * self.settings.colours) - rough

    @cached_property
    def _dense(self) -> Tensor | None:
        """V^T J V written out where the picture is small."""
        return self._matrix() if self.picture.x.numel() <= self.settings.exact_entries else None

    def _matrix(self) -> Tensor:
        d = self.picture.x.numel()
        eye = torch.eye(d, dtype=torch.float64, device=self.picture.x.device).reshape(d, *self.picture.x.shape)
        rows = torch.cat([self.information(part).flatten(1) for part in eye.split(256)])
        return 0.5 * (rows + rows.mT)

    @cached_property
    def _diagonal(self) -> Tensor:
        """The diagonal of V^T J V, (1, *shape), by Hutchinson's estimate where the picture is large."""
        if self._dense is not None:
            return self._dense.diagonal().reshape(1, *self.picture.x.shape)
        signs = self._signs(_FOR_DIAGONAL)
        estimate = (signs * self.information(signs)).mean(0, keepdim=True).clamp(min=0)
        return estimate + 1e-3 * estimate.mean()

    def _signs(self, number: int) -> Tensor:
        generator = torch.Generator(self.picture.x.device).manual_seed(0)
        shape = (number, *self.picture.x.shape)
        return torch.randint(0, 2, shape, generator=generator, device=self.picture.x.device).double() * 2 - 1

    def _preconditioned(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """S and S M S with M = I + C^(1/2) J C^(1/2) and S^2 = 1 / (1 + v j), which brings the spectrum near 1."""
        scale = (1 + v * self._diagonal).rsqrt()
        square, outer = scale.square(), scale * v.sqrt()

        def apply(z: Tensor) -> Tensor:
            return torch.addcmul(square * z, outer, self.information(outer * z))

        return scale, apply

    def _exact_log_det(self, v: Tensor, dense: Tensor) -> Tensor:
        root = v.sqrt().flatten()
        matrix = root[:, None] * dense * root + torch.eye(len(root), dtype=dense.dtype, device=dense.device)
        return 2 * torch.linalg.cholesky_ex(matrix)[0].diagonal().log().sum()

    def _probes(self, colours: int) -> Tensor:
        """Random signs on the pixels of each colour in turn, (colours^2 at most, *shape)."""
        shape, device = self.picture.x.shape, self.picture.x.device
        last = shape[-2:]
        place = torch.arange(last.numel(), device=device).reshape(last)
        row, column = (place // last[-1], place % last[-1]) if len(last) == 2 else (place * 0, place)
        colour = row % colours * colours + column % colours
        which = torch.arange(colours**2, device=device).reshape(-1, *(1,) * len(shape))
        found = self._signs(1) * (colour == which)
        return found[found.flatten(1).any(1)]

    def _lanczos_log_det(self, v: Tensor, colours: int) -> Tensor:
        """tr log(S M S) + sum log(1 + v j), the trace as the sum of z^T log(S M S) z over probing vectors z."""
        _, matrix = self._preconditioned(v)
        probes = self.basis.to_spectral(self._probes(colours))
        squares = _squares(probes)
        q = probes / squares.sqrt()
        before, beta = torch.zeros_like(q), torch.zeros((), dtype=torch.float64, device=v.device)
        alphas: list[Tensor] = []
        betas: list[Tensor] = []
        for _ in range(min(_STEPS, v[0].numel())):
            w = matrix(q) - beta * before
            alpha = _dot(w, q)
            w = w - alpha * q
            alphas.append(alpha.flatten())
            beta = _squares(w).sqrt()
            betas.append(beta.flatten())
            before, q = q, w / beta.clamp(min=1e-12)
        tri = torch.diag_embed(torch.stack(alphas, -1))
        off = torch.stack(betas, -1)[:, :-1]
        tri = tri + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        values, vectors = torch.linalg.eigh(tri)
        terms = squares.flatten() * (vectors[:, 0].square() * values.clamp(min=1e-12).log()).sum(-1)
        return terms.sum() + torch.log1p(v * self._diagonal).sum()


@dataclass(frozen=True, eq=False)
class _Part:
    """One site's share of J, with A = R_1 ... R_j V diag(a) V^T: what is diagonal in V costs no transform.

    Args:
        diagonal: a, of the picture's dtype, or 1.
        rest: R_1, ..., R_j.
        precision: Sigma^-1, elementwise.
    """

    diagonal: Tensor
    rest: tuple[LinearOperator, ...]
    precision: Tensor

    @classmethod
    def of(cls, site: LinearSite, x: Tensor, basis: Basis) -> _Part:
        a, rest = diagonal_part(site.operator, x.double(), basis)
        return cls(x.new_ones(()) if a is None else a.to(x), rest, site.weight.square().to(x))

    def information(self, c: Tensor, basis: Basis) -> Tensor:
        y = basis.from_spectral(self.diagonal * c)
        for operator in reversed(self.rest):
            y = operator(y)
        y = self.precision * y
        for operator in self.rest:
            y = operator.adjoint(y)
        return self.diagonal * basis.to_spectral(y)


@dataclass(frozen=True, eq=False)
class IterativeMeasurement:
    """One picture under noise of known variance, log p(y given x_0) = constant - |r(x_0)|^2 / 2.

    Args:
        name: the picture's site.
        system: J.
    """

    name: str
    system: LinearSystem

    @property
    def expanded_at(self) -> States:
        return {}

    def condition(self, mean: States, covariance: Covariances) -> _IterativeConditioned:
        m, c = mean[self.name], covariance[self.name]
        assert isinstance(c, Diagonal)
        residual = self.system.residual(m)
        value = self.system.picture.constant - 0.5 * residual.double().square().sum(1)
        slope = self.system.backward(residual)
        return _IterativeConditioned(self.name, m, c.variance.double(), value, slope, self.system)

    def expanded(self, program: Program, at: States) -> IterativeExpansion:
        """The program's own law about ``at``, with this curvature."""
        value, gradient = slope_at(program, at, self.name)
        return IterativeExpansion(self.name, at[self.name], value, gradient, self.system)


@dataclass(frozen=True, eq=False)
class IterativeExpansion:
    """One picture's quadratic about a state of each particle, J the same for all.

    Args:
        name: the picture's site.
        at: where it is expanded, (m, *shape).
        value: l, (m,) of float64.
        gradient: g, (m, *shape).
        system: J.
    """

    name: str
    at: Tensor
    value: Tensor
    gradient: Tensor
    system: LinearSystem

    @property
    def expanded_at(self) -> States:
        return {self.name: self.at}

    def condition(self, mean: States, covariance: Covariances) -> _IterativeConditioned:
        m, c = mean[self.name], covariance[self.name]
        assert isinstance(c, Diagonal)
        away = self.system.forward(m - self.at)
        slope = self.gradient - self.system.backward(away)
        value = self.value + _dot(self.gradient.double(), (m - self.at).double()).flatten()
        value = value - 0.5 * away.double().square().sum(1)
        return _IterativeConditioned(self.name, m, c.variance.double(), value, slope, self.system)


@dataclass(frozen=True, eq=False)
class _IterativeConditioned:
    name: str
    centre: Tensor  # m
    variance: Tensor
    value: Tensor  # l at m
    slope: Tensor  # g at m
    system: LinearSystem

    @property
    def _pull(self) -> Tensor:
        """sqrt(v) g, in coordinates."""
        return self.variance.sqrt() * self.system.basis.to_spectral(self.slope).double()

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor]:
        """P g in coordinates, and g^T P g."""
        return self.system.solve(self.variance, self._pull)

    def log_integral(self) -> Tensor:
        return self.value + 0.5 * (self._pulled[1] - self.system.log_det(self.variance))

    def mean(self) -> States:
        return self._at(self._pulled[0])

    def draw(self, noise: Noise) -> States:
        first = noise(self.centre.shape).double()
        second = noise(torch.Size((len(self.centre), self.system.num_values)))
        second = self.system.basis.to_spectral(self.system.backward(second)).double()
        return self._at(self.system.solve(self.variance, self._pull + first + self.variance.sqrt() * second)[0])

    def _at(self, away: Tensor) -> States:
        return {self.name: self.centre + self.system.basis.from_spectral(away.to(self.centre.dtype))}


_TINY = torch.finfo(torch.float64).tiny


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each particle, with the event's axes kept."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).reshape(-1, *(1,) * (a.ndim - 1))


def _squares(a: Tensor) -> Tensor:
    return _dot(a, a)
