r"""Covariance matrices of pictures, in forms that can be applied, drawn from and conditioned without being written out.

    diagonal     C = V diag(v) V^T                 V an orthonormal basis: pixels, cosines, Hartley
    low rank     C = V (diag(v) + U U^T) V^T       U of a few columns per particle
    corrected    C = V (diag(v) + W S W^T) V^T     S small and of either sign: what was learnt against diag(v)
    dense        C                                 for small problems, and the form the others are tested against

All are covariances of m particles at once (or one for all), so that they can depend on what each particle looks like.
They are closed under the two operations that a step of the chain needs: ``scale C + shift I``, the covariance of x_s
given x_t, and ``(C^-1 + a I)^-1``, the covariance of x_0 once x_s is seen as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, final

import torch
from torch import Tensor

from smcdiff.transforms import PIXELS, Basis

__all__ = ["Corrected", "Covariance", "Dense", "Diagonal", "LowRank"]


class Covariance(Protocol):
    """C of m particles, or one C for all."""

    def apply(self, v: Tensor) -> Tensor:
        """C v for v of shape (m, *event)."""

    def draw(self, noise: Tensor) -> Tensor:
        """R noise with R R^T = C and standard normal noise, (m, *event): a draw from N(0, C)."""

    def log_prob(self, residual: Tensor) -> Tensor:
        """log N(residual; 0, C), (m,) of float64."""

    def affine(self, scale: float, shift: float) -> Covariance:
        """scale C + shift I, for scale and shift at least 0."""

    def given(self, precision: float) -> Covariance:
        """(C^-1 + precision I)^-1, for a precision of at least 0; infinite gives 0."""


def _floor(dtype: torch.dtype) -> float:
    """The smallest variance whose inverse and logarithm are safe."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def _sum(terms: Tensor) -> Tensor:
    return terms.reshape(len(terms), -1).sum(1, dtype=torch.float64)


@final
@dataclass(frozen=True, eq=False)
class Diagonal:
    """C = V diag(v) V^T.

    Args:
        variance: v, (m or 1, *event) or broadcastable to it, positive.
        basis: V.
    """

    variance: Tensor
    basis: Basis = PIXELS

    def apply(self, v: Tensor) -> Tensor:
        return self.basis.from_spectral(self.variance * self.basis.to_spectral(v))

    def draw(self, noise: Tensor) -> Tensor:
        return self.basis.from_spectral(self.variance.sqrt() * noise)

    def log_prob(self, residual: Tensor) -> Tensor:
        c = self.basis.to_spectral(residual)
        return -0.5 * _sum(c.square() / self.variance + self.variance.log() + math.log(2 * math.pi))

    def affine(self, scale: float, shift: float) -> Diagonal:
        return Diagonal((scale * self.variance + shift).clamp(min=_floor(self.variance.dtype)), self.basis)

    def given(self, precision: float | Tensor) -> Diagonal:
        """A tensor (m or 1, *event) is a precision for each coordinate of V."""
        if isinstance(precision, float) and math.isinf(precision):
            return Diagonal(torch.zeros_like(self.variance), self.basis)
        return Diagonal(self.variance / (1 + precision * self.variance), self.basis)

    def log_det_gain(self, precision: Tensor) -> Tensor:
        """log det(I + C V diag(precision) V^T), (m or 1,) of float64, for a precision (m or 1, *event)."""
        return _sum(torch.log1p(self.variance * precision))


@final
@dataclass(frozen=True, eq=False)
class LowRank:
    """C = V (diag(v) + U U^T) V^T, with U^T = M W of each particle.

    Where all particles share v and W, products with C cost one matrix product for all of them.

    Args:
        variance: v, (m or 1, *event) or broadcastable to it, positive.
        factors: W in the coordinates of V, (m or 1, rank, *event).
        basis: V.
        mixing: M, (m or 1, rank, rank), singular values at most 1; None for the identity.
    """

    variance: Tensor
    factors: Tensor
    basis: Basis = PIXELS
    mixing: Tensor | None = None

    @property
    def _v(self) -> Tensor:
        """v of the full event's shape, flat: (m or 1, d)."""
        return self.variance.expand(-1, *self.factors.shape[2:]).flatten(1)

    @property
    def _w(self) -> Tensor:
        return self.factors.flatten(2)

    @property
    def _m(self) -> Tensor:
        if self.mixing is not None:
            return self.mixing
        return torch.eye(self.factors.shape[1], dtype=self.factors.dtype, device=self.factors.device)[None]

    @property
    def _divisible(self) -> Tensor:
        """v, not below what rounding makes of U U^T: a coordinate may vary by the factors alone."""
        most = self._w.square().sum(1)
        return self._v.maximum(4 * torch.finfo(most.dtype).eps * most).clamp(min=_floor(most.dtype))

    def _gram(self, weight: Tensor) -> Tensor:
        """U^T diag(weight) U, (m or 1, rank, rank)."""
        w, m = self._w, self._m
        return m @ ((w * weight[:, None]) @ w.mT) @ m.mT

    def _down(self, flat: Tensor) -> Tensor:
        """U^T x of x (m, d), (m, rank)."""
        w = self._w
        z = flat @ w[0].mT if len(w) == 1 else (w @ flat[..., None])[..., 0]
        return (self._m @ z[..., None])[..., 0]

    def _up(self, z: Tensor) -> Tensor:
        """U z of z (m, rank), (m, d)."""
        w, z = self._w, (self._m.mT @ z[..., None])[..., 0]
        return z @ w[0] if len(w) == 1 else (w.mT @ z[..., None])[..., 0]

    def apply(self, v: Tensor) -> Tensor:
        c = self.basis.to_spectral(v)
        flat = c.flatten(1)
        return self.basis.from_spectral((self._v * flat + self._up(self._down(flat))).reshape(c.shape))

    def draw(self, noise: Tensor) -> Tensor:
        # D^(1/2) (I + B B^T)^(1/2) noise with B = D^(-1/2) U; with B^T B = Q diag(l) Q^T the root is
        # I + B Q diag((sqrt(1 + l) - 1) / l) Q^T B^T
        v = self._divisible
        root = v.sqrt()
        values, q = torch.linalg.eigh(self._gram(1 / v))
        gain = 1 / (1 + (1 + values.clamp(min=0)).sqrt())
        flat = noise.flatten(1)
        inner = q @ (gain[..., None] * (q.mT @ self._down(flat / root)[..., None]))
        out = root * flat + self._up(inner[..., 0])
        return self.basis.from_spectral(out.reshape(noise.shape))

    def log_prob(self, residual: Tensor) -> Tensor:
        c = self.basis.to_spectral(residual).flatten(1)
        v = self._divisible
        gram = self._gram(1 / v)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        lower = torch.linalg.cholesky_ex(eye + gram)[0]  # of I + U^T D^-1 U
        small = torch.linalg.solve_triangular(lower, self._down(c / v)[..., None], upper=False)[..., 0]
        quadratic = _sum(c.square() / v) - _sum(small.square())
        log_det = _sum(v.log()) + 2 * _sum(lower.diagonal(dim1=-2, dim2=-1).log())
        return -0.5 * (quadratic + log_det + c.shape[1] * math.log(2 * math.pi))

    def affine(self, scale: float, shift: float) -> LowRank:
        variance = (scale * self.variance + shift).clamp(min=_floor(self.variance.dtype))
        return LowRank(variance, math.sqrt(scale) * self.factors, self.basis, self.mixing)

    def given(self, precision: float) -> LowRank | Diagonal:
        if math.isinf(precision):
            return Diagonal(torch.zeros_like(self.variance), self.basis)
        # with D' = (D^-1 + a I)^-1 and U' = D' D^-1 U = U / (1 + a v) it is D' + U' (I + a U^T U')^-1 U'^T
        kept = 1 / (1 + precision * self._v)
        gram = precision * self._gram(kept)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        lower = torch.linalg.cholesky_ex(eye + 0.5 * (gram + gram.mT))[0]
        mixing = torch.linalg.solve_triangular(lower, self._m.expand(len(gram), -1, -1), upper=False)
        factors = (self._w * kept[:, None]).reshape(-1, *self.factors.shape[1:])
        return LowRank(self.variance / (1 + precision * self.variance), factors, self.basis, mixing)


@final
@dataclass(frozen=True, eq=False)
class Corrected:
    """C = V (diag(v) + W S W^T) V^T, positive definite though S need not be.

    Args:
        variance: v, (m or 1, *event) or broadcastable to it, positive.
        factors: W in the coordinates of V, (m, rank, *event); columns may be zero.
        core: S, (m, rank, rank), symmetric, float64.
        basis: V.
    """

    variance: Tensor
    factors: Tensor
    core: Tensor
    basis: Basis = PIXELS

    @cached_property
    def _v(self) -> Tensor:
        """v of the full event's shape, flat, float64: (m or 1, d)."""
        return self.variance.expand(-1, *self.factors.shape[2:]).flatten(1).double()

    @cached_property
    def _w(self) -> Tensor:
        """(m, rank, d), float64."""
        return self.factors.flatten(2).double()

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor]:
        """O (m, rank, d), rows orthonormal or zero, and K (m, rank, rank):
        C = D^(1/2) (I + O^T (K K^T - I) O) D^(1/2), by O = L^-1 B with B = W D^(-1/2) and B B^T = L L^T, and the
        Cholesky factor K of I + L^T S L."""
        b = self._w / self._v.sqrt()[:, None]
        gram = b @ b.mT
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
        hair = (_HAIR * largest).clamp(min=_floor(torch.float64))  # a column of zeros has a row of zeros in O
        lower = torch.linalg.cholesky_ex(gram + hair[:, None, None] * eye)[0]
        axes = torch.linalg.solve_triangular(lower, b, upper=False)
        inner = lower.mT @ self.core @ lower
        return axes, torch.linalg.cholesky_ex(eye + 0.5 * (inner + inner.mT))[0]

    def apply(self, v: Tensor) -> Tensor:
        c = self.basis.to_spectral(v)
        flat, w = c.flatten(1).double(), self._w
        out = self._v * flat + (w.mT @ (self.core @ (w @ flat[..., None])))[..., 0]
        return self.basis.from_spectral(out.reshape(c.shape).to(v.dtype))

    def draw(self, noise: Tensor) -> Tensor:
        axes, k = self._root
        flat = noise.flatten(1).double()[..., None]
        along = axes @ flat
        flat = flat + axes.mT @ (k @ along - along)
        return self.basis.from_spectral((self._v.sqrt() * flat[..., 0]).reshape(noise.shape).to(noise.dtype))

    def log_prob(self, residual: Tensor) -> Tensor:
        axes, k = self._root
        white = self.basis.to_spectral(residual).flatten(1).double() / self._v.sqrt()
        along = axes @ white[..., None]
        shrunk = torch.linalg.solve_triangular(k, along, upper=False)
        quadratic = white.square().sum(1) + (shrunk.square() - along.square()).sum((1, 2))
        log_det = self._v.log().sum(1) + 2 * k.diagonal(dim1=-2, dim2=-1).log().sum(1)
        return -0.5 * (quadratic + log_det + white.shape[1] * math.log(2 * math.pi))

    def affine(self, scale: float, shift: float) -> Corrected:
        variance = (scale * self.variance + shift).clamp(min=_floor(self.variance.dtype))
        return Corrected(variance, self.factors, scale * self.core, self.basis)

    def given(self, precision: float | Tensor) -> Corrected | Diagonal:
        """A tensor (m or 1, *event) is a precision for each coordinate of V."""
        if isinstance(precision, float) and math.isinf(precision):
            return Diagonal(torch.zeros_like(self.variance), self.basis)
        # with K = 1 / (1 + a v) it is K v + K W (I + S W^T K a W)^-1 S W^T K
        kept = 1 / (1 + precision * self.variance)
        core = torch.linalg.solve_ex(self._gain(kept * precision), self.core)[0]
        return Corrected(
            self.variance * kept,
            self.factors * kept.expand(-1, *self.factors.shape[2:])[:, None],
            0.5 * (core + core.mT),
            self.basis,
        )

    def log_det_gain(self, precision: Tensor) -> Tensor:
        """log det(I + C V diag(precision) V^T), (m,) of float64, for a precision (m or 1, *event)."""
        information = precision * self.variance
        gain = self._gain(precision / (1 + information))
        return _sum(torch.log1p(information)) + torch.linalg.slogdet(gain)[1]

    def _gain(self, weight: Tensor) -> Tensor:
        """I + S W^T diag(weight) W, (m, rank, rank)."""
        w = self._w
        across = weight.expand(-1, *self.factors.shape[2:]).flatten(1).double()
        eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        return eye + self.core @ ((w * across[:, None]) @ w.mT)


#: Directions of W whose square is below this share of the longest's are rounding.
_HAIR = 1e-13


@final
@dataclass(frozen=True, eq=False)
class Dense:
    """C as a matrix over the flattened event.

    Args:
        matrix: (m or 1, d, d), symmetric and positive semi-definite.
    """

    matrix: Tensor

    @property
    def _lower(self) -> Tensor:
        """A Cholesky factor, float64. A hair of the trace, about the rounding of the entries, is added to the diagonal,
        since C may have lost a direction."""
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).double().sum(-1)
        hair = (4 * torch.finfo(self.matrix.dtype).eps * trace).clamp(min=_floor(torch.float64))
        eye = torch.eye(self.matrix.shape[-1], dtype=torch.float64, device=self.matrix.device)
        return torch.linalg.cholesky_ex(self.matrix.double() + hair[:, None, None] * eye)[0]

    def apply(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.flatten(1)[..., None])[..., 0].reshape(v.shape)

    def draw(self, noise: Tensor) -> Tensor:
        drawn = (self._lower @ noise.flatten(1)[..., None].double())[..., 0]
        return drawn.reshape(noise.shape).to(noise.dtype)

    def log_prob(self, residual: Tensor) -> Tensor:
        lower = self._lower
        white = torch.linalg.solve_triangular(lower, residual.flatten(1)[..., None].double(), upper=False)[..., 0]
        log_det = 2 * _sum(lower.diagonal(dim1=-2, dim2=-1).log())
        return -0.5 * (_sum(white.square()) + log_det + white.shape[1] * math.log(2 * math.pi))

    def affine(self, scale: float, shift: float) -> Dense:
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return Dense(scale * self.matrix + shift * eye)

    def given(self, precision: float) -> Dense:
        if math.isinf(precision):
            return Dense(torch.zeros_like(self.matrix))
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        # (I + a C)^-1 C, which needs no inverse of C
        shrunk = torch.linalg.solve_ex(eye + precision * self.matrix, self.matrix)[0]
        return Dense(0.5 * (shrunk + shrunk.mT))
