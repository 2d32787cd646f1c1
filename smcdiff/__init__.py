"""Posteriors with diffusion priors: Pyro programs, guided proposals and one particle filter.

A pretrained diffusion model is a Pyro distribution; an ordinary Pyro program around it says what was measured; a
particle filter with guided proposals gives the posterior, its evidence, and diagnostics of both::

    import pyro, smcdiff as sd

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", sd.GaussianMeasurement(blur, x, 0.1), obs=y)

    smc = sd.SMC(sd.TDS(model), num_particles=64, num_chains=4).run(y)
"""

from smcdiff.diffusion.analytic import (
    EmpiricalDenoiser,
    GaussianDenoiser,
    GaussianFieldDenoiser,
    GaussianMixtureDenoiser,
)
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.conditioning import ClassifierFree, ClassifierGuided
from smcdiff.diffusion.covariance_models import IsotropicCovariance, JacobianCovariance, SpectralCovariance
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
from smcdiff.diffusion.free_hunch import FreeHunchCovariance
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import (
    CosineSchedule,
    FlowSchedule,
    KarrasGrid,
    LeadingGrid,
    LinspaceGrid,
    LogGrid,
    NoiseLevel,
    SinhGrid,
    TabulatedSchedule,
    TrailingGrid,
    VESchedule,
    VPSchedule,
)
from smcdiff.diffusion.start import Start
from smcdiff.diffusion.symmetric import SymmetricDenoiser
from smcdiff.diffusion.variance_head import HeteroscedasticCovariance, VarianceHead, fit_variance_head
from smcdiff.guidance.adapted import Adapted
from smcdiff.guidance.auto import Choice, auto
from smcdiff.guidance.blind_dps import BlindDPS, ConstantStep, KernelNorm, SignalStep, normalised_kernel
from smcdiff.guidance.bootstrap import Bootstrap
from smcdiff.guidance.conditional import Conditional
from smcdiff.guidance.conjugate_gradients import ConjugateGradients
from smcdiff.guidance.ddnm import BODDNM, DDNM, DDNMPlus
from smcdiff.guidance.ddrm import DDRM
from smcdiff.guidance.ddsmc import DDSMC
from smcdiff.guidance.diffpir import DiffPIR
from smcdiff.guidance.dmps import DMPS, DMPSTwist
from smcdiff.guidance.dps import DPS
from smcdiff.guidance.fps import FPS
from smcdiff.guidance.gdp import GDP
from smcdiff.guidance.ilvr import ILVR
from smcdiff.guidance.latents import UnmappablePrior
from smcdiff.guidance.marginal import Marginalised
from smcdiff.guidance.mcgdiff import MCGDiff
from smcdiff.guidance.mmps import MMPS, MMPSTwist
from smcdiff.guidance.pigdm import PiGDM, PiGDMTwist
from smcdiff.guidance.potentials import Difference, Max, Sum
from smcdiff.guidance.repaint import RePaint
from smcdiff.guidance.replacement import Replacement
from smcdiff.guidance.reward import FeynmanKacSteering, RewardTwist, black_box
from smcdiff.guidance.tds import TDS
from smcdiff.guidance.tempered import TemperedTwist, tempered
from smcdiff.guidance.tilted import Tilted
from smcdiff.guidance.time_travel import TimeTravel
from smcdiff.guidance.tmpd import TMPD, TMPDTwist
from smcdiff.guidance.twists import PointTwist, TweedieTwist, WidenedTwist
from smcdiff.guidance.unroll import unroll
from smcdiff.infer import SMC, WeightedSamples
from smcdiff.measurement import (
    AstigmaticPSF,
    Blur,
    Circular,
    Compose,
    DefocusPSF,
    Downsample,
    FourierMagnitude,
    FourierSampling,
    GaussianMeasurement,
    GaussianPSF,
    Grey,
    Identity,
    LaplaceMeasurement,
    LogNormalMeasurement,
    Mask,
    Matrix,
    MixedMeasurement,
    MotionPSF,
    PoissonMeasurement,
    Radon,
    Reflective,
    Select,
    SimplexKernel,
    ZernikePSF,
    Zero,
    as_linear,
    as_operator,
    astigmatic_psf,
    defocus_psf,
    gaussian_psf,
    motion_psf,
    stigmator_psf,
    zernike_psf,
)
from smcdiff.moves import MarginalMH, ParticleGibbs
from smcdiff.smc import FilterError, ParticleFilter, Records
from smcdiff.smc.distributed import ChainsOverRanks, OfWeights, ParticlesOverRanks
from smcdiff.smc.ranks import RankError
from smcdiff.state_space import StateSpaceModel
from smcdiff.validation import (
    CalibrationStudy,
    MeasurementSplit,
    PosteriorDraws,
    SMCPosterior,
    StudyError,
    posterior_score,
    predictive_check,
    split_measurement,
    stein_discrepancy,
)
from smcdiff.zoo import load_prior

__version__ = "0.1.0"

__all__ = [
    "BODDNM",
    "DDNM",
    "DDRM",
    "DDSMC",
    "DMPS",
    "DPS",
    "FPS",
    "GDP",
    "ILVR",
    "MMPS",
    "SMC",
    "TDS",
    "TMPD",
    "Adapted",
    "AstigmaticPSF",
    "BlindDPS",
    "Blur",
    "Bootstrap",
    "CalibrationStudy",
    "ChainsOverRanks",
    "Choice",
    "Circular",
    "ClassifierFree",
    "ClassifierGuided",
    "Compose",
    "Conditional",
    "ConjugateGradients",
    "ConstantStep",
    "CosineSchedule",
    "DDNMPlus",
    "DMPSTwist",
    "DefocusPSF",
    "Denoiser",
    "DiffPIR",
    "Difference",
    "DiffusionPrior",
    "Downsample",
    "EmpiricalDenoiser",
    "Estimate",
    "FeynmanKacSteering",
    "FilterError",
    "FlowSchedule",
    "FourierMagnitude",
    "FourierSampling",
    "FreeHunchCovariance",
    "GaussianDenoiser",
    "GaussianFieldDenoiser",
    "GaussianMeasurement",
    "GaussianMixtureDenoiser",
    "GaussianPSF",
    "Grey",
    "HeteroscedasticCovariance",
    "Identity",
    "IsotropicCovariance",
    "JacobianCovariance",
    "KarrasGrid",
    "KernelNorm",
    "LaplaceMeasurement",
    "LeadingGrid",
    "LinspaceGrid",
    "LogGrid",
    "LogNormalMeasurement",
    "MCGDiff",
    "MMPSTwist",
    "MarginalMH",
    "Marginalised",
    "Mask",
    "Matrix",
    "Max",
    "MeasurementSplit",
    "MixedMeasurement",
    "MotionPSF",
    "NetworkDenoiser",
    "NoiseLevel",
    "OfWeights",
    "ParticleFilter",
    "ParticleGibbs",
    "ParticlesOverRanks",
    "PiGDM",
    "PiGDMTwist",
    "PointTwist",
    "PoissonMeasurement",
    "PosteriorDraws",
    "Radon",
    "RankError",
    "RePaint",
    "Records",
    "Reflective",
    "Replacement",
    "ReverseChain",
    "RewardTwist",
    "SMCPosterior",
    "Select",
    "SignalStep",
    "SimplexKernel",
    "SinhGrid",
    "SpectralCovariance",
    "Start",
    "StateSpaceModel",
    "StudyError",
    "Sum",
    "SymmetricDenoiser",
    "TMPDTwist",
    "TabulatedSchedule",
    "TemperedTwist",
    "Tilted",
    "TimeTravel",
    "TrailingGrid",
    "TweedieTwist",
    "UnmappablePrior",
    "VESchedule",
    "VPSchedule",
    "VarianceHead",
    "WeightedSamples",
    "WidenedTwist",
    "WithVariance",
    "ZernikePSF",
    "Zero",
    "as_linear",
    "as_operator",
    "astigmatic_psf",
    "auto",
    "black_box",
    "defocus_psf",
    "fit_variance_head",
    "from_clean",
    "from_epsilon",
    "from_flow",
    "from_velocity",
    "gaussian_psf",
    "load_prior",
    "motion_psf",
    "normalised_kernel",
    "posterior_score",
    "predictive_check",
    "split_measurement",
    "stein_discrepancy",
    "stigmator_psf",
    "tempered",
    "unroll",
    "zernike_psf",
]
