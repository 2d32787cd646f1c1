r"""Twisting functions: log psi_t(x_t), an approximation of log p(y given x_t).

Any positive psi_t leaves the filter exact in the limit of many particles, with an unbiased evidence for any number; a
good one keeps the weights even. At t = 0 the likelihood itself takes its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from smcdiff.guidance.base import Prediction
from smcdiff.guidance.program import not_gaussian
from smcdiff.measurement.noise import gaussian_moments

__all__ = ["PointTwist", "TweedieTwist", "WidenedTwist"]


@dataclass(frozen=True)
class PointTwist:
    """psi_t(x_t) = p(y given x_0 = x0_hat(x_t)): the published twist. Takes any likelihood.

    References:
        L. Wu, B. Trippe, C. Naesseth, D. Blei, J. Cunningham, "Practical and Asymptotically Exact Conditional
        Sampling in Diffusion Models" (2023), arXiv 2306.17775, eq. 8.
    """

    def log_psi(self, prediction: Prediction) -> Tensor:
        return prediction.program.log_prob(prediction.x0_hat)


@dataclass(frozen=True)
class WidenedTwist:
    """psi_t(x_t) = N(y; A(x0_hat), sigma_y^2 + c (sigma_t / alpha_t)^2): the point twist, less sure at high noise.

    Args:
        c: how much of the noise's variance reaches the measurement, at least 0; 1 for an operator of gain one.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise ValueError(f"got c = {self.c}; expected at least 0, where 0 is the point twist")

    def log_psi(self, prediction: Prediction) -> Tensor:
        extra = self.c * prediction.ratio**2

        def score(name: str, fn: Distribution, y: Tensor) -> Tensor:
            noise = gaussian_moments(fn)
            if noise is None:
                raise not_gaussian("the widened twist", name, fn)
            variance = noise.variance + extra
            return -0.5 * ((y - noise.loc) ** 2 / variance + variance.log() + math.log(2 * math.pi))

        return prediction.program.log_prob(prediction.x0_hat, score)


@dataclass(frozen=True)
class TweedieTwist:
    r"""psi_t(x_t) = N(y; A(x0_hat), J C_t J^T + sigma_y^2 I),  C_t = (sigma_t^2 / alpha_t) d x0_hat / d x_t.

    C_t is the exact covariance of x_0 given x_t (Tweedie), J the derivative of the measurement's mean with respect to
    the latents at x0_hat: the operator's matrix where it is linear, a linearisation of the program elsewhere. All
    latents enter, the exactly known variance of the standard normal ones included. It takes one vector-Jacobian
    product of the network per measured value; through the covariance no gradient is taken. Of a network's J C_t J^T,
    which need not be symmetric, the symmetric positive semi-definite part is taken.

    Args:
        max_measurements: largest number of measured values accepted.

    Raises:
        TypeError: where a law is not Gaussian.
        ValueError: for more measured values than ``max_measurements``.

    References:
        B. Boys, M. Girolami, J. Pidstrigach, S. Reich, A. Mosca, O. Akyildiz, "Tweedie Moment Projected Diffusions for
        Inverse Problems" (2023), arXiv 2310.06721, eq. 8 and 10.
    """

    max_measurements: int = 64

    def log_psi(self, prediction: Prediction) -> Tensor:
        x, x0_hat = prediction.x, prediction.x0_hat
        count = sum(value.numel() for value in prediction.program.observed.values())
        if count > self.max_measurements:
            raise ValueError(
                f"got {count} measured values; the Tweedie twist needs a pass through the network for each and takes "
                f"at most {self.max_measurements}. Use sd.WidenedTwist() for pictures"
            )
        with torch.enable_grad():
            y, mean, precision = prediction.program.moments(x0_hat, "the Tweedie twist")
            by_state = _jacobian(mean, x)
            by_clean = _jacobian(mean, x0_hat)
        covariance = mean.new_zeros(1, count, count)
        for name, latent in prediction.program.latents.items():
            if name in prediction.program.held:
                continue  # known, so without variance
            level = latent.chain.levels[prediction.k]
            gain = level.sigma**2 / level.alpha  # 2310.06721, eq. 8: C_t = gain * d x0_hat / d x_t
            covariance = covariance + gain * by_state[name] @ by_clean[name].mT  # (m, dim y, dim y)
        noise = 1 / precision.clamp(min=torch.finfo(precision.dtype).tiny ** 0.5).double()
        root = torch.linalg.cholesky_ex(_positive_part(covariance.detach().double()) + noise.diag_embed()).L
        z = torch.linalg.solve_triangular(root, (y - mean).double()[..., None], upper=False)[..., 0]
        return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _positive_part(matrices: Tensor) -> Tensor:
    """(S + |S|) / 2 with S the symmetric parts of square matrices (m, d, d); eigenvalues below zero become zero.

    |S| = S sign(S), and sign(S) comes from Newton-Schulz iterations x <- a x (3 - a^2 x^2) / 2, which unlike an
    eigendecomposition do not wait for the device. The factor a >= 1 makes eigenvalues, known to lie between ``low`` and
    1, grow the faster the smaller they can be; eigenvalues under 1e-12 of the largest are left as small as they are.

    References:
        N. Higham, "Functions of Matrices", SIAM (2008), chapter 5: the iteration without the factor.
    """
    symmetric = 0.5 * (matrices + matrices.mT)
    size = torch.linalg.matrix_norm(symmetric, keepdim=True)
    x = symmetric / size.clamp(min=torch.finfo(size.dtype).tiny)
    low = 1e-12
    while low < 1 - 1e-12:
        a = min(1.65, math.sqrt(3 / (1 + low + low**2)))  # the best one is the root, which at low = 0 maps 1 to 0
        x = 1.5 * a * x - 0.5 * a**3 * x @ x @ x
        low = min(0.5 * a * end * (3 - (a * end) ** 2) for end in (low, 1.0))
    positive = 0.5 * (symmetric + symmetric @ x)
    return 0.5 * (positive + positive.mT)


def _jacobian(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """d output[:, i] / d input of each particle: {site: (m, outputs, d)}."""
    tensors = list(inputs.values())
    rows = [
        torch.autograd.grad(output[:, i].sum(), tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        for i in range(output.shape[1])
    ]
    return {
        name: torch.stack([row[site].reshape(len(output), -1) for row in rows], 1) for site, name in enumerate(inputs)
    }
