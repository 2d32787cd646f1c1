"""Point-spread functions against their moments, transfer functions and symmetries; their priors against quantiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.guidance.program import Program
from smcdiff.measurement.psf import (
    NOLL,
    astigmatic_psf,
    defocus_psf,
    gaussian_psf,
    motion_psf,
    stigmator_psf,
    zernike_psf,
)
from smcdiff.measurement.psf_priors import (
    AstigmaticPSF,
    DefocusPSF,
    GaussianPSF,
    KernelPrior,
    MotionPSF,
    SimplexKernel,
    ZernikePSF,
)
from tests.guidance.exact import chain_law

D = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def moments(k: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the position (right, up) under the kernel."""
    size = k.shape[-1]
    steps = torch.arange(size, dtype=k.dtype) - size // 2
    x = torch.stack(torch.broadcast_tensors(steps[None], -steps[:, None]), -1)
    mean = torch.einsum("...rc,rcd->...d", k, x)
    return mean, torch.einsum("...rc,rcd,rce->...de", k, x, x) - mean[..., None] * mean[..., None, :]


def rotated(along: float, across: float, angle: float) -> Tensor:
    """R diag(along, across) R^T in the axes to the right and up."""
    c, s = math.cos(angle), math.sin(angle)
    r = t(c, -s, s, c).reshape(2, 2)
    return r @ torch.diag(t(along, across)) @ r.mT


FAMILIES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "gaussian": (lambda sigma: gaussian_psf(sigma, 7), (t(0.6, 1.3),)),
    "astigmatic": (lambda a, b, angle: astigmatic_psf(a, b, angle, 7), (t(0.6, 2.0), t(1.4, 0.9), t(0.4, -2.0))),
    "stigmator": (lambda s, ab: stigmator_psf(s, ab, 7), (t(0.8, 1.5), t(0.5, -0.3, 0.0, 0.0).reshape(2, 2))),
    "defocus": (lambda radius: defocus_psf(radius, 7), (t(1.1, 2.4),)),
    "motion": (lambda length, angle: motion_psf(length, angle, 7), (t(0.3, 4.0), t(0.9, 2.9))),
    "zernike": (lambda c: zernike_psf(c, 7, 0.4), (torch.linspace(-1.5, 1.2, 12, dtype=D).reshape(2, 6),)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_unit_sum_gradients_and_batch(name: str) -> None:
    make, parameters = FAMILIES[name]
    k = make(*parameters)
    assert k.shape == (2, 7, 7)
    assert bool((k >= 0).all())
    torch.testing.assert_close(k.sum((-2, -1)), torch.ones(2, dtype=D), rtol=1e-14, atol=0)
    for i in range(2):
        torch.testing.assert_close(make(*(p[i] for p in parameters)), k[i], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.func.vmap(make)(*parameters), k, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(make(*(p.float() for p in parameters)), k.float(), rtol=1e-4, atol=1e-6)
    assert torch.autograd.gradcheck(make, tuple(p.clone().requires_grad_() for p in parameters))


def test_a_gaussian_has_its_variance() -> None:
    """Above sigma = 1.2 the lattice adds less than 1e-10; below, by Poisson's sum over the dual lattice, as much as
    d log theta / d log sigma says for theta(sigma) = sum_m exp(-2 pi^2 sigma^2 m^2)."""
    m = np.arange(-40, 41)
    for sigma in (0.4, 0.64, 1.2, 2.5):
        dual = np.exp(-2 * (np.pi * sigma * m) ** 2)
        expected = sigma**2 + sigma**2 * (-4 * (np.pi * sigma * m) ** 2 * dual).sum() / dual.sum()
        mean, covariance = moments(gaussian_psf(t(sigma)[0], 41))
        torch.testing.assert_close(covariance, expected * torch.eye(2, dtype=D), rtol=1e-10, atol=1e-12)
        assert float(mean.abs().max()) < 1e-14
        first = 8 * math.pi**2 * sigma**4 * math.exp(-2 * (math.pi * sigma) ** 2)  # the term that the module states
        assert abs(float(covariance[0, 0]) - sigma**2 + first) < 0.3 * first + 1e-12
    assert 0.009 < 8 * math.pi**2 * 0.64**2 * math.exp(-2 * (math.pi * 0.64) ** 2) < 0.011


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0, -0.9])
def test_an_astigmatic_gaussian_has_its_covariance(angle: float) -> None:
    expected = rotated(9.0, 2.25, angle)
    mean, covariance = moments(astigmatic_psf(3.0, 1.5, t(angle)[0], 61))
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-9)
    assert float(mean.abs().max()) < 1e-12
    swapped = astigmatic_psf(1.5, 3.0, t(angle + math.pi / 2)[0], 61)
    torch.testing.assert_close(moments(swapped)[1], expected, rtol=1e-9, atol=1e-9)
    # the same by a stigmator: sigma_1 / sigma_2 = exp(r), the angle doubled
    r, sigma = math.log(2.0), math.sqrt(4.5)
    knobs = r * t(math.cos(2 * angle), math.sin(2 * angle))
    torch.testing.assert_close(stigmator_psf(sigma, knobs, 61), astigmatic_psf(3.0, 1.5, t(angle)[0], 61))


def test_angles_turn_counter_clockwise_as_shown() -> None:
    """At 45 degrees the mass is at the upper right and the lower left."""
    for k in (astigmatic_psf(t(2.0)[0], 0.7, math.pi / 4, 9), motion_psf(t(6.0)[0], math.pi / 4, 9)):
        assert float(k[2, 6]) > 100 * float(k[2, 2])
        torch.testing.assert_close(k[2, 6], k[6, 2])


def test_a_stigmator_is_smooth_at_zero_and_has_its_matrix_exponential() -> None:
    a, b, sigma = 0.7, -0.4, 1.8
    matrix = sigma**2 * torch.linalg.matrix_exp(t(a, b, b, -a).reshape(2, 2))
    torch.testing.assert_close(moments(stigmator_psf(sigma, t(a, b), 61))[1], matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stigmator_psf(sigma, t(0, 0), 9), gaussian_psf(t(sigma)[0], 9))
    for scale in (0.99e-3, 1.01e-3):  # either side of where the series takes over
        knobs = scale * t(0.6, 0.8)
        widths = sigma * math.exp(scale / 2), sigma * math.exp(-scale / 2)
        expected = astigmatic_psf(t(widths[0])[0], widths[1], math.atan2(0.8, 0.6) / 2, 9)
        torch.testing.assert_close(stigmator_psf(sigma, knobs, 9), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("radius", [4.0, 7.3])
def test_a_disc_has_its_area_and_moment(radius: float) -> None:
    """With an edge of one pixel the lattice adds of the order exp(-2 pi^2) = 3e-9 of the whole."""
    k = defocus_psf(t(radius)[0], 41, edge=1.0)
    area = math.pi * (radius**2 + 1)
    torch.testing.assert_close(
        1 / k[20, 20], torch.tensor(area / scipy.stats.norm.cdf(radius), dtype=D), rtol=2e-5, atol=0
    )
    variance = (radius**4 + 6 * radius**2 + 3) / (4 * (radius**2 + 1))
    torch.testing.assert_close(moments(k)[1], variance * torch.eye(2, dtype=D), rtol=2e-5, atol=1e-8)
    sharp = moments(defocus_psf(t(radius)[0], 41))[1]  # with the default edge: its moment to a percent
    expected = (radius**4 + 1.5 * radius**2 + 3 / 16) / (4 * (radius**2 + 0.25))
    torch.testing.assert_close(sharp, expected * torch.eye(2, dtype=D), rtol=0.01, atol=1e-8)


@pytest.mark.parametrize(("length", "angle"), [(9.0, 0.0), (12.0, 0.7), (5.0, 2.4), (0.0, 1.0)])
def test_a_line_has_its_moments(length: float, angle: float) -> None:
    k = motion_psf(t(length)[0], angle, 41, edge=1.0)
    mean, covariance = moments(k)
    torch.testing.assert_close(covariance, rotated(length**2 / 12 + 1, 1.0, angle), rtol=2e-5, atol=1e-5)
    assert float(mean.abs().max()) < 1e-12
    if length == 0:
        torch.testing.assert_close(k, gaussian_psf(t(1.0)[0], 41), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [7, 8])
def test_symmetries(size: int) -> None:
    """About the centre, which has a partner for every pixel within an odd window; and of the axes' exchange."""
    odd = slice(size % 2 == 0, None)
    for k in (
        gaussian_psf(t(1.1)[0], size),
        defocus_psf(t(2.0)[0], size),
        zernike_psf(t(0.8, 0, 0, 0, 0, -0.3), size),
    ):
        k = k[odd, odd]
        for other in (k.mT, k.flip(-1), k.flip(-2)):
            torch.testing.assert_close(other, k, rtol=1e-10, atol=1e-14)
    for k in (astigmatic_psf(t(1.1)[0], 0.6, 0.4, size), motion_psf(t(3.0)[0], 0.4, size)):
        k = k[odd, odd]
        torch.testing.assert_close(k.flip((-2, -1)), k, rtol=1e-10, atol=1e-14)
        assert float((k.flip(-1) - k).abs().max()) > 0.01


@pytest.mark.parametrize("cutoff", [0.5, 0.31])
def test_a_flat_pupil_gives_airys_pattern(cutoff: float) -> None:
    size = 33
    k = zernike_psf(torch.zeros(6, dtype=D), size, cutoff)
    steps = np.arange(size) - size // 2
    v = np.pi * cutoff * np.hypot(steps[:, None], steps)
    airy = (2 * scipy.special.j1(v) / np.where(v == 0, 1, v)) ** 2
    airy[size // 2, size // 2] = 1
    torch.testing.assert_close(k, torch.from_numpy(airy / airy.sum()), rtol=1e-9, atol=1e-13)


def test_its_transfer_function_is_the_autocorrelation_of_a_disc() -> None:
    """Up to the 4 / (pi^2 cutoff size) of the pattern that lies outside the window, and not less than half of that."""
    size, cutoff = 45, 0.4
    k = zernike_psf(torch.zeros(6, dtype=D), size, cutoff)
    frequency = torch.fft.fftfreq(size, dtype=D)
    nu = (torch.hypot(frequency[:, None], frequency) / cutoff).clamp(max=1)
    exact = 2 / math.pi * (torch.arccos(nu) - nu * (1 - nu**2).sqrt())
    found = torch.fft.fft2(k.roll((-(size // 2),) * 2, (-2, -1)))
    lost = 4 / (math.pi**2 * cutoff * size)
    assert 0.3 * lost < float((found.real - exact).abs().max()) < 1.5 * lost
    assert float(found.imag.abs().max()) < 1e-12


def written_out(x: float, y: float, c: list[float], cutoff: float) -> float:
    """|integral over the pupil|^2 at one pixel, by adaptive quadrature, of Noll's polynomials in Cartesian form."""

    def phase(u: float, v: float) -> float:
        r2 = u * u + v * v
        polynomials = (
            math.sqrt(3) * (2 * r2 - 1),
            2 * math.sqrt(6) * u * v,
            math.sqrt(6) * (u * u - v * v),
            math.sqrt(8) * v * (3 * r2 - 2),
            math.sqrt(8) * u * (3 * r2 - 2),
            math.sqrt(5) * (6 * r2 * r2 - 6 * r2 + 1),
        )
        return sum(a * z for a, z in zip(c, polynomials, strict=True)) + math.pi * cutoff * (u * x + v * y)

    def part(of: Callable[[float], float]) -> float:
        found, _ = scipy.integrate.dblquad(
            lambda theta, rho: rho * of(phase(rho * math.cos(theta), rho * math.sin(theta))),
            0, 1, 0, 2 * math.pi, epsabs=1e-7,
        )  # fmt: skip
        return float(found)

    return part(math.cos) ** 2 + part(math.sin) ** 2


def test_aberrations_against_a_written_out_integral() -> None:
    c, cutoff, size = [0.7, -0.4, 0.5, 0.6, -0.3, 0.4], 0.45, 9
    k = zernike_psf(torch.tensor(c, dtype=D), size, cutoff)
    centre = written_out(0, 0, c, cutoff)
    for right, up in ((2, 1), (-1, 3)):
        expected = written_out(right, up, c, cutoff) / centre
        assert abs(float(k[4 - up, 4 + right] / k[4, 4]) / expected - 1) < 1e-5
    strong = t(1, -1, 0.7, 1, -0.8, 0.9)
    finer = zernike_psf(strong, 5 * size, cutoff)[18:27, 18:27]  # a larger window has more nodes
    torch.testing.assert_close(zernike_psf(strong, size, cutoff), finer / finer.sum(), rtol=0, atol=1e-7)


def test_the_even_aberrations_change_sign_unseen() -> None:
    c = t(0.7, -0.4, 0.5, 0.6, -0.3, 0.4)
    even, coma = t(1, 1, 1, 0, 0, 1) * c, t(0, 0, 0, 1, 1, 0) * c
    k = zernike_psf(even + coma, 9)
    torch.testing.assert_close(zernike_psf(coma - even, 9), k, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(zernike_psf(even - coma, 9).flip((-2, -1)), k, rtol=1e-9, atol=1e-10)
    assert float((zernike_psf(even - coma, 9) - k).abs().max()) > 0.01


# priors

SIDE = 4
FIELD = torch.eye(SIDE**2, dtype=D) + 0.5
PRIOR = sd.DiffusionPrior(
    sd.GaussianDenoiser(torch.zeros(1, SIDE, SIDE, dtype=D), FIELD), sd.VPSchedule(), 12, grid=sd.KarrasGrid(),
    variance="full",
)  # fmt: skip
PRIORS: dict[str, KernelPrior] = {
    "gaussian": GaussianPSF(3),
    "astigmatic": AstigmaticPSF(3),
    "defocus": DefocusPSF(5, median=1.2),
    "motion": MotionPSF(5, scale=1.5),
    "zernike": ZernikePSF(3),
    "simplex": SimplexKernel(gaussian_psf(0.8, 3)),
}


def model_of(prior: KernelPrior) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        kernel = prior.sample("psf", like=x)
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel), x, 1.0), obs=y)

    return model


def kernel_at(prior: KernelPrior, **z: Tensor) -> dict[str, Tensor]:
    """The program's latents and kernels at states z of shape (m, *event) of the prior's noise."""
    program = Program(model_of(prior), (torch.zeros(1, SIDE, SIDE, dtype=D),))
    m = len(next(iter(z.values())))
    return program.values({"x": torch.zeros(m, 1, SIDE, SIDE, dtype=D), **z})


Z = t(-3.0, -0.5, 0.0, 2.0)
U = scipy.stats.norm.cdf(Z.numpy())


def test_widths_have_their_quantiles() -> None:
    for prior, site, make in (
        (GaussianPSF(5, 1.4, 0.2), "psf_sigma", gaussian_psf),
        (DefocusPSF(5, 1.4, 0.2), "psf_radius", defocus_psf),
    ):
        found = kernel_at(prior, **{site: Z})
        quantiles = torch.from_numpy(scipy.stats.lognorm.ppf(U, 0.2, scale=1.4))
        torch.testing.assert_close(found[site], quantiles, rtol=1e-9, atol=0)
        torch.testing.assert_close(found["psf"], make(quantiles, 5), rtol=1e-8, atol=1e-12)


def test_astigmatism_and_motion_have_uniform_directions_and_rayleigh_sizes() -> None:
    """z in polar coordinates: its direction is twice the line's angle, its length a quantile of the Rayleigh law."""
    share, angle = 0.8, 0.35
    rayleigh = scipy.stats.rayleigh.ppf(share)
    z = rayleigh * t(math.cos(2 * angle), math.sin(2 * angle))[None]
    found = kernel_at(AstigmaticPSF(7, 1.3, 0.2, 0.4), psf_sigma=t(0.0), psf_stigmator=z)["psf"][0]
    ratio = math.exp(scipy.stats.rayleigh.ppf(share, scale=0.4))
    expected = astigmatic_psf(t(1.3 * ratio**0.5)[0], 1.3 * ratio**-0.5, angle, 7)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    found = kernel_at(MotionPSF(7, 2.0), psf_motion=z)["psf"][0]
    expected = motion_psf(t(scipy.stats.rayleigh.ppf(share, scale=2.0))[0], angle, 7)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_motion_has_a_gradient_everywhere() -> None:
    def second(w: Tensor) -> Tensor:
        with pyro.poutine.trace(), pyro.poutine.condition(data={"psf_motion": w}):
            k = MotionPSF(9, 1.0).sample(like=w)
        return (k * torch.arange(9, dtype=D) ** 2).sum()

    for w in (t(0.0, 0.0), t(-2.0, 0.0), t(-2.0, -1e-9)):
        w = w.requires_grad_()
        (gradient,) = torch.autograd.grad(second(w), w)
        assert bool(torch.isfinite(gradient).all())
    # over the cut of atan2 the kernel goes on
    torch.testing.assert_close(second(t(-2.0, -1e-9)), second(t(-2.0, 1e-9)), rtol=1e-7, atol=0)


def test_zernike_coefficients_are_normal() -> None:
    scales = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    z = torch.linspace(-2, 2, 6, dtype=D)[None]
    found = kernel_at(ZernikePSF(5, 0.4, scales, (1.0,) * 6), psf_zernike=z)
    coefficients = 1 + z * torch.tensor(scales, dtype=D)
    torch.testing.assert_close(found["psf_zernike"], coefficients)
    torch.testing.assert_close(found["psf"], zernike_psf(coefficients, 5, 0.4))


def test_the_simplex_kernel_is_logistic_normal() -> None:
    """log k_i - log k_j is affine in z, its offset and variance as stated; the kernel is on the simplex."""
    centre = gaussian_psf(t(0.8)[0], 3)
    prior = SimplexKernel(centre, spread=0.7, correlation=1.2)
    z = torch.cat([torch.zeros(1, 9, dtype=D), torch.eye(9, dtype=D)])
    k = kernel_at(prior, psf_logits=z)["psf"]
    assert bool((k > 0).all())
    torch.testing.assert_close(k.sum((-2, -1)), torch.ones(10, dtype=D))
    torch.testing.assert_close(k[0], centre, rtol=1e-12, atol=0)
    log_k = k.log().flatten(1)
    rows = log_k[1:] - log_k[0]  # of the noise's unit vectors, up to a constant each
    i, j = 0, 5  # at (0, 0) and (1, 2)
    variance = ((rows[:, i] - rows[:, j]) ** 2).sum()
    expected = 2 * 0.7**2 * (1 - math.exp(-5 / (2 * 1.2**2)))
    torch.testing.assert_close(variance, torch.tensor(expected, dtype=D), rtol=1e-5, atol=0)
    raised = kernel_at(SimplexKernel(torch.diag(t(1.0, 0.0)), floor=0.1), psf_logits=torch.zeros(1, 4, dtype=D))
    torch.testing.assert_close(raised["psf"][0], t(1.0, 0.1, 0.1, 0.1).reshape(2, 2) / 1.3)


@pytest.mark.parametrize("name", PRIORS)
def test_a_program_runs_and_has_its_evidence(name: str) -> None:
    """Against plain Monte Carlo over the kernel's prior of the closed-form evidence given the kernel; TDS does not know
    the kernel beforehand. With 6 standard errors of both the probability of a false alarm is below 1e-6 by a t-law of
    15 degrees of freedom, and the seeds are fixed."""
    prior, side = PRIORS[name], SIDE**2
    generator = torch.Generator().manual_seed(5)
    y = torch.randn(1, SIDE, SIDE, generator=generator, dtype=D)
    model = model_of(prior)
    smc = sd.SMC(sd.TDS(model, sd.WidenedTwist()), num_particles=150, num_chains=16, seed=3, progress=False).run(y)
    kernels = smc.posterior.values["psf"]
    torch.testing.assert_close(kernels.sum((-2, -1)), torch.ones(16, 150, dtype=D))

    program = Program(model, (y,))
    states = {
        latent: torch.randn(4000, *known.chain.shape, generator=generator, dtype=D)
        for latent, known in program.latents.items()
        if latent != "x"
    }
    drawn = program.values({"x": torch.zeros(4000, 1, SIDE, SIDE, dtype=D), **states})["psf"]
    units = torch.eye(side, dtype=D).reshape(side, 1, SIDE, SIDE)
    matrices = torch.stack([sd.Blur(k)(units).reshape(side, side).mT for k in drawn])
    variance = chain_law(PRIOR, torch.zeros(side, dtype=D), FIELD).covariance
    spread = matrices @ variance @ matrices.mT + torch.eye(side, dtype=D)
    given = dist.MultivariateNormal(torch.zeros(side, dtype=D), spread).log_prob(y.flatten()).exp()
    exact, doubt = float(given.mean()), float(given.std()) / 4000**0.5
    ratio = smc.log_evidence_per_chain.exp()
    error = math.hypot(float(ratio.std()) / 4, doubt)
    assert error < 0.1 * exact
    assert abs(float(ratio.mean()) - exact) < 6 * error


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_draws_as_pyro_does(name: str) -> None:
    prior, like = PRIORS[name], torch.zeros(1)
    with pyro.poutine.trace() as trace:
        pyro.set_rng_seed(0)
        k = prior.sample("kernel", like=like)
    assert k.dtype == torch.float32
    torch.testing.assert_close(k.sum(), torch.tensor(1.0))
    sites = [site for site, node in trace.trace.nodes.items() if node["type"] == "sample"]
    assert all(site == "kernel" or site.startswith("kernel_") for site in sites)
    with pyro.poutine.replay(trace=trace.trace):
        torch.testing.assert_close(prior.sample("kernel"), k)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "size": (lambda: gaussian_psf(1.0, 0), "size of 0"),
    "size not whole": (lambda: gaussian_psf(1.0, 3.0), "size of 3.0"),  # type: ignore[arg-type]
    "sigma": (lambda: gaussian_psf(t(1.0, -0.5), 3), "sigma of -0.5"),
    "nan": (lambda: gaussian_psf(t(math.nan), 3), "NaN"),
    "integers": (lambda: gaussian_psf(torch.tensor([1]), 3), "dtype torch.int64"),
    "sigma_2": (lambda: astigmatic_psf(1.0, 0.0, 0.0, 3), "sigma_2 of 0.0"),
    "stigmator": (lambda: stigmator_psf(1.0, t(1.0, 2.0, 3.0), 3), r"stigmator of shape \(3,\)"),
    "stigmator's sigma": (lambda: stigmator_psf(-1.0, t(1.0, 2.0), 3), "sigma of -1.0"),
    "radius": (lambda: defocus_psf(-1.0, 3), "radius of -1.0"),
    "edge": (lambda: defocus_psf(1.0, 3, 0.0), "edge of 0.0"),
    "length": (lambda: motion_psf(-1.0, 0.0, 3), "length of -1.0"),
    "pen": (lambda: motion_psf(1.0, 0.0, 3, -1.0), "edge of -1.0"),
    "coefficients": (lambda: zernike_psf(t(1.0, 2.0), 3), rf"shape \(2,\); expected \(\*batch, {len(NOLL)}\)"),
    "cutoff": (lambda: zernike_psf(torch.zeros(6), 3, 0.6), "cutoff of 0.6"),
    "median": (lambda: GaussianPSF(3, median=0.0), "median 0.0 in GaussianPSF"),
    "spread": (lambda: DefocusPSF(3, spread=-1.0), "spread -1.0 in DefocusPSF"),
    "astigmatism": (lambda: AstigmaticPSF(3, astigmatism=0.0), "astigmatism 0.0"),
    "scale": (lambda: MotionPSF(3, scale=math.inf), "scale inf"),
    "prior's size": (lambda: MotionPSF(0), "size of 0"),
    "scales": (lambda: ZernikePSF(3, scales=(1.0,)), "expected 6 numbers"),
    "means": (lambda: ZernikePSF(3, means=(math.nan,) * 6), "expected 6 finite numbers"),
    "prior's cutoff": (lambda: ZernikePSF(3, cutoff=0.0), "cutoff of 0.0"),
    "centre": (lambda: SimplexKernel(torch.ones(2, 3)), r"centre of shape \(2, 3\)"),
    "negative centre": (lambda: SimplexKernel(-torch.ones(2, 2)), "negative"),
    "correlation": (lambda: SimplexKernel(torch.ones(2, 2), correlation=0.0), "correlation 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_priors_are_values() -> None:
    assert GaussianPSF(3) == GaussianPSF(3, 1.0, 0.3)
    assert dataclasses.replace(GaussianPSF(3), spread=0.1).spread == 0.1
