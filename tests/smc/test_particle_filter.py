"""The particle filter against exact answers: Kalman filters and enumerated hidden Markov models."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from smcdiff.smc import FeynmanKac, FilterState, Move, ParticleFilter, Particles, Records
from tests.smc.models import CPU, Bootstrap, HiddenMarkov, LinearGaussian, OptimallyTwisted


def assert_mean(samples: Tensor, expected: Tensor, failure: float = 1e-6, bias: float = 0.0) -> None:
    """Student's test that independent rows have the expected mean, Bonferroni over the entries."""
    count = samples.shape[0]
    error = samples.std(0) / math.sqrt(count)
    critical = stats.t.isf(failure / 2 / max(1, expected.numel()), count - 1)
    excess = ((samples.mean(0) - expected).abs() - bias) / error
    assert excess.max() < critical, f"{excess.max().item():.1f} standard errors; critical {critical:.1f}"


def moments(state: FilterState) -> Tensor:
    """Weighted first and second moments of x, (b, d + d^2)."""
    x = state.particles["x"]
    first = (state.w[..., None] * x).sum(1)
    second = torch.einsum("bn,bni,bnj->bij", state.w, x, x)
    return torch.cat([first, second.flatten(1)], -1)


@pytest.mark.parametrize(("d", "n"), [(1, 500), (2, 1000), (5, 2000)])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_bootstrap_filter_against_kalman(d: int, n: int, threshold: float) -> None:
    # 64 independent chains, Student's test at 1e-6 each for the evidence, which is unbiased, and the filtering moments,
    # whose bias is of order (relative variance of the weights) / n and at most 0.01 of these moments' spread here.
    model = LinearGaussian.example(d, num_steps=8)
    means, covs, log_z = model.kalman
    result = ParticleFilter(ess_threshold=threshold).run(
        Bootstrap(model), num_particles=n, num_chains=64, seed=d, records=Records(summaries={"moments": moments})
    )
    ratio = torch.exp(result.records.log_z - log_z[:, None])
    assert ratio.std() < 0.6, "too noisy to tell anything"
    assert_mean(ratio.T, torch.ones(9, dtype=torch.float64))
    exact = torch.cat([means, (covs + means[:, :, None] * means[:, None, :]).flatten(1)], -1)
    got = result.records.summaries["moments"]
    assert_mean(got.transpose(0, 1), exact, bias=0.003 * math.sqrt(1000 / n))
    error = (got.mean(1) - exact).abs().max().item()
    assert error < 0.05 * exact.abs().max().item()
    assert result.log_evidence.item() == pytest.approx(math.log(ratio[-1].mean()) + log_z[-1].item(), abs=1e-12)


def test_kalman_helper_against_the_joint_gaussian() -> None:
    # The oracle itself: one dense Gaussian solve gives the last filtering mean and covariance as well.
    model = LinearGaussian.example(3, num_steps=4)
    means, covs, _ = model.kalman
    mean, cov = model.joint
    torch.testing.assert_close(means[-1], mean[-3:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(covs[-1], cov[-3:, -3:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_optimal_twist_has_exact_evidence(n: int, d: int, threshold: float) -> None:
    model = LinearGaussian.example(d, num_steps=8)
    result = ParticleFilter(ess_threshold=threshold).run(OptimallyTwisted(model), num_particles=n, num_chains=3, seed=0)
    exact = model.kalman[2][-1].expand(3)
    torch.testing.assert_close(result.log_z, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.w, torch.full((3, n), 1 / n, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("n", "threshold"), [(2, 0.8), (3, 0.5), (4, 0.5), (3, 0.0), (3, 1.0)])
def test_evidence_is_unbiased_with_few_particles(n: int, threshold: float) -> None:
    """40 000 filters of a few particles: the mean of Z_hat / Z is one within 5 standard errors (failure 6e-7 each).

    The same statistic rejects the two classic mistakes, computed from the same run. Both forget the weights that a
    chain carries over a step without resampling: one takes the mean of the incremental weights alone at every step,
    the other settles at resamplings only, but with the last incremental weights instead of the accumulated ones.
    """
    model, chains = HiddenMarkov.example(), 40_000
    settings = ParticleFilter(ess_threshold=threshold)
    states = list(settings.iterate(model, num_particles=n, num_chains=chains, seed=n))
    truth = model.forward.sum(-1).log()
    every_step, last_only = torch.zeros(chains, dtype=torch.float64), torch.zeros(chains, dtype=torch.float64)
    carried, mixed = torch.zeros((chains, n), dtype=torch.float64), 0
    for i, state in enumerate(states):
        assert abs(score(state.log_z - truth[i])) < 5
        last = torch.logsumexp(state.log_w - carried, -1) - math.log(n)
        every_step += last
        settles = states[i + 1].history[-1].resampled if i < model.num_steps else torch.ones(chains, dtype=torch.bool)
        mixed += int(0 < settles.sum() < chains)
        last_only += torch.where(settles, last, 0.0)
        carried = torch.where(settles[:, None], 0.0, state.log_w)
    if 0 < threshold < 1:
        assert mixed >= 4, "some chains must resample at a step where others do not"
        assert abs(score(every_step - truth[-1])) > 10
        assert abs(score(last_only - truth[-1])) > 10
    if threshold == 0:
        assert not any(state.history[-1].resampled.any() for state in states)
    if threshold == 1:
        assert all(state.history[-1].resampled.all() for state in states[1:])
        torch.testing.assert_close(every_step, states[-1].log_z, rtol=0, atol=1e-12)


def score(log_ratio: Tensor) -> float:
    """Standard errors between the mean of exp(log_ratio) and one."""
    ratio = torch.exp(log_ratio)
    return ((ratio.mean() - 1) / (ratio.std() / math.sqrt(ratio.numel()))).item()


def test_filtering_law_of_a_hidden_markov_model() -> None:
    # Occupation times Z_hat * w are unbiased for the forward variables, at any n: Student's test at 1e-6.
    model = HiddenMarkov.example()
    n, chains = 3, 20_000
    for state in ParticleFilter().iterate(model, num_particles=n, num_chains=chains, seed=5):
        here = torch.nn.functional.one_hot(state.particles["state"], 3).to(torch.float64)
        mass = state.log_z.exp()[:, None] * (state.w[..., None] * here).sum(1)
        assert_mean(mass, model.forward[state.step])


def test_everything_a_particle_carries_is_gathered_together() -> None:
    @dataclass(frozen=True)
    class Tagged:
        num_steps: int = 5
        device: torch.device = CPU

        def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
            tag = torch.arange(num_chains * num_particles).reshape(num_chains, num_particles)
            carried = {
                "tag": tag,
                "half": tag.to(torch.float32) / 2,
                "picture": tag[..., None, None, None].expand(-1, -1, 2, 3, 4).double(),
                "nothing": torch.empty((*tag.shape, 0)),
            }
            return Move(carried, torch.randn(tag.shape, generator=generator))

        def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
            return Move(particles, 2 * torch.randn(particles["tag"].shape, generator=generator))

    result = ParticleFilter(ess_threshold=0.6).run(Tagged(), num_particles=6, num_chains=4, seed=0)
    tag = result.particles["tag"]
    assert result.records.resampled.any() and not result.records.resampled.all()
    assert torch.equal(result.particles["half"], tag / 2)
    assert torch.equal(result.particles["picture"], tag[..., None, None, None].expand(-1, -1, 2, 3, 4).double())
    # the tag is the path's root: the records tell the same story as the particles
    from smcdiff.smc.genealogy import roots

    assert result.records.ancestors is not None
    assert torch.equal(roots(result.records.ancestors)[-1] + 6 * torch.arange(4)[:, None], tag)


def same(a: FilterState, b: FilterState) -> bool:
    """Equal bit for bit, history included."""
    tensors = [
        (a.log_w, b.log_w), (a.w, b.w), (a.ess, b.ess), (a.log_z, b.log_z), (a.log_z_settled, b.log_z_settled),
        (a.generator_state, b.generator_state),
        *((a.particles[k], b.particles[k]) for k in a.particles),
        *((a.faults[k], b.faults[k]) for k in a.faults),
        *((x.ess, y.ess) for x, y in zip(a.history, b.history, strict=True)),
        *((x.log_z, y.log_z) for x, y in zip(a.history, b.history, strict=True)),
        *((x.resampled, y.resampled) for x, y in zip(a.history, b.history, strict=True)),
        *((x.ancestors, y.ancestors) for x, y in zip(a.history[1:], b.history[1:], strict=True)),
    ]  # fmt: skip
    return a.step == b.step and all(torch.equal(x, y) for x, y in tensors)


def test_same_seed_same_result_other_seed_another() -> None:
    model = Bootstrap(LinearGaussian.example(2, num_steps=5))
    runs = [list(ParticleFilter().iterate(model, num_particles=8, num_chains=3, seed=s))[-1] for s in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0].log_z, runs[2].log_z)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_going_on_from_a_state_equals_never_stopping(threshold: float) -> None:
    model = Bootstrap(LinearGaussian.example(2, num_steps=6), dtype=torch.float32)
    settings = ParticleFilter(ess_threshold=threshold)
    numbers = {"num_particles": 8, "num_chains": 3, "seed": 4}
    straight = list(settings.iterate(model, **numbers))
    for k, state in enumerate(straight):
        start = pickle.loads(pickle.dumps(state))
        went_on = list(settings.iterate(model, **{**numbers, "seed": 99}, start=start))
        assert len(went_on) == 6 - k
        assert all(same(a, b) for a, b in zip(went_on, straight[k + 1 :], strict=True))
        result = settings.run(model, **numbers, start=start)
        assert torch.equal(result.log_z, straight[-1].log_z)
        assert result.records.ess.shape == (7, 3)


@dataclass(frozen=True)
class Meddled:
    """A model whose chain 0 is changed by hand: other particles, another weight, and NaN at step 3."""

    inner: Bootstrap

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self._meddle(0, self.inner.initial(num_chains, num_particles, generator))

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        return self._meddle(i, self.inner.step(i, particles, generator))

    def _meddle(self, i: int, move: Move) -> Move:
        x, log_g = move.particles["x"].clone(), move.log_g.clone()
        x[0] += 10
        log_g[0] = torch.nan if i == 3 else 3 * log_g[0]
        return Move({"x": x}, log_g)


def test_a_chain_does_not_see_its_neighbours() -> None:
    model = Bootstrap(LinearGaussian.example(2, num_steps=6))
    numbers = {"num_particles": 8, "num_chains": 3, "seed": 4}
    for a, b in zip(
        ParticleFilter().iterate(model, **numbers), ParticleFilter().iterate(Meddled(model), **numbers), strict=True
    ):
        assert not torch.equal(a.particles["x"][0], b.particles["x"][0])
        assert torch.equal(a.particles["x"][1:], b.particles["x"][1:])
        assert torch.equal(a.log_w[1:], b.log_w[1:])
        assert torch.equal(a.log_z[1:], b.log_z[1:])


def test_weights_gather_in_float64() -> None:
    # 3000 potentials of one third in float32: their float32 sum is off by far more than this tolerance.
    @dataclass(frozen=True)
    class Constant:
        num_steps: int = 3000
        device: torch.device = CPU

        def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
            one = torch.ones((num_chains, num_particles), dtype=torch.float32)
            return Move({"x": one}, one / 3)

        def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
            return Move(particles, particles["x"] / 3)

    result = ParticleFilter().run(Constant(), num_particles=2, records=Records(ancestors=False))
    assert result.log_z.item() == pytest.approx(3001 * torch.tensor(1 / 3, dtype=torch.float32).item(), abs=1e-9)
    assert result.records.ancestors is None


@dataclass(frozen=True)
class Synchronising:
    """A model that reads a number off the device."""

    inner: FeynmanKac
    num_steps: int = 3
    device: torch.device = CPU

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self.inner.initial(num_chains, num_particles, generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        move = self.inner.step(i, particles, generator)
        return replace(move, log_g=move.log_g * move.log_g.max().item())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_nothing_in_the_loop_waits_for_the_device(threshold: float) -> None:
    # Fake tensors have no values: whatever needs one on the host, or has a shape that depends on one, raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Bootstrap(LinearGaussian.example(2, num_steps=3))
        settings = ParticleFilter(ess_threshold=threshold)
        states = list(settings.iterate(model, num_particles=8, num_chains=2))
        assert len(states) == 4 and isinstance(states[-1].log_z, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            list(settings.iterate(Synchronising(model), num_particles=8, num_chains=2))


def test_no_graph_is_kept() -> None:
    @dataclass(frozen=True)
    class Learning:
        theta: Tensor
        num_steps: int = 2
        device: torch.device = CPU

        def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
            x = self.theta * torch.ones((num_chains, num_particles))
            return Move({"x": x}, x)

        def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
            return Move({"x": particles["x"] * self.theta}, particles["x"])

    result = ParticleFilter().run(Learning(torch.tensor(2.0, requires_grad=True)), num_particles=2)
    assert not result.log_z.requires_grad and not result.particles["x"].requires_grad
    assert result.log_z.item() == 2.0 + 2.0 + 4.0


def test_progress_is_read_at_a_modest_rate_and_at_the_end() -> None:
    seen: list[int] = []
    model = Bootstrap(LinearGaussian.example(1, num_steps=333))
    ParticleFilter().run(model, num_particles=2, progress=lambda state: seen.append(state.step))
    assert 20 <= len(seen) <= 51 and seen[-1] == 333


def test_a_model_without_moves_is_importance_sampling() -> None:
    model = LinearGaussian.example(1, num_steps=0)
    result = ParticleFilter().run(Bootstrap(model), num_particles=5, num_chains=2)
    x = result.particles["x"]
    exact = Bootstrap(model)._weigh(0, x).log_g.exp().mean(1).log()
    torch.testing.assert_close(result.log_z, exact, rtol=1e-12, atol=0)
    assert result.records.ess.shape == (1, 2) and result.records.resampled.shape == (0, 2)
