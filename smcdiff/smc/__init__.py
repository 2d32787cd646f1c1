"""Sequential Monte Carlo for any Feynman-Kac model; imports torch and nothing else of this package."""

from smcdiff.smc.checkpoint import Checkpoint, CheckpointError, CheckpointWarning, digest
from smcdiff.smc.conditional import ConditionalFeynmanKac, ConditionalSMC, Past, Path
from smcdiff.smc.evidence import error_over_chains, evidence_variance, expectation_variance
from smcdiff.smc.faults import FilterError, check
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.graph import Capture, CaptureError
from smcdiff.smc.particle_filter import FilterResult, ParticleFilter
from smcdiff.smc.records import History, Records
from smcdiff.smc.resampling import (
    ConditionalResampler,
    Killing,
    Multinomial,
    Resampler,
    Residual,
    Stratified,
    Systematic,
)
from smcdiff.smc.ssp import SSP
from smcdiff.smc.state import FilterState

__all__ = [
    "SSP",
    "Capture",
    "CaptureError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "ConditionalFeynmanKac",
    "ConditionalResampler",
    "ConditionalSMC",
    "FeynmanKac",
    "FilterError",
    "FilterResult",
    "FilterState",
    "History",
    "Killing",
    "Move",
    "Multinomial",
    "ParticleFilter",
    "Particles",
    "Past",
    "Path",
    "Records",
    "Resampler",
    "Residual",
    "Stratified",
    "Systematic",
    "check",
    "digest",
    "error_over_chains",
    "evidence_variance",
    "expectation_variance",
]
