r"""The elementary linear operators, each with its exact singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from smcdiff.measurement.checks import broadcasts, is_validating, require_finite
from smcdiff.measurement.operators import SpectralOperator
from smcdiff.measurement.svd import SVD, cut
from smcdiff.transforms import Basis, identity

__all__ = ["Downsample", "Grey", "Identity", "Mask", "Matrix", "Select"]


@final
@dataclass(frozen=True, eq=False)
class Identity(SpectralOperator):
    """y = x."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def svd(self, x: Tensor) -> SVD:
        return SVD(x.new_ones(()), identity, identity, identity, identity)

    def eigenvalues(self, x: Tensor, basis: Basis) -> Tensor:
        """1, in every basis."""
        return x.new_ones(())


@final
@dataclass(frozen=True, eq=False)
class Matrix(SpectralOperator):
    """y = A vec(x).

    Args:
        matrix: A, of shape (m, d).
        event_shape: the shape of x, with d entries; None for events of shape (d,).

    Raises:
        ValueError: for a matrix that is not two-dimensional or not floating-point, an event shape that has not d
            entries, NaN.
    """

    matrix: Tensor
    event_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or not self.matrix.is_floating_point():
            raise ValueError(
                f"got a matrix of shape {tuple(self.matrix.shape)} and dtype {self.matrix.dtype}; expected "
                "floating-point values of shape (m, d)"
            )
        if self._event.numel() != self.matrix.shape[1]:
            raise ValueError(
                f"got event_shape {tuple(self._event)} with {self._event.numel()} entries and a matrix of shape "
                f"{tuple(self.matrix.shape)}; expected one column per entry"
            )
        if is_validating():
            require_finite("a matrix", self.matrix)

    @property
    def _event(self) -> torch.Size:
        return torch.Size((self.matrix.shape[1],) if self.event_shape is None else self.event_shape)

    def _flat(self, x: Tensor) -> Tensor:
        event = self._event
        lead = x.ndim - len(event)
        if lead < 0 or x.shape[lead:] != event:
            raise ValueError(
                f"got x of shape {tuple(x.shape)} for a matrix of shape {tuple(self.matrix.shape)}; expected "
                f"(..., {', '.join(map(str, event))}). For other events give Matrix(A, event_shape=...)"
            )
        return x.flatten(lead) if event else x.unsqueeze(-1)

    def _unflat(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-1] + self._event)

    def __call__(self, x: Tensor) -> Tensor:
        return self._flat(x) @ self.matrix.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return self._unflat(y @ self.matrix.to(y.dtype))

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape[:-1] + self._event

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U (m, r), s (r,), W (d, r) and T (r, r) of V = I + W T W^T (d, d), with r = min(m, d).

        V is orthogonal, its first r columns are the right singular vectors v_1 ... v_r: the product of the reflectors
        of their QR decomposition, whose signs are U's. With E the first r unit vectors, V E = (v_1 ... v_r) gives
        W = V E - E and T = ((V E)^T E - I)^{-1}. It takes d r numbers in place of d^2.
        """
        u, s, vt = torch.linalg.svd(self.matrix, full_matrices=False)
        reflectors, tau = torch.geqrf(vt.mT)
        tau = torch.where(tau == 0, 2.0, tau)  # a vector that is a unit vector already: it is turned all the same
        first = torch.linalg.householder_product(reflectors, tau)
        signs = (first * vt.mT).sum(0).sign()
        unit = torch.eye(len(vt), dtype=s.dtype, device=s.device)
        w = first - pad(unit, (0, 0, 0, len(first) - len(unit)))
        t = torch.linalg.inv(first[: len(unit)].mT - unit)
        return u * signs, cut(s, 1, max(self.matrix.shape) * torch.finfo(s.dtype).eps), w, t

    def svd(self, x: Tensor) -> SVD:
        u, s, w, t = (factor.to(x.dtype) for factor in self._factors)
        rank, d = len(s), self.matrix.shape[1]
        u = u * (s > 0)
        singular_values = self._unflat(torch.cat([s, s.new_zeros(d - rank)]))

        def rotated(x: Tensor, inner: Tensor) -> Tensor:
            x = self._flat(x)
            return self._unflat(x + (x @ w) @ inner @ w.mT)

        return SVD(
            singular_values,
            lambda x: rotated(x, t),
            lambda c: rotated(c, t.mT),
            lambda y: self._unflat(pad(y @ u, (0, d - rank))),
            lambda c: self._flat(c)[..., :rank] @ u.mT,
        )


@final
@dataclass(frozen=True, eq=False)
class Mask(SpectralOperator):
    """y = m x, elementwise; y keeps the shape of x.

    Where m = 0 the measurement is noise alone: it says nothing of x, but it does say something of an unknown noise
    level, and a zero filled in there would say that it is small. Use :class:`Select` when the noise level is a latent.

    Args:
        mask: m, bool (True is seen) or real; broadcasts to the shape of x.

    Raises:
        ValueError: for a mask that does not broadcast to the shape of x, NaN.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if is_validating():
            require_finite("a mask", self.mask)

    def __call__(self, x: Tensor) -> Tensor:
        if not broadcasts(self.mask.shape, x.shape):
            raise ValueError(
                f"got a mask of shape {tuple(self.mask.shape)} and x of shape {tuple(x.shape)}; expected a mask that "
                "broadcasts to the shape of x, such as (rows, columns) or (channels, rows, columns)"
            )
        return x * self.mask.to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def svd(self, x: Tensor) -> SVD:
        mask = self.mask.to(x.dtype)

        def sign(y: Tensor) -> Tensor:
            return y * mask.sign()

        return SVD(mask.abs(), identity, identity, sign, sign)


@final
@dataclass(frozen=True, eq=False)
class Select(SpectralOperator):
    """y = the seen pixels of x in a row, for x of shape (..., *mask.shape); y is (..., number seen).

    Args:
        mask: bool, True is seen; of the shape of an event, or of its last dimensions.

    Raises:
        ValueError: for a mask that is not bool or sees nothing, or x of another shape.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.ndim == 0 or not bool(self.mask.any()):
            raise ValueError(
                f"got a mask of shape {tuple(self.mask.shape)} and dtype {self.mask.dtype}; expected bool with at "
                "least one True"
            )

    @cached_property
    def _places(self) -> Tensor:
        return self.mask.flatten().nonzero().squeeze(-1)

    def __call__(self, x: Tensor) -> Tensor:
        dim = self.mask.ndim
        if x.shape[-dim:] != self.mask.shape:
            raise ValueError(
                f"got a mask of shape {tuple(self.mask.shape)} and x of shape {tuple(x.shape)}; expected a mask of the "
                "shape of x, or of its last dimensions"
            )
        return x.flatten(-dim).index_select(-1, self._places)

    def adjoint(self, y: Tensor) -> Tensor:
        pixels = y.new_zeros(*y.shape[:-1], self.mask.numel()).index_copy(-1, self._places, y)
        return pixels.unflatten(-1, self.mask.shape)

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return shape[:-1] + self.mask.shape

    def svd(self, x: Tensor) -> SVD:
        return SVD(self.mask.to(x.dtype), identity, identity, self.adjoint, self)


@final
@dataclass(frozen=True, eq=False)
class Downsample(SpectralOperator):
    """y = the mean of each block of f x f pixels, over the last two dimensions.

    Per block A = (1/f) u^T with u the constant unit vector; V is the reflection that takes the first unit vector to
    u, so that s = 1/f at each block's first pixel and 0 at the others.

    Args:
        factor: f, at least 1.

    Raises:
        ValueError: for a factor under 1, or one that does not divide the size of x.
    """

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"got factor {self.factor}; expected a whole number of at least 1")

    def _blocks(self, x: Tensor) -> Tensor:
        """(..., rows / f, columns / f, f * f)."""
        f = self.factor
        if x.ndim < 2 or x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(
                f"got x of shape {tuple(x.shape)} and factor {f}; expected (..., rows, columns) with both divisible by "
                "the factor: crop or pad x first"
            )
        x = x.unflatten(-1, (x.shape[-1] // f, f)).unflatten(-3, (x.shape[-2] // f, f))
        return x.transpose(-3, -2).flatten(-2)

    def _image(self, blocks: Tensor) -> Tensor:
        f = self.factor
        return blocks.unflatten(-1, (f, f)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def __call__(self, x: Tensor) -> Tensor:
        return self._blocks(x).mean(-1)

    def adjoint(self, y: Tensor) -> Tensor:
        f = self.factor
        return self._image((y / f**2).unsqueeze(-1).expand(*y.shape, f * f))

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-2] * self.factor, shape[-1] * self.factor))

    def svd(self, x: Tensor) -> SVD:
        f = self.factor
        unit = x.new_full((f * f,), 1 / f)

        def rotate(x: Tensor) -> Tensor:
            return self._image(_reflect(self._blocks(x), unit))

        def embed(y: Tensor) -> Tensor:
            return self._image(pad(y.unsqueeze(-1), (0, f * f - 1)))

        singular_values = embed(x.new_full((x.shape[-2] // f, x.shape[-1] // f), 1 / f))
        return SVD(singular_values, rotate, rotate, embed, lambda c: self._blocks(c)[..., 0])


@final
@dataclass(frozen=True, eq=False)
class Grey(SpectralOperator):
    """y = sum over the channels c of w_c x_c, for x of shape (..., channels, rows, columns); one channel remains.

    Per pixel A = |w| u^T with u = w / |w|, so s = |w| at the first channel and 0 at the others.

    Args:
        weights: w, at least 0; (1/3, 1/3, 1/3) is the mean, (0.299, 0.587, 0.114) the luma of ITU-R BT.601.

    Raises:
        ValueError: for weights that are negative or all zero, or x of another number of channels.
    """

    weights: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)

    def __post_init__(self) -> None:
        if not self.weights or not min(self.weights) >= 0 or not 0 < sum(self.weights) < float("inf"):
            raise ValueError(f"got weights {self.weights}; expected finite numbers of at least 0 with a positive sum")

    def _weights(self, x: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=x.dtype, device=x.device)

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[-3] != len(self.weights):
            raise ValueError(
                f"got x of shape {tuple(x.shape)} and {len(self.weights)} weights; expected (..., channels, rows, "
                "columns) with one weight per channel"
            )
        return (x.movedim(-3, -1) @ self._weights(x)).unsqueeze(-3)

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self._weights(y)[:, None, None]

    def input_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-3], len(self.weights), *shape[-2:]))

    def svd(self, x: Tensor) -> SVD:
        weights = self._weights(x)
        norm = torch.linalg.vector_norm(weights)

        def rotate(x: Tensor) -> Tensor:
            return _reflect(x.movedim(-3, -1), weights / norm).movedim(-1, -3)

        def embed(y: Tensor) -> Tensor:
            return pad(y, (0, 0, 0, 0, 0, len(weights) - 1))

        return SVD(embed(norm.reshape(1, 1, 1)), rotate, rotate, embed, lambda c: c[..., :1, :, :])


def _reflect(x: Tensor, unit: Tensor) -> Tensor:
    """The symmetric orthonormal map of the last dimension that exchanges the first unit vector e and ``unit``.

    It is 2 h h^T / |h|^2 - I with h = e + unit, which needs unit_0 > -1.
    """
    h = torch.cat([unit[:1] + 1, unit[1:]])
    return (x @ h).unsqueeze(-1) * (2 * h / (h @ h)) - x
