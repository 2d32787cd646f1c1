"""What a run is worth, in numbers, words and pictures, and as an ArviZ object.

Nothing here imports ArviZ or Matplotlib until it is used: :mod:`smcdiff.diagnostics.arviz` and
:mod:`smcdiff.diagnostics.plots` are imported by name.
"""

from smcdiff.diagnostics.decisions import (
    PixelDeparture,
    RegionDeparture,
    defect_probability,
    program_probabilities,
    reliability,
)
from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.summary import summarise
from smcdiff.diagnostics.verdict import Diagnostics, Finding, diagnose
from smcdiff.diagnostics.weights import effective_sample_size, entropy, pareto_k, perplexity, tempered

__all__ = [
    "Diagnostics",
    "Finding",
    "PixelDeparture",
    "RegionDeparture",
    "Run",
    "defect_probability",
    "diagnose",
    "effective_sample_size",
    "entropy",
    "pareto_k",
    "perplexity",
    "program_probabilities",
    "reliability",
    "summarise",
    "tempered",
]
