"""Blur against scipy, against its written-out sum, and as a differentiable function of its kernel."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import ndimage, signal
from torch import Tensor

from smcdiff.measurement import Blur, Circular, GaussianMeasurement, Reflective, Zero
from smcdiff.measurement.blur import Padding
from smcdiff.transforms import DCT, HARTLEY, Basis

SIZES = [(3, 3), (1, 5), (4, 4), (2, 3), (5, 2), (7, 6), (1, 1), (11, 13), (20, 4)]
PADDINGS = [Circular(), Zero(), Reflective()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mirrored(place: int, size: int) -> int:
    """Where a pixel beyond the border is taken from: ... 1 0 | 0 1 ... size - 1 | size - 1 ..."""
    within = place % (2 * size)
    return min(within, 2 * size - 1 - within)


def written_out(kernel: Tensor, x: Tensor, padding: Padding) -> Tensor:
    """y[i] = sum_j k[j] x[i + c - j] in two dimensions, one pixel after the other."""
    rows, columns = x.shape
    y = torch.zeros_like(x)
    for row, column in np.ndindex(rows, columns):
        for j, k in np.ndindex(*kernel.shape):
            a, b = row + kernel.shape[0] // 2 - j, column + kernel.shape[1] // 2 - k
            if isinstance(padding, Circular):
                y[row, column] += kernel[j, k] * x[a % rows, b % columns]
            elif isinstance(padding, Reflective):
                y[row, column] += kernel[j, k] * x[mirrored(a, rows), mirrored(b, columns)]
            elif 0 <= a < rows and 0 <= b < columns:
                y[row, column] += kernel[j, k] * x[a, b]
    return y


@pytest.mark.parametrize("padding", PADDINGS, ids=repr)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_written_out_sum(size: tuple[int, int], padding: Padding) -> None:
    kernel, x = normal(*size), normal(6, 5, seed=1)
    torch.testing.assert_close(Blur(kernel, padding)(x), written_out(kernel, x, padding), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_scipy(size: tuple[int, int]) -> None:
    kernel, x = normal(*size), normal(2, 3, 16, 15, seed=1)
    for picture in x.flatten(0, 1):
        full = signal.convolve2d(picture.numpy(), kernel.numpy())
        top, left = size[0] // 2, size[1] // 2
        expected = torch.from_numpy(full[top : top + 16, left : left + 15])
        torch.testing.assert_close(Blur(kernel, Zero())(picture), expected, rtol=1e-12, atol=1e-12)
        if size[0] <= 16:  # larger than the image, the kernel's wrap is checked against the written-out sum alone
            wrapped = ndimage.convolve(picture.numpy(), kernel.numpy(), mode="wrap")
            got = Blur(kernel)(picture)
            torch.testing.assert_close(got, torch.from_numpy(wrapped), rtol=1e-12, atol=1e-12)
            reflected = torch.from_numpy(ndimage.convolve(picture.numpy(), kernel.numpy(), mode="reflect"))
            torch.testing.assert_close(Blur(kernel, Reflective())(picture), reflected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Blur(kernel)(x)[1, 2], Blur(kernel)(x[1, 2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS, ids=repr)
@pytest.mark.parametrize("size", [(3, 3), (4, 2), (9, 8)], ids=str)
def test_a_spike_at_the_centre_is_the_identity(size: tuple[int, int], padding: Padding) -> None:
    kernel = torch.zeros(size, dtype=torch.float64)
    kernel[size[0] // 2, size[1] // 2] = 1.0
    x = normal(2, 5, 6)
    torch.testing.assert_close(Blur(kernel, padding)(x), x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("padding", PADDINGS, ids=repr)
def test_one_kernel_per_sample_equals_a_loop(padding: Padding) -> None:
    kernels, x = normal(4, 2, 3, 2), normal(4, 2, 3, 5, 6, seed=1)
    y = Blur(kernels, padding)(x)
    back = Blur(kernels, padding).adjoint(x)
    for i, j in np.ndindex(4, 2):
        torch.testing.assert_close(y[i, j], Blur(kernels[i, j], padding)(x[i, j]))
        torch.testing.assert_close(back[i, j], Blur(kernels[i, j], padding).adjoint(x[i, j]))
    torch.testing.assert_close(Blur(kernels[:1], padding)(x)[3], Blur(kernels[0], padding)(x[3]))


@pytest.mark.parametrize("padding", PADDINGS, ids=repr)
@pytest.mark.parametrize("size", [(3, 2), (5, 6)], ids=str)
def test_gradients_in_kernel_and_image(size: tuple[int, int], padding: Padding) -> None:
    kernel, x = normal(*size).requires_grad_(), normal(2, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda kernel, x: Blur(kernel, padding)(x), (kernel, x))


@pytest.mark.parametrize("padding", PADDINGS, ids=repr)
def test_vmap_over_kernels(padding: Padding) -> None:
    kernels, x = normal(4, 3, 2), normal(4, 1, 5, 6, seed=1)

    def value(kernel: Tensor, x: Tensor) -> Tensor:
        return Blur(kernel, padding)(x).square().sum()

    got = torch.func.vmap(torch.func.grad(value))(kernels, x)
    expected = torch.stack([torch.func.grad(value)(kernel, one) for kernel, one in zip(kernels, x, strict=True)])
    torch.testing.assert_close(got, expected)


def test_gradient_through_the_svd_is_finite_where_the_transfer_function_is_zero() -> None:
    kernel = (torch.ones(2, 2, dtype=torch.float64) / 4).requires_grad_()
    y = normal(4, 4)
    svd = Blur(kernel).svd(y)
    assert svd is not None
    (gradient,) = torch.autograd.grad(svd.prox(torch.zeros_like(y), y, 1.0).square().sum(), kernel)
    step = 1e-6 * normal(2, 2, seed=1)  # moves the zeros of the transfer function by 1e-6, far from mattering

    def value(kernel: Tensor) -> float:
        return float(Blur(kernel.detach()).prox(torch.zeros_like(y), y, 1.0).square().sum())

    slope = (value(kernel + step) - value(kernel - step)) / 2
    assert slope == pytest.approx(float((gradient * step).sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_singular_values_count_down_to_rounding_and_no_further(dtype: torch.dtype) -> None:
    """A kernel made to have the singular values 1, 0.1 ... 1e-16 keeps those above 64 times the machine precision."""
    frequency = torch.fft.fftfreq(16, 1 / 16, dtype=torch.float64).abs()
    exact = 10 ** -(frequency[:, None] + frequency)
    kernel = torch.fft.fftshift(torch.fft.ifft2(exact).real)
    svd = Blur(kernel.to(dtype)).svd(torch.zeros(16, 16, dtype=dtype))
    assert svd is not None
    smallest = 1e-5 if dtype == torch.float32 else 1e-13
    expected = torch.where(exact > 0.5 * smallest, exact, 0.0).to(dtype)
    torch.testing.assert_close(svd.singular_values, expected, rtol=0.05, atol=0)


TAP = torch.tensor([0.3, -0.9, 1.0, -0.9, 0.3], dtype=torch.float64)  # a transfer function of both signs


@pytest.mark.parametrize(
    ("padding", "basis", "kernel"),
    [
        (Reflective(), DCT, TAP[:, None] * torch.tensor([0.5, 1.0, 0.5])),
        (Circular(), HARTLEY, TAP[:, None] * TAP),
        (Circular(), HARTLEY, normal(3, 3) + normal(3, 3).flip((0, 1))),
    ],
    ids=["reflected", "circular", "symmetric about the centre alone"],
)
def test_eigenvalues_are_those_of_the_written_out_matrix(padding: Padding, basis: Basis, kernel: Tensor) -> None:
    blur, unit = Blur(kernel, padding), torch.eye(42, dtype=torch.float64).reshape(42, 6, 7)
    a = blur.eigenvalues(unit, basis)
    assert a is not None
    assert float(a.min()) < -0.05 < 0.05 < float(a.max())
    torch.testing.assert_close(blur(unit), basis.from_spectral(a * basis.to_spectral(unit)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("padding", "basis", "kernel"),
    [
        (Zero(), DCT, torch.ones(3, 3)),
        (Reflective(), HARTLEY, torch.ones(3, 3)),
        (Circular(), DCT, torch.ones(3, 3)),
        (Circular(), HARTLEY, torch.tensor([[1.0, 2.0, 3.0]])),
        (Reflective(), DCT, normal(3, 3).float() + normal(3, 3).float().flip((0, 1))),  # its mirror images differ
        (Reflective(), DCT, torch.tensor([[1.0, 2.0, 3.0]])),
        (Reflective(), DCT, torch.tensor([[1.0], [2.0], [3.0]])),
        (Reflective(), DCT, torch.ones(2, 3)),  # an even number of rows has no middle
    ],
    ids=["zeros", "another basis", "circular cosines", "lopsided", "turned", "along columns", "along rows", "even"],
)
def test_no_eigenvalues_where_the_basis_does_not_fit(padding: Padding, basis: Basis, kernel: Tensor) -> None:
    assert Blur(kernel, padding).eigenvalues(torch.zeros(6, 7), basis) is None


def test_evenness_is_judged_kernel_by_kernel_and_by_their_own_precision() -> None:
    x = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    even, odd = torch.ones(3, 3, dtype=torch.float64), torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0]]).double()
    assert Blur(torch.stack([1e16 * even, odd]), Reflective()).svd(x) is None
    assert Blur(torch.stack([1e16 * even, even]), Reflective()).svd(x) is not None
    rounded = 1e6 * even.float()
    rounded[0] *= 1 + 1e-7  # even in float32, whatever the picture's dtype
    assert Blur(rounded, Reflective()).svd(x) is not None
    assert Blur(rounded.double(), Reflective()).svd(x) is None


def test_under_vmap_a_kernel_is_taken_for_lopsided() -> None:
    seen = []

    def look(kernel: Tensor) -> Tensor:
        seen.append(Blur(kernel, Reflective()).svd(torch.zeros(4, 4, dtype=torch.float64)))
        return kernel.sum()

    with pyro.validation_enabled(False):
        torch.func.vmap(look)(torch.ones(2, 3, 3, dtype=torch.float64))
    assert seen == [None]


def test_a_kernel_that_is_a_latent_of_a_program() -> None:
    x, y = normal(1, 5, 6), normal(1, 5, 6, seed=2)

    def model() -> None:
        width = pyro.sample("width", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        place = torch.arange(-2, 3, dtype=torch.float64)
        tap = torch.exp(-0.5 * (place / width) ** 2)
        kernel = tap[:, None] * tap / tap.sum() ** 2
        pyro.sample("y", GaussianMeasurement(Blur(kernel, Zero()), x, 0.5), obs=y)

    def log_likelihood(width: Tensor) -> Tensor:
        trace = pyro.poutine.trace(pyro.condition(model, {"width": width})).get_trace()
        return trace.nodes["y"]["fn"].log_prob(trace.nodes["y"]["value"])

    widths = torch.tensor([0.7, 1.3], dtype=torch.float64)
    with pyro.validation_enabled(False):
        got = torch.func.vmap(log_likelihood)(widths)
    for width, value in zip(widths, got, strict=True):
        tap = np.exp(-0.5 * (np.arange(-2, 3) / float(width)) ** 2)
        blurred = signal.convolve2d(x[0].numpy(), np.outer(tap, tap) / tap.sum() ** 2, mode="same")
        expected = dist.Normal(torch.from_numpy(blurred), 0.5).log_prob(y[0]).sum()
        torch.testing.assert_close(value, expected)
    assert torch.autograd.gradcheck(log_likelihood, (widths[0].clone().requires_grad_(),))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.ones(3), r"kernel of shape \(3,\)"),
        (torch.ones(0, 3), r"kernel of shape \(0, 3\)"),
        (torch.ones(3, 3, dtype=torch.int64), "floating-point"),
        (torch.tensor([[1.0, torch.nan]]), "1 NaN or infinite values of 2"),
    ],
)
def test_wrong_kernels_are_refused(kernel: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blur(kernel)


def test_a_kernel_of_nan_is_let_through_where_pyro_does_not_validate() -> None:
    with pyro.validation_enabled(False):
        assert Blur(torch.full((2, 2), torch.nan))(torch.ones(4, 4)).isnan().all()


@pytest.mark.parametrize(
    ("kernel", "x"),
    [((3, 3), (7,)), ((1, 3, 3), (1, 8, 8)), ((4, 3, 3), (2, 1, 8, 8)), ((4, 1, 3, 3), (4, 1, 8, 8))],
    ids=str,
)
def test_a_kernel_that_does_not_fit_the_image_is_refused(kernel: tuple[int, ...], x: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got a kernel of shape .* and x of shape") as error:
        Blur(torch.ones(kernel))(torch.ones(x))
    assert str(kernel) in str(error.value)
    assert str(x) in str(error.value)


def test_wrong_padding_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected Circular\(\), Zero\(\) or Reflective\(\)"):
        Blur(torch.ones(3, 3), "circular")  # type: ignore[arg-type]
