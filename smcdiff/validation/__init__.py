"""Can the posterior of a program be trusted? Studies that need the program itself.

The statistics they end in are functions of plain tensors, in :mod:`smcdiff.diagnostics`.
"""

from smcdiff.validation.posteriors import Posterior, PosteriorDraws, SMCPosterior
from smcdiff.validation.predictive import MeasurementSplit, predictive_check, split_measurement
from smcdiff.validation.score import posterior_score, stein_discrepancy
from smcdiff.validation.study import CalibrationStudy, StudyError

__all__ = [
    "CalibrationStudy",
    "MeasurementSplit",
    "Posterior",
    "PosteriorDraws",
    "SMCPosterior",
    "StudyError",
    "posterior_score",
    "predictive_check",
    "split_measurement",
    "stein_discrepancy",
]
