"""The quadratics of linear-Gaussian programs, in all three kinds, against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diffusion.covariance import Corrected, Covariance, Dense, Diagonal, LowRank
from smcdiff.guidance.conjugate_gradients import ConjugateGradients, IterativeMeasurement
from smcdiff.guidance.elementwise import DiagonalExpansion, DiagonalMeasurement
from smcdiff.guidance.gauss_newton import FewMeasurements
from smcdiff.guidance.information import Conditioning
from smcdiff.guidance.picture import picture_measurement
from smcdiff.guidance.program import Program
from smcdiff.transforms import DCT, HARTLEY, PIXELS

F64 = torch.float64
EVENT = (1, 4, 4)
D = 16
PRIOR = sd.DiffusionPrior(sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), torch.ones(EVENT, dtype=F64)),
                          sd.VPSchedule(), 4)  # fmt: skip
KERNEL = torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.0]], dtype=F64)
SEEN = torch.rand(EVENT, generator=torch.Generator().manual_seed(5)) < 0.6
UNEVEN = torch.linspace(0.2, 0.9, D, dtype=F64).reshape(EVENT)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def white(values: int, variance: float) -> Tensor:
    return torch.full((values,), variance, dtype=F64)


def root_of(d: int, seed: int) -> Tensor:
    return torch.linalg.cholesky(random(d, d, seed=seed) @ random(d, d, seed=seed).mT / d + 0.2 * torch.eye(d))


def correlated(seed: int = 3) -> Tensor:
    return root_of(D, seed)


@dataclass(frozen=True)
class Case:
    """A program y = A x + b + noise, what its data look like, and which kind of quadratic is expected."""

    model: Callable[..., Any]
    mean: Callable[[Tensor], list[Tensor]]  # of one picture: that of each observed site
    noise: list[Tensor]  # covariance of each observed site over its flattened values, or variances
    covariance: Callable[[int], Covariance]
    kind: type
    few: int = 64


def model_of(*laws: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def model(data: list[Tensor]) -> None:
        x = pyro.sample("x", PRIOR)
        for i, (law, y) in enumerate(zip(laws, data, strict=True)):
            pyro.sample(f"y{i}", law(x), obs=y)

    return model


def diagonal(basis: Any, shared: bool = False) -> Callable[[int], Covariance]:
    return lambda m: Diagonal(random(1 if shared else m, *EVENT, seed=1).square() + 0.1, basis)


def corrected(basis: Any) -> Callable[[int], Covariance]:
    """What was learnt takes away along one direction and adds along another."""

    def make(m: int) -> Corrected:
        core = torch.tensor([[-0.004, 0.003], [0.003, 0.3]], dtype=F64)
        return Corrected(random(m, *EVENT, seed=1).square() + 0.1, random(m, 2, *EVENT), core.expand(m, 2, 2), basis)

    return make


BLUR, ZERO, SELECT = sd.Blur(KERNEL), sd.Blur(KERNEL, sd.Zero()), sd.Select(SEEN)
GAUSS = sd.GaussianMeasurement
LOWER = correlated()
FACTORS = random(D, 2)
FEW = {
    "Gaussian": Case(model_of(lambda x: GAUSS(BLUR, x, 0.3)), lambda x: [BLUR(x)], [white(D, 0.09)],
                     diagonal(DCT), FewMeasurements),
    "low rank covariance": Case(model_of(lambda x: GAUSS(SELECT, x, 0.3)), lambda x: [SELECT(x)],
                                [white(int(SEEN.sum()), 0.09)],
                                lambda m: LowRank(random(m, *EVENT).square() + 0.1, random(m, 2, *EVENT), DCT),
                                FewMeasurements),
    "corrected covariance": Case(model_of(lambda x: GAUSS(SELECT, x, 0.3)), lambda x: [SELECT(x)],
                                 [white(int(SEEN.sum()), 0.09)], corrected(DCT), FewMeasurements),
    "dense covariance": Case(model_of(lambda x: GAUSS(SELECT, x, 0.3)), lambda x: [SELECT(x)],
                             [white(int(SEEN.sum()), 0.09)],
                             lambda m: Dense(torch.stack([root_of(D, i) @ root_of(D, i).mT for i in range(m)])),
                             FewMeasurements),
    "correlated noise": Case(model_of(lambda x: dist.MultivariateNormal(x.flatten(), scale_tril=LOWER)),
                             lambda x: [x.flatten()], [LOWER @ LOWER.mT], diagonal(PIXELS), FewMeasurements),
    "correlated rows": Case(model_of(lambda x: dist.MultivariateNormal(2 * x[0], scale_tril=LOWER[:4, :4]).to_event(1)),
                            lambda x: [2 * x[0]], [torch.block_diag(*[LOWER[:4, :4] @ LOWER[:4, :4].mT] * 4)],
                            diagonal(PIXELS), FewMeasurements),
    "low-rank noise": Case(
        model_of(lambda x: dist.LowRankMultivariateNormal(x.flatten(), FACTORS, UNEVEN.flatten())),
        lambda x: [x.flatten()], [FACTORS @ FACTORS.mT + UNEVEN.flatten().diag()], diagonal(DCT),
        FewMeasurements),
    "two sites": Case(model_of(lambda x: dist.Normal(x.sum((-1, -2)), 0.5).to_event(1), lambda x: GAUSS(BLUR, x, 0.3)),
                      lambda x: [x.sum((-1, -2)), BLUR(x)], [white(1, 0.25), white(D, 0.09)],
                      diagonal(DCT), FewMeasurements),
}  # fmt: skip
DIAGONAL = {
    "blur in Fourier": Case(model_of(lambda x: GAUSS(BLUR, x, 0.3)), lambda x: [BLUR(x)], [white(D, 0.09)],
                            diagonal(HARTLEY), DiagonalMeasurement),
    "pixels, uneven noise": Case(model_of(lambda x: GAUSS(SELECT, x, UNEVEN[SEEN])), lambda x: [SELECT(x)],
                                 [UNEVEN[SEEN].square()], diagonal(PIXELS), DiagonalMeasurement),
    "a mask with signs": Case(model_of(lambda x: GAUSS(sd.Mask(UNEVEN - 0.5), x, UNEVEN)),
                              lambda x: [(UNEVEN - 0.5) * x], [UNEVEN.square().flatten()], diagonal(PIXELS),
                              DiagonalMeasurement),
    "white noise, any basis": Case(model_of(lambda x: GAUSS(sd.Identity(), x, 0.3)), lambda x: [x],
                                   [white(D, 0.09)], diagonal(DCT), DiagonalMeasurement),
    "two sites, one basis": Case(
        model_of(lambda x: GAUSS(BLUR, x, 0.3), lambda x: GAUSS(sd.Identity(), x, 0.7).to_event(0)),
        lambda x: [BLUR(x), x], [white(D, 0.09), white(D, 0.49)], diagonal(HARTLEY),
        DiagonalMeasurement),
    "blur, corrected": Case(model_of(lambda x: GAUSS(BLUR, x, 0.3)), lambda x: [BLUR(x)], [white(D, 0.09)],
                            corrected(HARTLEY), DiagonalMeasurement),
    "pixels, uneven noise, corrected": Case(model_of(lambda x: GAUSS(SELECT, x, UNEVEN[SEEN])), lambda x: [SELECT(x)],
                                            [UNEVEN[SEEN].square()], corrected(PIXELS), DiagonalMeasurement),
    "one number": Case(model_of(lambda x: GAUSS(BLUR, x, 0.3)), lambda x: [BLUR(x)], [white(D, 0.09)],
                       lambda m: Diagonal(torch.full((1, 1, 1, 1), 0.4, dtype=F64), HARTLEY), DiagonalMeasurement),
}  # fmt: skip
ITERATIVE = {
    "mask in cosines": Case(model_of(lambda x: GAUSS(SELECT, x, 0.3)), lambda x: [SELECT(x)],
                            [white(int(SEEN.sum()), 0.09)], diagonal(DCT, True), IterativeMeasurement, 0),
    "mask of a blur": Case(model_of(lambda x: GAUSS(sd.Compose(SELECT, BLUR), x, 0.3)), lambda x: [SELECT(BLUR(x))],
                           [white(int(SEEN.sum()), 0.09)], diagonal(HARTLEY, True), IterativeMeasurement, 0),
    "uneven noise": Case(model_of(lambda x: GAUSS(BLUR, x, UNEVEN)), lambda x: [BLUR(x)], [UNEVEN.square().flatten()],
                         diagonal(HARTLEY, True), IterativeMeasurement, 0),
    "affine, two sites": Case(model_of(lambda x: GAUSS(lambda v: ZERO((v + 1) / 2), x, 0.3),
                                       lambda x: GAUSS(SELECT, x, 0.5)),
                              lambda x: [ZERO((x + 1) / 2), SELECT(x)],
                              [white(D, 0.09), white(int(SEEN.sum()), 0.25)], diagonal(DCT, True),
                              IterativeMeasurement, 0),
    "a law without an operator": Case(model_of(lambda x: dist.Normal(3 - 2 * ZERO(x), 0.3).to_event(3)),
                                      lambda x: [3 - 2 * ZERO(x)], [white(D, 0.09)], diagonal(DCT, True),
                                      IterativeMeasurement, 0),
}  # fmt: skip
CASES = {**FEW, **DIAGONAL, **ITERATIVE}


class Units:
    """Noise of m particles: none for the first, and then one unit vector each, over all numbers that are asked for."""

    def __init__(self, m: int) -> None:
        self.m, self.start = m, 0

    def __call__(self, shape: torch.Size) -> Tensor:
        assert shape[0] == self.m
        each = torch.Size(shape[1:]).numel()
        rows = torch.zeros(self.m, each, dtype=F64)
        for i in range(each):
            if 1 + self.start + i < self.m:
                rows[1 + self.start + i, i] = 1
        self.start += each
        return rows.reshape(shape)


def dense(covariance: Covariance, m: int) -> Tensor:
    eye = torch.eye(D, dtype=F64).reshape(D, *EVENT)
    return torch.stack([covariance.apply(e.expand(m, *EVENT)).flatten(1) for e in eye], -1)


def setting(case: Case, m: int) -> tuple[Any, Tensor, Tensor, Tensor, Covariance, Tensor]:
    """The information at m particles, A, b - y, Sigma, and what the particles believe."""
    zero = torch.zeros(EVENT, dtype=F64)
    data = [random(*value.shape, seed=7 + i) for i, value in enumerate(case.mean(zero))]
    program = Program(case.model, (data,))
    eye = torch.eye(D, dtype=F64).reshape(D, *EVENT)

    def flat(x: Tensor) -> Tensor:
        return torch.cat([value.flatten() for value in case.mean(x)])

    offset = flat(zero)
    A = torch.stack([flat(e) - offset for e in eye], -1)
    y = torch.cat([value.flatten() for value in data])
    sigma = torch.block_diag(*[s.double() if s.ndim == 2 else s.double().diag() for s in case.noise])
    covariance, mean = case.covariance(m), random(m, *EVENT, seed=9)
    how = Conditioning(case.few, 1, ConjugateGradients(tolerance=1e-18, exact_entries=100))
    information = how.information(program, {"x": mean}, {}, {"x": covariance}, lambda: covariance.variance)  # type: ignore[attr-defined]
    assert isinstance(information, case.kind)
    return information, A, offset - y, sigma, covariance, mean


@pytest.mark.parametrize("name", CASES)
def test_against_dense_linear_algebra(name: str) -> None:
    """log N(y; A m, A C A^T + Sigma), the posterior mean, and the covariance of draws, also away from where the
    quadratic was expanded and with another covariance."""
    m = 100  # enough unit vectors for all the noise of a draw
    information, A, b, sigma, covariance, mean = setting(CASES[name], m)
    for shift, given in ((0.0, covariance), (0.7, covariance.given(1.3))):
        centre, C = mean + shift, dense(given, m)
        conditioned = information.condition({"x": centre}, {"x": given})
        total = A @ C @ A.mT + sigma
        missing = -(centre.flatten(1) @ A.mT + b)
        exact = MultivariateNormal(torch.zeros(len(b), dtype=F64), total).log_prob(missing)
        torch.testing.assert_close(conditioned.log_integral(), exact, rtol=1e-8, atol=1e-8)
        gain = C @ A.mT @ torch.linalg.inv(total)
        posterior = centre.flatten(1) + (gain @ missing[..., None])[..., 0]
        torch.testing.assert_close(conditioned.mean()["x"].flatten(1), posterior, rtol=1e-8, atol=1e-8)
        noise = Units(m)
        if bool((C[:1] == C).all()):
            draws = conditioned.draw(noise)["x"].flatten(1) - posterior
            torch.testing.assert_close(draws[0], torch.zeros(D, dtype=F64), rtol=0, atol=1e-8)
            assert noise.start < m
            torch.testing.assert_close(draws[1:].mT @ draws[1:], (C - gain @ A @ C)[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", FEW | DIAGONAL)
def test_draws_of_each_particle_by_itself(name: str) -> None:
    """With a covariance of its own each particle is drawn by its own: one shared by copies of one particle."""
    m = 100
    _, A, _, sigma, covariance, mean = setting(CASES[name], 3)
    for i in range(3):
        C = dense(covariance, 3)[i % len(dense(covariance, 3))]
        gain = C @ A.mT @ torch.linalg.inv(A @ C @ A.mT + sigma)

        def copies(tensor: Tensor, i: int = i) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[i : i + 1].expand(m, *tensor.shape[1:])

        if isinstance(covariance, Diagonal):
            same: Covariance = Diagonal(copies(covariance.variance), covariance.basis)
        elif isinstance(covariance, Corrected):
            same = Corrected(*map(copies, (covariance.variance, covariance.factors, covariance.core)), covariance.basis)
        elif isinstance(covariance, LowRank):
            same = LowRank(copies(covariance.variance), copies(covariance.factors), covariance.basis)
        else:
            assert isinstance(covariance, Dense)
            same = Dense(copies(covariance.matrix))
        again, *_ = setting(Case(CASES[name].model, CASES[name].mean, CASES[name].noise, lambda m: same,  # noqa: B023
                                 CASES[name].kind), m)  # fmt: skip
        draws = again.condition({"x": mean[i : i + 1].expand(m, *EVENT)}, {"x": same}).draw(Units(m))["x"].flatten(1)
        away = draws[1:] - draws[0]
        torch.testing.assert_close(away.mT @ away, C - gain @ A @ C, rtol=1e-7, atol=1e-8)


def test_other_latents_are_conditioned_too() -> None:
    """Few measured values: picture, scalar offset and a plate of offsets together, all normal."""
    y = random(5, seed=2)

    def model(y=None):
        x = pyro.sample("x", PRIOR)
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=F64), 2.0))
        with pyro.plate("five", 5):
            each = pyro.sample("each", dist.Normal(torch.zeros((), dtype=F64), 0.5))
            pyro.sample("y", dist.Normal(x.flatten()[:5] + shift + each, 0.3), obs=y)

    m = 60
    program = Program(model, (y,))
    mean = {"x": random(m, *EVENT), "shift": random(m, seed=1), "each": random(m, 5, seed=2)}
    covariances: dict[str, Covariance] = {
        "x": Dense((correlated() @ correlated().mT)[None]),
        "shift": Diagonal(torch.full((1,), 0.8, dtype=F64)),
        "each": Diagonal(torch.full((1, 1), 0.6, dtype=F64)),
    }
    how = Conditioning(64, 1, ConjugateGradients())
    conditioned = how.information(program, mean, {}, covariances, lambda: y).condition(mean, covariances)
    A = torch.cat([torch.eye(5, D, dtype=F64), torch.full((5, 1), 2.0, dtype=F64), 0.5 * torch.eye(5, dtype=F64)], 1)
    C = torch.block_diag(correlated() @ correlated().mT, torch.tensor([[0.8]]), 0.6 * torch.eye(5, dtype=F64))
    centre = torch.cat([mean["x"].flatten(1), mean["shift"][:, None], mean["each"]], 1)
    total = A @ C @ A.mT + 0.09 * torch.eye(5, dtype=F64)
    exact = MultivariateNormal(centre @ A.mT, total).log_prob(y)
    torch.testing.assert_close(conditioned.log_integral(), exact)
    gain = C @ A.mT @ torch.linalg.inv(total)
    posterior = centre + (y - centre @ A.mT) @ gain.mT

    def joined(states: dict[str, Tensor]) -> Tensor:
        return torch.cat([states["x"].flatten(1), states["shift"][:, None], states["each"]], 1)

    torch.testing.assert_close(joined(conditioned.mean()), posterior)
    draws = joined(conditioned.draw(Units(m))) - posterior
    torch.testing.assert_close(draws[1:].mT @ draws[1:], C - gain @ A @ C, rtol=1e-7, atol=1e-8)


def test_values_under_a_mask_say_nothing() -> None:
    """By poutine, and by the law itself, whatever stands there."""
    y, seen = random(D, seed=2), SEEN.flatten()

    def program(law: Callable[[Tensor], Any], handler: Any = None) -> Program:
        def model(y=None):
            x = pyro.sample("x", PRIOR).flatten()
            with pyro.plate("values", D):
                if handler is None:
                    pyro.sample("y", law(x), obs=y)
                else:
                    with handler:
                        pyro.sample("y", law(x), obs=y)

        return Program(model, (y,))

    def select(y=None):
        pyro.sample("y", dist.Normal(pyro.sample("x", PRIOR).flatten()[seen], 0.3).to_event(1), obs=y)

    mean, covariance = {"x": random(3, *EVENT)}, {"x": diagonal(DCT)(3)}
    how = Conditioning(64, 1, ConjugateGradients())

    def mean_given(program: Program) -> Tensor:
        return how.information(program, mean, {}, covariance, lambda: y).condition(mean, covariance).mean()["x"]

    exact = mean_given(Program(select, (y[seen],)))
    masked = program(lambda x: dist.Normal(x, 0.3), pyro.poutine.mask(mask=seen))
    torch.testing.assert_close(mean_given(masked), exact)
    torch.testing.assert_close(mean_given(program(lambda x: dist.Normal(x, 0.3).mask(seen))), exact)
    twice = program(lambda x: dist.Normal(x, 0.3), pyro.poutine.scale(scale=2.0))
    sharper = program(lambda x: dist.Normal(x, 0.3 / 2**0.5))
    torch.testing.assert_close(mean_given(twice), mean_given(sharper))


def test_other_latents_stay_where_they_are_in_a_large_program() -> None:
    """More measured values than can be written out: the picture is conditioned elementwise, each particle with its own
    noise level, exactly."""
    y = random(*EVENT, seed=2)

    def model(y=None):
        x = pyro.sample("x", PRIOR)
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.5))
        pyro.sample("y", GAUSS(BLUR, x, sigma), obs=y)

    program = Program(model, (y,))
    mean = {"x": random(4, *EVENT), "sigma": random(4, seed=1)}
    covariances = {"x": diagonal(HARTLEY)(4), "sigma": Diagonal(torch.full((1,), 0.5, dtype=F64))}
    information = Conditioning(10, 1, ConjugateGradients()).information(program, mean, {}, covariances, lambda: y)
    assert isinstance(information, DiagonalExpansion)
    eye = torch.eye(D, dtype=F64).reshape(D, *EVENT)
    A, C = BLUR(eye).flatten(1).mT, dense(covariances["x"], 4)
    sigma = (-1 + 0.5 * mean["sigma"]).exp()
    total = A @ C @ A.mT + sigma[:, None, None] ** 2 * torch.eye(D, dtype=F64)
    for shift in (0.0, 0.4):
        centre = mean["x"] + shift
        conditioned = information.condition({**mean, "x": centre}, covariances)
        exact = MultivariateNormal(centre.flatten(1) @ A.mT, total).log_prob(y.flatten())
        torch.testing.assert_close(conditioned.log_integral(), exact)
        missing = (y.flatten() - centre.flatten(1) @ A.mT)[..., None]
        posterior = centre.flatten(1) + (C @ A.mT @ torch.linalg.solve(total, missing))[..., 0]
        torch.testing.assert_close(conditioned.mean()["x"].flatten(1), posterior)
        assert set(conditioned.draw(lambda shape: torch.zeros(shape, dtype=F64))) == {"x"}


def test_what_cannot_be_conditioned_on_is_refused() -> None:
    y = random(*EVENT)

    def cauchy(y=None):
        pyro.sample("y", dist.Cauchy(pyro.sample("x", PRIOR), 1.0).to_event(3), obs=y)

    mean, covariances = {"x": random(2, *EVENT)}, {"x": diagonal(DCT)(2)}
    with pytest.raises(
        TypeError, match=r"sd.Adapted.*'y' has the law Independent without them; use sd.TDS with sd.Point"
    ):
        Conditioning(64, 1, ConjugateGradients()).information(Program(cauchy, (y,)), mean, {}, covariances, lambda: y)
    full: dict[str, Covariance] = {"x": Dense(torch.eye(D, dtype=F64)[None])}
    program = Program(model_of(lambda x: GAUSS(SELECT, x, 0.3)), ([random(int(SEEN.sum()))],))
    with pytest.raises(
        TypeError, match=r"got \d+ measured values of \['x'\].*more than 5.*max_measurements=\d+.*sd.TDS"
    ):
        Conditioning(5, 1, ConjugateGradients()).information(program, mean, {}, full, lambda: y)


def masked(mask: Tensor, sigma: Any, scale: float = 1.0) -> Callable[..., Any]:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        with pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=scale):
            pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, sigma, event_dim=0), obs=y)

    return model


@pytest.mark.parametrize("covariance", [diagonal(DCT, True), diagonal(PIXELS)], ids=["cosines", "pixels"])
def test_a_mask_leaves_out_what_a_selection_leaves_out(covariance: Callable[[int], Covariance]) -> None:
    """And what is left out may hold any number."""
    m, y = 3, random(*EVENT, seed=7)
    kept = SEEN.expand(EVENT)
    how, c, mean = Conditioning(0, 1, ConjugateGradients(tolerance=1e-18)), covariance(m), {"x": random(m, *EVENT)}
    selection = model_of(lambda x: GAUSS(SELECT, x, UNEVEN[SEEN]))
    found = []
    for model, data in ((masked(kept, UNEVEN), torch.where(kept, y, 1e3)), (selection, [SELECT(y)])):
        information = how.information(Program(model, (data,)), mean, {}, {"x": c}, lambda: c.variance)  # type: ignore[attr-defined]
        found.append(information.condition(mean, {"x": c}))
    torch.testing.assert_close(found[0].log_integral(), found[1].log_integral(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0].mean()["x"], found[1].mean()["x"], rtol=1e-8, atol=1e-8)


def test_a_scale_of_two_counts_a_measurement_twice() -> None:
    m, y = 3, random(*EVENT, seed=7)
    c, mean = diagonal(DCT)(m), {"x": random(m, *EVENT)}
    twice = model_of(*[lambda x: GAUSS(sd.Identity(), x, 0.3)] * 2)
    found = []
    for model, data in ((masked(torch.ones(EVENT, dtype=torch.bool), 0.3, 2.0), y), (twice, [y, y])):
        information = Conditioning(0, 1, ConjugateGradients()).information(
            Program(model, (data,)),
            mean,
            {},
            {"x": c},
            lambda: c.variance,  # type: ignore[attr-defined]
        )
        assert isinstance(information, DiagonalMeasurement)
        found.append(information.condition(mean, {"x": c}))
    torch.testing.assert_close(found[0].log_integral(), found[1].log_integral(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[0].mean()["x"], found[1].mean()["x"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: x > 0,
        lambda x: (x[..., 0, 0] > 0)[..., None, None].expand(x.shape),
        lambda x: (x[..., 0, 0] < 0)[..., None, None].expand(x.shape),
        lambda x: (x.sum() > -1).expand(x.shape),
    ],
    ids=["each pixel", "one pixel above", "one pixel below", "the sum"],
)
def test_a_mask_that_depends_on_the_picture_is_not_taken_for_a_fixed_one(mask: Callable[[Tensor], Tensor]) -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        with pyro.poutine.mask(mask=mask(x)):
            pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, 0.3, event_dim=0), obs=y)

    assert picture_measurement(Program(model, (random(*EVENT),))) is None
