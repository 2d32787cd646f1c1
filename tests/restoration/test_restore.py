"""Restorations against closed forms: a Gaussian scene, a linear picture of it, every way of taking it."""

import math

import pyro
import pytest
import torch

import smcdiff as sd
from smcdiff.measurement.compose import diagonal_part
from smcdiff.restoration.acquisition import Acquisition, Whiten, Window, blurred, coarse, gaussian_psf, masked, sharp
from smcdiff.restoration.images import Crop
from smcdiff.restoration.noise_level import Noise, whiten
from smcdiff.restoration.restore import Effort, prepare
from smcdiff.transforms import DCT
from tests.guidance.exact import chain_law

MASK = torch.tensor([[[1.0, 0, 1], [1, 1, 0]]])
ACQUISITIONS = {
    "sharp": sharp(Noise(0.5)),
    "blurred": blurred(Noise(0.5), 0.6),
    "masked": masked(Noise(0.5), MASK),
    "coarse": coarse(Noise(0.3), 2),
    "row correlation": sharp(Noise(0.5, row_correlation=0.6)),
}


def field(shape):
    """A smooth Gaussian prior of pictures of this shape: mean and covariance."""
    shape = shape or (1, 4, 4)
    row, column = torch.meshgrid(*(torch.arange(float(n), dtype=torch.float64) for n in shape[1:]), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], -1)
    covariance = 0.5 * torch.exp(-0.5 * (torch.cdist(places, places) / 1.5) ** 2) + 0.1 * torch.eye(len(places))
    return torch.linspace(-0.5, 0.5, len(places), dtype=torch.float64).reshape(shape), covariance


def load(shape):
    return sd.DiffusionPrior(sd.GaussianDenoiser(*field(shape)), sd.VPSchedule(), num_steps=5)


def matrix(function, shape):
    """The dense matrix of a linear function of scenes of this shape."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return torch.stack([function(u).flatten() for u in unit], -1)


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_posterior_and_evidence_are_exact(name):
    acquisition = ACQUISITIONS[name]
    y = torch.tensor([[[0.9, -0.2, 0.4], [-0.7, 0.8, 0.1]]], dtype=torch.float64)
    job = prepare(y, acquisition, load, Effort(particles=256, chains=24, steps=40, seed=1))
    canvas, noise = job.canvas, acquisition.noise
    mean, covariance = field((1, canvas.rows, canvas.columns))
    law = chain_law(job.prior, mean.flatten(), covariance)

    # the picture's law, written out anew: A by its definition, correlated noise by its covariance
    A = matrix(lambda x: canvas.window.of(acquisition.operator(x)), mean.shape)
    seen = torch.ones(6, dtype=torch.bool) if acquisition.mask is None else acquisition.mask.flatten() > 0
    lag = (torch.arange(3.0)[:, None] - torch.arange(3.0)).abs().double()
    colour = torch.block_diag(*[noise.row_correlation**lag] * 2) if noise.row_correlation else torch.eye(6)
    root = noise.sigma * torch.linalg.cholesky(colour.double())
    to_white = torch.linalg.inv(root)[seen][:, seen]
    posterior, log_z = law.given(to_white @ A[seen], to_white @ y.flatten()[seen], 1.0)
    log_z -= int(seen.sum()) * math.log(noise.sigma)  # the program observes W y, the white picture with deviation sigma

    result = job.run(progress=False)
    ratio = (result.diagnostics.log_z - log_z).exp()
    # 24 independent unbiased ratios: 6 of their standard errors are passed with probability 2 P(t_23 > 6) = 4e-6
    error = float(ratio.std()) / math.sqrt(24)
    assert error < 0.05 and abs(float(ratio.mean()) - 1) < 6 * error

    assert result.exponent == 1.0  # nothing was tempered
    keep = canvas.picture.of(torch.arange(mean.numel()).reshape(mean.shape)).flatten()
    expected, spread = posterior.mean[keep], posterior.covariance.diagonal()[keep].sqrt()
    x = result.run.values["x"].flatten(2)
    chain_w = result.run.chain_log_w.exp()
    chain_mean = torch.einsum("bn,bnd->bd", result.run.within_chain_log_w.exp(), x)
    error = (chain_w[:, None] ** 2 * (chain_mean - result.mean.flatten()) ** 2).sum(0).sqrt()
    assert float(error.max()) < 0.015
    # 8 standard errors, in one of 24 pixels: 24 * 2 P(t_23 > 8) = 1e-6
    assert bool(((result.mean.flatten() - expected).abs() < 8 * error).all())
    torch.testing.assert_close(result.sd.flatten(), spread, rtol=0.1, atol=0)


def test_unknown_noise_level_follows_the_data():
    # Scenes that are almost known: p(y given sigma) is normal in closed form, and quadrature gives sigma's posterior.
    # 8000 particles, hardly resampled, count for over 1000: a standard error below 0.032 posterior deviations, so that
    # 0.25 of them is passed with probability below 1e-13.
    def known(shape):
        mean, _ = field(shape)
        return sd.DiffusionPrior(sd.GaussianDenoiser(mean, torch.full_like(mean, 1e-6)), sd.VPSchedule(), num_steps=5)

    mean, _ = field((1, 6, 6))
    generator = torch.Generator().manual_seed(5)
    y = mean + 0.3 * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    job = prepare(y, sharp(Noise(0.2, width=0.5)), known, Effort(particles=500, chains=16, steps=60, seed=2))
    result = job.run(progress=False)
    assert result.diagnostics.pooled_ess > 1000 and result.exponent == 1.0
    log_sigma = torch.linspace(math.log(0.05), math.log(1.0), 2001, dtype=torch.float64)
    square = float((y - mean).square().sum())
    log_p = -36 * log_sigma - square / 2 * torch.exp(-2 * log_sigma) - 0.5 * ((log_sigma - math.log(0.2)) / 0.5) ** 2
    w = log_p.softmax(0)
    expected = float((w * log_sigma.exp()).sum())
    spread = math.sqrt(float((w * (log_sigma.exp() - expected) ** 2).sum()))
    assert float(result.run.mean("sigma")) == pytest.approx(expected, abs=0.25 * spread)
    assert float(result.run.sd("sigma")) == pytest.approx(spread, rel=0.2)


def test_shot_noise_enters_by_its_variance():
    noise = Noise(0.3, shot=True)
    acquisition = sharp(noise)
    x = torch.tensor([[[-0.99, -0.4, 0.0], [0.3, 0.7, 1.0]]], dtype=torch.float64)
    canvas = acquisition.canvas(2, 3, 1)
    program = acquisition.program(load((1, 2, 3)), canvas)
    y = torch.zeros(1, 2, 3, dtype=torch.float64)
    conditioned = pyro.poutine.condition(program, {"x": x})
    trace = pyro.poutine.trace(conditioned).get_trace(y)
    trace.compute_log_prob(lambda name, site: name == "y")
    variance = 0.09 * (1 + x).clamp(min=0.1)
    expected = -0.5 * (x**2 / variance + variance.log() + math.log(2 * math.pi))
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], expected)


def test_program_draws_pictures():
    acquisition = blurred(Noise(0.01), 0.6)
    canvas = acquisition.canvas(3, 3, 2)
    program = acquisition.program(load((1, canvas.rows, canvas.columns)), canvas)
    trace = pyro.poutine.trace(program).get_trace()
    clean = canvas.window.of(acquisition.operator(trace.nodes["x"]["value"]))
    assert float((trace.nodes["y"]["value"] - clean).abs().max()) < 0.06  # 6 deviations, 9 pixels: 2e-8


@pytest.mark.parametrize("rows", [1, 5, 64, 65])
@pytest.mark.parametrize("block", [1, 8, 12])
@pytest.mark.parametrize(("margin", "factor"), [(0, 1), (5, 1), (0, 2), (3, 4)])
def test_canvas_holds_the_picture_and_its_margin(rows, block, margin, factor):
    canvas = Acquisition(Noise(1.0), margin=margin, factor=factor).canvas(rows, 7, block)
    assert canvas.rows % block == 0 and canvas.columns % block == 0
    assert canvas.rows % factor == 0 and canvas.rows - math.lcm(block, factor) < rows * factor + 2 * margin
    picture, window = canvas.picture, canvas.window
    assert (picture.height, picture.width) == (rows * factor, 7 * factor)
    assert (window.height, window.width) == (rows, 7)
    assert (picture.top, picture.left) == (window.top * factor, window.left * factor)
    # a blur that wraps around the canvas must not reach the window
    around = (canvas.rows - picture.height) + (factor - 1)
    assert around >= 2 * margin and picture.top + factor > margin - factor


def test_a_blur_does_not_wrap_into_the_window():
    acquisition = blurred(Noise(1.0), 1.2)
    canvas = acquisition.canvas(6, 6, 1)  # without a pixel to spare
    view = matrix(lambda x: canvas.window.of(acquisition.operator(x)), (1, canvas.rows, canvas.columns))
    places = torch.arange(canvas.rows * canvas.columns).reshape(canvas.rows, canvas.columns)
    kernel = gaussian_psf(1.2).double()
    radius = len(kernel) // 2
    for i in range(6):
        for j in range(6):
            row, column = canvas.window.top + i, canvas.window.left + j
            inside = places[row - radius : row + radius + 1, column - radius : column + radius + 1]
            assert inside.shape == kernel.shape  # the kernel lies on the canvas as a whole
            expected = torch.zeros(places.numel(), dtype=torch.float64)
            expected[inside.flatten()] = kernel.flatten()
            torch.testing.assert_close(view[6 * i + j], expected, atol=1e-7, rtol=0)


def test_a_blur_is_diagonal_where_restorations_have_their_covariance():
    """So that conjugate gradients pay for one pair of transforms an iteration, and none for the blur."""
    acquisition = blurred(Noise(0.1), 1.5)
    canvas = acquisition.canvas(8, 8, 8)
    view = sd.Compose(Window(canvas.window, (canvas.rows, canvas.columns)), acquisition.operator)
    a, rest = diagonal_part(view, torch.zeros(1, canvas.rows, canvas.columns), DCT)
    assert a is not None and [type(operator) for operator in rest] == [Window]


@pytest.mark.parametrize(
    ("acquisition", "tilted"),
    [
        (sharp(Noise(0.1)), True),
        (blurred(Noise(0.1), 1.0), True),
        (masked(Noise(0.1), torch.ones(1, 8, 8)), True),
        (sharp(Noise(0.1, width=0.3)), False),
        (sharp(Noise(0.1, shot=True)), False),
    ],
    ids=["sharp", "blurred", "masked", "unknown noise", "shot noise"],
)
def test_what_restores_which_picture(acquisition, tilted):
    y = torch.zeros(1, 8, 8)
    chain = prepare(y, acquisition, lambda shape: sd.load_prior("wafer64", event_shape=shape)).prior.chain
    assert (chain.variance, chain.grid) == (("full", sd.SinhGrid()) if tilted else ("fixed_large", sd.LogGrid()))


def test_missing_pixels_do_not_move_a_restoration():
    """The tilted denoiser under a mask, against the same with other numbers where nothing was measured."""
    seen = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    y = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1)).double()

    def smooth(shape):
        spectrum = 1 / (1 + torch.arange(36, dtype=torch.float64)).reshape(1, 6, 6)
        return sd.DiffusionPrior(
            sd.GaussianFieldDenoiser(torch.zeros_like(spectrum), spectrum, DCT), sd.VPSchedule(), num_steps=5
        )

    def restored(y):
        job = prepare(y, masked(Noise(0.3), seen.float()), smooth, Effort(4, 3, 6))
        assert job.prior.chain.variance == "full"
        return job.run(progress=False)

    one, other = restored(y), restored(torch.where(seen, y, 50.0))
    torch.testing.assert_close(one.run.values["x"], other.run.values["x"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.run.log_z, other.run.log_z, rtol=1e-6, atol=1e-6)


def test_adjoints():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    for operator in (Window(Crop(1, 2, 3, 4), (5, 7)), Whiten(0.7)):
        y = torch.randn(operator(x).shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())
    torch.testing.assert_close(Whiten(0.7)(x), whiten(x, 0.7))


def test_gaussian_psf():
    kernel = gaussian_psf(1.5)
    assert kernel.shape == (11, 11) and float(kernel.sum()) == pytest.approx(1, rel=1e-6)
    assert float(kernel[5, 8] / kernel[5, 5]) == pytest.approx(math.exp(-0.5 * 4), rel=1e-5)
    assert float(kernel[3, 4] / kernel[5, 5]) == pytest.approx(math.exp(-0.5 * 5 / 2.25), rel=1e-5)
    with pytest.raises(ValueError, match="greater than 0"):
        gaussian_psf(0.0)


def test_the_same_seed_gives_the_same_particles():
    runs = []
    for seed in (1, 1, 2):
        job = prepare(torch.zeros(1, 2, 2).double(), sharp(Noise(0.5, width=0.3)), load, Effort(4, 2, 5, seed))
        runs.append(job.run(progress=False).run)
    assert torch.equal(runs[0].values["x"], runs[1].values["x"]) and torch.equal(runs[0].log_w, runs[1].log_w)
    assert not torch.equal(runs[0].values["x"], runs[2].values["x"])


def test_draws_follow_the_weights_and_intervals_the_quantiles():
    job = prepare(torch.zeros(1, 2, 2).double(), sharp(Noise(0.5)), load, Effort(8, 4, 10))
    result = job.run(progress=False)
    draws, x = result.draws(8), result.run.values["x"].flatten(0, 1)
    cumulative = result.run.log_w.exp().flatten().cumsum(0).tolist()
    for i, draw in enumerate(draws):
        first = next(j for j, c in enumerate(cumulative) if c >= (i + 0.5) / 8)
        assert torch.equal(draw, x[first])
    low, high = result.interval(0.8)
    assert torch.equal(low, result.run.quantile("x", 0.1)) and torch.equal(high, result.run.quantile("x", 0.9))
    with pytest.raises(ValueError, match="got mass 1"):
        result.interval(1)


class Trained:
    """A denoiser that does not tell its covariance, as a network does not."""

    def __init__(self, shape):
        self.exact = sd.GaussianDenoiser(*field(shape))
        self.event_shape, self.dtype, self.device = self.exact.event_shape, torch.float64, torch.device("cpu")

    def __call__(self, x_t, level):
        return self.exact(x_t, level)


def test_a_prior_without_a_covariance_is_restored_all_the_same():
    mean, _ = field((1, 4, 4))
    job = prepare(mean, sharp(Noise(0.3)), lambda s: sd.DiffusionPrior(Trained(s), sd.VPSchedule()), Effort(64, 4, 40))
    assert job.prior.chain.variance == "fixed_large"
    tilted = prepare(mean, sharp(Noise(0.3)), load, Effort(64, 4, 40))
    assert tilted.prior.chain.variance == "full"
    means = [job.run(progress=False).mean for job in (job, tilted)]
    torch.testing.assert_close(*means, atol=0.15, rtol=0)


def test_a_collapsed_run_is_tempered_to_half_its_particles():
    mean, _ = field((1, 8, 8))
    job = prepare(
        mean + 3, sharp(Noise(0.05)), lambda s: sd.DiffusionPrior(Trained(s), sd.VPSchedule()), Effort(4, 4, 10)
    )
    result = job.run(progress=False)
    assert 0 < result.exponent < 1
    assert float(1 / result.run.log_w.exp().square().sum()) == pytest.approx(8, rel=1e-6)
    assert result.diagnostics.verdict == "bad" and result.diagnostics.pooled_ess < 8


def test_what_cannot_be_restored_is_refused():
    y = torch.zeros(1, 4, 4)
    nan = y.clone()
    nan[0, 1, 1] = math.nan
    rgb = sd.DiffusionPrior(
        sd.GaussianDenoiser(torch.zeros(3, 4, 4), torch.ones(3, 4, 4)), sd.VPSchedule(), num_steps=5
    )
    for picture, loader, effort, words in (
        (y[0], load, Effort(), "expected finite values of shape"),
        (nan, load, Effort(), "finite: False"),
        (y, load, Effort(particles=0), "got particles 0"),
        (y, lambda shape: rgb, Effort(), "expected grey ones"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(picture, sharp(Noise(1.0)), loader, effort)
    with pytest.raises(ValueError, match="mask and the row correlation"):
        masked(Noise(1.0, row_correlation=0.5), MASK)
    with pytest.raises(ValueError, match="mask of shape"):
        masked(Noise(1.0), MASK).data(y)
    with pytest.raises(ValueError, match="margin -1"):
        Acquisition(Noise(1.0), margin=-1)
