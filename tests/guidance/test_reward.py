"""Steering by rewards against an exact mixture, its potentials against their definition, and black boxes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.guidance.potentials import Difference, Max, Sum, with_potential
from smcdiff.guidance.program import Program
from smcdiff.guidance.reward import FeynmanKacSteering, RewardTwist, black_box
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter, Records
from tests.guidance.exact import chain_density, check_evidence, weighted_moments

F64 = torch.float64
STEPS, SCALE = 12, 0.6


def make_prior() -> sd.DiffusionPrior:
    means = torch.tensor([[-2.0], [0.5], [2.5]], dtype=F64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    denoiser = sd.GaussianMixtureDenoiser(means, torch.full((3, 1, 1), 0.3, dtype=F64), weights)
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), STEPS, variance="optimal", grid=sd.KarrasGrid())


PRIOR = make_prior()


def reward(x: Tensor) -> Tensor:
    """Code that torch cannot differentiate or map: NumPy, with a jump."""
    values = x.numpy()[:, 0]
    return torch.from_numpy(np.where(values > 0, 1.0, 0.0) + np.sin(values))


def plain() -> Tensor:
    return pyro.sample("x", PRIOR)


def measured(y: Tensor | None = None) -> Tensor:
    x = pyro.sample("x", PRIOR)
    pyro.sample("y", dist.Normal(x, 2.0).to_event(1), obs=y)
    return x


def with_factor() -> None:
    x = pyro.sample("x", PRIOR)
    pyro.factor("worth", SCALE * black_box(reward)(x[None])[0])


def exact(log_weight: Tensor, grid: Tensor) -> tuple[float, float]:
    """log of the mean of exp(log_weight) over the chain's law, and the tilted mean."""
    joint = chain_density(PRIOR, grid) * log_weight.exp()
    log_z = float((joint.sum() * (grid[1] - grid[0])).log())
    return log_z, float((joint * grid).sum() / joint.sum())


GRID = torch.linspace(-9, 9, 1801, dtype=F64)
KERNELS = {
    "difference": (FeynmanKacSteering(plain, reward, SCALE), 500),
    "difference, at times": (FeynmanKacSteering(plain, reward, SCALE, every=5), 500),
    "max": (FeynmanKacSteering(plain, reward, SCALE, potential=Max(), every=4), 1000),
    "sum": (FeynmanKacSteering(plain, reward, SCALE, potential=Sum(), every=6), 1000),
    "the program's own factor": (FeynmanKacSteering(with_factor), 500),
    "bootstrap with a factor": (sd.Bootstrap(with_factor), 500),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_target_is_the_tilted_prior(name: str) -> None:
    """p(x_0) exp(scale r(x_0)), whatever the potentials, by quadrature."""
    log_z, mean = exact(SCALE * reward(GRID[:, None]), GRID)
    kernel, n = KERNELS[name]
    smc = sd.SMC(kernel, n, num_chains=24, seed=2, progress=False).run()
    check_evidence(smc, log_z)
    estimate, error, _ = weighted_moments(smc, "x")
    assert float(error) < 0.08 and abs(float(estimate) - mean) < 5 * float(error)
    assert smc.network_evaluations == (24 * n * STEPS, 0)


@pytest.mark.parametrize("potential", [Difference(), Max()], ids=str)
def test_a_reward_beside_a_measurement(potential) -> None:
    """p(x_0) p(y given x_0) exp(scale r(x_0)), by quadrature."""
    y = torch.tensor([0.7], dtype=F64)
    log_z, mean = exact(SCALE * reward(GRID[:, None]) + dist.Normal(GRID, 2.0).log_prob(y), GRID)
    kernel = FeynmanKacSteering(measured, reward, SCALE, site="x", potential=potential, every=4)
    smc = sd.SMC(kernel, 800, num_chains=24, seed=0, progress=False).run(y)
    check_evidence(smc, log_z)
    estimate, error, _ = weighted_moments(smc, "x")
    assert float(error) < 0.08 and abs(float(estimate) - mean) < 5 * float(error)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("potential", [Difference(), Max(), Sum()], ids=str)
def test_weights_are_the_published_potentials(potential, every: int) -> None:
    """Each particle's weight, traced through all resamplings, from the definitions of 2501.06848 written out."""
    kernel = FeynmanKacSteering(plain, reward, SCALE, potential=potential, every=every)
    program = Program(kernel.model)
    feynman_kac = with_potential(TwistedModel(program, kernel), kernel)
    b, n = 2, 6
    filter_ = ParticleFilter(ess_threshold=0.9)
    states = list(filter_.iterate(feynman_kac, num_particles=n, num_chains=b, seed=4, records=Records(ancestors=True)))
    resampled = torch.stack([record.resampled for record in states[-1].history[1:]])
    assert 0 < int(resampled.sum()) < b * STEPS
    for c in range(b):
        for i in range(n):
            index, line = i, []
            for state in reversed(states):
                k = STEPS - state.step
                x = state.particles["x"][c, index][None]
                line.append((k, float(SCALE * reward(x if k == 0 else PRIOR.chain.estimate(k, x).mean)[0])))
                if state.step:
                    index = int(state.history[-1].ancestors[c, index])
            line.reverse()
            rewards, log_G = [], []
            for k, r in line[:-1]:
                if (STEPS - k) % every:
                    log_G.append(0.0)
                    continue
                rewards.append(r)
                log_G.append(
                    {
                        Difference: r - (rewards[-2] if len(rewards) > 1 else 0.0),
                        Max: max(rewards),
                        Sum: sum(rewards),
                    }[type(potential)]
                )
            log_G.append(line[-1][1] - sum(log_G))
            since = max((step for step in range(STEPS) if bool(resampled[step, c])), default=-1)
            assert float(states[-1].log_w[c, i]) == pytest.approx(sum(log_G[since + 1 :]), abs=1e-10)
            assert sum(log_G) == pytest.approx(line[-1][1])


def test_a_black_box_is_called_once_for_all_particles() -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return reward(x)

    x = torch.linspace(-2, 2, 5, dtype=F64)[:, None].requires_grad_()
    mapped = torch.func.vmap(lambda one: black_box(counted)(one[None])[0])(x)
    torch.testing.assert_close(mapped, reward(x.detach()))
    assert calls == [(5, 1)]
    assert not mapped.requires_grad
    constant = torch.func.vmap(lambda one: one.sum() + black_box(counted)(torch.ones(1, 1, dtype=F64))[0])(x)
    torch.testing.assert_close(constant, x[:, 0] + reward(torch.ones(1, 1, dtype=F64)))


def test_the_reward_is_asked_at_the_scored_levels_and_the_end() -> None:
    asked: list[int] = []

    def counted(x: Tensor) -> Tensor:
        asked.append(len(x))
        return reward(x)

    kernel = FeynmanKacSteering(plain, counted, SCALE, every=5)
    feynman_kac = with_potential(TwistedModel(Program(kernel.model), kernel), kernel)
    asked.clear()
    ParticleFilter().run(feynman_kac, num_particles=7, num_chains=2)
    assert asked == [14] * 4  # k = 12, 7, 2 and 0


def test_a_reward_as_a_twist_leaves_the_target_alone() -> None:
    """Guided by the gradient of a reward that is not the likelihood; the posterior stays the program's."""
    y = torch.tensor([0.7], dtype=F64)
    log_z, mean = exact(dist.Normal(GRID, 2.0).log_prob(y), GRID)
    twist = RewardTwist(lambda x: -0.1 * (x[:, 0] - 1).square(), scale=0.8)
    smc = sd.SMC(sd.TDS(measured, twist), 500, num_chains=24, seed=0, progress=False).run(y)
    check_evidence(smc, log_z)
    estimate, error, _ = weighted_moments(smc, "x")
    assert float(error) < 0.08 and abs(float(estimate) - mean) < 5 * float(error)
    quadratic = RewardTwist(lambda x: -0.5 * ((x - y) / 2).square().sum(1))
    same = sd.SMC(sd.TDS(measured, quadratic), 20, seed=0, progress=False).run(y)
    point = sd.SMC(sd.TDS(measured), 20, seed=0, progress=False).run(y)
    # the log-likelihood but for its constant: the same particles, the same evidence
    torch.testing.assert_close(same.log_evidence, point.log_evidence)


def test_the_rewarded_program_is_a_pyro_program() -> None:
    kernel = FeynmanKacSteering(plain, reward, SCALE)
    trace = pyro.poutine.trace(sd.unroll(kernel.model)).get_trace()
    x = trace.nodes["x_0"]["value"]
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["reward"]["log_prob"], SCALE * reward(x[None])[0])
    assert dataclasses.replace(kernel, scale=2.0).model.model is plain
    drawn = pyro.poutine.trace(kernel.model).get_trace()  # what the program returns is what it returned
    assert drawn.nodes["_RETURN"]["value"] is drawn.nodes["x"]["value"]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="got scale nan"):
        FeynmanKacSteering(plain, reward, float("nan"))
    with pytest.raises(ValueError, match="got scale inf"):
        RewardTwist(reward, float("inf"))
    with pytest.raises(ValueError, match="got every = 0"):
        FeynmanKacSteering(plain, reward, every=0)
    for kernel, message in (
        (FeynmanKacSteering(plain, reward, site="z"), r"site 'z'; expected one of the latents \['x'\]"),
        (FeynmanKacSteering(plain, lambda x: x), r"reward of shape \(1, 1\) for 1 events; expected \(1,\)"),
        (FeynmanKacSteering(plain), "observes nothing"),
        (sd.TDS(with_factor, RewardTwist(lambda x: x)), r"reward of shape \(2, 1\) for 2 events"),
    ):
        with pytest.raises(ValueError, match=message):
            sd.SMC(kernel, 2, max_batch=2, progress=False).run()
    with pytest.raises(ValueError, match=r"without a site and a program with the diffusion priors \[\]"):
        FeynmanKacSteering(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), reward).model()
