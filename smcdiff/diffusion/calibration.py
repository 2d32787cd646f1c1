r"""Calibration: how wrong a denoiser is, per noise level and frequency, measured once.

On clean pictures x_0 with x_t = alpha_t x_0 + sigma_t eps, the residual x_0 - x0_hat(x_t) has mean square v_t in each
coordinate of an orthonormal basis: the spectral covariance of x_0 given x_t, averaged over pictures. One network
evaluation per picture and level. The report says how far the residuals are from what the covariance takes them for,
normal and alike in every picture and place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.covariance_models import BASES, SpectralBasis, SpectralCovariance, check_basis
from smcdiff.diffusion.smoothing import smoothed

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A measured spectral covariance, and how well residuals fit it, level by level from the least noisy.

    With r = V^T (x_0 - x0_hat) / sqrt(v), of d coordinates:

    Args:
        covariance: what was measured.
        ratios: sigma_t / alpha_t of the levels, (levels,).
        excess_kurtosis: mean of r^4, minus 3: 0 where residuals are normal, (levels,).
        picture_spread: variance over pictures of |r|^2 / d, over the 2 / d it has where residuals are normal and every
            picture is as uncertain as every other: 1 then, large where some pictures are much harder, (levels,).
        pixel_spread: relative standard deviation over the picture of the pixels' mean squared residual, sampling error
            taken off: 0 where every place is as uncertain as every other, (levels,).
        num_images: how many pictures it was measured on.
    """

    covariance: SpectralCovariance
    ratios: Tensor
    excess_kurtosis: Tensor
    picture_spread: Tensor
    pixel_spread: Tensor
    num_images: int

    def __str__(self) -> str:
        lines = [
            f"spectral covariance ({self.covariance.basis_name}) from {self.num_images} pictures",
            "sigma/alpha   mean variance   excess kurtosis   picture spread   pixel spread",
        ]
        means = self.covariance.table.variances.flatten(1).mean(1)
        for row in zip(self.ratios, means, self.excess_kurtosis, self.picture_spread, self.pixel_spread, strict=True):
            ratio, mean, kurtosis, picture, pixel = (float(value) for value in row)
            lines.append(f"{ratio:11.4g}   {mean:13.4g}   {kurtosis:15.2f}   {picture:14.1f}   {pixel:12.2f}")
        return "\n".join(lines)


#: Added to the seed, so that pictures drawn with the same seed are not made of the same numbers as their noise.
_STREAM = 1_618_033


@torch.no_grad()
def calibrate(
    chain: ReverseChain,
    images: Tensor,
    *,
    basis: SpectralBasis = "dct",
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> Calibration:
    """Measure the spectral covariance of a chain's denoiser at the chain's levels.

    Neighbouring coordinates are averaged as far as sampling noise asks for it
    (:mod:`smcdiff.diffusion.smoothing`), and a coordinate never seen to vary keeps a variance above zero.

    Args:
        images: clean pictures the network was not trained on, or draws from the chain, (number, *event).
        basis: "dct", "fft" or "pixels".
        seed: of the noise.
        batch: pictures put through the network at once.
        progress: show a progress bar.

    Raises:
        ValueError: for fewer than two pictures, pictures of another shape or not finite, or an unknown basis.
    """
    denoiser = chain.denoiser
    if images.shape[1:] != denoiser.event_shape or len(images) < 2:
        raise ValueError(
            f"got images of shape {tuple(images.shape)}; expected two or more, (number, *{tuple(denoiser.event_shape)})"
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError("got images with NaN or infinite values; leave them out")
    if basis not in BASES:
        raise ValueError(f"got the basis {basis!r}; expected one of {sorted(BASES)}")
    check_basis(basis, denoiser.event_shape)
    to_spectral = BASES[basis].to_spectral
    images = images.to(denoiser.device, denoiser.dtype)
    generator = torch.Generator(images.device).manual_seed(_STREAM + seed)
    # the same noise at all levels, so that their sampling errors go together and neighbouring levels agree
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    single = chain.expand(())
    tables, kurtoses, pictures, pixels = [], [], [], []
    for level in tqdm(chain.levels[1:], desc="calibrating", unit="level", disable=not progress, leave=False):
        noisy = level.alpha * images + level.sigma * noise
        residual = torch.cat(
            [part - single.denoise(x, level) for part, x in zip(images.split(batch), noisy.split(batch), strict=True)]
        ).double()
        r = to_spectral(residual).square()
        measured = r.mean(0).clamp(min=1e-9 * float(r.mean()) + torch.finfo(r.dtype).tiny ** 0.5)
        variance = smoothed(measured[None], len(r), BASES[basis])[0]
        tables.append(variance.cpu())
        standard = r / measured
        # of n normal values the mean of r^4 over the square of the mean of r^2 is 3 n / (n + 2), not 3
        small = (len(r) + 2) / len(r)
        kurtoses.append(float(small * standard.square().mean() - 3))
        d = standard[0].numel()
        pictures.append(float(small * standard.flatten(1).mean(1).var() * d / 2))
        squares = residual.square()
        place = squares.mean(0)
        sampling = squares.var(0) / len(squares)
        pixels.append(float(((place.var() - sampling.mean()).clamp(min=0)).sqrt() / place.mean()))
    ratios = torch.tensor([level.ratio for level in chain.levels[1:]], dtype=torch.float64)
    return Calibration(
        SpectralCovariance(torch.stack(tables), basis, ratios),
        ratios,
        torch.tensor(kurtoses),
        torch.tensor(pictures),
        torch.tensor(pixels),
        len(images),
    )
