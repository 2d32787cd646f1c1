"""Pictures of a result. Every function draws into a figure it is given, or a new one, and returns the axes.

Grey pictures share one scale. Everything else is coloured for colour-blind eyes and in steps that look equal:
"cividis" for what is positive, a blue-white-orange map with even steps in CIELAB for what has a sign, and the colours
of Okabe and Ito for lines. Pictures of more than a thousand pixels along a side are reduced to what a screen can show.
"""

from smcdiff.diagnostics.plots.calibration import (
    plot_coverage,
    plot_coverage_map,
    plot_ecdf,
    plot_sbc,
    plot_tarp,
)
from smcdiff.diagnostics.plots.pictures import plot_film, plot_kernel, plot_posterior, plot_zscore
from smcdiff.diagnostics.plots.runs import (
    plot_evidence,
    plot_genealogy,
    plot_marginals,
    plot_steps,
    plot_weights,
)

__all__ = [
    "plot_coverage",
    "plot_coverage_map",
    "plot_ecdf",
    "plot_evidence",
    "plot_film",
    "plot_genealogy",
    "plot_kernel",
    "plot_marginals",
    "plot_posterior",
    "plot_sbc",
    "plot_steps",
    "plot_tarp",
    "plot_weights",
    "plot_zscore",
]
