"""Conditional SMC leaves the exact law of the paths invariant, with two to four particles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor

from smcdiff.smc import FilterError, ParticleFilter, Particles
from smcdiff.smc.conditional import ConditionalFeynmanKac, ConditionalSMC, Past, Path
from smcdiff.smc.resampling import ConditionalResampler, Killing, Multinomial, Residual, Stratified, Systematic
from smcdiff.smc.ssp import SSP
from tests.smc.models import Bootstrap, LinearGaussian, Shifted

CHAINS = 15_000
PROBLEM = LinearGaussian(
    *(torch.tensor(v, dtype=torch.float64) for v in ([0.2], [[1.0]], [[0.9]], [[0.5]], [[1.0]], [[0.3]])),
    y=torch.tensor([[1.2], [-0.4], [0.8], [0.1]], dtype=torch.float64),
)


def exact_paths(model: LinearGaussian, count: int, seed: int) -> Path:
    """Independent draws of x_{0:K} given the data."""
    mean, cov = model.joint
    z = torch.randn((count, mean.shape[0]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (mean + z @ torch.linalg.cholesky(cov).T).reshape(count, model.num_steps + 1, -1)
    return tuple({"x": x[:, i, None]} for i in range(model.num_steps + 1))


def flat(path: Path) -> Tensor:
    return torch.cat([particles["x"].flatten(1) for particles in path], -1)


def largest_score(model: LinearGaussian, path: Path) -> float:
    """The largest of many scores; the paths are put in coordinates that the exact law makes independent normals.

    All first and second moments, in standard errors of the exact law, and Kolmogorov-Smirnov of each coordinate, as the
    normal score of its p-value.
    """
    mean, cov = model.joint
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (flat(path) - mean).T, upper=False).T
    count, dim = z.shape
    first = z.mean(0) * math.sqrt(count)
    spread = torch.full((dim, dim), 1.0, dtype=torch.float64) + torch.eye(dim, dtype=torch.float64)
    second = (z.T @ z / count - torch.eye(dim, dtype=torch.float64)) * torch.sqrt(count / spread)
    ks = [stats.norm.isf(max(stats.kstest(z[:, i].numpy(), "norm").pvalue, 1e-300) / 2) for i in range(dim)]
    return max(first.abs().max().item(), second.abs().max().item(), *ks)


def updated(
    kernel: ConditionalSMC, model: ConditionalFeynmanKac, path: Path, n: int, updates: int = 3, seed: int = 1
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        path = kernel.update(model, path, n, generator)
    return path


def test_the_score_itself() -> None:
    # 4 means, 10 second moments, 4 coordinates: 18 scores, of which one is above 5.5 with probability 7e-7.
    assert largest_score(PROBLEM, exact_paths(PROBLEM, CHAINS, 0)) < 5.5


@pytest.mark.parametrize("past", Past)
@pytest.mark.parametrize(("n", "threshold"), [(2, 0.0), (2, 1.0), (3, 0.8), (4, 0.7)])
def test_invariant_for_every_rule(past: Past, n: int, threshold: float) -> None:
    kernel = ConditionalSMC(Multinomial(), past, threshold)
    start = exact_paths(PROBLEM, CHAINS, 0)
    for model in (Bootstrap(PROBLEM), Shifted(PROBLEM)):
        path = updated(kernel, model, start, n)
        assert (flat(path) != flat(start)).any(-1).double().mean() > 0.1, "many paths must have moved"
        assert largest_score(PROBLEM, path) < 5.5


@pytest.mark.parametrize(
    "scheme", [Systematic(), Stratified(), Residual(), SSP(), Killing()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize(
    ("n", "threshold", "past"),
    [(2, 1.0, Past.TRACED), (2, 0.7, Past.ANCESTOR_SAMPLED), (3, 0.8, Past.BACKWARD_SAMPLED)],
)
def test_invariant_for_every_scheme(scheme: ConditionalResampler, n: int, threshold: float, past: Past) -> None:
    path = updated(ConditionalSMC(scheme, past, threshold), Bootstrap(PROBLEM), exact_paths(PROBLEM, CHAINS, 0), n)
    assert largest_score(PROBLEM, path) < 5.5


def test_invariant_in_two_dimensions() -> None:
    # 6 + 21 + 6 = 33 scores: above 5.5 with probability 1.3e-6
    model = LinearGaussian.example(2, num_steps=2)
    path = updated(ConditionalSMC(Systematic()), Shifted(model), exact_paths(model, CHAINS, 0), 3)
    assert largest_score(model, path) < 5.5


@dataclass(frozen=True)
class NotSizeBiased:
    """The plain scheme with its first slot overwritten: what conditional resampling must not be."""

    def __call__(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        return Systematic()(weights, generator)

    def conditional(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        drawn = Systematic()(weights, generator).clone()
        drawn[:, 0] = 0
        return drawn


class CountsTwice(Bootstrap):
    """A reference whose potential is counted twice."""

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        return 2 * super().log_potential(i, previous, current)


class WrongTransition(Bootstrap):
    """A transition density with twice the variance."""

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        return super().log_transition(i, previous, current) / 2


@pytest.mark.parametrize(
    ("kernel", "model"),
    [
        (ConditionalSMC(NotSizeBiased(), Past.TRACED), Bootstrap(PROBLEM)),
        (ConditionalSMC(Multinomial(), Past.TRACED), CountsTwice(PROBLEM)),
        (ConditionalSMC(Multinomial(), Past.ANCESTOR_SAMPLED), WrongTransition(PROBLEM)),
        (ConditionalSMC(Multinomial(), Past.BACKWARD_SAMPLED), WrongTransition(PROBLEM)),
    ],
    ids=["not size-biased", "counts twice", "wrong transition, ancestor", "wrong transition, backward"],
)
def test_the_score_sees_wrong_kernels(kernel: ConditionalSMC, model: ConditionalFeynmanKac) -> None:
    assert largest_score(PROBLEM, updated(kernel, model, exact_paths(PROBLEM, CHAINS, 0), 2, updates=6)) > 8


def test_the_thresholds_above_resample_some_chains_and_not_others() -> None:
    for n, threshold in ((3, 0.8), (4, 0.7)):
        result = ParticleFilter(ess_threshold=threshold).run(Bootstrap(PROBLEM), num_particles=n, num_chains=1000)
        share = result.records.resampled.double().mean(1)
        assert share.min() > 0.1 and share.max() < 0.9


def test_it_comes_to_the_law_from_somewhere_else() -> None:
    # From a filter's path with 3 particles, far from the law, 25 updates lead to it.
    kernel, model = ConditionalSMC(Systematic(), Past.ANCESTOR_SAMPLED), Bootstrap(PROBLEM)
    path = kernel.first(model, 3, 5_000, torch.Generator().manual_seed(2))
    assert largest_score(PROBLEM, path) > 8
    assert largest_score(PROBLEM, updated(kernel, model, path, 3, updates=25)) < 5.5


def test_ancestor_and_backward_sampling_renew_the_beginning() -> None:
    model = LinearGaussian.example(1, num_steps=40)
    start = exact_paths(model, 500, 0)
    renewed = {
        past: (updated(ConditionalSMC(Multinomial(), past), Bootstrap(model), start, 5, 1)[0]["x"] != start[0]["x"])
        .double().mean().item()
        for past in Past
    }  # fmt: skip
    assert renewed[Past.TRACED] < 0.1
    assert renewed[Past.ANCESTOR_SAMPLED] > 0.5 and renewed[Past.BACKWARD_SAMPLED] > 0.5


def test_reproducible() -> None:
    kernel, model = ConditionalSMC(Systematic()), Bootstrap(PROBLEM)
    start = exact_paths(PROBLEM, 50, 0)
    assert torch.equal(flat(updated(kernel, model, start, 3)), flat(updated(kernel, model, start, 3)))
    assert not torch.equal(flat(updated(kernel, model, start, 3)), flat(updated(kernel, model, start, 3, seed=2)))


@dataclass(frozen=True)
class InFloat32(Bootstrap):
    """Particles and log-potentials of float32; given particles are weighed in float64, as its moves do."""

    dtype: torch.dtype = torch.float32

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        return super().log_potential(i, None, {"x": current["x"].double()}).float()

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        return super().log_transition(i, {"x": previous["x"].double()}, {"x": current["x"].double()}).float()


@pytest.mark.parametrize("past", Past)
def test_in_float32_it_chooses_the_same_paths(past: Past) -> None:
    """With the noise of float64, rounded: paths stay in float32 and are those of float64 but for rounding.

    A draw goes to another particle only where a uniform number lies within some 1e-7 of the boundary between two
    weights. In 100 000 chains that happened to none: two of 2000 are allowed for.
    """
    kernel, start = ConditionalSMC(Systematic(), past), exact_paths(PROBLEM, 2000, 0)
    rounded = tuple({"x": particles["x"].float()} for particles in start)
    path = updated(kernel, InFloat32(PROBLEM), rounded, 4)
    assert all(particles["x"].dtype == torch.float32 for particles in path)
    exact = flat(updated(kernel, Bootstrap(PROBLEM), start, 4))
    assert (exact != flat(start)).any(-1).double().mean() > 0.5
    off = (flat(path) - exact).abs().amax(-1)
    assert (off > 1e-6).sum() <= 2


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="got ess_threshold 2"):
        ConditionalSMC(ess_threshold=2.0)
    start, generator = exact_paths(PROBLEM, 5, 0), torch.Generator()
    with pytest.raises(ValueError, match="got 1 particles"):
        ConditionalSMC().update(Bootstrap(PROBLEM), start, 1, generator)
    with pytest.raises(ValueError, match="got a reference of 3 steps; the model has 4"):
        ConditionalSMC().update(Bootstrap(PROBLEM), start[:3], 2, generator)


@pytest.mark.parametrize("past", [Past.ANCESTOR_SAMPLED, Past.BACKWARD_SAMPLED])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_transition_without_density_is_a_fault(past: Past, value: float) -> None:
    class NoDensity(Bootstrap):
        def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
            result = super().log_transition(i, previous, current)
            result[2] = value if i == 2 else result[2]
            return result

    with pytest.raises(FilterError, match="step 2 of 3 in chain 2 of 5: no past for a path"):
        ConditionalSMC(Multinomial(), past).update(
            NoDensity(PROBLEM), exact_paths(PROBLEM, 5, 0), 3, torch.Generator().manual_seed(0)
        )
