"""Exact answers for Gaussian priors, written from the laws themselves rather than from the library's formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.schedule import NoiseLevel


def example_covariance(d: int, seed: int = 0) -> Tensor:
    """A correlated covariance of dimension d with eigenvalues from 0.2 to 2."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    covariance = basis @ torch.linspace(0.2, 2.0, d, dtype=torch.float64).diag() @ basis.T
    return (covariance + covariance.T) / 2


def conditional(mean: Tensor, covariance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the first block of a joint normal given that its last block is ``known``."""
    d = len(mean) - len(known)
    gain = torch.linalg.solve(covariance[d:, d:], covariance[d:, :d]).T
    return mean[:d] + gain @ (known - mean[d:]), covariance[:d, :d] - gain @ covariance[d:, :d]


def clean_given_noisy(mean: Tensor, covariance: Tensor, level: NoiseLevel, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 given x_t for x_0 ~ N(mean, covariance), by conditioning their joint normal."""
    cross = level.alpha * covariance
    noisy = level.alpha**2 * covariance + level.sigma**2 * torch.eye(len(mean), dtype=mean.dtype)
    joint = torch.cat([torch.cat([covariance, cross], 1), torch.cat([cross, noisy], 1)])
    return conditional(torch.cat([mean, level.alpha * mean]), joint, x_t)


def bridge(t: NoiseLevel, s: NoiseLevel) -> tuple[float, float, float, float]:
    """q(x_s given x_t, x_0) = N(b x_t + c x_0, small) and q(x_t given x_s) = N(r x_s, large): b, c, small, large.

    By Bayes' rule: x_s has the prior N(alpha_s x_0, sigma_s^2) and is seen through x_t = r x_s + noise.
    """
    r = t.alpha / s.alpha
    large = t.sigma**2 - r**2 * s.sigma**2
    if s.sigma == 0:
        return 0.0, 1.0, 0.0, large
    small = 1 / (1 / s.sigma**2 + r**2 / large)
    return small * r / large, small * s.alpha / s.sigma**2, small, large


def chain_law(mean: Tensor, covariance: Tensor, levels: tuple[NoiseLevel, ...], variance: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 under an ancestral chain with the exact denoiser of N(mean, covariance)."""
    d = len(mean)
    eye = torch.eye(d, dtype=mean.dtype)
    top = levels[-1]
    m, P = torch.zeros_like(mean), (top.alpha**2 + top.sigma**2) * eye
    for k in range(len(levels) - 1, 0, -1):
        t, s = levels[k], levels[k - 1]
        b, c, small, large = bridge(t, s)
        gain = t.alpha * covariance @ torch.linalg.inv(t.alpha**2 * covariance + t.sigma**2 * eye)
        _, within = clean_given_noisy(mean, covariance, t, mean)
        step = {
            "posterior": small,
            "fixed_large": large if s.sigma > 0 else 0.0,
            "optimal": small + c**2 * float(within.trace()) / d,
        }[variance]
        map_ = b * eye + c * gain
        m = map_ @ m + c * (mean - t.alpha * gain @ mean)
        P = map_ @ P @ map_.T + step * eye
    return m, P


def library_law(chain: ReverseChain, m: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 under ``chain``, started at N(m, P), for a denoiser affine in x_t.

    The affine maps are read off the chain's own transitions at the origin and at the unit vectors.
    """
    probes = torch.cat([torch.zeros_like(m)[None], torch.eye(len(m), dtype=m.dtype)])
    for k in range(chain.num_steps, 0, -1):
        law = chain.transition(k, probes, chain.estimate(k, probes))
        offset, map_ = law.mean[0], (law.mean[1:] - law.mean[0]).T
        noise = torch.zeros_like(P)
        if law.variance is not None:
            noise = law.variance.expand(probes.shape)[0].diag()
        m, P = map_ @ m + offset, map_ @ P @ map_.T + noise
    return m, P


def assert_normal_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Mean and second moment of independent draws (number, d) of N(mean, covariance), d at most 4.

    Whitened by the truth, each mean is N(0, 1 / n): beyond 6 of its deviations with probability 2e-9. The second
    moment along any direction is chi-squared over n, and with x = 16 it leaves 1 +- (2 sqrt(x / n) + 2 x / n) with
    probability at most 2 exp(-16) = 2.3e-7 (Laurent and Massart, Annals of Statistics 2000, lemma 1); an off-diagonal
    entry is half the difference of two of these. With 4 means, 4 diagonal and 6 off-diagonal entries the test fails by
    chance with probability at most 4e-6.
    """
    n, d = draws.shape
    assert d <= 4
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).T, upper=False).T
    assert (white.mean(0).abs() <= 6 / math.sqrt(n)).all(), white.mean(0)
    second = white.T @ white / n - torch.eye(d, dtype=draws.dtype)
    bound = 2 * math.sqrt(16 / n) + 2 * 16 / n
    assert (second.abs() <= bound).all(), second
