"""Replacement against a loop of the published algorithm, and its weights against closed forms."""

from __future__ import annotations

import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.base import SiteStep
from smcdiff.guidance.program import Program
from smcdiff.guidance.replacement import Replacement
from smcdiff.guidance.twisted import TwistedModel
from tests.guidance import published as pub

STEPS = 50
SEEN = torch.tensor([True, False, True])
Y = torch.tensor([0.4, 1.1], dtype=pub.F64)
ROWS = torch.eye(3, dtype=pub.F64)[SEEN]


def published_loop(noise: torch.Tensor) -> torch.Tensor:
    """Replacement by a path of the forward process from y, whose noise is made to be that of a path drawn backwards.

    A path of the forward process, read from high noise to low, has y_s given y_t and y as DDPM's posterior step.
    """
    bars = pub.alpha_bars(STEPS)
    path = [noise[0][SEEN]]  # y_T
    for i in range(STEPS, 0, -1):
        mean, scale = pub.ancestral(path[-1], Y, bars[i], bars[i - 1])
        path.append(mean + scale * noise[STEPS + 1 - i][SEEN])
    x = noise[0]
    for i in range(STEPS, 0, -1):
        x = x.clone()
        x[SEEN] = path[STEPS - i]
        mean, scale = pub.ancestral(x, pub.denoise(x, bars[i]), bars[i], bars[i - 1])
        x = mean + scale * noise[STEPS + 1 - i]
    x[SEEN] = path[-1]
    return x


def test_path_is_the_published_loop() -> None:
    """The published method knows no measurement noise; 1e-9 of it moves no number by more than a few times that."""
    model = pub.measured(pub.gaussian_prior(num_steps=STEPS), sd.Select(SEEN), 1e-9)
    pub.check_loop(Replacement, model, Y, published_loop, STEPS + 1, 1e-6)


def test_measured_part_is_a_path_of_the_forward_process() -> None:
    """x_0 ~ N(y / s, (sigma_y / s)^2), noised to s and from there to t: x_s given x_t by the Gaussian joint law."""
    prior, gain, sigma = pub.gaussian_prior(num_steps=STEPS), torch.tensor([2.0, 0.0, 0.5], dtype=pub.F64), 0.3
    program = Program(pub.measured(prior, sd.Mask(gain), sigma), (torch.tensor([0.4, 0.0, 1.1], dtype=pub.F64),))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=pub.F64)
    for k in (2, 20, 50):
        estimate, move = prior.chain.estimate(k, x), prior.chain.step(k)
        p = prior.chain.transition(k, x, estimate)
        q = Replacement(lambda y: y).proposal.q(SiteStep(program, "x", k, move, x, estimate, p, None))
        for place, clean in ((0, 0.2), (2, 2.2)):
            spread = move.s.alpha**2 * (sigma / float(gain[place])) ** 2 + move.s.sigma**2
            a = move.t.alpha / move.s.alpha
            share = a * spread / (a**2 * spread + move.beta)
            mean = move.s.alpha * clean + share * (x[:, place] - a * move.s.alpha * clean)
            torch.testing.assert_close(q.mean[:, place], mean, rtol=1e-9, atol=1e-9)
            variance = torch.full((len(x),), (1 - share * a) * spread, dtype=pub.F64)
            torch.testing.assert_close(q.variance.expand(4, 3)[:, place], variance, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(q.mean[:, 1], p.mean[:, 1])
        torch.testing.assert_close(q.variance.expand(4, 3)[:, 1], p.variance.expand(4, 3)[:, 1])


def test_weights_are_the_published_ones() -> None:
    """log_g = log p(y_s given x_t) up to what does not depend on the particle's x0_hat.

    Particles that differ in the unknown entry alone share their path; the published weight then differs between them
    by the chain's density of the shared y_s.
    """
    prior = pub.gaussian_prior(num_steps=STEPS)
    model = pub.measured(prior, sd.Select(SEEN), 1e-9)
    feynman_kac = TwistedModel(Program(model, (Y,)), Replacement(model))
    x_t = torch.tensor([[0.3, -1.0, 0.5], [0.3, 2.0, 0.5]], dtype=pub.F64)
    k = 20
    particles, _ = feynman_kac.evaluate(k, {"x": x_t[None]})
    y_s = torch.tensor([0.35, 0.6], dtype=pub.F64)
    x_s = torch.stack([torch.tensor([0.35, u, 0.6], dtype=pub.F64) for u in (-0.9, 1.7)])
    current, _ = feynman_kac.evaluate(k - 1, {"x": x_s[None]})
    log_g = feynman_kac.log_potential(STEPS + 1 - k, particles, current)[0]
    p = prior.chain.transition(k, x_t, prior.chain.estimate(k, x_t))
    published = -0.5 * ((y_s - p.mean[:, SEEN]) ** 2 / p.variance).sum(1)
    torch.testing.assert_close(log_g.diff(), published.diff(), rtol=1e-6, atol=1e-9)
    assert float(published.diff().abs()) > 1e-3


@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_many_particles_are_exact(variance: str) -> None:
    pub.check_gaussian_posterior(Replacement, sd.Select(SEEN), ROWS, Y, 1000, pub.karras(variance))


def test_any_operator_with_an_svd_will_do() -> None:
    pub.check_gaussian_posterior(Replacement, sd.Matrix(pub.A), pub.A, pub.Y, 2000, pub.karras("optimal"))


def test_many_particles_are_exact_on_a_mixture() -> None:
    pub.check_mixture_posterior(Replacement, 1000, grid=sd.KarrasGrid())


def test_a_particle_does_not_depend_on_its_neighbours() -> None:
    pub.check_neighbours(Replacement)


def test_a_step_never_waits_for_the_device() -> None:
    pub.check_no_waiting(Replacement)


def test_refusals() -> None:
    pub.check_refusals(Replacement, "Replacement", needs_svd=True)
