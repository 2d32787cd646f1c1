"""Sequential Monte Carlo for any Feynman-Kac model; imports torch and nothing else of this package."""

from smcdiff.smc.faults import FilterError, check
from smcdiff.smc.feynman_kac import FeynmanKac, Move, Particles
from smcdiff.smc.particle_filter import FilterResult, ParticleFilter
from smcdiff.smc.records import History, Records
from smcdiff.smc.resampling import Resampler, Systematic
from smcdiff.smc.state import FilterState

__all__ = [
    "FeynmanKac",
    "FilterError",
    "FilterResult",
    "FilterState",
    "History",
    "Move",
    "ParticleFilter",
    "Particles",
    "Records",
    "Resampler",
    "Systematic",
    "check",
]
