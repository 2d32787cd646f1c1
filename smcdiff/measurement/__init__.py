"""Measurement operators, and the noise laws of what they measure."""

from smcdiff.measurement.blur import Blur, Circular, Padding, Reflective, Zero
from smcdiff.measurement.compose import (
    Compose,
    Composition,
    Function,
    LinearComposition,
    LinearFunction,
    as_linear,
    as_operator,
)
from smcdiff.measurement.continuous import LaplaceMeasurement, LogNormalMeasurement, MixedMeasurement
from smcdiff.measurement.distributions import GaussianMeasurement, Measurement, PoissonMeasurement
from smcdiff.measurement.fourier import FourierMagnitude, FourierSampling
from smcdiff.measurement.linear import Downsample, Grey, Identity, Mask, Matrix, Select
from smcdiff.measurement.noise import Moments, gaussian_moments, poisson_moments
from smcdiff.measurement.operators import (
    LinearOperator,
    Operator,
    SpectralOperator,
    TransposeOperator,
    require_linear,
    require_svd,
)
from smcdiff.measurement.physics import LinearPhysics, Physics
from smcdiff.measurement.psf import (
    astigmatic_psf,
    defocus_psf,
    gaussian_psf,
    motion_psf,
    stigmator_psf,
    zernike_psf,
)
from smcdiff.measurement.psf_priors import (
    AstigmaticPSF,
    DefocusPSF,
    GaussianPSF,
    KernelPrior,
    MotionPSF,
    SimplexKernel,
    ZernikePSF,
)
from smcdiff.measurement.radon import Radon
from smcdiff.measurement.svd import SVD

__all__ = [
    "SVD",
    "AstigmaticPSF",
    "Blur",
    "Circular",
    "Compose",
    "Composition",
    "DefocusPSF",
    "Downsample",
    "FourierMagnitude",
    "FourierSampling",
    "Function",
    "GaussianMeasurement",
    "GaussianPSF",
    "Grey",
    "Identity",
    "KernelPrior",
    "LaplaceMeasurement",
    "LinearComposition",
    "LinearFunction",
    "LinearOperator",
    "LinearPhysics",
    "LogNormalMeasurement",
    "Mask",
    "Matrix",
    "Measurement",
    "MixedMeasurement",
    "Moments",
    "MotionPSF",
    "Operator",
    "Padding",
    "Physics",
    "PoissonMeasurement",
    "Radon",
    "Reflective",
    "Select",
    "SimplexKernel",
    "SpectralOperator",
    "TransposeOperator",
    "ZernikePSF",
    "Zero",
    "as_linear",
    "as_operator",
    "astigmatic_psf",
    "defocus_psf",
    "gaussian_moments",
    "gaussian_psf",
    "motion_psf",
    "poisson_moments",
    "require_linear",
    "require_svd",
    "stigmator_psf",
    "zernike_psf",
]
