r"""Latents that are integrated out: nodes against closed forms, posteriors and evidence against quadrature.

The small problems and their statements are those of :mod:`tests.guidance.test_blind_exact`; a run's statements together
fail a true method with probability 1e-5. In addition a Gaussian random field of 16 x 16 pixels under a blur of unknown
width, where every coordinate of the Fourier basis stands alone given the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import MultivariateNormal, Normal

import smcdiff as sd
from smcdiff.guidance.base import Prediction, SiteStep
from smcdiff.guidance.marginal import Marginalised, _MarginalTransition
from smcdiff.guidance.marginal_nodes import Nodes, moments, refined
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc import ParticleFilter
from smcdiff.transforms import hartley
from tests.guidance.exact import NormalLaw, chain_law
from tests.guidance.test_blind_exact import (
    D,
    Exact,
    Family,
    Problem,
    by_quadrature,
    circulant,
    limit,
    problem,
    run,
    scores,
    t,
)

# --- nodes --------------------------------------------------------------------------------------------------------


def integral(log_f: Callable[[Tensor], Tensor], mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centre, scale = refined(log_f, mean, deviation)
    nodes = Nodes.about(centre, scale, 5)
    return moments(nodes, log_f(nodes.z), scale)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("narrow", [1.0, 0.1, 0.005])
def test_a_normal_likelihood_is_integrated_exactly(d: int, narrow: float) -> None:
    """Also one of half a percent of the prior's width, turned, at an uneven place."""
    generator = torch.Generator().manual_seed(d)
    mean, deviation = (torch.randn(6, d, generator=generator, dtype=D) for _ in range(2))
    deviation = deviation.abs() + 0.3
    root = narrow * (torch.eye(d, dtype=D) + 0.4 * torch.randn(d, d, generator=generator, dtype=D)) * deviation[0]
    spread = root @ root.mT
    place = mean + 0.9 * deviation * torch.randn(6, d, generator=generator, dtype=D)

    def log_f(z: Tensor) -> Tensor:
        prior = Normal(mean[:, None], deviation[:, None]).log_prob(z).sum(-1)
        return prior + MultivariateNormal(place[:, None], spread).log_prob(z)

    log_z, centre, scale = integral(log_f, mean, deviation)
    own = torch.diag_embed(deviation.square())
    expected = MultivariateNormal(mean, own + spread).log_prob(place)
    pull = own @ torch.linalg.inv(own + spread)
    torch.testing.assert_close(log_z, expected, atol=1e-6, rtol=1e-6)
    there = mean + (pull @ (place - mean)[..., None])[..., 0]
    torch.testing.assert_close(centre, there, atol=1e-5 * narrow, rtol=0)
    left = own - pull @ own
    torch.testing.assert_close(scale @ scale.mT, left, atol=1e-5 * narrow**2, rtol=1e-5)


@pytest.mark.parametrize("count", [8.0, 4000.0])
def test_a_skewed_likelihood_is_integrated_closely(count: float) -> None:
    """A noise level: y_i of deviation exp(z), of which the sum of squares says all; against the trapezoidal rule."""
    mean, deviation = t(0.0, 0.5)[:, None], t(1.0, 0.6)[:, None]
    squares = count * math.exp(2 * 0.8)

    def log_f(z: Tensor) -> Tensor:
        fit = -count * (z[..., 0] - 0.8) - 0.5 * squares * ((-2 * z[..., 0]).exp() - math.exp(-1.6))
        return Normal(mean[:, None], deviation[:, None]).log_prob(z).sum(-1) + fit

    log_z, centre, scale = integral(log_f, mean, deviation)
    grid = torch.linspace(-4, 6, 200001, dtype=D)
    log_w = log_f(grid[None, :, None].expand(2, -1, 1)) + math.log(10 / 200000)
    torch.testing.assert_close(log_z, log_w.logsumexp(1), atol=2e-3, rtol=0)
    first = log_w.softmax(1) @ grid
    second = (log_w.softmax(1) * (grid - first[:, None]) ** 2).sum(1)
    assert float(((centre[:, 0] - first) / second.sqrt()).abs().max()) < 0.02
    torch.testing.assert_close(scale[:, 0, 0].square(), second, atol=0, rtol=0.05)


# --- small problems, rows written out -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gain", "three taps", "astigmatic", "noise level"])
def test_posterior_and_evidence(name: str) -> None:
    case = problem(name, 8)
    found = run(case, Marginalised(case.model, nodes=3), 8)
    off, size = scores(found, case.exact)
    assert max(size.values()) < 0.2, size
    assert size["evidence"] < 0.01, size
    assert max(off.values()) < limit(case.exact), off


THREE = torch.cartesian_prod(*(torch.linspace(-5, 5, 31, dtype=D),) * 3)
NAMES = ("g", "side", "s")


def three_numbers() -> tuple[Family, sd.DiffusionPrior, NormalLaw]:
    """A gain, a blur's side lobe and the noise level at once."""

    def statements(x: Tensor, y: Tensor) -> None:
        g = pyro.sample("g", dist.LogNormal(t(0.0)[0], 0.3))
        side = pyro.sample("side", dist.Normal(t(0.2)[0], 0.1))
        s = pyro.sample("s", dist.LogNormal(t(-1.0)[0], 0.4))
        taps = torch.stack((side, 1 - 2 * side, side))
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(g * taps[None]), x, s), obs=y)

    g, side, s = (0.3 * THREE[:, 0]).exp(), 0.2 + 0.1 * THREE[:, 1], (-1.0 + 0.4 * THREE[:, 2]).exp()
    matrices = circulant(g[:, None] * torch.stack((side, 1 - 2 * side, side), 1), 6)
    family = Family((1, 1, 6), statements, matrices, s, dict(zip(NAMES, (g, side, s), strict=True)), THREE)
    place = torch.arange(6, dtype=D)
    mean, covariance = torch.full((6,), 0.5, dtype=D), torch.exp(-0.5 * (place[:, None] - place) ** 2)
    covariance = covariance + 0.1 * torch.eye(6, dtype=D)
    denoiser = sd.GaussianDenoiser(mean.reshape(1, 1, 6), covariance)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 6, grid=sd.KarrasGrid(), variance="full")
    return family, prior, chain_law(prior, mean, covariance)


Y_THREE = t(0.9, 1.4, 0.2, -0.3, 0.5, 1.1)


def three_program(family: Family, prior: sd.DiffusionPrior) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        family.statements(pyro.sample("x", prior), y)

    return model


def test_three_numbers_at_once() -> None:
    family, prior, law = three_numbers()
    case = Problem(three_program(family, prior), Y_THREE.reshape(family.shape), by_quadrature(family, law, Y_THREE))
    off, size = scores(run(case, Marginalised(case.model, nodes=3), 8), case.exact)
    assert max(size.values()) < 0.25, size
    assert max(off.values()) < limit(case.exact), off


def test_latents_that_are_held() -> None:
    """Two of the three stay where they are: the evidence is that given their values."""
    family, prior, law = three_numbers()
    model = three_program(family, prior)
    node = int((THREE - t(0.0, 1.0, -1.0)).square().sum(1).argmin())
    line = (THREE[:, 1:] - THREE[node, 1:]).abs().amax(1) == 0
    parts = {name: family.latents[name][line] for name in NAMES}
    along = Family(family.shape, family.statements, family.matrices[line], family.sigma[line], parts, THREE[line, :1])
    exact = by_quadrature(along, law, Y_THREE)
    held = {"side": THREE[node, 1].expand(24), "s": THREE[node, 2].expand(24)}
    method = Marginalised(model)
    program = Program(method.model, (Y_THREE.reshape(family.shape),), held=held)
    result = ParticleFilter().run(TwistedModel(program, method), num_particles=12, num_chains=24, seed=1)
    ratio = (result.log_z - exact.log_z).exp()
    error = float(ratio.std()) / 24**0.5
    assert error < 0.02
    assert abs(float(ratio.mean()) - 1) < 7 * error  # P(|t_23| > 7) < 1e-6


# --- a picture, elementwise ---------------------------------------------------------------------------------------

SIDE, SIGMA, STEPS = 16, 0.1, 6
LOC, SPREAD = 0.1, 0.4


def spectrum(side: int = SIDE) -> Tensor:
    f = torch.fft.fftfreq(side, dtype=D) * side
    power = (1 + f[:, None] ** 2 + f**2) ** -1.5
    return (power / power.mean())[None]


def kernel(width: Tensor) -> Tensor:
    """(..., 7, 7) of sum 1."""
    tap = (-0.5 * (torch.arange(-3, 4, dtype=D) / width[..., None]) ** 2).exp()
    tap = tap / tap.sum(-1, keepdim=True)
    return tap[..., :, None] * tap[..., None, :]


def transfer(width: Tensor, side: int = SIDE) -> Tensor:
    """What the kernel makes of each Hartley coordinate, (..., 1, side, side), by cosine sums."""
    angle = 2 * math.pi * torch.arange(side, dtype=D)[:, None] * torch.arange(-3, 4, dtype=D) / side
    return torch.einsum("ia,jb,...ab->...ij", angle.cos(), angle.cos(), kernel(width))[..., None, :, :]


def field(num_steps: int, side: int = SIDE) -> sd.DiffusionPrior:
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, side, side, dtype=D), spectrum(side))
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps, grid=sd.KarrasGrid(), variance="full")


def field_program(prior: sd.DiffusionPrior, sigma: float) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        width = pyro.sample("width", dist.LogNormal(t(LOC)[0], SPREAD))
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel(width)), x, sigma), obs=y)

    return model


def field_problem(num_steps: int, sigma: float, side: int = SIDE) -> Problem:
    """With the variance of each coordinate under the chain by its recursion, and the width by the trapezoidal rule."""
    prior, power = field(num_steps, side), spectrum(side)
    chain = prior.chain
    variance = torch.full_like(power, chain.initial_scale**2)
    for k in range(chain.num_steps, 0, -1):
        to = chain.step(k)
        total = to.t.alpha**2 * power + to.t.sigma**2
        forward = to.b + to.c * to.t.alpha * power / total
        variance = forward**2 * variance + to.kappa**2 + to.c**2 * power * to.t.sigma**2 / total
    generator = torch.Generator().manual_seed(4)
    x = variance.sqrt() * torch.randn(variance.shape, generator=generator, dtype=D)
    seen = transfer(t(1.3)[0], side) * x + sigma * torch.randn(x.shape, generator=generator, dtype=D)
    z = torch.linspace(-4, 4, 4001, dtype=D)
    h = transfer((LOC + SPREAD * z).exp(), side)
    foretold = h**2 * variance + sigma**2
    fit = Normal(torch.zeros((), dtype=D), foretold.sqrt()).log_prob(seen).flatten(1).sum(1)
    log_w = (-0.5 * z**2).log_softmax(0) + fit
    w, width = log_w.softmax(0), (LOC + SPREAD * z).exp()
    gain = h * variance / foretold
    centres = hartley(gain * seen)
    mean = torch.einsum("n,n...->...", w, centres)
    # a pixel's own variance given the width is the mean over coordinates, as the field is stationary
    left = (variance * (1 - gain * h)).flatten(1).mean(1)
    deviation = (w @ left + torch.einsum("n,n...->...", w, (centres - mean) ** 2)).sqrt()
    at = w @ width
    means, deviations = {"x": mean.flatten(), "width": at[None]}, {"x": deviation.flatten()}
    deviations["width"] = (w @ (width - at) ** 2).sqrt()[None]
    exact = Exact(float(log_w.logsumexp(0)), means, deviations)
    return Problem(field_program(prior, sigma), hartley(seen), exact)


def test_a_field_under_a_blur_of_unknown_width() -> None:
    """256 pixels know the width far better than its prior; one pass through the denoiser a particle and step."""
    case = field_problem(STEPS, SIGMA)
    assert float(case.exact.deviation["width"]) < 0.15 * SPREAD * 1.3
    off, size = scores(run(case, Marginalised(case.model), 12), case.exact)
    assert max(size.values()) < 0.25, size
    assert size["evidence"] < 0.02, size
    assert max(off.values()) < limit(case.exact), off
    smc = sd.SMC(Marginalised(case.model), num_particles=12, seed=1, progress=False).run(case.y)
    assert smc.network_evaluations == (12 * STEPS, 0)
    assert float(smc.records.ess.min()) > 0.9 * 12  # all but the first law and the shape of the width's law is exact


def test_written_out_rows_say_the_same() -> None:
    """The same field of 8 x 8 with a covariance that is not known to be diagonal: another way to the same numbers."""
    case = field_problem(3, 0.3, 8)
    basis = hartley(torch.eye(64, dtype=D).reshape(64, 1, 8, 8)).flatten(1)
    dense = sd.GaussianDenoiser(torch.zeros(1, 8, 8, dtype=D), basis.mT @ (spectrum(8).reshape(64, 1) * basis))
    other = sd.DiffusionPrior(dense, sd.VPSchedule(), 3, grid=sd.KarrasGrid(), variance="full")
    found = []
    for model in (case.model, field_program(other, 0.3)):
        method = Marginalised(model)
        program = Program(method.model, (case.y,))
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=D)
        z = t(-0.5, 0.0, 0.3, 1.0)
        at = {"x": x, "width": z}
        prediction = Prediction(
            program, 2, at, {name: latent.chain.estimate(2, at[name]) for name, latent in program.latents.items()}
        )
        carried = method.proposal.carry(prediction)
        steps = {name: SiteStep.at(prediction, name) for name in program.latents}
        ahead = {"x": 0.8 * x, "width": 0.7 * z}
        ratio = method.proposal.transition(steps, {}, carried).log_ratio(ahead)
        found.append((method.twist.log_psi(prediction), carried["centre"], ratio))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


# --- the weights, whatever the nodes ------------------------------------------------------------------------------


CASES: dict[str, tuple[Callable[[], Problem], Any]] = {
    "written out": (lambda: problem("gain, much noise", 4), sd.IsotropicCovariance(0.5)),
    "elementwise": (lambda: field_problem(4, 1.0, 4), sd.SpectralCovariance(0.5 * spectrum(4) + 0.1, "fft")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_evidence_is_unbiased_with_a_wrong_covariance_and_few_nodes(name: str) -> None:
    """2000 chains of 2 particles: the mean of exp(log_z) is the evidence; failure probability 6e-7 for 5 errors."""
    make, covariance = CASES[name]
    case = make()
    method = Marginalised(case.model, covariance, nodes=2)
    smc = sd.SMC(method, num_particles=2, num_chains=2000, seed=5, progress=False).run(case.y)
    ratio = (smc.log_evidence_per_chain - case.exact.log_z).exp()
    error = float(ratio.std()) / 2000**0.5
    assert 0.002 < error < 0.05, error
    assert abs(float(ratio.mean()) - 1) < 5 * error, (float(ratio.mean()), error)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 3])
def test_q_is_the_density_of_what_is_drawn(name: str, k: int) -> None:
    """Under q, p / q has mean 1, and weighs draws to the mean of p; 5 standard errors fail with probability 6e-7."""
    make, covariance = CASES[name]
    case = make()
    method = Marginalised(case.model, covariance, nodes=2)
    program = Program(method.model, (case.y,))
    generator = torch.Generator().manual_seed(k)
    count, at = 20000, {}
    for site, latent in program.latents.items():
        at[site] = torch.randn(1, *latent.chain.shape, generator=generator, dtype=D)
    said = {site: latent.chain.estimate(k, at[site]) for site, latent in program.latents.items()}
    carried = method.proposal.carry(Prediction(program, k, at, said))

    def copies(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.expand(count, *part.shape[1:]) for name, part in parts.items()}

    at = copies(at)
    said = {site: latent.chain.estimate(k, at[site]) for site, latent in program.latents.items()}
    steps = {site: SiteStep.at(Prediction(program, k, at, said), site) for site in at}
    transition = method.proposal.transition(steps, {}, copies(carried))
    x = transition.sample(lambda shape: torch.randn(shape, generator=generator, dtype=D))
    w = transition.log_ratio(x).exp()
    rows = torch.cat(
        [w[:, None] - 1, *((w[:, None] * (x[site] - steps[site].p.mean).reshape(count, -1)) for site in x)], 1
    )
    assert float((rows.mean(0) / (rows.std(0) / count**0.5)).abs().max()) < 5
    assert float(rows.std(0)[0]) / count**0.5 < 0.05


@pytest.mark.parametrize("own", [True, False])
def test_nodes_once_the_latents_have_moved(own: bool) -> None:
    """They stand for z_0 given z_t, z_s and y, and sum a_j f(z_j) is the mean of f given z_t and z_s alone."""
    family, prior, _ = three_numbers()
    method = Marginalised(three_program(family, prior))
    program, k = Program(method.model, (Y_THREE.reshape(family.shape),)), 4
    generator = torch.Generator().manual_seed(8)
    at = {
        name: torch.randn(2, *latent.chain.shape, generator=generator, dtype=D)
        for name, latent in program.latents.items()
    }
    said = {name: latent.chain.estimate(k, at[name]) for name, latent in program.latents.items()}
    steps = {name: SiteStep.at(Prediction(program, k, at, said), name) for name in at}
    z = torch.stack([at[name] for name in NAMES], 1)
    level, to = steps["g"].coefficients.t, steps["g"].coefficients
    assert abs(to.c - 1) > 0.2
    law = (level.alpha * z, torch.eye(3, dtype=D).expand(2, 3, 3) * level.sigma**2)  # variance preserving
    root = torch.eye(3, dtype=D) + 0.5 * torch.randn(2, 3, 3, generator=generator, dtype=D)
    given = law if own else (z + 0.4, root @ root.mT)
    transition = _MarginalTransition(method.look(steps, {}), given[0], torch.linalg.cholesky(given[1]))
    z_s = torch.randn(2, 3, generator=generator, dtype=D)
    z_j, log_a = transition._nodes({name: z_s[:, i] for i, name in enumerate(NAMES)})

    def after(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        gain = to.c * covariance @ torch.linalg.inv(to.c**2 * covariance + to.kappa**2 * torch.eye(3, dtype=D))
        missing = z_s - to.b * z - to.c * mean
        return mean + (gain @ missing[..., None])[..., 0], covariance - to.c * gain @ covariance

    foretold = MultivariateNormal(*(part[:, None] for part in after(*law)))
    seen = MultivariateNormal(*(part[:, None] for part in after(*given)))
    rule = (log_a - foretold.log_prob(z_j) + seen.log_prob(z_j)).exp()
    torch.testing.assert_close(rule.sum(1), torch.ones(2, dtype=D), atol=1e-9, rtol=0)
    mean = (rule[..., None] * z_j).sum(1)
    away = z_j - mean[:, None]
    torch.testing.assert_close(mean, after(*given)[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.einsum("mj,mja,mjb->mab", rule, away, away), after(*given)[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("written_out", [False, True])
def test_a_step_asks_the_host_for_nothing(written_out: bool) -> None:
    """Fake tensors hold no data and raise where a value is read."""
    side, padding = (4, sd.Zero()) if written_out else (SIDE, sd.Circular())
    prior, y = field(3, side), torch.zeros(1, side, side, dtype=D)

    def program(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        width = pyro.sample("width", dist.LogNormal(t(LOC)[0], SPREAD))
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel(width), padding), x, 0.3), obs=y)

    method = Marginalised(program)
    model = TwistedModel(Program(method.model, (y,)), method)
    particles = model.initial(2, 3, torch.Generator().manual_seed(0)).particles
    model.step(1, particles, torch.Generator().manual_seed(1))  # what is asked once is asked here
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in particles.items()}
        assert model.step(2, fake, torch.Generator()).log_g.shape == (2, 3)


# --- what it cannot take ------------------------------------------------------------------------------------------


def test_what_it_cannot_take_is_said() -> None:
    prior, y = field(3), torch.zeros(1, SIDE, SIDE, dtype=D)

    def refused(statements: Callable[[Tensor, Tensor], None], y: Tensor, message: str, prior: Any = prior) -> None:
        def model(y: Tensor) -> None:
            statements(pyro.sample("x", prior), y)

        with pytest.raises(TypeError, match=message):
            sd.SMC(Marginalised(model), num_particles=2, progress=False).run(y)

    def width() -> Tensor:
        return pyro.sample("width", dist.LogNormal(t(LOC)[0], SPREAD))

    def plain(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, 0.3), obs=y)

    def four(x: Tensor, y: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(4, dtype=D), 1.0).to_event(1))
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, shift.exp().sum()), obs=y)

    def no_basis(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel(width()), sd.Zero()), x, 0.3), obs=y)

    def bent(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", dist.Normal((2 * x).tanh(), width()).to_event(3), obs=y)

    def counts(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", dist.Poisson((width() * x).exp()).to_event(3), obs=y)

    def curved(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", dist.Normal(width() * x**2, 0.3).to_event(3), obs=y)

    refused(plain, y, "0 numbers in the latents.*Use sd.Adapted")
    refused(four, y, "4 numbers in the latents.*Use sd.Adapted")
    refused(no_basis, y, "256 measured values.*Use sd.Adapted")
    small, few = field(3, 4), torch.ones(1, 4, 4, dtype=D)
    refused(counts, few, "the law Poisson. Use sd.Adapted", small)
    refused(bent, few, "linear in the picture.*Use sd.Adapted", small)
    refused(curved, few, "linear in the picture.*Use sd.Adapted", small)
    with pytest.raises(ValueError, match="got nodes 1"):
        Marginalised(plain, nodes=1)
