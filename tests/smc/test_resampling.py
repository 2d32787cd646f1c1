"""The contract of a resampling scheme, one row per scheme, against counts known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from smcdiff.smc.integer_weights import (
    _shared_comb_counts,
    ancestors_from_counts,
    cells,
    comb_counts,
    comb_search,
    cumulative,
    point_of_first,
    uniform_below,
)
from smcdiff.smc.resampling import ConditionalResampler, Killing, Multinomial, Residual, Stratified, Systematic
from smcdiff.smc.ssp import SSP

# How far below and above n w a count may be, rounded: floor(n w) - below <= N <= ceil(n w) + above.
BOUNDS: dict[ConditionalResampler, tuple[float, float]] = {
    Systematic(): (0, 0),
    SSP(): (0, 0),
    Stratified(): (1, 1),
    Residual(): (0, math.inf),
    Multinomial(): (math.inf, math.inf),
    Killing(): (math.inf, math.inf),
}
scheme = pytest.mark.parametrize("scheme", BOUNDS, ids=lambda s: type(s).__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(ancestors: Tensor) -> Tensor:
    return torch.zeros_like(ancestors).scatter_add_(-1, ancestors, torch.ones_like(ancestors))


WEIGHTS = {
    "uneven": [0.05, 0.3, 0.02, 0.4, 0.13, 0.1],
    "with zeros": [0.0, 0.5, 0.0, 0.25, 0.25, 0.0],
    "equal": [1 / 6] * 6,
    "tiny": [1e-12, 0.7, 1e-300, 0.3 - 1e-12, 0.0, 1e-9],
    "one": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    "two": [0.35, 0.65],
}


@scheme
@pytest.mark.parametrize("name", WEIGHTS)
def test_counts_are_unbiased(scheme: ConditionalResampler, name: str) -> None:
    # Each of at most 6 mean counts over 50 000 chains; a count is in 0 ... n with variance at most n^2 / 4, estimated
    # here; 6 standard errors fail with probability 1.2e-8 in the normal limit. The variance of a count that is hardly
    # ever different is not estimable: n w of less than 1e-8 must then come out as zero.
    w = torch.tensor(WEIGHTS[name], dtype=torch.float64)
    n, b = w.numel(), 50_000
    N = counts(scheme(w.expand(b, n), generator(3))).to(torch.float64)
    assert (N.sum(-1) == n).all()
    error = N.std(0) / math.sqrt(b)
    off = (N.mean(0) - n * w).abs()
    assert (off <= 6 * error + 1e-7).all(), off / error


def assert_bounds(scheme: ConditionalResampler, N: Tensor, w: Tensor, slack: float) -> None:
    exact = w.shape[-1] * w.to(torch.float64) / w.to(torch.float64).sum(-1, keepdim=True)
    below, above = BOUNDS[scheme]
    assert (torch.floor(exact + slack) - below <= N).all()
    assert (torch.ceil(exact - slack) + above >= N).all()


@scheme
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_within_their_bounds(scheme: ConditionalResampler, name: str, dtype: torch.dtype) -> None:
    w = torch.tensor(WEIGHTS[name], dtype=dtype).expand(1000, -1)
    assert_bounds(scheme, counts(scheme(w, generator(4))), w, 1e-12)


@scheme
@pytest.mark.parametrize("n", [2, 3, 100, 131_072, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_float_weights(scheme: ConditionalResampler, n: int, dtype: torch.dtype) -> None:
    # log-normal weights with a fifth of zeros, zeros at both ends: where float32 comparisons pick the wrong particle
    b = 1 if n > 1000 else 2
    log_w = 3 * torch.randn((b, n), generator=generator(n), dtype=torch.float64)
    w = torch.softmax(log_w, -1)
    w[:, ::5] = 0
    if n > 2:
        w[:, -1] = 0
    w = (w / w.sum(-1, keepdim=True)).to(dtype)
    ancestors = scheme(w, generator(1))
    assert ancestors.dtype == torch.int64 and ancestors.shape == (b, n)
    assert ancestors.min() >= 0 and ancestors.max() < n
    N = counts(ancestors)
    assert (N[w == 0] == 0).all()
    assert_bounds(scheme, N, w, -1e-6)


# Bounds of the variance of each scheme's counts, given n w_i and its fraction. Counts of all schemes but systematic are
# negatively correlated, so that the bound of a group of particles is the sum of theirs; with systematic resampling this
# holds for groups that do not depend on the order of the particles, and for intervals of it.
VARIANCES: dict[ConditionalResampler, Callable[[Tensor, Tensor], Tensor]] = {
    Systematic(): lambda mean, fraction: fraction * (1 - fraction),
    SSP(): lambda mean, fraction: fraction * (1 - fraction),
    Stratified(): lambda mean, fraction: mean.clamp(max=0.5),
    Residual(): lambda mean, fraction: fraction,
    Multinomial(): lambda mean, fraction: mean,
    Killing(): lambda mean, fraction: mean,
}


@cache
def weights_at_size(name: str, n: int) -> Tensor:
    """Weights (n,) of float64: log-normal ones, equal ones, or log-normal ones among zeros and tiny ones."""
    if name == "equal":
        return torch.full((n,), 1 / n, dtype=torch.float64)
    w = torch.exp(2 * torch.randn(n, generator=generator(n), dtype=torch.float64))
    if name == "zero and tiny":
        w[1::3] = 0
        w[2::3] = 0.03 * w.mean()  # some 0.06 copies of each
    return w / w.sum()


def assert_groups(scheme: ConditionalResampler, N: Tensor, w: Tensor, groups: Tensor, slack: float) -> None:
    """The sums of counts N (n,) over each group differ from those of n w by at most 6 standard errors and the slack."""
    mean = w.to(torch.float64) * (w.shape[0] / w.sum(dtype=torch.float64))
    fraction = torch.frac(mean + 1e-9)  # equal weights must not come out as nearly one
    off, variance = (
        torch.zeros(int(groups.max()) + 1, dtype=torch.float64).scatter_add_(0, groups, value)
        for value in (N - mean, VARIANCES[scheme](mean, fraction))
    )
    assert (off.abs() <= 6 * variance.sqrt() + slack).all(), off / variance.sqrt()


def partitions(name: str, n: int) -> tuple[Tensor, Tensor]:
    """A group of each particle, (n,): 50 at random and 10 more for those of small weight; 50 intervals of them."""
    random = torch.randint(50, (n,), generator=generator(9))
    light = weights_at_size(name, n) < 0.3 / n
    return torch.where(light, 50 + random // 5, random), torch.arange(n) * 50 // n


@scheme
@pytest.mark.parametrize("n", [100_000, 1_000_000])
def test_counts_are_unbiased_at_size(scheme: ConditionalResampler, n: int) -> None:
    """In groups of thousands of particles, whose counts add up to n times their weight but for a small error.

    Each test compares at most 660 groups (110 of each of three weights in two types) to 6 standard errors or less: it
    fails for a right scheme with probability 1.3e-6 at most in the normal limit.
    """
    for name in ("uneven", "equal", "zero and tiny"):
        groups = partitions(name, n)
        for dtype in (torch.float32, torch.float64):
            w = weights_at_size(name, n).to(dtype)
            N = counts(scheme(w[None], generator(n + 1)))[0]
            assert N.sum() == n and (N[w == 0] == 0).all()
            assert_groups(scheme, N, w, groups[0], slack=1e-6)
            assert_groups(scheme, N, w, groups[1], slack=1e-6)


@scheme
def test_failed_rows_keep_their_particles_and_leave_others_alone(scheme: ConditionalResampler) -> None:
    good = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    bad = torch.tensor([[0.0, 0.0, 0.0], [0.5, torch.nan, 0.5], [torch.inf, 1.0, 1.0]], dtype=torch.float64)
    ancestors = scheme(torch.cat([good[None], bad, good[None]]), generator(7))
    assert ancestors[1:4].tolist() == [[0, 1, 2]] * 3
    alone = scheme(good.expand(5, 3), generator(7))
    assert torch.equal(ancestors[[0, 4]], alone[[0, 4]])


@scheme
def test_scale_and_dtype_of_weights_do_not_matter(scheme: ConditionalResampler) -> None:
    w = torch.tensor([[3.0, 1.0, 4.0, 0.0, 8.0]])
    expected = scheme(w, generator(2))
    assert torch.equal(scheme(w.double() * 2.0**-200, generator(2)), expected)
    assert torch.equal(scheme(w.double() * 2.0**300, generator(2)), expected)


@scheme
def test_one_particle(scheme: ConditionalResampler) -> None:
    assert scheme(torch.ones(4, 1), generator()).tolist() == [[0]] * 4


@pytest.mark.parametrize("n", [2, 5, 64, 1000])
def test_systematic_is_its_definition(n: int) -> None:
    # The same uniform, the same integer weights, and the definition with fractions: equal index by index.
    g = generator(n)
    w = torch.rand((3, n), generator=g, dtype=torch.float64) ** 4
    w[:, 1] = 0
    got = Systematic()(w, generator(11))
    u = torch.rand((3, 1), generator=generator(11), dtype=torch.float64)
    for c in range(3):
        x = [int(v * (2.0**60 / w[c].sum().item())) for v in w[c].tolist()]
        total, r = sum(x), None
        r = int(u[c].item() * float(total))
        line, at, below = [], 0, x[0]
        for j in range(n):
            while Fraction(j * total + r, n) >= below:
                at += 1
                below += x[at]
            line.append(at)
        assert got[c].tolist() == line


def test_systematic_keeps_equal_particles() -> None:
    for n in (1, 3, 7, 1000):
        w = torch.full((2, n), 1 / n)
        assert torch.equal(Systematic()(w, generator(n)), torch.arange(n).expand(2, n))


def test_cells_are_exact_divisions() -> None:
    # Points within a few units of the ends of cells, where a float quotient is off by one, against Python's integers.
    g = generator(5)
    for n in (1, 2, 3, 7, 1000, 1_000_003):
        for total in (1, 2, 17, 2**31 + 11, 2**60, 2**60 + 12_345):
            j = torch.randint(n, (1, 500), generator=g).tolist()[0]
            points = [min(max(i * total // n + d, 0), total) for i in j for d in (-1, 0, 1)] + [0, total]
            cell, place = cells(torch.tensor([points]), torch.tensor([[total]]), n)
            assert list(zip(cell[0].tolist(), place[0].tolist(), strict=True)) == [divmod(n * c, total) for c in points]


def test_counts_of_a_shared_place_are_exact() -> None:
    # Cumulative weights within a few units of the points of the comb, where the float quotient is off, for places at
    # the ends of a cell and within it: against Python's integers, and searching for the points finds the same.
    g = generator(6)
    for n in (1, 2, 3, 7, 1000, 1_000_003, 2**31 + 11):
        for total in (1, 2, 17, 2**31 + 11, 2**60 - 1, 2**60, 2**60 + n):
            for r in {0, 1 % total, total // 2, total - 1}:
                j = [*torch.randint(n, (300,), generator=g).tolist(), 0, n - 1]
                near = [(i * total + r) // n + d for i in j for d in (-1, 0, 1, 2)]
                points = [min(max(c, 0), total) for c in near] + [0, 1, total - 1, total]
                found = _shared_comb_counts(torch.tensor([points]), torch.tensor([[total]]), torch.tensor([[r]]), n)
                assert found[0].tolist() == [max(0, -((r - n * c) // total)) for c in points]


@pytest.mark.parametrize("n", [1, 2, 5, 1000, 5000, 100_000])
@pytest.mark.parametrize("power", [0, 1, 40])
def test_searching_and_counting_give_the_same_ancestors(n: int, power: int) -> None:
    g = generator(n)
    w = torch.rand((3, n), generator=g, dtype=torch.float64) ** power
    w[:, ::3] *= power > 0
    w[0] = torch.nan
    c = cumulative(w, failed=1)
    for r in (uniform_below(c[:, -1:], 1, g), torch.zeros_like(c[:, :1]), c[:, -1:] - 1):
        counted = ancestors_from_counts(comb_counts(c, r))
        assert torch.equal(comb_search(c, r), counted)
        assert torch.equal(counted[0], torch.arange(n))
        # and as a place of its own for each cell
        assert torch.equal(comb_counts(c, r), comb_counts(c, r.repeat(1, n)))


def test_combs_by_enumeration() -> None:
    # With small integer weights all places can be tried: the mean counts are n w exactly, with one place or one a cell.
    x, n = torch.tensor([1, 0, 3, 2]), 4
    total = int(x.sum())
    c = x.cumsum(0)
    one = torch.arange(total)[:, None]
    each = torch.cartesian_prod(*[torch.arange(total)] * n)
    for r in (one, each):
        N = comb_counts(c.expand(r.shape[0], -1), r).diff(
            dim=-1, prepend=torch.zeros((r.shape[0], 1), dtype=torch.int64)
        )
        assert (N.sum(0) * total == n * x * r.shape[0]).all()
        for row, place in zip(N.tolist(), r.expand(-1, n).tolist(), strict=True):
            line = [next(i for i in range(n) if n * int(c[i]) > j * total + place[j]) for j in range(n)]
            assert row == [line.count(i) for i in range(n)]


def test_a_point_of_a_particle_is_uniform() -> None:
    # x = 2 of a total of 5, n = 3, the interval after 2: n u is uniform on 6 ... 11, that is cells 1 and 2.
    b = 60_000
    total, x = torch.full((b, 1), 5), torch.full((b, 1), 2)
    cell, place = point_of_first(torch.full((b, 1), 2), x, total, 3, generator(8))
    found = counts((cell * 5 + place - 6).flatten()[None])[0][:6].to(torch.float64)
    assert found.sum() == b
    chi2 = ((found - b / 6) ** 2 / (b / 6)).sum().item()
    assert chi2 < stats.chi2.isf(1e-7, 5)


CONDITIONAL_WEIGHTS = {
    "uneven": [0.3, 0.05, 0.4, 0.25],
    "light star": [0.08, 0.5, 0.02, 0.4],
    "heavy star": [0.8, 0.1, 0.0, 0.1],
    "equal": [0.25] * 4,
    "odd": [0.21, 0.09, 0.38, 0.17, 0.15],
    "two": [0.4, 0.6],
    "three": [0.3, 0.6, 0.1],
}


@scheme
@pytest.mark.parametrize("name", CONDITIONAL_WEIGHTS)
def test_conditional_counts_are_size_biased(scheme: ConditionalResampler, name: str) -> None:
    """Shuffle, apply the plain scheme, weigh each outcome by N_0 / (n w_0): the conditional scheme has that law.

    The two laws of the whole vector of counts are compared cell by cell: at most 70 cells of frequencies from 100 000
    draws each, 6 standard errors, which fails with probability 1.4e-7 in the normal limit. Cells that are expected less
    than 30 times are left to the sums in the other tests.
    """
    w = torch.tensor(CONDITIONAL_WEIGHTS[name], dtype=torch.float64)
    n, b = w.numel(), 100_000
    pinned = scheme.conditional(w.expand(b, n), generator(1))
    assert (pinned[:, 0] == 0).all()
    order = torch.rand((b, n), generator=generator(2)).argsort(-1)
    plain = order.gather(-1, scheme(w[order], generator(3)))
    base = (n + 1) ** torch.arange(n)
    weight = counts(plain)[:, 0] / (n * w[0])
    cells_of = (n + 1) ** n
    code = (counts(plain) * base).sum(-1)
    expected = torch.zeros(cells_of, dtype=torch.float64).scatter_add_(0, code, weight) / b
    square = torch.zeros(cells_of, dtype=torch.float64).scatter_add_(0, code, weight**2) / b
    got = torch.bincount((counts(pinned) * base).sum(-1), minlength=cells_of) / b
    seen = (expected > 30 / b) | (got > 30 / b)
    assert 0 < seen.sum() <= 70
    error = torch.sqrt((square - expected**2 + got * (1 - got)) / b)
    off = (got - expected).abs()
    assert (off[seen] <= 6 * error[seen] + 1e-12).all(), (off / error)[seen].max()
    assert got[~seen].sum() < 0.05


@scheme
def test_conditional_is_right_at_size(scheme: ConditionalResampler) -> None:
    """A star of 0.01 copies and one of a fifth of all weight, in float32.

    The size-biased law moves the mean count of any group by at most Var[N_0] / (n w_0) <= 1, which a million particles
    cannot show and the slack allows for; it also allows for the tail of the light star, whose count is at most
    1 + Poisson(0.01) in law. The star is a group of its own, the first; the others come in 10 random groups and in 10
    intervals. For a right scheme, 44 groups to 6 standard errors fail with probability 8.7e-8 in the normal limit.
    """
    n = 1_000_000
    w = weights_at_size("uneven", n).repeat(2, 1)
    w[:, 1::5] = 0
    w[:, 0] = 0
    w *= torch.tensor([[1 - 0.01 / n], [0.8]], dtype=torch.float64) / w.sum(-1, keepdim=True)
    w[:, 0] = torch.tensor([0.01 / n, 0.2], dtype=torch.float64)
    w = w.to(torch.float32)
    ancestors = scheme.conditional(w, generator(1))
    assert (ancestors[:, 0] == 0).all() and ancestors.min() == 0 and ancestors.max() < n
    N = counts(ancestors)
    assert (N[w == 0] == 0).all() and (N.sum(-1) == n).all()
    assert_bounds(scheme, N, w, -1e-6)
    for groups in (torch.randint(1, 11, (n,), generator=generator(9)), torch.arange(n) * 10 // n + 1):
        groups[0] = 0
        for c in range(2):
            assert_groups(scheme, N[c], w[c], groups, slack=8)


@scheme
def test_conditional_with_a_star_of_zero_weight_has_failed(scheme: ConditionalResampler) -> None:
    w = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, torch.nan, 1.0]])
    assert scheme.conditional(w, generator()).tolist() == [[0, 1, 2]] * 3


@scheme
def test_conditional_with_one_particle(scheme: ConditionalResampler) -> None:
    assert scheme.conditional(torch.ones(4, 1), generator()).tolist() == [[0]] * 4


@scheme
def test_no_scheme_waits_for_the_device(scheme: ConditionalResampler) -> None:
    with FakeTensorMode():
        for n in (1, 5):
            w = torch.rand((2, n))
            assert scheme(w, generator()).shape == scheme.conditional(w, generator()).shape == (2, n)
