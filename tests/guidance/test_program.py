"""What is refused before any work is done, and prior predictive draws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from smcdiff.guidance.program import Program
from tests.guidance.exact import chain_law, check_evidence

F64 = torch.float64


def prior_of(steps: int = 20, **options) -> sd.DiffusionPrior:
    denoiser = sd.GaussianDenoiser(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), steps, **options)


def model(y=None, sigma=0.5, prior=None):
    x = pyro.sample("x", prior or prior_of())
    return pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), x, sigma), obs=y)


def run(program, *args, **kwargs):
    return sd.SMC(sd.TDS(program), num_particles=2, seed=0, progress=False).run(*args, **kwargs)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(3, dtype=F64), r"'y' of shape \(3,\).*shape \(2,\)"),
        (torch.tensor([0.0, torch.nan], dtype=F64), r"'y' with 1 of 2 values NaN or infinite"),
        (torch.tensor([torch.inf, 0.0], dtype=F64), r"'y' with 1 of 2 values NaN or infinite"),
    ],
)
def test_bad_measurements_are_refused(y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, y)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_noise_level_must_be_positive(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        run(model, torch.zeros(2, dtype=F64), sigma=sigma)


def test_a_program_must_observe_something() -> None:
    with pytest.raises(ValueError, match=r"observes nothing.*obs="):
        run(model)


def test_all_diffusion_priors_take_the_same_number_of_steps() -> None:
    def two(y=None):
        x = pyro.sample("x", prior_of(20))
        w = pyro.sample("w", prior_of(30))
        return pyro.sample("y", dist.Normal(x + w, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"different numbers of steps.*20.*30.*replace"):
        run(two, torch.zeros(2, dtype=F64))


def test_a_chain_without_density_is_refused() -> None:
    with pytest.raises(ValueError, match="eta = 0"):
        run(model, torch.zeros(2, dtype=F64), prior=prior_of(eta=0.0))


def test_a_subsampled_plate_is_refused() -> None:
    def subsampled(y=None):
        x = pyro.sample("x", prior_of())
        with pyro.plate("data", 2, subsample_size=1) as index:
            pyro.sample("y", dist.Normal(x[index], 1.0), obs=y[index])

    with pytest.raises(ValueError, match="subsampled plate 'data'"):
        run(subsampled, torch.zeros(2, dtype=F64))


def test_a_program_that_looks_at_values_is_named() -> None:
    def looks(y=None):
        x = pyro.sample("x", prior_of())
        scale = 1.0 if x[0] > 0 else 2.0
        return pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    with pytest.raises(RuntimeError, match=r"cannot be run on all particles at once.*`if` on a latent"):
        run(looks, torch.zeros(2, dtype=F64))


def test_results_need_a_run() -> None:
    with pytest.raises(RuntimeError, match="has not run"):
        sd.SMC(sd.TDS(model), num_particles=2).get_samples()


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_numbers_of_particles(count) -> None:
    with pytest.raises(ValueError, match="num_particles"):
        sd.SMC(sd.TDS(model), num_particles=count)


def test_masked_and_scaled_sites_count_as_pyro_counts_them() -> None:
    """A masked entry drops out of the evidence, a scale multiplies the log-likelihood: against the closed form."""
    y = torch.tensor([0.7, 50.0], dtype=F64)
    mask = torch.tensor([True, False])

    def masked(y=None):
        x = pyro.sample("x", prior_of(50, variance="optimal"))
        with pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    smc = sd.SMC(sd.TDS(masked, sd.TweedieTwist()), num_particles=400, num_chains=8, seed=0, progress=False).run(y)
    exact = float(dist.Normal(0.0, 1.25**0.5).log_prob(y[0]))
    assert abs(float(smc.log_evidence) - exact) < 0.02
    assert float(smc.posterior.log_likelihood["y"][..., 1].abs().max()) == 0.0


@pytest.mark.parametrize("rows", [2, 3])
def test_masks_and_scales_go_with_the_batch_and_not_with_the_event(rows: int) -> None:
    """Rows of two values each under a mask of rows and a scale of rows, against Pyro's own log-density."""
    y = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    mask = torch.arange(rows) != 1
    scale = torch.linspace(0.5, 2.0, rows, dtype=F64)

    def weighed(y=None):
        x = pyro.sample("x", prior_of())
        with pyro.plate("rows", rows), pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(x.expand(rows, 2), 0.5).to_event(1), obs=y)

    x = torch.tensor([0.3, -1.0], dtype=F64)
    expected = float((dist.Normal(x, 0.5).log_prob(y).sum(1) * scale * mask).sum())
    program = Program(weighed, (y,))
    assert float(program.log_prob({"x": x[None]})[0]) == pytest.approx(expected, rel=1e-12)
    _, _, precision = program.moments({"x": x[None]}, "the test")
    torch.testing.assert_close(precision.reshape(rows, 2), (4 * scale * mask)[:, None].expand(rows, 2))


def test_a_mask_of_parts_of_an_event_is_refused() -> None:
    def masked(y=None):
        x = pyro.sample("x", prior_of())
        with pyro.poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"mask of shape \(2,\).*batch shape is \(\).*sd.Select"):
        run(masked, torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("value", [-9.0, 9.5])
def test_a_measurement_that_its_law_cannot_give_is_refused(value: float) -> None:
    def counts(y=None):
        x = pyro.sample("x", prior_of())
        return pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'y' that its law .* cannot give"):
        run(counts, torch.tensor([1.0, value], dtype=F64))


def test_complex_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="complex measurement at 'y'"):
        run(model, torch.zeros(2, dtype=torch.complex128))


def test_a_program_without_latents_is_refused() -> None:
    def nothing(y=None):
        return pyro.sample("y", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="without latents"):
        run(nothing, torch.zeros(2, dtype=F64))


def test_a_scaled_latent_is_refused() -> None:
    def scaled(y=None):
        with pyro.poutine.scale(scale=3.0):
            x = pyro.sample("x", prior_of())
        return pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"latent 'x' under poutine.scale"):
        run(scaled, torch.zeros(2, dtype=F64))


def test_two_diffusion_sites_multiplied() -> None:
    """y = w x + noise with two independent one-dimensional priors, against a grid over both chains' exact laws."""
    priors = [
        sd.DiffusionPrior(
            sd.GaussianDenoiser(torch.tensor([mean], dtype=F64), torch.tensor([[0.4]], dtype=F64)),
            schedule,
            25,
            variance="optimal",
            grid=sd.KarrasGrid(),
        )
        for mean, schedule in ((1.0, sd.VPSchedule()), (-0.5, sd.VESchedule(0.01, 50.0)))
    ]
    y = torch.tensor([-1.2], dtype=F64)

    def product(y=None):
        x = pyro.sample("x", priors[0])
        w = pyro.sample("w", priors[1])
        return pyro.sample("y", dist.Normal(w * x, 0.6).to_event(1), obs=y)

    laws = [
        chain_law(p, torch.tensor([m], dtype=F64), torch.tensor([[0.4]], dtype=F64))
        for p, m in zip(priors, (1.0, -0.5), strict=True)
    ]
    grids = [law.mean + law.covariance[0, 0].sqrt() * torch.linspace(-6, 6, 601, dtype=F64) for law in laws]
    width = torch.tensor([float(grid[1] - grid[0]) for grid in grids]).prod()
    density = [
        dist.Normal(law.mean, law.covariance[0, 0].sqrt()).log_prob(grid) for law, grid in zip(laws, grids, strict=True)
    ]
    joint = (density[0][:, None] + density[1] + dist.Normal(grids[0][:, None] * grids[1], 0.6).log_prob(y)).exp()
    log_z = float((joint.sum() * width).log())
    kernel = sd.TDS(product, sd.TweedieTwist())
    smc = sd.SMC(kernel, num_particles=400, num_chains=32, seed=0, progress=False).run(y)
    check_evidence(smc, log_z)
    samples = smc.weighted_samples()
    for name, mean in (
        ("x", float((joint.sum(1) * grids[0]).sum() / joint.sum())),
        ("w", float((joint.sum(0) * grids[1]).sum() / joint.sum())),
    ):
        values, w = samples.values[name][..., 0], samples.log_w.exp()
        got = float((w * values).sum())
        error = float(((w * values).sum(1) - got * w.sum(1)).square().sum().sqrt())
        assert abs(got - mean) < 5 * error and error < 0.05


def test_prior_predictive_and_predictive() -> None:
    """model() draws a picture and a measurement; pyro.infer.Predictive does so many times, with the right moments."""
    draws = pyro.infer.Predictive(model, num_samples=1000)()
    assert draws["x"].shape == (1000, 2) and draws["y"].shape == (1000, 2)
    # five standard errors of a variance estimated from 1000 draws: 5 * sqrt(2 / 1000) = 0.22 (failure 6e-7 each);
    # a chain of 20 linear steps with the posterior variance has the variance of its own recursion
    chain = prior_of().chain
    variance = chain.initial_scale**2
    for k in range(20, 0, -1):
        step = chain.step(k)
        pull = step.t.alpha / (step.t.alpha**2 + step.t.sigma**2)
        variance = (step.b + step.c * pull) ** 2 * variance + step.kappa**2
    assert bool((draws["x"].var(0) / variance - 1).abs().max() < 0.23)
    assert bool((draws["y"].var(0) / (variance + 0.25) - 1).abs().max() < 0.23)


def test_unrolled_program_has_one_site_per_step() -> None:
    y = torch.zeros(2, dtype=F64)
    trace = pyro.poutine.trace(sd.unroll(model)).get_trace(y)
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"]]
    assert names == [f"x_{k}" for k in range(20, -1, -1)]
    assert torch.equal(trace.nodes["x"]["value"], trace.nodes["x_0"]["value"])
