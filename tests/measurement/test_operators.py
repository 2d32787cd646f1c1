"""What is particular to single operators: their formulas, what they refuse, and how foreign ones are taken in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smcdiff.measurement import (
    Blur,
    Compose,
    Composition,
    Downsample,
    FourierMagnitude,
    FourierSampling,
    Function,
    Grey,
    Identity,
    LinearComposition,
    LinearFunction,
    LinearOperator,
    LinearPhysics,
    Mask,
    Matrix,
    Physics,
    Radon,
    Reflective,
    Select,
    Zero,
    as_linear,
    as_operator,
    require_linear,
    require_svd,
)
from smcdiff.measurement.compose import diagonal_part
from smcdiff.transforms import DCT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_downsample_takes_block_means() -> None:
    x = torch.arange(24.0).reshape(1, 4, 6)
    expected = torch.tensor([[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]])
    assert torch.equal(Downsample(2)(x), expected)


def test_select_takes_pixels_in_order() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(Select(mask)(x), torch.tensor([[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]))


def test_grey_weighs_channels() -> None:
    x = normal(2, 3, 4, 5)
    torch.testing.assert_close(Grey()(x), x.mean(-3, keepdim=True))
    expected = 0.2 * x[:, :1] + 0.3 * x[:, 1:2] + 0.5 * x[:, 2:]
    torch.testing.assert_close(Grey((0.2, 0.3, 0.5))(x), expected)


def test_fourier_sampling_is_the_masked_unitary_transform() -> None:
    x, mask = normal(4, 5), torch.rand(4, 5) > 0.5
    rows, columns = torch.arange(4.0, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)
    left = torch.exp(-2j * math.pi * rows[:, None] * rows / 4)
    right = torch.exp(-2j * math.pi * columns[:, None] * columns / 5)
    expected = mask * (left @ x.to(left.dtype) @ right) / math.sqrt(20)
    torch.testing.assert_close(FourierSampling(mask)(x), torch.view_as_real(expected), rtol=1e-12, atol=1e-12)


def test_fourier_magnitude() -> None:
    """Parseval for the padded image; blind to shifts of the image and to its sign; differentiable."""
    operator, x = FourierMagnitude(3), torch.zeros(1, 6, 6, dtype=torch.float64)
    x[:, 1:5, 1:5] = normal(4, 4)
    y = operator(x)
    assert y.shape == (1, 12, 12)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(y[0, 0, 0], x.sum().abs() / 12)
    torch.testing.assert_close(operator(-x.roll((1, -1), (-2, -1))), y)
    assert not operator.is_linear
    assert torch.autograd.gradcheck(operator, (normal(3, 4, seed=3).requires_grad_(),))
    torch.testing.assert_close(torch.func.vmap(operator)(normal(2, 3, 4)), operator(normal(2, 3, 4)))


def test_radon_along_the_axes_sums_rows_and_columns() -> None:
    x = normal(2, 5, 5)
    y = Radon(5, torch.tensor([0.0, math.pi / 2, math.pi], dtype=torch.float64))(x)
    middle = slice(y.shape[-1] // 2 - 2, y.shape[-1] // 2 + 3)
    torch.testing.assert_close(y[:, 0, middle], x.sum(-2))
    torch.testing.assert_close(y[:, 1, middle], x.sum(-1))
    torch.testing.assert_close(y[:, 2, middle], x.sum(-2).flip(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 33])
def test_radon_keeps_mass_and_first_moment(size: int) -> None:
    angles = torch.cat([torch.linspace(0, 2 * math.pi, 37), torch.tensor([math.pi / 4, 3 * math.pi / 4])]).double()
    radon, x = Radon(size, angles), normal(size, size)
    y = radon(x)
    torch.testing.assert_close(y.sum(-1), x.sum().expand(len(angles)))
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    moment = angles.cos() * (x * axis).sum() + angles.sin() * (x * axis[:, None]).sum()
    bins = torch.arange(radon.bins, dtype=torch.float64) - radon.bins // 2
    torch.testing.assert_close((y * bins).sum(-1), moment)


@pytest.mark.parametrize(
    "matrix",
    [
        normal(2, 40),
        torch.eye(3, 7, dtype=torch.float64),  # its right singular vectors are unit vectors already
        torch.outer(normal(3), normal(5, seed=1)),  # of rank 1
        normal(4, 4),
        normal(6, 3),
    ],
    ids=["wide", "unit vectors", "rank 1", "square", "tall"],
)
def test_svd_of_a_matrix_in_reflectors(matrix: Tensor) -> None:
    """V is orthogonal and U diag(s) V^T is the matrix, with d min(m, d) numbers kept of V where it has d^2."""
    rows, d = matrix.shape
    operator, unit = Matrix(matrix), torch.eye(d, dtype=torch.float64)
    svd = operator.svd(unit)
    v = svd.from_spectral(unit).mT  # a row of unit gives a column of V
    torch.testing.assert_close(v.mT @ v, unit, rtol=0, atol=1e-13)
    torch.testing.assert_close(svd.to_spectral(unit), v, rtol=0, atol=1e-13)
    torch.testing.assert_close(svd.measurement_from_spectral(svd.singular_values * v), matrix.mT, rtol=0, atol=1e-12)
    assert max(factor.numel() for factor in operator._factors) <= max(d, rows) * min(d, rows)


def test_compose_applies_the_last_first() -> None:
    double, square = Function(lambda x: 2 * x), Function(torch.square)
    x = normal(3)
    torch.testing.assert_close(Compose(double, square)(x), 2 * x**2)
    torch.testing.assert_close(Compose(square, double)(x), 4 * x**2)
    torch.testing.assert_close(Compose(torch.exp, square, double)(x), torch.exp(4 * x**2))


def test_compose_is_linear_if_all_are() -> None:
    blur = Blur(torch.ones(3, 3))
    assert Compose(blur) is blur
    assert isinstance(Compose(Downsample(2), blur), LinearComposition)
    assert isinstance(Compose(Downsample(2), torch.tanh), Composition)
    with pytest.raises(ValueError, match="no operator to compose"):
        Compose()


class Squares:
    """A non-linear physics object on (batch, channels, rows, columns)."""

    def A(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return x**2


class Halves:
    """A linear physics object whose measurement is a vector."""

    def A(self, x: Tensor) -> Tensor:
        return 0.5 * x.flatten(1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 0.5 * y.reshape(-1, 1, 2, 3)


class SquaredHalves(Halves):
    """In the manner of deepinv's phase retrieval: non-linear, and yet it has an A_adjoint."""

    def A(self, x: Tensor) -> Tensor:
        return super().A(x).square()

    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        return 2 * self.A_adjoint(super().A(x) * v)


class DeepinvHalves(Halves):
    """With what deepinv's linear operators have besides."""

    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.A_adjoint(v)

    def A_adjoint_A(self, x: Tensor) -> Tensor:
        return self.A_adjoint(self.A(x))


def test_an_adjoint_does_not_make_a_physics_object_linear() -> None:
    assert isinstance(as_operator(SquaredHalves()), Physics)
    assert isinstance(as_operator(DeepinvHalves()), LinearPhysics)
    x = normal(1, 2, 3)
    torch.testing.assert_close(as_operator(SquaredHalves())(x), x.flatten().square() / 4)


def test_foreign_operators() -> None:
    x = normal(2, 5, 1, 2, 3)
    nonlinear = as_operator(Squares())
    assert isinstance(nonlinear, Physics)
    torch.testing.assert_close(nonlinear(x), x**2)
    torch.testing.assert_close(nonlinear(x[0, 0]), x[0, 0] ** 2)
    torch.testing.assert_close(torch.func.vmap(nonlinear)(x[0]), x[0] ** 2)
    linear = as_operator(Halves())
    assert isinstance(linear, LinearPhysics)
    with pytest.raises(ValueError, match="measurement_dim=1"):
        linear(x)
    linear = LinearPhysics(Halves(), measurement_dim=1)
    torch.testing.assert_close(linear(x), 0.5 * x.flatten(2))
    torch.testing.assert_close(linear.adjoint(linear(x)), 0.25 * x)
    for missing in (lambda: linear.pinv(linear(x)), lambda: linear.prox(x, linear(x), 1.0)):
        with pytest.raises(TypeError, match=r"A_dagger|prox_l2"):
            missing()
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        nonlinear(x[0, 0, 0])


def test_as_operator() -> None:
    identity = Identity()
    assert as_operator(identity) is identity
    assert isinstance(as_operator(torch.tanh), Function)
    assert not as_operator(torch.tanh).is_linear
    with pytest.raises(TypeError, match=r"got Tensor as an operator.*Matrix\(A\)"):
        as_operator(torch.ones(3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_linear_takes_linear_functions_and_refuses_others(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 4, 4, dtype=dtype)
    identity = Identity()
    assert as_linear(identity, x) is identity
    made = as_linear(lambda x: x.cumsum(-1)[..., ::2], x)
    assert isinstance(made, LinearFunction)
    y = torch.randn(2, 1, 4, 2, dtype=dtype)
    expected = torch.stack([y.flip(-1).cumsum(-1).flip(-1)] * 2, -1).flatten(-2)
    expected[..., 1::2] -= y
    torch.testing.assert_close(made.adjoint(y), expected)
    for function in (torch.tanh, lambda x: x + 1e-2 * x**2, torch.abs):
        with pytest.raises(TypeError, match="is not linear"):
            as_linear(function, x)
    with pytest.raises(TypeError, match="is affine"):
        as_linear(lambda x: 2 * x + 1, x)


def test_what_is_diagonal_in_a_basis_is_taken_off_a_composition() -> None:
    even = Blur(torch.tensor([[1.0, 2.0, 1.0]]).double() / 4, Reflective())
    tall = Blur(torch.tensor([[1.0], [-3.0], [1.0]]).double(), Reflective())
    seen = Select(normal(1, 6, 7) > 0)
    x = normal(3, 1, 6, 7)
    for operator, rest in (
        (Compose(seen, tall, even), (seen,)),
        (Compose(tall, even), ()),
        (Compose(even, Mask(normal(6, 7))), None),
        (even, ()),
        (seen, (seen,)),
    ):
        assert isinstance(operator, LinearOperator)
        a, found = diagonal_part(operator, x[0], DCT)
        y = DCT.from_spectral(DCT.to_spectral(x) * (1 if a is None else a))
        for last in reversed(found):
            y = last(y)
        torch.testing.assert_close(y, operator(x), rtol=1e-12, atol=1e-12)
        if rest is None:
            assert a is None and len(found) == 2
        else:
            assert found == rest and (a is None) == (operator is seen)


def test_methods_that_need_more_are_told_what_to_use() -> None:
    with pytest.raises(TypeError, match=r"DDRM needs a linear operator and got Function.*as_linear.*TDS or DPS"):
        require_linear(as_operator(torch.tanh), "DDRM")
    blur = Blur(torch.ones(3, 3), Zero())
    assert require_linear(blur, "DDRM") is blur
    with pytest.raises(
        TypeError, match=r"Blur has no singular value decomposition, which DDRM needs.*circular padding"
    ):
        require_svd(blur, torch.ones(1, 8, 8), "DDRM")
    assert require_svd(Identity(), torch.ones(3), "DDRM").singular_values == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Matrix(torch.ones(3)), r"matrix of shape \(3,\)"),
        (lambda: Matrix(torch.ones(3, 4, dtype=torch.int64)), "int64"),
        (lambda: Matrix(torch.ones(3, 4), event_shape=(1, 5)), r"event_shape \(1, 5\) with 5 entries.*\(3, 4\)"),
        (lambda: Matrix(torch.tensor([[torch.inf]])), "a matrix with 1 NaN or infinite"),
        (lambda: Matrix(torch.ones(3, 4))(torch.ones(2, 5)), r"x of shape \(2, 5\) for a matrix of shape \(3, 4\)"),
        (lambda: Mask(torch.tensor([torch.nan])), "a mask with 1 NaN"),
        (lambda: Mask(torch.ones(4, 5))(torch.ones(1, 5, 4)), r"mask of shape \(4, 5\) and x of shape \(1, 5, 4\)"),
        (lambda: Mask(torch.ones(2, 1, 4))(torch.ones(4, 4)), r"mask of shape \(2, 1, 4\) and x of shape \(4, 4\)"),
        (lambda: Select(torch.zeros(2, 2, dtype=torch.bool)), "at least one True"),
        (lambda: Select(torch.ones(2, 2)), "float32; expected bool"),
        (lambda: Select(torch.ones(2, 2) > 0)(torch.ones(2, 3)), r"shape \(2, 2\) and x of shape \(2, 3\)"),
        (lambda: Downsample(0), "factor 0"),
        (lambda: Downsample(3)(torch.ones(1, 6, 8)), r"shape \(1, 6, 8\) and factor 3"),
        (lambda: Grey((0.5, -0.1, 0.6)), "weights"),
        (lambda: Grey((0.0, 0.0)), "weights"),
        (lambda: Grey()(torch.ones(1, 4, 4)), r"shape \(1, 4, 4\) and 3 weights"),
        (lambda: FourierSampling(torch.ones(3, 4))(torch.ones(4, 4)), r"\(3, 4\) and x of shape \(4, 4\)"),
        (lambda: FourierMagnitude(-1), "padding -1"),
        (lambda: Radon(0, torch.zeros(1)), "size 0"),
        (lambda: Radon(4, torch.zeros(())), r"angles of shape \(\)"),
        (lambda: Radon(4, torch.zeros(2))(torch.ones(4, 5)), r"x of shape \(4, 5\)"),
        (lambda: Radon(4, torch.zeros(2)).adjoint(torch.ones(2, 4)), r"y of shape \(2, 4\)"),
    ],
)
def test_wrong_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
