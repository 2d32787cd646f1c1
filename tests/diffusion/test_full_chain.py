"""Chains with a full covariance: exact for a Gaussian prior in any number of steps, with the density of their trace."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import smcdiff as sd
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import CosineSchedule, FlowSchedule, KarrasGrid, NoiseLevel, Schedule
from smcdiff.transforms import DCT, HARTLEY
from tests.diffusion.exact import assert_normal_moments, bridge, clean_given_noisy, example_covariance

F64 = torch.float64
SCHEDULES = [sd.VPSchedule(), CosineSchedule(), sd.VESchedule(0.01, 50.0), FlowSchedule(0.002, 0.99)]
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
COVARIANCE = example_covariance(3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def basis_matrix(basis, event: tuple[int, ...]) -> Tensor:
    eye = torch.eye(torch.Size(event).numel(), dtype=F64)
    return basis.from_spectral(eye.reshape(-1, *event)).flatten(1).mT


def gaussians() -> dict[str, tuple[Denoiser, Tensor, Tensor]]:
    """Denoisers with the mean and covariance of x_0 over flattened events."""
    found: dict[str, tuple[Denoiser, Tensor, Tensor]] = {
        "matrix": (sd.GaussianDenoiser(MEAN, COVARIANCE), MEAN, COVARIANCE)
    }
    mean, spectrum = random(1, 2, 3), random(1, 2, 3, seed=1).square() + 0.1
    for name, basis in (("Hartley", HARTLEY), ("cosines", DCT)):
        v = basis_matrix(basis, (1, 2, 3))
        covariance = v @ spectrum.flatten().diag() @ v.mT
        found[name] = (sd.GaussianFieldDenoiser(mean, spectrum, basis), mean.flatten(), covariance)
    return found


GAUSSIANS = gaussians()


def moments(chain: ReverseChain, m: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0, the affine maps and noises read off the chain's own transitions."""
    d, event = len(m), chain.denoiser.event_shape
    probes = torch.cat([torch.zeros(1, d, dtype=F64), torch.eye(d, dtype=F64)]).reshape(d + 1, *event)
    units = torch.eye(d, dtype=F64).reshape(d, 1, *event)
    for k in range(chain.num_steps, 0, -1):
        law = chain.transition(k, probes, chain.estimate(k, probes))
        mean = law.mean.flatten(1)
        offset, map_ = mean[0], (mean[1:] - mean[0]).mT
        root = torch.stack([(law.sample(u.expand(d + 1, *event)) - law.mean)[0].flatten() for u in units], 1)
        m, P = map_ @ m + offset, map_ @ P @ map_.mT + root @ root.mT
    return m, P


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_gaussian_prior_is_drawn_exactly(name: str, num_steps: int, schedule: Schedule) -> None:
    """From the law that x_T has, x_0 has its own, however few the steps; all eta, as each step has both moments."""
    denoiser, mean, covariance = GAUSSIANS[name]
    for eta in (1.0, 0.3):
        chain = ReverseChain(denoiser, schedule, num_steps, eta, variance="full", grid=KarrasGrid())
        top = chain.levels[-1]
        start = top.alpha * mean, top.alpha**2 * covariance + top.sigma**2 * torch.eye(len(mean), dtype=F64)
        m, P = moments(chain, *start)
        torch.testing.assert_close(m, mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(P, covariance, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_draws(num_steps: int) -> None:
    """Fails by chance with probability at most 4e-6 (assert_normal_moments)."""
    chain = ReverseChain(GAUSSIANS["matrix"][0], sd.VPSchedule(), num_steps, variance="full")
    scale, top = chain.initial_scale, chain.levels[-1]
    m, P = moments(chain, torch.zeros(3, dtype=F64), scale**2 * torch.eye(3, dtype=F64))
    # the start N(0, (alpha^2 + sigma^2) I) of the chain in place of x_T's own law leaves a little of itself
    assert float((P - COVARIANCE).abs().max()) < 3 * top.alpha**2
    assert_normal_moments(chain.sample(20_000, torch.Generator().manual_seed(0)), m, P)


def mixture(own: bool) -> Denoiser:
    means, weights = 1.5 * random(3, 3), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    covariances = torch.stack([example_covariance(3, seed) for seed in range(3)]) if own else COVARIANCE
    return sd.GaussianMixtureDenoiser(means, covariances, weights)


def exact_step(denoiser: Denoiser, t: NoiseLevel, s: NoiseLevel, x_t: Tensor) -> MultivariateNormal:
    """N(b x_t + c x0_hat, small I + c^2 C_t) with C_t by Tweedie's identity, over flattened events."""

    def mean(x: Tensor) -> Tensor:
        return denoiser(x.reshape(1, *denoiser.event_shape), t).mean.flatten()

    x = x_t.flatten()
    b, c, small, _ = bridge(t, s)
    within = t.sigma**2 / t.alpha * torch.autograd.functional.jacobian(mean, x)
    total = small * torch.eye(len(x), dtype=F64) + c**2 * within
    return MultivariateNormal(b * x + c * mean(x), 0.5 * (total + total.mT))


DENOISERS = {
    "diagonal": GAUSSIANS["cosines"][0],
    "diagonal in its eigenbasis": GAUSSIANS["matrix"][0],
    "low rank": mixture(own=False),
    "dense": mixture(own=True),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_density_of_a_path(name: str) -> None:
    """The trace of the chain against the product of dense normal densities written out."""
    denoiser = DENOISERS[name]
    chain = ReverseChain(denoiser, sd.VPSchedule(), 4, variance="full", grid=KarrasGrid())
    trace = pyro.poutine.trace(chain).get_trace("x")
    path = [trace.nodes[f"x_{k}"]["value"] for k in range(5)]
    total = Normal(0.0, chain.initial_scale).log_prob(path[4]).sum()
    for k in range(4, 0, -1):
        law = exact_step(denoiser, chain.levels[k], chain.levels[k - 1], path[k])
        total = total + law.log_prob(path[k - 1].flatten())
    assert float(trace.log_prob_sum()) == pytest.approx(float(total), rel=1e-8)
    assert all(trace.nodes[f"x_{k}"]["fn"].event_shape == denoiser.event_shape for k in range(5))


@pytest.mark.parametrize("name", DENOISERS)
def test_the_unrolled_program_of_adapted(name: str) -> None:
    """sd.unroll of Adapted's program, whose prior is the full chain: path, another latent and the measurement."""
    denoiser = DENOISERS[name]
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 3, grid=KarrasGrid())
    y = torch.tensor(0.7, dtype=F64)

    def model(y=None):
        x = pyro.sample("x", prior)
        shift = pyro.sample("shift", dist.Normal(torch.tensor(1.0, dtype=F64), 2.0))
        return pyro.sample("y", dist.Normal(x.sum() + shift, 0.5), obs=y)

    assert prior.chain.variance == "posterior"
    trace = pyro.poutine.trace(sd.unroll(sd.Adapted(model).model)).get_trace(y)
    path = [trace.nodes[f"x_{k}"]["value"] for k in range(4)]
    shift = [trace.nodes[f"shift_{k}"]["value"] for k in range(4)]
    levels = prior.chain.levels
    total = Normal(0.0, prior.chain.initial_scale).log_prob(torch.cat([path[3].flatten(), shift[3][None]])).sum()
    for k in range(3, 0, -1):
        t, s = levels[k], levels[k - 1]
        total = total + exact_step(denoiser, t, s, path[k]).log_prob(path[k - 1].flatten())
        b, c, small, _ = bridge(t, s)
        mean, within = clean_given_noisy(0 * MEAN[:1], torch.eye(1, dtype=F64), t, shift[k][None])
        law = Normal(b * shift[k] + c * mean, (small + c**2 * within[0, 0]).sqrt())
        total = total + law.log_prob(shift[k - 1]).sum()
    total = total + Normal(path[0].sum() + 1 + 2 * shift[0], 0.5).log_prob(y)
    assert float(trace.log_prob_sum()) == pytest.approx(float(total), rel=1e-8)


def test_pyro_draws_and_densities_of_a_step() -> None:
    """A step as a Pyro distribution: many draws have its moments, and densities of a batch are those of its rows."""
    denoiser = DENOISERS["dense"]
    chain = ReverseChain(denoiser, sd.VPSchedule(), 2, variance="full")
    x = random(1, 3)
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(pyro.condition(chain, {"x_2": x[0]})).get_trace("x")
    law = trace.nodes["x_1"]["fn"]
    exact = exact_step(denoiser, chain.levels[2], chain.levels[1], x[0])
    draws = law.sample(torch.Size([4000]))
    assert_normal_moments(draws, exact.mean, exact.covariance_matrix)
    torch.testing.assert_close(law.log_prob(draws[:6].reshape(2, 3, 3)), exact.log_prob(draws[:6]).reshape(2, 3))


def test_what_has_no_full_covariance_is_refused() -> None:
    class Plain:
        event_shape, dtype, device = torch.Size([3]), F64, torch.device("cpu")

        def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
            return Estimate(x_t)

    with pytest.raises(ValueError, match=r'variance="full" with a prior that knows no covariance.*calibrate\(images\)'):
        sd.DiffusionPrior(Plain(), sd.VPSchedule(), 3, variance="full")
    prior = sd.DiffusionPrior(GAUSSIANS["matrix"][0], sd.VPSchedule(), 3, variance="full")
    with pytest.raises(ValueError, match=r'variance="full" in a plate.*its own site'):
        prior.expand((2,))
    given = sd.DiffusionPrior(Plain(), sd.VPSchedule(), 3, variance="full", covariance=sd.IsotropicCovariance(0.5))
    assert given.sample().shape == (3,)
