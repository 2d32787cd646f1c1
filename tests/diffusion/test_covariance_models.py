"""Models of Cov[x_0 given x_t] against Tweedie's identity, and the tables of measured ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smcdiff.diffusion.analytic import (
    EmpiricalDenoiser,
    GaussianDenoiser,
    GaussianFieldDenoiser,
    GaussianMixtureDenoiser,
    StandardNormalDenoiser,
)
from smcdiff.diffusion.covariance import Covariance
from smcdiff.diffusion.covariance_models import (
    CovarianceModel,
    IsotropicCovariance,
    JacobianCovariance,
    KnowsCovariance,
    SpectralCovariance,
)
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel, VESchedule, VPSchedule
from smcdiff.transforms import DCT, HARTLEY, PIXELS
from tests.diffusion.exact import example_covariance

F64 = torch.float64
EVENT = (1, 3, 4)
LEVELS = [VPSchedule().level(t) for t in (20.0, 300.0, 800.0)] + [VESchedule(0.01, 20.0).level(1.5)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def field(name: str) -> GaussianFieldDenoiser:
    basis = {"hartley": HARTLEY, "dct": DCT, "pixels": PIXELS}[name]
    return GaussianFieldDenoiser(random(*EVENT), random(*EVENT, seed=1).square() + 0.05, basis)


WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
DENOISERS: dict[str, Denoiser] = {
    "Gaussian": GaussianDenoiser(random(4), example_covariance(4)),
    "Gaussian, independent": GaussianDenoiser(random(2, 3), random(2, 3, seed=1).square() + 0.1),
    "field, Hartley": field("hartley"),
    "field, cosines": field("dct"),
    "field, pixels": field("pixels"),
    "mixture, isotropic": GaussianMixtureDenoiser(1.5 * random(3, 2, 2), 0.4 * torch.eye(4, dtype=F64), WEIGHTS),
    "mixture, shared": GaussianMixtureDenoiser(1.5 * random(3, 4), example_covariance(4), WEIGHTS),
    "mixture on a line": GaussianMixtureDenoiser(
        torch.tensor([-1.0, 0.5, 2.0], dtype=F64)[:, None] * random(1, 4), example_covariance(4), WEIGHTS
    ),
    "mixture, own": GaussianMixtureDenoiser(
        1.5 * random(3, 4), torch.stack([example_covariance(4, seed) for seed in range(3)]), WEIGHTS
    ),
    "finite sample": EmpiricalDenoiser(random(6, 2, 2)),
    "standard normal": StandardNormalDenoiser(torch.Size([3]), F64, torch.device("cpu")),
}


def matrix(covariance: Covariance, m: int, event: torch.Size) -> Tensor:
    eye = torch.eye(event.numel(), dtype=F64).reshape(-1, *event)
    return torch.stack([covariance.apply(e.expand(m, *event)).flatten(1) for e in eye], -1)


def tweedie(denoiser: Denoiser, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """(sigma^2 / alpha) d x0_hat / d x_t of each event, (m, d, d)."""

    def mean(x: Tensor) -> Tensor:
        return denoiser(x[None], level).mean[0].flatten()

    rows = [torch.autograd.functional.jacobian(mean, x).reshape(x.numel(), x.numel()) for x in x_t]
    return level.sigma**2 / level.alpha * torch.stack(rows)


def found(model: CovarianceModel, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel) -> Tensor:
    estimate = denoiser(x_t, level)
    parts = model.parts(denoiser, x_t, level, estimate)
    assert all(len(part) == len(x_t) for part in parts.values())
    return matrix(model.at(level, parts, x_t), len(x_t), denoiser.event_shape).expand(len(x_t), -1, -1)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"{level.ratio:.3g}")
@pytest.mark.parametrize("name", DENOISERS)
def test_exact_denoisers_know_their_covariance(name: str, level: NoiseLevel) -> None:
    """By Tweedie's identity, at points where several components of a mixture or sample count."""
    denoiser = DENOISERS[name]
    x_t = level.alpha * random(4, *denoiser.event_shape, seed=3) + level.sigma * random(
        4, *denoiser.event_shape, seed=4
    )
    assert isinstance(denoiser, KnowsCovariance)
    exact = tweedie(denoiser, x_t, level)
    scale = float(exact.diagonal(dim1=1, dim2=2).mean())
    torch.testing.assert_close(found(denoiser.covariance, denoiser, x_t, level), exact, rtol=1e-7, atol=1e-9 * scale)
    torch.testing.assert_close(found(JacobianCovariance(), denoiser, x_t, level), exact, rtol=1e-7, atol=1e-9 * scale)


def test_a_jacobian_that_is_no_covariance_is_made_one() -> None:
    """The nearest positive semi-definite matrix of the symmetric part: eigenvalues 2 and -1 become 2 and 0."""
    rotate = torch.linalg.qr(random(2, 2)).Q
    skew = torch.tensor([[0.0, 0.7], [-0.7, 0.0]], dtype=F64)
    jacobian = rotate @ torch.diag(torch.tensor([2.0, -1.0], dtype=F64)) @ rotate.mT + skew

    class Linear:
        event_shape, dtype, device = torch.Size([2]), F64, torch.device("cpu")

        def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
            return Estimate(x_t @ jacobian.mT)

    level = LEVELS[1]
    exact = level.sigma**2 / level.alpha * 2 * rotate[:, :1] @ rotate[:, :1].mT
    torch.testing.assert_close(found(JacobianCovariance(), Linear(), random(3, 2), level)[0], exact)


def test_the_jacobian_refuses_large_events() -> None:
    denoiser = field("pixels")
    with pytest.raises(ValueError, match=r"event of 12 entries.*limited to 5\. Calibrate"):
        JacobianCovariance(max_entries=5).parts(denoiser, random(1, *EVENT), LEVELS[0], Estimate(random(1, *EVENT)))


RATIOS = torch.tensor([0.05, 0.4, 1.0, 7.0], dtype=F64)
SPECTRUM = torch.logspace(-3, 2, 12, dtype=F64).reshape(EVENT)


def level_of(ratio: float) -> NoiseLevel:
    schedule = VESchedule(0.001, 100.0)
    return schedule.level(schedule.time(ratio))


def posterior(spectrum: Tensor, ratio: Tensor | float) -> Tensor:
    return 1 / (1 / spectrum + torch.as_tensor(ratio, dtype=F64) ** -2)


def at(model: CovarianceModel, ratio: float, event: tuple[int, ...] = EVENT) -> Tensor:
    like = torch.zeros(1, *event, dtype=F64)
    return model.at(level_of(ratio), {}, like).variance.expand(1, *event)[0]  # type: ignore[attr-defined]


def table() -> SpectralCovariance:
    return SpectralCovariance(posterior(SPECTRUM, RATIOS.reshape(-1, 1, 1, 1)), "dct", RATIOS)


@pytest.mark.parametrize("ratio", [0.003, 0.05, 0.13, 0.4, 0.9999, 1.0, 3.0, 7.0, 60.0])
def test_a_table_of_a_gaussian_prior_is_exact_everywhere(ratio: float) -> None:
    """At measured levels, between them and beyond both ends."""
    torch.testing.assert_close(at(table(), ratio), posterior(SPECTRUM, ratio), rtol=1e-9, atol=0)
    spectrum = SpectralCovariance(SPECTRUM, "fft")
    torch.testing.assert_close(at(spectrum, ratio), posterior(SPECTRUM, ratio), rtol=1e-9, atol=0)
    isotropic = IsotropicCovariance(posterior(torch.tensor(0.3, dtype=F64), RATIOS), RATIOS)
    one = IsotropicCovariance(0.3)
    expected = posterior(torch.tensor(0.3, dtype=F64), ratio).expand(EVENT)
    torch.testing.assert_close(at(isotropic, ratio), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(at(one, ratio), expected, rtol=1e-9, atol=0)


def test_measured_levels_are_met_where_no_gaussian_prior_is() -> None:
    """Variances above r^2, which a poor network has, and ones that fall with the noise; between them in between."""
    measured = torch.tensor([[0.3, 0.001], [0.2, 0.1], [1.5, 0.05], [0.9, 3.0]], dtype=F64).reshape(4, 1, 1, 2)
    model = SpectralCovariance(measured, "pixels", RATIOS)
    for row, ratio in enumerate(RATIOS.tolist()):
        torch.testing.assert_close(at(model, ratio, (1, 1, 2)), measured[row], rtol=1e-12, atol=0)
    between = at(model, 0.6, (1, 1, 2))
    assert 0.2 < float(between[0, 0, 0]) < 1.5
    nearly = at(model, 0.4 * (1 + 1e-7), (1, 1, 2))
    torch.testing.assert_close(nearly, measured[1], rtol=1e-5, atol=0)
    below = at(model, 0.01, (1, 1, 2))
    assert float(below[0, 0, 0]) == pytest.approx(0.01**2)  # nothing is known of x_0 there but x_t


def test_a_table_gives_its_dtype_and_basis() -> None:
    covariance = table().at(level_of(0.3), {}, torch.zeros(2, *EVENT, dtype=torch.float32))
    assert covariance.variance.dtype == torch.float32 and covariance.basis is DCT


@pytest.mark.parametrize("basis", ["dct", "fft"])
def test_resized_to_the_same_frequencies(basis: str) -> None:
    """A spectrum that is a function of frequency: exact where frequencies are shared, close between them."""

    def spectrum(size: int) -> Tensor:
        cosines = torch.arange(size, dtype=F64) / (2 * size)  # cycles a pixel
        f = cosines if basis == "dct" else torch.fft.fftfreq(size, dtype=F64).abs()
        f2 = f[:, None] ** 2 + f**2
        return (1 / (0.02 + f2))[None]

    def tables(size: int) -> SpectralCovariance:
        return SpectralCovariance(posterior(spectrum(size), RATIOS.reshape(-1, 1, 1, 1)), basis, RATIOS)  # type: ignore[arg-type]

    small, large = tables(16), tables(32)
    torch.testing.assert_close(large.resized((1, 16, 16)).table.variances, small.table.variances, rtol=1e-12, atol=0)
    grown = small.resized((1, 32, 32)).table.variances
    exact = large.table.variances
    torch.testing.assert_close(grown[..., ::2, ::2], exact[..., ::2, ::2], rtol=1e-12, atol=0)
    # a cosine spectrum ends at its last row, beyond which it is constant; a Fourier one goes round
    inner = (slice(None), slice(None), slice(0, 31), slice(0, 31)) if basis == "dct" else ...
    assert float((grown / exact - 1)[inner].abs().max()) < 0.05
    assert tables(16).resized((1, 16, 16)).event_shape == (1, 16, 16)
    odd = small.resized((1, 24, 10))
    assert odd.event_shape == (1, 24, 10) and bool((odd.table.variances > 0).all())


def test_what_makes_no_table_is_refused() -> None:
    good = posterior(SPECTRUM, RATIOS.reshape(-1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"basis 'wavelet'; expected one of \['dct', 'fft', 'pixels'\]"):
        SpectralCovariance(good, "wavelet", RATIOS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ratios \(3,\) and variances \(4, 1, 3, 4\)"):
        SpectralCovariance(good, "dct", RATIOS[:3])
    with pytest.raises(ValueError, match="do not rise from above 0; sort the levels"):
        SpectralCovariance(good, "dct", RATIOS.flip(0))
    with pytest.raises(ValueError, match="not positive and finite"):
        SpectralCovariance(good * torch.nan, "dct", RATIOS)
    with pytest.raises(ValueError, match="not positive; expected the prior's spectrum"):
        SpectralCovariance(0 * SPECTRUM)
    with pytest.raises(ValueError, match="expected the spectrum of an event, or sd.IsotropicCovariance"):
        SpectralCovariance(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"variances of shape \(4,\); expected one number, or \(levels,\) with"):
        IsotropicCovariance(torch.ones(4))
    with pytest.raises(ValueError, match=r"variances of shape \(\); expected"):
        IsotropicCovariance(1.0, RATIOS)
    with pytest.raises(ValueError, match=r"events \(1, 3, 4\) and a picture \(1, 4, 4\); calibrate"):
        table().parts(field("dct"), torch.zeros(1, 1, 4, 4), LEVELS[0], Estimate(torch.zeros(1, 1, 4, 4)))
    with pytest.raises(ValueError, match="expected other rows and columns alone"):
        table().resized((3, 3, 4))
    with pytest.raises(ValueError, match="expected other rows and columns alone, and a cosine or Fourier basis"):
        SpectralCovariance(good, "pixels", RATIOS).resized((1, 6, 8))


def test_tables_in_words_tell_them_apart() -> None:
    """A checkpoint knows a method by its words."""
    assert repr(table()) == repr(table())
    assert repr(table()) != repr(SpectralCovariance(1.001 * table().table.variances, "dct", RATIOS))
