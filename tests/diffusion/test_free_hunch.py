"""A covariance that particles correct on their way, against Gaussian priors, where what they learn is exact."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from smcdiff.diffusion.covariance import Corrected
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.free_hunch import FreeHunchCovariance
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.smc.conditional import ConditionalSMC, Past
from smcdiff.transforms import DCT

F64 = torch.float64
EVENT = (1, 2, 2)
EYE = torch.eye(4, dtype=F64)
M = 5
#: A field that is no diagonal matrix in the basis it is expected in.
FACTOR = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
PRIOR_COVARIANCE = FACTOR @ FACTOR.mT + 0.1 * torch.eye(4, dtype=F64)
MEAN = torch.tensor([0.5, -1.0, 0.3, 2.0], dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def levels(number: int) -> list[NoiseLevel]:
    schedule = sd.VESchedule(0.7, 20.0)
    return list(schedule.levels(number, sd.LogGrid())[1:])[::-1]


def walk(model: FreeHunchCovariance, covariance: Tensor, mean: Tensor, number: int) -> tuple[dict, NoiseLevel, Tensor]:
    """The parts of M particles that came down all levels, the last level, and C_t there (4, 4)."""
    denoiser = sd.GaussianMixtureDenoiser(mean[None], covariance[None], torch.ones(1, dtype=F64))
    x_0 = (mean + normal(M, 4) @ torch.linalg.cholesky(covariance).mT).reshape(M, *EVENT)
    parts: dict[str, Tensor] = {}
    path = levels(number)
    x_t, before = x_0 + path[0].sigma * normal(M, *EVENT, seed=1), path[0]
    for i, level in enumerate(path):
        if i:  # x_s given x_t and x_0
            share = level.sigma**2 / before.sigma**2
            spread = level.sigma * math.sqrt(1 - share)
            x_t = share * x_t + (1 - share) * x_0 + spread * normal(M, *EVENT, seed=2 + i)
        x0_hat = denoiser(x_t.flatten(1), level).mean.reshape(M, *EVENT)
        parts = model.parts(denoiser, x_t, level, Estimate(x0_hat, parts=parts))
        before = level
    eye = torch.eye(4, dtype=F64)
    return parts, before, torch.linalg.inv(torch.linalg.inv(covariance) + eye / before.sigma**2)


def matrix(covariance: Corrected) -> Tensor:
    eye = torch.eye(4, dtype=F64).reshape(4, *EVENT)
    return torch.stack([covariance.apply(e.expand(M, *EVENT)).flatten(1) for e in eye], -1)


def test_it_has_the_latest_secant() -> None:
    model = FreeHunchCovariance(sd.SpectralCovariance(torch.full(EVENT, 2.0)), 3, highest=math.inf, trust=1e6)
    parts, level, _ = walk(model, PRIOR_COVARIANCE, MEAN, 9)
    covariance = model.at(level, parts, parts["theta"])
    assert isinstance(covariance, Corrected)
    assert float(parts["steps"].flatten(2).norm(dim=2).min()) > 0
    step, answer = (DCT.from_spectral(parts[name][:, -1]) for name in ("steps", "answers"))
    torch.testing.assert_close(covariance.apply(step), answer, rtol=1e-7, atol=1e-9)
    assert float(torch.linalg.eigvalsh(matrix(covariance)).min()) > 0


def test_a_secant_stays_true_at_the_next_level() -> None:
    """C_s (s + a y) = y where C_s^-1 = C_t^-1 + a I: what an exact secant becomes is exact."""
    denoiser = sd.GaussianMixtureDenoiser(MEAN[None], PRIOR_COVARIANCE[None], torch.ones(1, dtype=F64))
    top, below = levels(6)[-2:]
    inverse, eye = torch.linalg.inv(PRIOR_COVARIANCE), torch.eye(4, dtype=F64)
    c_t, c_s = (torch.linalg.inv(inverse + eye / level.sigma**2) for level in (top, below))
    rotated = DCT.to_spectral(eye.reshape(4, *EVENT)).flatten(1).mT  # columns of the basis
    step = normal(M, *EVENT, seed=4)
    answer = (step.flatten(1) @ rotated @ c_t @ rotated.mT).reshape(step.shape)
    zeros = torch.zeros(M, *EVENT, dtype=F64)
    before = {"theta": zeros, "mean": zeros, "snr": torch.full((M,), top.ratio**-2, dtype=F64)}
    before |= {"steps": step[:, None], "answers": answer[:, None]}
    model = FreeHunchCovariance(sd.SpectralCovariance(torch.full(EVENT, 2.0)), 1, highest=1e-9)  # learns no more
    parts = model.parts(denoiser, zeros, below, Estimate(zeros, parts=before))
    known = parts["steps"][:, 0].flatten(1) @ rotated @ c_s @ rotated.mT
    torch.testing.assert_close(known, parts["answers"][:, 0].flatten(1))


def test_it_leaves_an_exact_covariance_alone() -> None:
    spectrum = torch.tensor([[[4.0, 1.0], [0.5, 0.1]]], dtype=F64)
    basis = DCT.from_spectral(torch.eye(4, dtype=F64).reshape(4, *EVENT)).flatten(1).mT
    covariance = basis @ spectrum.flatten().diag() @ basis.mT
    model = FreeHunchCovariance(sd.SpectralCovariance(spectrum), highest=math.inf)
    parts, level, exact = walk(model, covariance, MEAN, 12)
    found = model.at(level, parts, parts["theta"])
    assert isinstance(found, Corrected)
    torch.testing.assert_close(matrix(found), exact.expand(M, 4, 4), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("far", [1.0, 30.0])
def test_it_comes_nearer_to_a_covariance_that_the_base_has_not(far: float) -> None:
    """Kullback-Leibler divergence of N(0, C) from N(0, C_t), over that of the base, with all secants kept."""
    base = sd.SpectralCovariance(torch.full(EVENT, float(PRIOR_COVARIANCE.trace()) / 4))
    model = FreeHunchCovariance(base, 40, highest=math.inf, trust=1e6)

    def divergence(found: Tensor, exact: Tensor) -> Tensor:
        ratio = torch.linalg.solve(exact, found)
        return 0.5 * (ratio.diagonal(dim1=-2, dim2=-1).sum(-1) - 4 - torch.linalg.slogdet(ratio)[1])

    errors = {}
    for number in (10, 40):
        parts, level, exact = walk(model, PRIOR_COVARIANCE, far * MEAN, number)
        found = model.at(level, parts, parts["theta"])
        assert isinstance(found, Corrected)
        alone = matrix(Corrected(found.variance, 0 * found.factors, 0 * found.core, found.basis))
        errors[number] = float(divergence(matrix(found), exact).mean() / divergence(alone, exact).mean())
    assert errors[10] < 0.5
    assert errors[40] < 0.01


def test_a_run_is_unbiased_and_its_weights_spread_less() -> None:
    """1500 chains of 3 particles, resampled; the mean of Z over the exact one, within six standard errors."""
    spectrum = torch.tensor([[[4.0, 1.0], [0.5, 0.1]]], dtype=F64)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), spectrum, DCT)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(1e-4, 0.02 + 6e-3, 1300), num_steps=12, grid=sd.KarrasGrid())
    y = torch.tensor([[[1.0, -0.5], [0.2, 2.0]]], dtype=F64)

    def model(y: Tensor | None = None) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 0.5), obs=y)

    c = DCT.to_spectral(y[None])[0]
    exact = torch.distributions.Normal(0.0, (spectrum + 0.25).sqrt()).log_prob(c).sum()
    wrong = sd.SpectralCovariance(0.4 * spectrum, "dct")
    spread = {}
    for name, covariance in {"wrong": wrong, "learnt": FreeHunchCovariance(wrong, 12, highest=math.inf)}.items():
        filter = sd.ParticleFilter(ess_threshold=0.9)
        method = sd.Adapted(model, covariance, max_measurements=0)
        smc = sd.SMC(method, num_particles=3, num_chains=1500, seed=4, filter=filter, progress=False).run(y)
        ratio = (smc.log_evidence_per_chain - exact).exp()
        assert bool(smc.records.resampled.any())
        assert abs(float(ratio.mean()) - 1) < 6 * float(ratio.std()) / len(ratio) ** 0.5
        spread[name] = float(smc.log_evidence_per_chain.std())
    assert spread["learnt"] < 0.8 * spread["wrong"]


def test_particles_do_not_depend_on_each_other() -> None:
    spectrum = torch.tensor([[[4.0, 1.0], [0.5, 0.1]]], dtype=F64)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), spectrum, DCT)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=6, grid=sd.KarrasGrid())
    hunch = FreeHunchCovariance(sd.SpectralCovariance(2 * spectrum, "dct"), highest=math.inf)

    def model(y: Tensor | None = None) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 0.5), obs=y)

    y = normal(*EVENT)
    method = sd.Adapted(model, hunch)
    whole, parts = (
        sd.SMC(method, num_particles=6, num_chains=2, seed=4, max_batch=batch, progress=False).run(y)
        for batch in (12, 5)
    )
    torch.testing.assert_close(whole.posterior.values["x"], parts.posterior.values["x"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole.log_evidence_per_chain, parts.log_evidence_per_chain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("gain", "kept"), [(1.0, True), (9.0, False), (-1.0, False)])
def test_a_secant_that_it_cannot_trust_is_left_out(gain: float, kept: bool) -> None:
    """A network whose answer moves ``gain`` times as far as the covariance foretells, with trust 4."""
    spectrum = torch.tensor([[[4.0, 1.0], [0.5, 0.1]]], dtype=F64)
    model = FreeHunchCovariance(sd.SpectralCovariance(spectrum), 2, highest=math.inf)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), spectrum, DCT)
    top, below = levels(6)[-2:]
    x_t, x_s = top.sigma * normal(M, *EVENT), below.sigma * normal(M, *EVENT, seed=1)
    first, second = (denoiser(x, level).mean for x, level in ((x_t, top), (x_s, below)))
    before = model.parts(denoiser, x_t, top, Estimate(first))
    told = first + gain * (second - first)
    parts = model.parts(denoiser, x_s, below, Estimate(told, parts=before))
    assert bool((parts["steps"][:, -1].flatten(1).norm(dim=1) > 0).all()) is kept
    found = model.at(below, parts, x_s)
    assert isinstance(found, Corrected)
    if not kept:
        assert float(parts["answers"].abs().max()) == 0
    exact = 1 / (1 / spectrum + 1 / below.sigma**2)
    moved = normal(M, *EVENT, seed=3)
    torch.testing.assert_close(found.apply(moved), DCT.from_spectral(exact * DCT.to_spectral(moved)))


def test_single_precision() -> None:
    """Of float32 pictures: the matrix, its draws and its density as of the same numbers in float64."""
    model = FreeHunchCovariance(sd.SpectralCovariance(torch.full(EVENT, 2.0)), 4, highest=math.inf, trust=1e6)
    parts, level, _ = walk(model, PRIOR_COVARIANCE, MEAN, 12)
    single = {name: part if name == "snr" else part.float() for name, part in parts.items()}
    fine, coarse = (model.at(level, each, each["theta"]) for each in (parts, single))
    v = normal(M, *EVENT, seed=5)
    assert coarse.draw(v.float()).dtype == torch.float32
    torch.testing.assert_close(coarse.apply(v.float()).double(), fine.apply(v), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coarse.log_prob(v.float()), fine.log_prob(v), rtol=1e-4, atol=1e-3)


def test_with_marginalised_latents() -> None:
    """The gain of a measurement integrated out beside it: unbiased, 400 chains of 4, six standard errors."""
    spectrum = torch.tensor([[[4.0, 1.0], [0.5, 0.1]]], dtype=F64)
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), spectrum, DCT)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(1e-4, 0.026, 1300), num_steps=6, grid=sd.KarrasGrid())
    y = torch.tensor([1.0, -0.5], dtype=F64)

    def model(y: Tensor | None = None) -> None:
        gain = pyro.sample("gain", pyro.distributions.Normal(torch.tensor(1.0, dtype=F64), 0.3))
        x = pyro.sample("x", prior)
        pyro.sample("y", sd.GaussianMeasurement(sd.Matrix(gain * EYE[:2], EVENT), x, 0.5), obs=y)

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    basis = DCT.from_spectral(EYE.reshape(4, *EVENT)).flatten(1).mT
    seen = (basis @ spectrum.flatten().diag() @ basis.mT)[:2, :2]
    laws = [
        MultivariateNormal(torch.zeros(2, dtype=F64), (1 + 0.3 * z) ** 2 * seen + 0.25 * EYE[:2, :2]) for z in nodes
    ]
    z_exact = sum(w * float(law.log_prob(y).exp()) for w, law in zip(weights, laws, strict=True)) / math.sqrt(
        2 * math.pi
    )
    hunch = FreeHunchCovariance(sd.SpectralCovariance(0.6 * spectrum), highest=math.inf)
    smc = sd.SMC(sd.Marginalised(model, hunch), 4, 400, seed=2, progress=False).run(y)
    ratio = smc.log_evidence_per_chain.exp() / z_exact
    assert abs(float(ratio.mean()) - 1) < 6 * float(ratio.std()) / 20


def test_what_it_refuses() -> None:
    spectrum = torch.ones(EVENT, dtype=F64)
    hunch = FreeHunchCovariance(sd.SpectralCovariance(spectrum))
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(EVENT, dtype=F64), spectrum, DCT)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=3)
    with pytest.raises(ValueError, match="depends on the path of a particle"):
        prior.replace(covariance=hunch)
    for wrong in ({"secants": 0}, {"highest": 0.0}, {"trust": 1.0}, {"highest": math.nan}):
        with pytest.raises(ValueError, match="expected at least 1 secant"):
            FreeHunchCovariance(hunch.base, **wrong)  # type: ignore[arg-type]

    def model(y: Tensor | None = None) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 0.5), obs=y)

    y = normal(*EVENT)
    with pytest.raises(TypeError, match="one covariance for all particles"):
        sd.SMC(sd.Tilted(model, hunch), 2, progress=False).run(y)
    method = sd.Adapted(model, hunch)
    with pytest.raises(TypeError, match="cannot be given another past"):
        sd.ParticleGibbs(method, 2, 1, progress=False).run(y)
    traced = ConditionalSMC(past=Past.TRACED)
    draws = sd.ParticleGibbs(method, 2, 1, moves=traced, progress=False).run(y).get_samples()["x"]
    assert draws.shape == (1, *EVENT)
    twisted = TwistedModel(Program(method.model, (y,)), method)
    generator = torch.Generator().manual_seed(0)
    first = twisted.initial(1, 2, generator).particles
    with pytest.raises(TypeError, match="cannot be given another past"):
        twisted.log_transition(1, first, twisted.step(1, first, generator).particles)
