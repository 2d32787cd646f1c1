"""The synthetic wafer pictures against the formulas their docstring states.

Statistical tests fail by chance with probability at most 1e-5 each; the seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage, stats
from scipy.special import expit

from smcdiff.zoo import wafer as module
from smcdiff.zoo.wafer import DEFECT_KINDS, DEFECTS, Wafer, rough_edges

PAIRS = [(layout, defect) for layout, defects in DEFECTS.items() for defect in defects]


def spectrum(wafer: Wafer, length: int) -> np.ndarray:
    """E |X_f|^2 / length of an edge at all its Fourier frequencies: their mean is the edge's variance."""
    f = np.fft.fftfreq(length)
    power = 1 / (1 + (2 * np.pi * f * wafer.correlation_length) ** 2) ** (0.5 + wafer.hurst)
    power[0] = 0.0
    return wafer.roughness**2 * power / power.mean()


@pytest.mark.parametrize("length", [64, 63])
@pytest.mark.parametrize(("correlation_length", "hurst"), [(8.0, 0.7), (3.0, 0.4)])
def test_an_edge_has_the_spectrum_of_palasantzas(length: int, correlation_length: float, hurst: float) -> None:
    wafer = Wafer(roughness=0.9, correlation_length=correlation_length, hurst=hurst)
    number = 4000
    edges = rough_edges(wafer, np.random.default_rng(1), number, length)
    assert np.abs(edges.mean(1)).max() < 1e-12
    ratio = (np.abs(np.fft.fft(edges)) ** 2 / length).sum(0)[1:] / spectrum(wafer, length)[1:]
    # 2 ratio is chi-square with 2 number degrees of freedom, at the Nyquist frequency ratio with number;
    # by the union bound over the frequencies the test fails by chance with probability 1e-5.
    nyquist = np.fft.fftfreq(length)[1:] == -0.5
    p_value = np.where(nyquist, _two_sided(ratio, number), _two_sided(2 * ratio, 2 * number))
    assert p_value.min() > 1e-5 / (length - 1)


def _two_sided(statistic: np.ndarray, degrees: int) -> np.ndarray:
    return 2 * np.minimum(stats.chi2.cdf(statistic, degrees), stats.chi2.sf(statistic, degrees))


def test_an_edge_has_the_stated_standard_deviation() -> None:
    wafer, number, length = Wafer(roughness=1.3), 4000, 64
    variance = np.square(rough_edges(wafer, np.random.default_rng(2), number, length)).mean()
    # The mean of squares is a sum of independent chi-squares with weights spectrum / (number length), approximately
    # normal with 4000 edges; 4.5 standard deviations are passed by chance with probability 7e-6.
    spread = np.sqrt(2 * np.square(spectrum(wafer, length)).sum() / number) / length
    assert abs(variance - 1.3**2) < 4.5 * spread
    assert spread < 0.02


def test_straight_lines_are_at_their_signed_distance() -> None:
    wafer = Wafer(roughness=0.0)
    for seed in range(20):
        d, damaged, bright = module._lines(wafer, np.random.default_rng(seed), None)
        assert np.array_equal(d, damaged) and not bright.any()
        assert np.ptp(d, axis=0).max() == 0
        slope = np.abs(np.diff(d[0]))
        assert slope.max() < 1 + 1e-12
        # One step in pitch / 2 >= 5.5 passes a ridge or a valley, all others have slope one.
        assert np.mean(slope > 1 - 1e-12) > 1 - 1 / 5.5 - 2 / 63
        assert 0.2 * 11 - 0.5 <= d.max() <= 0.3 * 20


def test_round_holes_are_at_their_signed_distance() -> None:
    wafer = Wafer(roughness=0.0)
    for seed in range(20):
        d, damaged, bright = module._holes(wafer, np.random.default_rng(seed), None)
        assert np.array_equal(d, damaged) and not bright.any()
        # About a hole's centre d = rho - r, and rho^2 is a parabola with second differences 2 along rows and columns.
        row, col = np.argwhere(ndimage.minimum_filter(d, 9)[8:-8, 8:-8] == d[8:-8, 8:-8])[0] + 8
        patch = d[row - 1 : row + 2, col - 1 : col + 2]
        # (d_c + r)^2 = rho_c^2 and the four neighbours' squares sum to 4 rho_c^2 + 4: solve for r.
        neighbours = np.array([patch[0, 1], patch[2, 1], patch[1, 0], patch[1, 2]])
        r = (4 + 4 * patch[1, 1] ** 2 - np.square(neighbours).sum()) / (2 * (neighbours.sum() - 4 * patch[1, 1]))
        assert 0.26 * 14 - 1e-9 <= r <= 0.36 * 22 + 1e-9
        rho = patch + r
        assert np.allclose(rho[0] ** 2 + rho[2] ** 2 - 2 * rho[1] ** 2, 2)
        assert np.allclose(rho[:, 0] ** 2 + rho[:, 2] ** 2 - 2 * rho[:, 1] ** 2, 2)


def test_the_yield_is_the_stated_function_of_distance() -> None:
    look = module._Look(space=0.1, line=0.6, edge=0.4, width=1.5, softness=0.4)
    d = np.linspace(-12, 12, 101)
    expected = 0.1 + 0.5 * expit(d / 0.4) + 0.4 * np.exp(-np.abs(d) / 1.5)
    assert np.allclose(look.intensity(d), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("psf_sigma", [0.3, 0.7, 2.6])
def test_the_point_spread_function_is_gaussian(psf_sigma: float) -> None:
    picture = np.random.default_rng(3).standard_normal((33, 32))
    radius = int(np.ceil(4 * psf_sigma))
    expected = ndimage.gaussian_filter(picture, psf_sigma, mode="mirror", radius=radius)
    assert np.allclose(Wafer(psf_sigma=psf_sigma)._form(picture), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dose", [20.0, 1000.0])
def test_the_noise_is_poisson_of_the_dose(dose: float) -> None:
    residuals = []
    for seed in range(12):
        rate = dose * (Wafer(dose=np.inf).draw(np.random.default_rng(seed)).image + 1) / 2
        counts = dose * (Wafer(dose=dose).draw(np.random.default_rng(seed)).image + 1) / 2
        assert np.abs(counts - counts.round()).max() < 1e-6
        assert rate.min() > 0.05 * dose * 0.99
        residuals.append([(counts - rate) / np.sqrt(rate), 1 / rate])
    z, inverse_rate = np.moveaxis(np.array(residuals), 1, 0).reshape(2, -1)
    # z has mean 0 and variance 1; z^2 has mean 1 and variance 2 + 1 / rate. 4.5 standard deviations: 7e-6 each.
    assert abs(z.mean()) < 4.5 / np.sqrt(z.size)
    assert abs(np.square(z).mean() - 1) < 4.5 * np.sqrt((2 + inverse_rate).mean() / z.size)


def test_defects_come_at_their_rate_and_every_kind_alike() -> None:
    wafer, rng, number = Wafer(size=32, defect_rate=0.6), np.random.default_rng(4), 1200
    drawn = [wafer.draw(rng) for _ in range(number)]
    layouts = {layout: [p.defect for p in drawn if p.layout == layout] for layout in DEFECTS}
    # Four tests, each at 2.5e-6: the rate, the share of lines, and the kinds of either layout.
    level = 2.5e-6
    with_defect = sum(p.defect is not None for p in drawn)
    assert stats.binomtest(with_defect, number, 0.6).pvalue > level
    assert stats.binomtest(len(layouts["lines"]), number, 0.5).pvalue > level
    for layout, defects in layouts.items():
        counts = [defects.count(kind) for kind in DEFECTS[layout]]
        assert sum(counts) == sum(kind is not None for kind in defects)
        assert stats.chisquare(counts).pvalue > level


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_zero_or_one_is_certain(rate: float) -> None:
    rng = np.random.default_rng(5)
    drawn = [Wafer(size=32, defect_rate=rate).draw(rng) for _ in range(50)]
    assert all((p.defect is not None) == bool(rate) for p in drawn)


@pytest.mark.parametrize(("layout", "defect"), PAIRS)
def test_the_mask_is_where_the_defect_changed_the_picture(
    layout: str, defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wafer = Wafer(dose=np.inf)
    pictures = [wafer.draw(np.random.default_rng(seed), defect, layout) for seed in range(10)]
    name = f"_{layout}"
    with_defect = getattr(module, name)

    def without_defect(*arguments: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plain, _, bright = with_defect(*arguments)
        return plain, plain, np.zeros_like(bright)

    monkeypatch.setattr(module, name, without_defect)
    for seed, picture in enumerate(pictures):
        twin = wafer.draw(np.random.default_rng(seed), defect, layout)
        assert (picture.layout, picture.defect) == (layout, defect)
        assert not twin.mask.any()
        change = np.abs(picture.image - twin.image)
        assert np.array_equal(picture.mask, change > 0.1)
        # A defect is there to be seen, and it is a small part of the picture.
        assert change.max() > 0.2
        assert 4 <= picture.mask.sum() < 0.15 * picture.mask.size


def test_lines_stand_or_lie_at_even_odds() -> None:
    wafer = Wafer(dose=np.inf, roughness=0.0, defect_rate=0.0)
    pictures = [wafer.draw(np.random.default_rng(seed), layout="lines").image for seed in range(60)]
    standing = sum(np.ptp(image, axis=0).max() < 1e-12 for image in pictures)
    lying = sum(np.ptp(image, axis=1).max() < 1e-12 for image in pictures)
    assert standing + lying == 60
    assert stats.binomtest(standing, 60, 0.5).pvalue > 1e-5


def test_a_seed_gives_the_same_pictures() -> None:
    first, second = (Wafer().draw_images(np.random.default_rng(6), 3) for _ in range(2))
    assert np.array_equal(first, second)
    rng = np.random.default_rng(6)
    assert np.array_equal(first[:, 0], np.stack([Wafer().draw(rng).image for _ in range(3)]).astype(np.float32))
    assert first.dtype == np.float32 and first.shape == (3, 1, 64, 64)


def test_the_pictures_of_the_shipped_prior_stay_what_they_were() -> None:
    """The prior wafer64 was trained on seed 0 of this generator with 3 % of defects; a change of its draws would orphan
    the weights. By picture 100 the stream has passed three pictures with a defect."""
    images = Wafer(defect_rate=0.03).draw_images(np.random.default_rng(0), 101).astype(np.float64)
    means = [0.0545791, 0.01657568, -0.15731836, 0.12454248]
    assert np.allclose(images[:4].mean((1, 2, 3)), means, rtol=0, atol=1e-6)
    assert images[100].mean() == pytest.approx(-0.07929004, abs=1e-6)


def test_a_kind_left_out_is_unseen_but_can_be_asked_for() -> None:
    seen = ("break", "pinch", "particle", "missing", "closed")
    wafer, rng, number = Wafer(size=32, defect_rate=1.0, kinds=seen), np.random.default_rng(7), 600
    drawn = [wafer.draw(rng) for _ in range(number)]
    for layout, defects in DEFECTS.items():
        counts = [sum(p.defect == kind for p in drawn if p.layout == layout) for kind in defects if kind in seen]
        assert sum(counts) == sum(p.layout == layout for p in drawn)
        assert stats.chisquare(counts).pvalue > 5e-6  # two layouts: 1e-5 together
    assert {"bridge", "merged"} == set(DEFECT_KINDS) - set(seen)
    assert wafer.draw(rng, defect="bridge").defect == "bridge"


def test_the_order_of_kinds_does_not_matter() -> None:
    pictures = [Wafer(defect_rate=1.0, kinds=kinds) for kinds in (DEFECT_KINDS, DEFECT_KINDS[::-1])]
    first, second = (wafer.draw_images(np.random.default_rng(8), 6) for wafer in pictures)
    assert np.array_equal(first, second)


def test_two_in_a_hundred_have_a_defect() -> None:
    assert Wafer().defect_rate == 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 31}, "got size 31; a wafer picture needs at least 32 pixels"),
        ({"defect_rate": 1.5}, r"got defect_rate 1.5; expected a probability in \[0, 1\]"),
        ({"defect_rate": float("nan")}, "got defect_rate nan"),
        ({"roughness": -0.1}, "got roughness -0.1; expected a number of pixels, 0 or greater"),
        ({"correlation_length": 0.0}, "got correlation_length 0.0; expected a number greater than 0"),
        ({"hurst": -1.0}, "got hurst -1.0"),
        ({"psf_sigma": 0.0}, "got psf_sigma 0.0"),
        ({"dose": float("nan")}, "got dose nan"),
        ({"kinds": ("bridge", "scratch")}, r"got kinds \('bridge', 'scratch'\); expected some of \('bridge', "),
        ({"kinds": ("bridge",)}, r"none of them a defect of the layouts \['holes'\].*or defect_rate=0"),
    ],
)
def test_impossible_populations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wafer(**arguments)


def test_without_defects_no_kind_is_needed() -> None:
    assert Wafer(defect_rate=0.0, kinds=()).draw(np.random.default_rng(9)).defect is None


@pytest.mark.parametrize(("layout", "defect"), [("holes", "bridge"), ("lines", "merged"), ("dots", None), (None, "x")])
def test_impossible_requests_are_refused(layout: str | None, defect: str | None) -> None:
    with pytest.raises(ValueError, match=f"got layout {layout!r} with defect {defect!r}; expected a pair of"):
        Wafer().draw(np.random.default_rng(0), defect, layout)
