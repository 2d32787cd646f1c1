"""The Stein kernel against automatic differentiation, and what the discrepancy is zero for."""

from __future__ import annotations

import math

import pytest
import torch

from smcdiff.diagnostics.stein import kernel_stein_discrepancy, median_distance

F64 = torch.float64


def stein_kernel(x: torch.Tensor, other: torch.Tensor, score, scale: float, beta: float) -> torch.Tensor:
    """k_pi(x, other) from its definition, the derivatives of the kernel by autograd."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (1 + ((a - b) / scale).square().sum()) ** beta

    by_x, by_other = torch.func.grad(kernel, 0), torch.func.grad(kernel, 1)
    mixed = torch.func.jacrev(by_x, 1)(x, other)
    own, its = score(x), score(other)
    return (own @ its) * kernel(x, other) + own @ by_other(x, other) + its @ by_x(x, other) + mixed.diagonal().sum()


@pytest.mark.parametrize(("scale", "beta"), [(1.0, -0.5), (2.3, -0.5), (0.7, -0.3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_from_the_definition(scale: float, beta: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    covariance = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, -0.4], [0.0, -0.4, 0.7]], dtype=F64)
    x = torch.randn(6, 3, dtype=F64, generator=generator)

    def score(point: torch.Tensor) -> torch.Tensor:
        return -torch.linalg.solve(covariance, point - 0.2)

    log_w = torch.randn(6, dtype=F64, generator=generator) if weighted else None
    w = torch.full((6,), 1 / 6, dtype=F64) if log_w is None else log_w.softmax(0)
    kernel = torch.stack([torch.stack([stein_kernel(a, b, score, scale, beta) for b in x]) for a in x])
    found = kernel_stein_discrepancy(x, torch.stack([score(a) for a in x]), scale, log_w, beta=beta)
    pairs = w[:, None] * w
    off = pairs * (1 - torch.eye(6, dtype=F64))
    # derivatives are with respect to x and not to x / scale: one factor of scale^2
    assert found.ksd**2 == pytest.approx(float((pairs * kernel).sum()) * scale**2)
    assert found.u_statistic == pytest.approx(float((off * kernel).sum() / off.sum()) * scale**2)
    assert math.isnan(found.p_value) == weighted


def test_events_of_any_shape() -> None:
    x = torch.randn(20, 2, 3, dtype=F64)
    flat = kernel_stein_discrepancy(x.reshape(20, 6), -x.reshape(20, 6), 1.0)
    assert kernel_stein_discrepancy(x, -x, 1.0) == flat


def test_p_values_are_uniform_for_exact_draws_and_small_for_others() -> None:
    """200 p-values under the density. If P(p <= 0.1) of the bootstrap is between 0.08 and 0.12, more than 48 of 200 are
    below 0.1 with probability below 8e-7, and fewer than 2 with probability below 1.1e-6. Draws 30 % too wide: all 30
    runs have p below 0.01 at seeds that are fixed."""
    small = 0
    for seed in range(200):
        x = torch.randn(60, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
        small += kernel_stein_discrepancy(x, -x, 1.5, num_bootstrap=200).p_value <= 0.1
    assert 2 <= small <= 48
    for seed in range(30):
        x = 1.3 * torch.randn(600, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
        assert kernel_stein_discrepancy(x, -x, 1.5, num_bootstrap=200).p_value < 0.01


def test_shares_of_modes_far_apart_are_not_seen() -> None:
    """The stated blindness: two modes 20 standard deviations apart, all draws in one of them."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.tensor([-10.0, 10.0], dtype=F64)

    def score(x: torch.Tensor) -> torch.Tensor:
        share = (-0.5 * (x - modes).square()).softmax(1)
        return (share * (modes - x)).sum(1, keepdim=True)

    one = 10 + torch.randn(400, 1, dtype=F64, generator=generator)
    both = torch.randn(400, 1, dtype=F64, generator=generator) + modes[torch.arange(400) % 2][:, None]
    assert abs(kernel_stein_discrepancy(one, score(one), 1.0).u_statistic) < 0.02
    assert abs(kernel_stein_discrepancy(both, score(both), 1.0).u_statistic) < 0.02
    assert kernel_stein_discrepancy(one + 1, score(one + 1), 1.0).u_statistic > 0.3


def test_median_distance() -> None:
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    with pytest.raises(ValueError, match="copies"):
        median_distance(torch.zeros(4, 2))


def test_refusals() -> None:
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="expected both"):
        kernel_stein_discrepancy(x, x[:4], 1.0)
    with pytest.raises(ValueError, match="positive scale"):
        kernel_stein_discrepancy(x, x, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        kernel_stein_discrepancy(x, x * torch.nan, 1.0)
