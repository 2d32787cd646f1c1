"""The plots show the numbers they were given."""

import matplotlib

matplotlib.use("agg")

import numpy as np
import torch
from matplotlib.figure import Figure

from smcdiff.diagnostics import Run
from smcdiff.diagnostics.plots import plot_posterior, plot_steps


def test_the_panel_shows_each_picture_once():
    generator = torch.Generator().manual_seed(0)
    truth, y, mean, sd = (torch.rand(1, 5, 7, generator=generator) for _ in range(4))
    draws = torch.rand(3, 1, 5, 7, generator=generator)
    figure = Figure()
    axes = plot_posterior(mean, sd, draws, {"truth": truth, "measurement": y}, figure=figure)
    titles = ["truth", "measurement", "posterior mean", "standard deviation", "draw 1", "draw 2", "draw 3"]
    assert [a.get_title() for a in axes] == titles
    for a, expected in zip(axes, [truth, y, mean, sd, *draws], strict=True):
        (shown,) = a.get_images()
        np.testing.assert_allclose(shown.get_array(), expected[0], rtol=1e-6)
        if a.get_title() == "standard deviation":
            assert shown.get_clim()[0] == 0 and shown.cmap.name == "cividis" and shown.colorbar is not None
        else:
            assert shown.get_clim() == (-1, 1) and shown.cmap.name == "gray"
    figure.savefig("/dev/null", format="png")


def test_a_panel_without_a_figure_opens_one():
    from matplotlib import pyplot

    axes = plot_posterior(torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(0, 4, 4))
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
    )
    counts, evidence = plot_steps(run, Figure())
    shown = [line.get_ydata().tolist() for line in counts.get_lines()]
    assert shown == [[10, 4, 5], [10, 6, 3], [10, 10, 7], [10, 10, 4]]
    assert [line.get_ydata().tolist() for line in evidence.get_lines()] == [[0, -1, -3], [0, -2, -5]]
    assert [line.get_xdata().tolist() for line in evidence.get_lines()] == [[0, 1, 2]] * 2
    assert [text.get_text() for text in counts.get_legend().get_texts()] == ["effective sample size", "surviving roots"]
