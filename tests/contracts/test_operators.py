"""What every measurement operator must do, held against the dense matrix made by pushing unit vectors through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from smcdiff.measurement import (
    SVD,
    Blur,
    Circular,
    Compose,
    Downsample,
    FourierSampling,
    Grey,
    Identity,
    LinearOperator,
    LinearPhysics,
    Mask,
    Matrix,
    Radon,
    Reflective,
    Select,
    SpectralOperator,
    Zero,
    as_linear,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=torch.float64).to(dtype)


@dataclass
class DoublingPhysics:
    """A physics object in the manner of deepinv: it takes (batch, channels, rows, columns) only."""

    def A(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return 2 * x[..., ::2]

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 2 * torch.stack([y, torch.zeros_like(y)], -1).flatten(-2)

    def A_dagger(self, y: Tensor) -> Tensor:
        return self.A_adjoint(y) / 4

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float) -> Tensor:
        seen = torch.tensor([1.0, 0.0], dtype=z.dtype).repeat(z.shape[-1] // 2)
        return (z + gamma * self.A_adjoint(y)) / (1 + 4 * gamma * seen)


def rank_two(rows: int, columns: int) -> Tensor:
    return normal(rows, 2) @ normal(2, columns)


def symmetric(rows: int, columns: int) -> Tensor:
    kernel = normal(rows, columns)
    return kernel + kernel.flip(0) + kernel.flip(1) + kernel.flip((0, 1))


#: One row per operator: how to make it, and the shape of one event.
ROWS: dict[str, tuple[Callable[[], LinearOperator], tuple[int, ...]]] = {
    "identity": (Identity, (2, 3)),
    "matrix wide": (lambda: Matrix(normal(3, 5)), (5,)),
    "matrix tall": (lambda: Matrix(normal(7, 5)), (5,)),
    "matrix of rank two": (lambda: Matrix(rank_two(4, 5)), (5,)),
    "matrix on images": (lambda: Matrix(normal(4, 12), event_shape=(1, 3, 4)), (1, 3, 4)),
    "mask": (lambda: Mask(normal(3, 4) > 0), (2, 3, 4)),
    "mask with signed weights": (lambda: Mask(normal(3, 4).clamp(min=-0.5, max=0.0)), (2, 3, 4)),
    "select": (lambda: Select(normal(2, 3, 4) > 0), (2, 3, 4)),
    "select in each channel": (lambda: Select(normal(3, 4) > 0), (2, 3, 4)),
    "blur": (lambda: Blur(normal(3, 3)), (2, 5, 6)),
    "blur with an even kernel": (lambda: Blur(normal(2, 4)), (1, 6, 4)),
    "blur with zeros in its transfer function": (lambda: Blur(torch.ones(2, 3, dtype=torch.float64) / 6), (1, 4, 6)),
    "blur with a kernel larger than the image": (lambda: Blur(normal(7, 11), Circular()), (1, 3, 4)),
    "one blur per sample": (lambda: Blur(normal(2, 3, 2)), (2, 1, 4, 5)),
    "zero-padded blur": (lambda: Blur(normal(3, 4), Zero()), (2, 5, 4)),
    "reflected blur": (lambda: Blur(normal(3, 4), Reflective()), (2, 5, 4)),
    "reflected blur with a symmetric kernel": (lambda: Blur(symmetric(5, 3), Reflective()), (2, 6, 4)),
    "reflected blur with zeros": (lambda: Blur(torch.ones(3, 1, dtype=torch.float64), Reflective()), (1, 6, 4)),
    "reflected blur with zeros but for rounding": (
        lambda: Blur(torch.ones(5, 5, dtype=torch.float64) / 25, Reflective()),
        (1, 10, 10),
    ),
    "one symmetric kernel per sample": (
        lambda: Blur(torch.stack([symmetric(3, 3), symmetric(3, 3).square()]), Reflective()),
        (2, 1, 4, 5),
    ),
    "downsample": (lambda: Downsample(2), (2, 4, 6)),
    "downsample by three": (lambda: Downsample(3), (1, 3, 6)),
    "downsample by one": (lambda: Downsample(1), (1, 2, 3)),
    "grey": (lambda: Grey((0.299, 0.587, 0.114)), (3, 2, 3)),
    "grey of one channel": (lambda: Grey((0.5,)), (1, 2, 3)),
    "Fourier sampling": (lambda: FourierSampling(normal(4, 5) > 0), (2, 4, 5)),
    "Fourier sampling with weights": (lambda: FourierSampling(normal(5, 4)), (1, 5, 4)),
    "radon": (lambda: Radon(4, torch.linspace(0, 3, 5)), (1, 4, 4)),
    "composition": (lambda: Compose(Downsample(2), Mask(normal(4, 6) > -1), Blur(normal(3, 3))), (2, 4, 6)),
    "linear function": (lambda: as_linear(lambda x: 3 * x[..., ::2, :], normal(1, 4, 3)), (1, 4, 3)),
    "physics": (lambda: LinearPhysics(DoublingPhysics()), (1, 2, 4)),
}
WITHOUT_SVD = ("zero-padded blur", "reflected blur", "radon", "composition", "linear function", "physics")
WITHOUT_PINV = WITHOUT_SVD[:-1]


@dataclass
class Case:
    """An operator, its event shape, and its dense matrix of shape (m, d)."""

    operator: LinearOperator
    event: tuple[int, ...]
    measurement: tuple[int, ...]
    dense: Tensor

    def events(self, *lead: int) -> Tensor:
        return normal(*lead, *self.event)

    def measurements(self, *lead: int) -> Tensor:
        return normal(*lead, *self.measurement).flip(0)

    @property
    def svd(self) -> SVD:
        svd = self.operator.svd(self.events())
        assert svd is not None
        return svd


def dense(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear function, one column per unit vector."""
    unit = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).unflatten(-1, shape)
    return torch.stack([function(column).flatten() for column in unit], -1)


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    """Every operator."""
    return make(request.param)


@pytest.fixture(params=[name for name in ROWS if name not in WITHOUT_SVD])
def spectral(request: pytest.FixtureRequest) -> Case:
    """Every operator with a singular value decomposition."""
    return make(request.param)


def make(name: str) -> Case:
    factory, event = ROWS[name]
    operator = factory()
    return Case(operator, event, tuple(operator(normal(*event)).shape), dense(operator, event))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def flat(x: Tensor, event: tuple[int, ...]) -> Tensor:
    return x.reshape(*x.shape[: x.ndim - len(event)], -1)


def test_it_is_linear_and_acts_on_any_batch(case: Case) -> None:
    x = case.events(2, 3)
    y = case.operator(x)
    assert case.operator.is_linear
    assert y.shape == (2, 3, *case.measurement)
    close(flat(y, case.measurement), flat(x, case.event) @ case.dense.mT)


def test_adjoint_is_the_transpose(case: Case) -> None:
    x, y = case.events(2, 3), case.measurements(2, 3)
    close(flat(case.operator.adjoint(y), case.event), flat(y, case.measurement) @ case.dense)
    left = (flat(case.operator(x), case.measurement) * flat(y, case.measurement)).sum(-1)
    right = (flat(x, case.event) * flat(case.operator.adjoint(y), case.event)).sum(-1)
    close(left, right)


def test_a_sample_does_not_depend_on_its_neighbours(case: Case) -> None:
    x, y = case.events(3), case.measurements(3)
    other_x, other_y = x.clone(), y.clone()
    other_x[1:], other_y[1:] = 1e6, -1e6
    assert torch.equal(case.operator(x)[0], case.operator(other_x)[0])
    assert torch.equal(case.operator.adjoint(y)[0], case.operator.adjoint(other_y)[0])


def test_vmap_equals_a_loop(case: Case) -> None:
    x, y = case.events(3), case.measurements(3)
    close(torch.func.vmap(case.operator)(x), torch.stack([case.operator(one) for one in x]))
    close(torch.func.vmap(case.operator.adjoint)(y), torch.stack([case.operator.adjoint(one) for one in y]))


def test_gradient_of_the_misfit(case: Case) -> None:
    x, y = case.events(2), case.measurements(2)
    gradient = torch.func.grad(lambda x: 0.5 * (case.operator(x) - y).square().sum())(x)
    close(gradient, case.operator.adjoint(case.operator(x) - y), 1e-11)


def test_single_precision_stays_single(case: Case) -> None:
    x = case.events(2)
    y = case.operator(x.float())
    assert y.dtype == torch.float32
    assert case.operator.adjoint(y).dtype == torch.float32
    torch.testing.assert_close(y.double(), case.operator(x), rtol=1e-5, atol=1e-5)


def test_singular_values_and_coordinates(spectral: Case) -> None:
    svd, a, d = spectral.svd, spectral.dense, spectral.dense.shape[1]
    v = dense(svd.from_spectral, spectral.event)
    u = dense(svd.measurement_from_spectral, spectral.event)
    s = svd.singular_values.expand(spectral.event).flatten()
    identity = torch.eye(d, dtype=torch.float64)
    close(v.mT @ v, identity)
    close(dense(svd.to_spectral, spectral.event), v.mT)
    close(dense(svd.measurement_to_spectral, spectral.measurement), u.mT * (s > 0)[:, None])
    close((u.mT @ u)[s > 0][:, s > 0], identity[s > 0][:, s > 0], 1e-11)
    close((u * s) @ v.mT, a, 1e-11)
    expected = torch.linalg.svdvals(a)
    close(s.sort(descending=True).values[: len(expected)], expected, 1e-11)
    assert int((s > 0).sum()) == torch.linalg.matrix_rank(a)


def test_coordinates_on_any_batch(spectral: Case) -> None:
    svd, x, y = spectral.svd, spectral.events(2, 3), spectral.measurements(2, 3)
    for transform, values in (
        (svd.to_spectral, x),
        (svd.from_spectral, x),
        (svd.measurement_to_spectral, y),
        (svd.measurement_from_spectral, x),
    ):
        close(transform(values)[1, 2], transform(values[1, 2]))


def test_pseudo_inverse(spectral: Case) -> None:
    a, pinv = spectral.operator, spectral.operator.pinv
    x, y = spectral.events(3), spectral.measurements(3)
    expected = torch.linalg.pinv(spectral.dense, rtol=1e-12)
    close(flat(pinv(y), spectral.event), flat(y, spectral.measurement) @ expected.mT, 1e-9)
    close(a(pinv(a(x))), a(x), 1e-10)
    close(pinv(a(pinv(y))), pinv(y), 1e-9)
    close(torch.func.vmap(pinv)(y), pinv(y), 1e-10)


def test_proximal_map(spectral: Case) -> None:
    a, gamma = spectral.dense, 2.5
    z, y = spectral.events(3).flip(0), spectral.measurements(3)
    normal_matrix = torch.eye(a.shape[1], dtype=torch.float64) + gamma * a.mT @ a
    right = flat(z, spectral.event) + gamma * flat(y, spectral.measurement) @ a
    expected = torch.linalg.solve(normal_matrix, right.mT).mT.reshape(z.shape)
    close(spectral.operator.prox(z, y, gamma), expected, 1e-10)
    per_sample = torch.tensor([0.0, 2.5, 7.0], dtype=torch.float64).reshape(3, *[1] * len(spectral.event))
    got = spectral.operator.prox(z, y, per_sample)
    close(got[0], z[0], 1e-10)
    close(got[1], expected[1], 1e-10)


def test_solve(spectral: Case) -> None:
    a, y = spectral.dense, spectral.measurements(3)
    matrix = 0.7 * a @ a.mT + 0.2 * torch.eye(a.shape[0], dtype=torch.float64)
    expected = torch.linalg.solve(matrix, flat(y, spectral.measurement).mT).mT.reshape(y.shape)
    close(spectral.svd.solve(y, 0.7, 0.2), expected, 1e-10)


@pytest.mark.parametrize("name", WITHOUT_SVD)
def test_what_is_not_known_is_refused(name: str) -> None:
    case = make(name)
    assert case.operator.svd(case.events()) is None
    if name in WITHOUT_PINV:
        with pytest.raises(TypeError, match="pseudo-inverse"):
            case.operator.pinv(case.measurements())
        with pytest.raises(TypeError, match="proximal map"):
            case.operator.prox(case.events(), case.measurements(), 1.0)


def test_physics_gives_its_own_inverse_and_proximal_map() -> None:
    case = make("physics")
    y, z, a = case.measurements(2, 3), case.events(2, 3), case.dense
    close(flat(case.operator.pinv(y), case.event), flat(y, case.measurement) @ torch.linalg.pinv(a).mT)
    matrix = torch.eye(a.shape[1], dtype=torch.float64) + 1.5 * a.mT @ a
    right = (flat(z, case.event) + 1.5 * flat(y, case.measurement) @ a).reshape(6, -1)
    close(case.operator.prox(z, y, 1.5).reshape(6, -1), torch.linalg.solve(matrix, right.mT).mT)
    close(case.operator.prox(z[0, 0], y[0, 0], 1.5), case.operator.prox(z, y, 1.5)[0, 0])


@pytest.mark.parametrize("name", [name for name in ROWS if name not in WITHOUT_SVD])
def test_input_shape(name: str) -> None:
    case = make(name)
    assert isinstance(case.operator, SpectralOperator)
    assert case.operator.input_shape(torch.Size((3, *case.measurement))) == (3, *case.event)


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("select")])
def test_no_value_is_read_by_the_host(name: str) -> None:
    """Fake tensors have no values: what would wait for the device fails. (Select reads its mask once, when made.)"""
    factory, event = ROWS[name]
    operator = factory()
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, *event, dtype=torch.float64)
        y = operator(x)
        operator.adjoint(y)
        if isinstance(operator, SpectralOperator) and operator.svd(x) is not None:
            operator.prox(x, operator(operator.pinv(y)), 2.0)
