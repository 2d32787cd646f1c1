"""Posteriors with diffusion priors: Pyro programs, guided proposals and one particle filter.

A pretrained diffusion model is a Pyro distribution; an ordinary Pyro program around it says what was measured; a
particle filter with guided proposals gives the posterior, its evidence, and diagnostics of both::

    import pyro, smcdiff as sd

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(blur, x, 0.1), obs=y)

    smc = sd.SMC(sd.TDS(model), num_particles=64, num_chains=4).run(y)
"""

from smcdiff.diffusion.analytic import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.denoiser import (
    Denoiser,
    Estimate,
    NetworkDenoiser,
    WithVariance,
    from_clean,
    from_epsilon,
    from_flow,
    from_velocity,
)
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import (
    CosineSchedule,
    FlowSchedule,
    KarrasGrid,
    LeadingGrid,
    LinspaceGrid,
    LogGrid,
    NoiseLevel,
    TabulatedSchedule,
    TrailingGrid,
    VESchedule,
    VPSchedule,
)
from smcdiff.guidance.bootstrap import Bootstrap
from smcdiff.guidance.dps import DPS
from smcdiff.guidance.latents import UnmappablePrior
from smcdiff.guidance.tds import TDS
from smcdiff.guidance.tempered import TemperedTwist, tempered
from smcdiff.guidance.twists import PointTwist, TweedieTwist, WidenedTwist
from smcdiff.guidance.unroll import unroll
from smcdiff.infer import SMC, WeightedSamples
from smcdiff.measurement import (
    Blur,
    Circular,
    Compose,
    Downsample,
    FourierMagnitude,
    FourierSampling,
    GaussianMeasurement,
    Grey,
    Identity,
    Mask,
    Matrix,
    PoissonMeasurement,
    Radon,
    Select,
    Zero,
    as_linear,
    as_operator,
)
from smcdiff.moves import MarginalMH, ParticleGibbs
from smcdiff.smc import FilterError, ParticleFilter, Records
from smcdiff.state_space import StateSpaceModel
from smcdiff.zoo import load_prior

__version__ = "0.1.0"

__all__ = [
    "DPS",
    "SMC",
    "TDS",
    "Blur",
    "Bootstrap",
    "Circular",
    "Compose",
    "CosineSchedule",
    "Denoiser",
    "DiffusionPrior",
    "Downsample",
    "EmpiricalDenoiser",
    "Estimate",
    "FilterError",
    "FlowSchedule",
    "FourierMagnitude",
    "FourierSampling",
    "GaussianDenoiser",
    "GaussianMeasurement",
    "GaussianMixtureDenoiser",
    "Grey",
    "Identity",
    "KarrasGrid",
    "LeadingGrid",
    "LinspaceGrid",
    "LogGrid",
    "MarginalMH",
    "Mask",
    "Matrix",
    "NetworkDenoiser",
    "NoiseLevel",
    "ParticleFilter",
    "ParticleGibbs",
    "PointTwist",
    "PoissonMeasurement",
    "Radon",
    "Records",
    "ReverseChain",
    "Select",
    "StateSpaceModel",
    "TabulatedSchedule",
    "TemperedTwist",
    "TrailingGrid",
    "TweedieTwist",
    "UnmappablePrior",
    "VESchedule",
    "VPSchedule",
    "WeightedSamples",
    "WidenedTwist",
    "WithVariance",
    "Zero",
    "as_linear",
    "as_operator",
    "from_clean",
    "from_epsilon",
    "from_flow",
    "from_velocity",
    "load_prior",
    "tempered",
    "unroll",
]
