"""Pyro state-space models on the particle filter, against Kalman filters, dense Gaussians, quadrature and SMCFilter."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SMCFilter
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal

from smcdiff.smc import FilterError, ParticleFilter
from smcdiff.state_space import LOG_PSI, StateSpaceModel
from tests.smc.models import LinearGaussian, OptimallyTwisted, normal_log_prob

EXAMPLES = Path(__file__).parent.parent / "examples"


class Model:
    """A linear-Gaussian model in the style of SMCFilter, counting its own steps."""

    def __init__(self, law: LinearGaussian, dtype: torch.dtype = torch.float64) -> None:
        self.m, self.P, self.F, self.Q, self.H, self.R = (
            getattr(law, name).to(dtype) for name in ("m", "P", "F", "Q", "H", "R")
        )

    def init(self, state: Any, y: Tensor) -> None:
        self.t = 0
        state["x"] = pyro.sample("x_0", dist.MultivariateNormal(self.m, self.P))
        pyro.sample("y_0", dist.MultivariateNormal(state["x"] @ self.H.T, self.R), obs=y)

    def step(self, state: Any, y: Tensor) -> None:
        self.t += 1
        state["x"] = pyro.sample(f"x_{self.t}", dist.MultivariateNormal(state["x"] @ self.F.T, self.Q))
        pyro.sample(f"y_{self.t}", dist.MultivariateNormal(state["x"] @ self.H.T, self.R), obs=y)


class Shifted:
    """A proposal that is off on purpose, N(F x + 0.3, 1.5 Q), with any factor: (step, x) -> log psi."""

    def __init__(self, law: LinearGaussian, log_psi: Callable[[int, Tensor], Tensor] | None = None) -> None:
        self.law, self.log_psi = law, log_psi

    def init(self, state: Any, y: Tensor) -> None:
        self.t = 0
        self._propose(self.law.m, self.law.P)

    def step(self, state: Any, y: Tensor) -> None:
        self.t += 1
        self._propose(state["x"] @ self.law.F.T, self.law.Q)

    def _propose(self, mean: Tensor, covariance: Tensor) -> None:
        x = pyro.sample(f"x_{self.t}", dist.MultivariateNormal(mean + 0.3, 1.5 * covariance))
        if self.log_psi is not None:
            pyro.factor("twist", self.log_psi(self.t, x))


class Optimal:
    """The optimal proposal, p(x_i given x_{i-1}, y_i ... y_K), and the factor p(y_{i+1} ... y_K given x_i)."""

    def __init__(self, law: LinearGaussian) -> None:
        self.law, self.twists = law, OptimallyTwisted(law).twists

    def init(self, state: Any, y: Tensor) -> None:
        self.t = 0
        self._propose(self.law.m, self.law.P, y)

    def step(self, state: Any, y: Tensor) -> None:
        self.t += 1
        self._propose(state["x"] @ self.law.F.T, self.law.Q, y)

    def _propose(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        L, v, c = self.twists[self.t]
        precision = torch.linalg.inv(covariance)
        q = torch.linalg.inv(precision + L)
        x = pyro.sample(f"x_{self.t}", dist.MultivariateNormal((mean @ precision + v) @ q, (q + q.T) / 2))
        log_psi = c - 0.5 * ((x @ L) * x).sum(-1) + x @ v
        pyro.factor("twist", log_psi - normal_log_prob(y, x @ self.law.H.T, self.law.R))


def of(law: LinearGaussian, guide: Any = None) -> StateSpaceModel:
    return StateSpaceModel(Model(law), guide, law.y[1:], init_args=(law.y[0],))


def random_factor(i: int, x: Tensor) -> Tensor:
    """A factor that has nothing to do with the data."""
    return 1.5 * torch.sin(3 * x.sum(-1) + i) + 0.7 * i


def assert_mean_one(ratio: Tensor) -> None:
    """Student's test at 1e-6 that the independent estimates exp(log_z - log p(y)) have mean 1."""
    assert ratio.std() < 0.7, "too noisy to tell anything"
    t = (ratio.mean() - 1).abs() / (ratio.std() / math.sqrt(len(ratio)))
    assert t < stats.t.isf(0.5e-6, len(ratio) - 1), f"{t.item():.1f} standard errors"


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("guide", [None, Shifted, lambda law: Shifted(law, random_factor)], ids=["none", "q", "psi"])
def test_evidence_and_means_against_kalman(guide: Callable[[LinearGaussian], Any] | None, threshold: float) -> None:
    # 200 independent chains: Student's test at 1e-6 for the evidence, which is unbiased, and at 1e-6 for the two means
    # together, whose bias is of order 1 / n and allowed for by 0.01.
    law = LinearGaussian.example(2, num_steps=6, seed=1)
    means, _, log_z = law.kalman
    model = of(law, guide(law) if guide else None)
    result = ParticleFilter(ess_threshold=threshold).run(model, num_particles=300, num_chains=200, seed=2)
    assert_mean_one(torch.exp(result.log_z - log_z[-1]))
    got = (result.w[..., None] * result.particles["x"]).sum(1)
    error = got.std(0) / math.sqrt(len(got))
    assert error.max() < 0.03, "too noisy to tell anything"
    assert (((got.mean(0) - means[-1]).abs() - 0.01) / error).max() < stats.t.isf(0.25e-6, len(got) - 1)
    assert result.particles.keys() == {"x"}


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_an_optimal_factor_has_exact_evidence(n: int, threshold: float) -> None:
    law = LinearGaussian.example(2, num_steps=6, seed=1)
    result = ParticleFilter(ess_threshold=threshold).run(of(law, Optimal(law)), num_particles=n, num_chains=3, seed=1)
    expected = law.kalman[2][-1].expand(3)
    torch.testing.assert_close(result.log_z, expected, rtol=1e-11, atol=1e-11)


def test_one_particle_has_the_weight_of_its_path() -> None:
    # log_z = log p(path) + log p(y | path) - log q(path), all three written out by hand; the factors cancel.
    law = LinearGaussian.example(3, num_steps=4, seed=3)
    for log_psi in (None, random_factor):
        paths: list[Tensor] = []
        states = ParticleFilter().iterate(of(law, Shifted(law, log_psi)), num_particles=1, num_chains=4, seed=5)
        for state in states:
            paths.append(state.particles["x"])
        expected = torch.zeros((4, 1), dtype=torch.float64)
        for i, x in enumerate(paths):
            mean, cov = (paths[i - 1] @ law.F.T, law.Q) if i else (law.m.expand(x.shape), law.P)
            expected += normal_log_prob(x, mean, cov) - normal_log_prob(x, mean + 0.3, 1.5 * cov)
            expected += normal_log_prob(law.y[i], x @ law.H.T, law.R)
        torch.testing.assert_close(state.log_z, expected[:, 0], rtol=1e-11, atol=1e-11)


def test_a_factor_counts_from_its_own_step_to_the_next() -> None:
    law = LinearGaussian.example(2, num_steps=3, seed=1)
    with_psi = ParticleFilter(ess_threshold=0).iterate(of(law, Shifted(law, random_factor)), num_particles=6, seed=5)
    without = ParticleFilter(ess_threshold=0).iterate(of(law, Shifted(law)), num_particles=6, seed=5)
    for i, (a, b) in enumerate(zip(with_psi, without, strict=True)):
        expected = random_factor(i, b.particles["x"]) if i < 3 else torch.zeros(())
        torch.testing.assert_close(a.log_w - b.log_w, expected.expand(1, 6).to(torch.float64), rtol=1e-11, atol=1e-11)
        assert (LOG_PSI in a.particles) == (i < 3)


@pytest.mark.parametrize("guide", [Shifted, Optimal])
def test_the_same_objects_run_under_smcfilter(guide: Callable[[LinearGaussian], Any]) -> None:
    # Without resampling both draw the same numbers from the same stream; SMCFilter keeps its weights in float32, and it
    # has no twists: it takes no site of the guide that the model lacks, so the factor is blocked from its sight.
    law = LinearGaussian.example(2, num_steps=4, seed=1)
    torch.manual_seed(7)
    proposal = guide(law)
    hide = pyro.poutine.block(hide=["twist"])
    blocked = type(
        "Blocked", (), {"init": staticmethod(hide(proposal.init)), "step": staticmethod(hide(proposal.step))}
    )
    theirs = SMCFilter(Model(law), blocked, num_particles=20, max_plate_nesting=0, ess_threshold=1e-9)
    theirs.init(law.y[0])
    ours = ParticleFilter(ess_threshold=0).iterate(of(law, guide(law)), num_particles=20, seed=7)
    for i, state in enumerate(ours):
        if i:
            theirs.step(law.y[i])
        assert torch.equal(state.particles["x"][0], theirs.state["x"])
        log_psi = state.particles[LOG_PSI] if i < law.num_steps else torch.zeros(())
        log_w = (state.log_w - log_psi).log_softmax(-1)[0]
        torch.testing.assert_close(log_w, theirs.state._log_weights.to(torch.float64), rtol=1e-4, atol=1e-4)


def test_a_run_that_goes_on_equals_the_run_that_did_not_stop() -> None:
    # Fresh objects whose counters have to be brought to step 3 first; the optimal twist would be wrong otherwise.
    law = LinearGaussian.example(2, num_steps=6, seed=1)
    filter = ParticleFilter(ess_threshold=0.9)
    model = of(law, Shifted(law, random_factor))
    whole = list(filter.iterate(model, num_particles=7, num_chains=3, seed=4))
    for at in (0, 3, 5):
        fresh = of(law, Shifted(law, random_factor))
        rest = list(filter.iterate(fresh, num_particles=7, num_chains=3, seed=4, start=whole[at]))
        assert torch.equal(rest[-1].particles["x"], whole[-1].particles["x"])
        assert torch.equal(rest[-1].log_z, whole[-1].log_z)
    again = list(filter.iterate(model, num_particles=7, num_chains=3, seed=4))
    assert torch.equal(again[-1].log_z, whole[-1].log_z)


def test_noise_is_the_run_s_own() -> None:
    law = LinearGaussian.example(2, num_steps=2, seed=1)
    before = torch.get_rng_state()
    first = ParticleFilter().run(of(law), num_particles=5, seed=3).log_z
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(ParticleFilter().run(of(law), num_particles=5, seed=3).log_z, first)
    assert not torch.equal(ParticleFilter().run(of(law), num_particles=5, seed=4).log_z, first)


def test_float32_particles_have_float64_weights() -> None:
    law = LinearGaussian.example(2, num_steps=6, seed=1)
    y = law.y.to(torch.float32)
    model = StateSpaceModel(Model(law, torch.float32), None, list(y[1:]), init_args=(y[0],))
    result = ParticleFilter().run(model, num_particles=300, num_chains=200, seed=2)
    assert result.particles["x"].dtype == torch.float32
    assert result.log_w.dtype == torch.float64
    # Student's test at 1e-6 as above; the rounding of float32 is below 1e-4 of the evidence.
    assert_mean_one(torch.exp(result.log_z - law.kalman[2][-1]))


class Series:
    """x_i = a x_{i-1} + N(0, 1 - a^2) in several series at once, stationary: cov(x_i, x_j) = a^|i - j|."""

    a, r = 0.8, 0.5

    def init(self, state: Any) -> None:
        with pyro.plate("series", 3, dim=-1):
            state["x"] = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    def step(self, state: Any, y: Tensor | None) -> None:
        with pyro.plate("series", 3, dim=-1):
            state["x"] = pyro.sample("x", dist.Normal(self.a * state["x"], math.sqrt(1 - self.a**2)))
            pyro.sample("y", dist.Normal(state["x"], self.r), obs=y)


class SeriesGuide:
    """Proposes from a wider law."""

    def init(self, state: Any) -> None:
        with pyro.plate("series", 3, dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.2))

    def step(self, state: Any, y: Tensor | None) -> None:
        with pyro.plate("series", 3, dim=-1):
            pyro.sample("x", dist.Normal(Series.a * state["x"], 0.8))


@pytest.mark.parametrize("guide", [None, SeriesGuide()], ids=["none", "q"])
def test_plates_and_missing_observations_against_a_dense_gaussian(guide: Any) -> None:
    # Observations at times 1, 3 and 4 of 4, the second one missing. Student's test at 1e-6, 150 chains.
    g = torch.Generator().manual_seed(0)
    y = torch.randn((4, 3), generator=g, dtype=torch.float64)
    times = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)
    cov = Series.a ** (times[:, None] - times).abs() + Series.r**2 * torch.eye(3, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(3, dtype=torch.float64), cov).log_prob(y[[0, 2, 3]].T).sum()
    model = StateSpaceModel(Series(), guide, [y[0], None, y[2], y[3]], max_plate_nesting=1)
    result = ParticleFilter().run(model, num_particles=1500, num_chains=150, seed=1)
    assert result.particles["x"].shape == (150, 1500, 3)
    assert_mean_one(torch.exp(result.log_z - exact))


class Line:
    """One latent and one observation, with something to get wrong: a model and a guide in one."""

    def __init__(self, step: Callable[[Any, Any], Any] | None = None) -> None:
        self._step = step

    def init(self, state: Any) -> None:
        state["x"] = pyro.sample("x", dist.Normal(0.0, 1.0))

    def step(self, state: Any, y: Any) -> None:
        if self._step is not None:
            self._step(state, y)
            return
        state["x"] = pyro.sample("x", dist.Normal(state["x"], 1.0))
        pyro.sample("y", dist.Normal(state["x"], 1.0), obs=y)


class LineGuide(Line):
    def init(self, state: Any) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))


def keep(name: str, value: Any) -> Callable[[Any, Any], Any]:
    def step(state: Any, y: Any) -> None:
        pyro.sample("y", dist.Normal(state["x"], 1.0), obs=y)
        state[name] = value

    return step


def write(state: Any, y: Any) -> None:
    state["x"] = pyro.sample("x", dist.Normal(state["x"], 1.0))


def observe_nothing(state: Any, y: Any) -> None:
    state["x"] = pyro.sample("x", dist.Normal(state["x"], 1.0))
    pyro.deterministic("twice", 2 * state["x"])


def sample_y(state: Any, y: Any) -> None:
    pyro.sample("x", dist.Normal(state["x"], 1.0))
    pyro.sample("y", dist.Normal(state["x"], 1.0))


def observe_in_guide(state: Any, y: Any) -> None:
    pyro.sample("x", dist.Normal(state["x"], 1.0))
    pyro.sample("z", dist.Normal(state["x"], 1.0), obs=y)


def subsample(state: Any, y: Any) -> None:
    with pyro.plate("data", 10, subsample_size=2, dim=-2):
        pyro.sample("y", dist.Normal(state["x"], 1.0), obs=y.expand(2, 1))


def test_masks_and_scales_count() -> None:
    def log_z(mask: bool, scale: float) -> Tensor:
        def step(state: Any, y: Any) -> None:
            with pyro.poutine.mask(mask=torch.tensor(mask)), pyro.poutine.scale(scale=scale):
                pyro.sample("y", dist.Normal(state["x"], 1.0), obs=y)

        model = StateSpaceModel(Line(step), None, torch.ones(2))
        return ParticleFilter().run(model, num_particles=1, num_chains=3, seed=0).log_z

    assert torch.equal(log_z(False, 1.0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(log_z(True, 2.0), 2 * log_z(True, 1.0))


def test_every_step_is_taken_once() -> None:
    taken: list[float] = []

    def step(state: Any, y: Any) -> None:
        taken.append(float(y))
        pyro.sample("y", dist.Normal(state["x"], 1.0), obs=y)

    ParticleFilter().run(StateSpaceModel(Line(step), None, torch.arange(5.0)), num_particles=4, num_chains=2)
    assert taken == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("model", "guide", "error", "says"),
    [
        (Line(keep("v", torch.zeros(2))), None, ValueError, r"'v' of shape \(2,\); expected 12 particles"),
        (Line(keep("v", torch.zeros(()))), None, ValueError, r"'v' of shape \(\)"),
        (Line(keep("v", 1.0)), None, TypeError, "float as the state's 'v'"),
        (Line(observe_nothing), None, ValueError, "observes nothing: its sites are .'x'"),
        (Line(subsample), None, ValueError, "subsampled plate 'data'"),
        (Line(), LineGuide(write), RuntimeError, "'x' written to the state by the guide"),
        (Line(), LineGuide(lambda state, y: None), ValueError, r"without the model's latent sites \['x'\]"),
        (Line(), LineGuide(sample_y), ValueError, r"got the sites \['y'\] in the guide"),
        (Line(), LineGuide(observe_in_guide), ValueError, "observed site 'z' in the guide"),
    ],
    ids=["shape", "scalar", "type", "unused", "subsample", "write", "missing", "extra", "observed"],
)
def test_errors_say_what_and_where(model: Any, guide: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        y = torch.zeros(3)
        ParticleFilter().run(StateSpaceModel(model, guide, y), num_particles=4, num_chains=3)
    assert caught.value.__notes__ == ["This was in step 1 of 3, observations[0]."]


def test_a_density_without_the_particles_is_refused() -> None:
    class Wide(Line):
        def init(self, state: Any) -> None:
            super().init(state)
            pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0), obs=torch.zeros(2, 1))

    with pytest.raises(ValueError, match=r"shape \(2, 4\) at the site 'z'.*max_plate_nesting"):
        ParticleFilter().run(StateSpaceModel(Wide(), None, torch.zeros(1)), num_particles=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_observations_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=r"infinite value in observations\[1\]"):
        StateSpaceModel(Line(), None, torch.tensor([0.0, bad]))


@pytest.mark.parametrize("log_psi", [math.nan, math.inf, -math.inf])
def test_a_factor_must_be_finite(log_psi: float) -> None:
    def step(state: Any, y: Any) -> None:
        x = pyro.sample("x", dist.Normal(state["x"], 1.0))
        pyro.factor("twist", torch.where(x > 0, log_psi, 0.0))

    model = StateSpaceModel(Line(), LineGuide(step), torch.zeros(3))
    with pyro.validation_enabled(False):  # which would itself refuse NaN
        with pytest.raises(FilterError, match=r"at step 1 of 3 \(observations\[0\]\).*pyro.factor is NaN or infinite"):
            ParticleFilter().run(model, num_particles=50)
        # In the last step, and there alone, the guide's factor is left out.
        result = ParticleFilter().run(StateSpaceModel(Line(), LineGuide(step), torch.zeros(1)), num_particles=50)
    assert torch.isfinite(result.log_z).all()


def test_a_density_that_is_not_a_number_is_a_fault_of_its_step() -> None:
    def step(state: Any, y: Any) -> None:
        state["x"] = pyro.sample("x", dist.Normal(state["x"], 1.0))
        pyro.sample("y", dist.Normal(state["x"], torch.where(y > 0, math.nan, 1.0)), obs=y)

    model = StateSpaceModel(Line(step), None, torch.tensor([0.0, 1.0, 0.0]))
    with (
        pyro.validation_enabled(False),
        pytest.raises(FilterError, match=r"at step 2 of 3 \(observations\[1\]\).*log_g of a particle is NaN"),
    ):
        ParticleFilter().run(model, num_particles=4)


@pytest.mark.parametrize("name", ["stochastic_volatility", "tracking"])
def test_examples_agree_with_their_references(name: str) -> None:
    # Student's test at 1e-6 for each row of the table, 100 chains; the references by themselves are checked below. For
    # the volatility the last guide's spread is 0.11 of the first one's; above 0.3 would be an F statistic of 7 with 99
    # and 99 degrees of freedom, probability below 1e-17.
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    reference, results = example["run"]()
    for result in results.values():
        assert_mean_one(torch.exp(result.log_z - reference))
    spread = [float(result.log_z.std()) for result in results.values()]
    assert name == "tracking" or spread[-1] < 0.3 * spread[0]
    assert f"{reference:.4f}" in example["table"](reference, results)


def test_references_of_the_examples_have_converged() -> None:
    volatility = runpy.run_path(str(EXAMPLES / "stochastic_volatility.py"))
    model = volatility["Volatility"]()
    y = volatility["simulate"](model, 100, 0)
    assert volatility["log_evidence"](model, y, 200) == pytest.approx(volatility["log_evidence"](model, y), abs=1e-9)
    # One return: p(y_0) is an integral over x_0 alone, by Gauss and Hermite; the density is not a normal one.
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(100)
    x = model.mu + model.stationary * torch.from_numpy(nodes)
    one = (torch.from_numpy(weights) * dist.Normal(0.0, (x / 2).exp()).log_prob(y[0]).exp()).sum() / math.sqrt(
        2 * math.pi
    )
    assert volatility["log_evidence"](model, y[:1]) == pytest.approx(math.log(one), abs=1e-6)
    tracking = runpy.run_path(str(EXAMPLES / "tracking.py"))
    boat = tracking["Boat"]()
    y, observers = tracking["simulate"](boat, 25, 0)
    exact = tracking["log_evidence"](boat, y, observers)
    assert tracking["log_evidence"](boat, y, observers, 200) == pytest.approx(exact, abs=1e-6)
