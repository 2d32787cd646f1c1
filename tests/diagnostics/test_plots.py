"""The plots show the numbers they were given, look as they did, and hold from one pixel to thousands."""

import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from smcdiff.diagnostics import Run, plots
from smcdiff.diagnostics.plots.style import diverging, reduced
from tests.diagnostics import gallery

#: Root mean square difference in grey levels of 255; versions of Matplotlib differ by less, a lost line by more.
TOLERANCE = 2.0


def save(figure, path="/dev/null", dpi=40):
    figure.savefig(path, format="png", dpi=dpi)


@pytest.mark.parametrize("name", gallery.FIGURES)
def test_a_plot_looks_as_it_did(name, tmp_path):
    from matplotlib.testing.compare import compare_images

    file = f"{name.replace(' ', '_')}.png"
    save(gallery.without_text(gallery.draw(name)), tmp_path / file)
    assert compare_images(str(gallery.BASELINES / file), str(tmp_path / file), TOLERANCE) is None


def test_the_comparison_sees_a_missing_line(tmp_path):
    from matplotlib.testing.compare import compare_images

    figure = gallery.without_text(gallery.draw("coverage"))
    figure.axes[0].get_lines()[-2].remove()
    save(figure, tmp_path / "coverage.png")
    assert compare_images(str(gallery.BASELINES / "coverage.png"), str(tmp_path / "coverage.png"), TOLERANCE)


def test_the_panel_shows_each_picture_once():
    generator = torch.Generator().manual_seed(0)
    truth, y, mean, sd, low = (torch.rand(1, 5, 7, generator=generator) for _ in range(5))
    draws = torch.rand(3, 1, 5, 7, generator=generator)
    axes = plots.plot_posterior(mean, sd, draws, {"truth": truth, "measurement": y}, {"low": low}, figure=Figure())
    titles = ["truth", "measurement", "posterior mean", "standard deviation", "low", "draw 1", "draw 2", "draw 3"]
    assert [a.get_title() for a in axes] == titles
    for a, expected in zip(axes, [truth, y, mean, sd, low, *draws], strict=True):
        (shown,) = a.get_images()
        np.testing.assert_allclose(shown.get_array(), expected[0], rtol=1e-6)
        if a.get_title() == "standard deviation":
            assert shown.get_clim()[0] == 0 and shown.cmap.name == "cividis" and shown.colorbar is not None
        else:
            assert shown.get_clim() == (-1, 1) and shown.cmap.name == "gray"


def test_a_colour_picture_keeps_its_colours():
    mean = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1).expand(3, 2, 2)
    axes = plots.plot_posterior(mean, torch.full((3, 2, 2), 0.3), mean[None], figure=Figure())
    np.testing.assert_allclose(axes[0].get_images()[0].get_array()[0, 0], [0, 0.5, 1])
    np.testing.assert_allclose(axes[1].get_images()[0].get_array(), 0.3, rtol=1e-6)
    with pytest.raises(ValueError, match="got a colour picture"):
        plots.plot_zscore(mean, mean, mean, figure=Figure())
    with pytest.raises(ValueError, match=r"got a picture of shape \(2, 4, 4\)"):
        plots.plot_posterior(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(0, 2, 4, 4), figure=Figure())


def test_without_a_figure_each_plot_opens_one():
    from matplotlib import pyplot

    axes = plots.plot_posterior(torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(0, 4, 4))
    assert [a.get_title() for a in axes] == ["posterior mean", "standard deviation"]
    pyplot.close(axes[0].figure)


def test_the_steps_show_every_chain():
    run = Run(
        values={},
        log_w=torch.zeros(2, 10),
        log_z=torch.zeros(2),
        ess=torch.tensor([[10.0, 10.0], [4.0, 6.0], [5.0, 3.0]]),
        log_z_path=torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-3.0, -5.0]]),
        roots=torch.tensor([[10, 10], [10, 10], [7, 4]]),
        entropy=torch.tensor([[10.0, 10.0], [5.0, 7.0], [6.0, 4.0]]).log(),
    )
    counts, evidence = plots.plot_steps(run, Figure())
    shown = [line.get_ydata().tolist() for line in counts.get_lines()]
    expected = [[10, 4, 5], [10, 6, 3], [10, 5, 6], [10, 7, 4], [10, 10, 7], [10, 10, 4]]
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    assert [line.get_ydata().tolist() for line in evidence.get_lines()] == [[0, -1, -3], [0, -2, -5]]
    assert [line.get_xdata().tolist() for line in evidence.get_lines()] == [[0, 1, 2]] * 2
    legend = [text.get_text() for text in counts.get_legend().get_texts()]
    assert legend == ["effective sample size", "perplexity", "surviving roots"]


def test_the_family_tree_by_hand():
    # 0 1 2 -> parents 0 0 2 -> parents 1 1 1: all final particles descend from initial particle 0
    ancestors = torch.tensor([[0, 1, 2], [0, 0, 2], [1, 1, 1]])
    axes = plots.plot_genealogy(ancestors, Figure())
    everyone, survivors = axes.collections
    assert sorted(map(tuple, (s.ravel() for s in survivors.get_segments()))) == [
        (0.0, 0.0, 1.0, 1.0),
        (1.0, 1.0, 2.0, 0.0),
        (1.0, 1.0, 2.0, 1.0),
        (1.0, 1.0, 2.0, 2.0),
    ]
    assert len(everyone.get_segments()) == 6
    assert axes.get_lines()[0].get_ydata().tolist() == [0] and axes.get_title().startswith("1 of 3 ")


def test_z_scores_by_hand():
    truth, mean, sd = (
        np.array([[1.0, 2.0], [3.0, 0.0]]),
        np.array([[0.0, 2.0], [1.0, 0.0]]),
        np.array([[0.5, 0], [1, 2]]),
    )
    axes = plots.plot_zscore(truth, mean, sd, figure=Figure())
    (shown,) = axes.get_images()
    np.testing.assert_array_equal(shown.get_array(), [[2, 0], [2, 0]])
    assert "mean square 1.41" in axes.get_title() and shown.get_clim() == (-4, 4)


def test_evidence_relative_to_the_best():
    axes = plots.plot_evidence({"a": (-10.0, 0.5), "b": (-7.0, float("nan"))}, {"a": -9.5}, figure=Figure())
    shown = [list(line.get_xdata()) for line in axes.get_lines()]
    assert [-3.0] in shown and [0.0] in shown and [-2.5] in shown
    (bar,) = (segments for c in axes.collections for segments in c.get_segments())
    np.testing.assert_allclose(bar[:, 0], [-4, -2])


def test_the_weights_are_the_exact_ones():
    log_w = torch.tensor([[0.0, -1.0, -2.0], [-3.0, -4.0, -torch.inf]], dtype=torch.float64)
    run = Run({}, log_w, torch.zeros(2), torch.ones(1, 2), torch.zeros(1, 2))
    for given in (run, run.tempered(4.0)[0]):
        left, right = plots.plot_weights(given, Figure())
        expected = np.exp([0.0, -1, -2, -3, -4]) / np.exp([0.0, -1, -2, -3, -4]).sum()
        np.testing.assert_allclose(left.get_lines()[0].get_ydata(), expected)
        np.testing.assert_allclose(
            [bar.get_height() for bar in right.patches], [expected[:3].sum(), expected[3:].sum()]
        )


def test_marginals_show_mean_and_interval():
    values = {"s": torch.arange(100.0).reshape(4, 25), "v": torch.arange(300.0).reshape(4, 25, 3)}
    run = Run(values, torch.zeros(4, 25), torch.zeros(4), torch.ones(1, 4), torch.zeros(1, 4))
    axes = plots.plot_marginals(run, "s", torch.tensor(7.0), Figure())
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [pytest.approx(49.5), 7.0]
    assert sum(bar.get_height() for bar in axes.patches if bar.get_width() < 20) == pytest.approx(1)
    axes = plots.plot_marginals(run, "v", figure=Figure())
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [148.5, 149.5, 150.5])


def test_bins_and_curves_out_of_their_bands_are_marked():
    axes = plots.plot_sbc(torch.tensor([3, 10, 25]), 12.0, 4, 20, Figure())
    colours = [bar.get_facecolor() for bar in axes.patches[-3:]]
    assert colours[0] == colours[2] != colours[1] and [bar.get_height() for bar in axes.patches[-3:]] == [3, 10, 25]
    z = torch.tensor([0.25, 0.5, 0.75])
    for function, less in ((plots.plot_ecdf, z), (plots.plot_coverage, 0 * z), (plots.plot_tarp, 0 * z)):
        axes = function(z, torch.tensor([0.2, 0.8, 0.7]), z - 0.1, z + 0.1, figure=Figure())
        _, curve, out = axes.get_lines()
        np.testing.assert_allclose(curve.get_ydata(), torch.tensor([0.2, 0.8, 0.7]) - less, atol=1e-6)
        assert out.get_xdata().tolist() == [0.5]


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (4096, 4096)])
def test_pictures_of_any_size(sides):
    generator = torch.Generator().manual_seed(0)
    mean, sd = (torch.rand(1, *sides, generator=generator) for _ in range(2))
    started = time.perf_counter()
    for size, draw in (
        ((9.6, 5.0), lambda f: plots.plot_posterior(mean, sd, mean[None], {"truth": mean}, figure=f)),
        ((4.0, 3.4), lambda f: plots.plot_zscore(mean, 0 * mean, sd, figure=f)),
        ((4.0, 3.4), lambda f: plots.plot_coverage_map(mean, 0.9, figure=f)),
        ((4.0, 1.4), lambda f: plots.plot_film({"x": mean[None]}, figure=f)),
        ((9.0, 2.5), lambda f: plots.plot_kernel(mean[None], mean, figure=f)),
    ):
        figure = Figure(figsize=size)
        draw(figure)
        for axes in figure.axes:
            for image in axes.get_images():
                assert max(image.get_array().shape[:2]) <= 1024
        save(figure)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(("b", "n", "steps", "entries"), [(1, 1, 1, 1), (2, 4096, 50, 4096)])
def test_runs_of_any_size(b, n, steps, entries):
    generator = torch.Generator().manual_seed(0)
    run = Run(
        values={"v": torch.rand(b, n, entries, generator=generator) if n * entries < 2**20 else torch.rand(b, n, 64)},
        log_w=torch.rand(b, n, generator=generator),
        log_z=torch.zeros(b),
        ess=torch.ones(steps, b),
        log_z_path=torch.zeros(steps, b),
        roots=torch.ones(steps, b),
        ancestors=torch.randint(n, (steps, b, n), generator=generator).sort(-1).values,
    )
    for draw in (
        lambda f: plots.plot_steps(run, f),
        lambda f: plots.plot_genealogy(run.ancestors[:, 0], f),
        lambda f: plots.plot_weights(run, f),
        lambda f: plots.plot_marginals(run, "v", figure=f),
    ):
        figure = Figure(figsize=(6, 4))
        draw(figure)
        save(figure)


def test_large_pictures_are_reduced_by_mean_or_by_the_extreme():
    picture = np.arange(2048.0 * 3).reshape(2048, 3)
    np.testing.assert_allclose(reduced(picture)[5], [np.mean(picture[10:12, :2]), np.mean(picture[10:12, 2])])
    assert reduced(picture, extreme=True)[5].tolist() == [picture[11, 1], picture[11, 2]]
    assert reduced(-picture, extreme=True)[5].tolist() == [-picture[11, 1], -picture[11, 2]]
    assert reduced(picture[:1024]) is picture[:1024] or np.shares_memory(reduced(picture[:1024]), picture)


#: How colours look to eyes without one kind of cone, in linear sRGB.
#: G. Machado, M. Oliveira, L. Fernandes, "A physiologically-based model for simulation of color vision deficiency"
#: (2009).
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(srgb):
    from skimage.color import rgb2lab

    return rgb2lab(np.asarray(srgb)[None])[0]


@pytest.mark.parametrize("name", ["cividis", "gray", "diverging"])
def test_colour_maps_have_even_steps(name):
    cmap = diverging() if name == "diverging" else matplotlib.colormaps[name]
    values = lab(cmap(np.linspace(0, 1, 255))[:, :3])
    steps = np.linalg.norm(np.diff(values[:: 1 if name == "diverging" else 15], axis=0), axis=1)
    assert steps.max() < (1.01 if name == "diverging" else 1.6) * steps.mean()
    lightness = values[:, 0]
    half = len(lightness) // 2 + 1
    rising = lightness if name != "diverging" else lightness[:half]
    assert (np.diff(rising) > -0.2).all()
    if name == "diverging":
        np.testing.assert_allclose(lightness, lightness[::-1], atol=0.3)


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_are_told_apart_by_colour_blind_eyes(blindness):
    def seen(srgb):
        srgb = np.asarray(srgb)
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        linear = (linear @ np.array(BLINDNESS[blindness]).T).clip(0, 1)
        return lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))

    ends = seen(diverging()(np.array([0.0, 0.25, 0.75, 1.0]))[:, :3])
    assert np.linalg.norm(ends[0] - ends[3]) > 30 and np.linalg.norm(ends[1] - ends[2]) > 15
    lines = seen([matplotlib.colors.to_rgb(c) for c in ("#0072b2", "#d55e00")])
    assert np.linalg.norm(lines[0] - lines[1]) > 30


def test_no_plot_is_left_out():
    drawn = Path(gallery.__file__).read_text()
    assert [name for name in plots.__all__ if f"p.{name}(" not in drawn] == []
