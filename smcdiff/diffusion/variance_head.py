r"""Uncertainty that depends on the picture: a small network that rescales a calibrated covariance.

A calibrated covariance C_t = V diag(v_t) V^T is the same for all pictures of a noise level. Here a head, a few thousand
parameters beside the frozen denoiser, looks at x_t and x0_hat(x_t) and gives s(x_t), the logarithm of a factor on v_t:

    cosines, Fourier    C_t(x_t) = V diag(v_t exp(s_ring(x_t))) V^T     one factor per ring of frequency
    pixels              C_t(x_t) = diag(v_t exp(s(x_t)))                one factor per pixel

Either is diagonal in the basis of the calibration, one diagonal per particle, so all that is elementwise stays so.
(Conjugate gradients, which prepare their systems once for all particles, do not take them.) The head is fitted to the
likelihood of residuals r = V^T (x_0 - x0_hat), the denoiser left as it is: it minimises the mean of

    1/2 sum_i (r_i^2 exp(-s_i) / v_i + s_i),

whose minimum over functions of x_t is v_i exp(s_i) = E[r_i^2 given x_t], averaged over a ring. An untrained head gives
s = 0, the calibrated covariance itself.

References:
    D. Nix, A. Weigend, "Estimating the mean and variance of the target probability distribution" (1994): a variance
    fitted by the residual's likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.covariance import Diagonal
from smcdiff.diffusion.covariance_models import Parts, SpectralCovariance
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel

__all__ = ["FittedHead", "HeteroscedasticCovariance", "VarianceHead", "fit_variance_head"]

_LARGEST = 4.0  # of |s|


class VarianceHead(nn.Module):
    """s, the logarithm of the factor on the calibrated variances.

    Args:
        channels: of the pictures.
        rings: number of factors; None for one per pixel.
        width: of the layers.
    """

    def __init__(self, channels: int, rings: int | None, width: int = 16) -> None:
        super().__init__()
        self.channels, self.rings, self.width = channels, rings, width
        self.trunk = nn.Sequential(
            nn.Conv2d(2 * channels + 1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.SiLU(),
        )
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, channels if rings is None else rings)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x0_hat: Tensor, noise: Tensor, log_ratio: Tensor) -> Tensor:
        """s, (m, rings) or (m, channels, rows, columns).

        Args:
            x0_hat: (m, channels, rows, columns).
            noise: the noise that x0_hat leaves in x_t, (x_t - alpha x0_hat) / sigma, of the same shape.
            log_ratio: log(sigma / alpha), (m,).
        """
        level = (log_ratio / 5)[:, None, None, None].expand(-1, 1, *x0_hat.shape[-2:])
        features = self.trunk(torch.cat([x0_hat, noise.asinh(), level], 1)).movedim(1, -1)
        if self.rings is not None:
            features = features.mean((1, 2))
        found: Tensor = self.last(nn.functional.silu(self.middle(features)))
        found = found if self.rings is not None else found.movedim(-1, 1)
        return _LARGEST * torch.tanh(found / _LARGEST)


@final
@dataclass(frozen=True, eq=False)
class HeteroscedasticCovariance:
    """C_t(x_t) = V diag(v_t exp(s(x_t))) V^T.

    Args:
        base: v_t and V.
        head: s; with rings for cosines and Fourier, without for pixels.

    Raises:
        ValueError: for events that are not (channels, rows, columns), or a head that does not fit the basis or them.
    """

    base: SpectralCovariance
    head: VarianceHead

    def __post_init__(self) -> None:
        event, pixels = self.base.event_shape, self.base.basis_name == "pixels"
        if len(event) != 3:
            raise ValueError(f"got events of shape {tuple(event)}; a variance head takes (channels, rows, columns)")
        if event[0] != self.head.channels or pixels != (self.head.rings is None):
            raise ValueError(
                f"got a head of {self.head.channels} channels and rings {self.head.rings} for pictures {tuple(event)} "
                f"in the basis {self.base.basis_name!r}; expected as many channels, and rings unless in pixels"
            )

    @cached_property
    def _ring(self) -> Tensor:
        """The ring of each frequency, (rows, columns)."""
        rings = self.head.rings
        assert rings is not None
        highest = []
        for size in self.base.event_shape[-2:]:
            if self.base.basis_name == "fft":
                highest.append(2 * torch.fft.fftfreq(size).abs())
            else:
                highest.append(torch.arange(size) / size)
        return ((highest[0][:, None] ** 2 + highest[1] ** 2).sqrt() * rings).long().clamp(max=rings - 1)

    def spread(self, s: Tensor) -> Tensor:
        """s of every coordinate, (m, 1 or channels, rows, columns)."""
        return s if self.head.rings is None else s[:, self._ring.to(s.device)][:, None]

    @torch.no_grad()
    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        self.base.parts(denoiser, x_t, level, estimate)  # refuses pictures of another shape
        like = self.head.last.weight
        x0_hat = estimate.mean.detach().to(like)
        noise = (x_t.detach().to(like) - level.alpha * x0_hat) / level.sigma
        log_ratio = torch.full((len(x_t),), level.ratio, dtype=like.dtype, device=like.device).log()
        return {"log_scale": self.head(x0_hat, noise, log_ratio).to(x_t)}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Diagonal:
        v = self.base.table(level.ratio, like.device)[None].to(like.dtype)
        return Diagonal(v * self.spread(parts["log_scale"].to(like)).exp(), self.base.basis)


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A fitted head, and what it gains.

    Args:
        covariance: the calibrated covariance, rescaled by it.
        ratios: sigma_t / alpha_t of the levels, (levels,).
        gain: mean of log N(r; 0, C_t(x_t)) - log N(r; 0, C_t) over pictures kept back from the fit, nats, (levels,).
        spread: standard deviation of s over those pictures, root mean square over its entries, (levels,).
    """

    covariance: HeteroscedasticCovariance
    ratios: Tensor
    gain: Tensor
    spread: Tensor

    def __str__(self) -> str:
        lines = ["sigma/alpha   nats gained per picture   spread of the log-factors"]
        for row in zip(self.ratios, self.gain, self.spread, strict=True):
            ratio, gain, spread = (float(value) for value in row)
            lines.append(f"{ratio:11.4g}   {gain:23.1f}   {spread:25.3f}")
        return "\n".join(lines)


def fit_variance_head(
    chain: ReverseChain,
    images: Tensor,
    base: SpectralCovariance,
    *,
    rings: int = 16,
    width: int = 16,
    steps: int = 600,
    batch: int = 32,
    learning_rate: float = 3e-3,
    kept_back: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> FittedHead:
    """Fit a head to the residuals of a chain's denoiser at the chain's levels, one network evaluation per image each.

    Args:
        images: clean pictures the network was not trained on, or draws from the chain, (number, *event). Best others
            than ``base`` was measured on.
        base: the calibrated covariance.
        rings: factors per picture, in a basis of frequencies.
        width: of the head's layers.
        steps: of Adam, its rate falling to zero as a half cosine.
        batch: pictures of a step, at random levels.
        learning_rate: the highest.
        kept_back: share of the images that the gain is measured on.
        seed: of the noise, the head and the batches.
        progress: show a progress bar.

    Raises:
        ValueError: for images of another shape than the denoiser's, or fewer than are needed to keep some back.
    """
    denoiser = chain.denoiser
    held = round(kept_back * len(images))
    if images.shape[1:] != denoiser.event_shape or not 0 < held < len(images):
        raise ValueError(
            f"got images of shape {tuple(images.shape)} of which {held} are kept back; expected "
            f"(number, *{tuple(denoiser.event_shape)}) and some on both sides"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = VarianceHead(images.shape[1], None if base.basis_name == "pixels" else rings, width)
    covariance = HeteroscedasticCovariance(base, head.to(denoiser.device))
    levels = chain.levels[1:]
    looks = _looks(chain, images.to(denoiser.device, denoiser.dtype), base, generator, progress)
    fitted = len(images) - held
    optimiser = torch.optim.Adam(head.parameters(), learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in tqdm(range(steps), desc="fitting", unit="step", disable=not progress, leave=False):
        k = torch.randint(len(levels), (batch,), generator=generator)
        one = torch.randint(fitted, (batch,), generator=generator)
        loss = _cost(covariance, looks.at(k, one)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
    head.eval().requires_grad_(False)
    gains, spreads = [], []
    others = torch.arange(fitted, len(images))
    for index in range(len(levels)):
        look = looks.at(torch.full_like(others, index), others)
        x0_hat, noise, log_ratio, standard = look
        gained = 0.5 * standard.mean((1, 2, 3)) - _cost(covariance, look)
        gains.append(float(gained.mean()) * images[0].numel())
        spreads.append(float(head(x0_hat, noise, log_ratio).var(0, correction=0).mean().sqrt()))
    ratios = torch.tensor([level.ratio for level in levels], dtype=torch.float64)
    return FittedHead(covariance, ratios, torch.tensor(gains), torch.tensor(spreads))


#: x0_hat, the noise left in x_t, log(sigma / alpha), r^2 / v
_Look = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Looks:
    """What the denoiser said of all pictures at all levels."""

    x0_hat: Tensor  # (levels, number, *event)
    noise: Tensor
    log_ratio: Tensor  # (levels,)
    standard: Tensor  # r^2 / v, (levels, number, *event)

    def at(self, level: Tensor, picture: Tensor) -> _Look:
        return (
            self.x0_hat[level, picture],
            self.noise[level, picture],
            self.log_ratio[level],
            self.standard[level, picture],
        )


@torch.no_grad()
def _looks(
    chain: ReverseChain, images: Tensor, base: SpectralCovariance, generator: torch.Generator, progress: bool
) -> _Looks:
    single, levels = chain.expand(()), chain.levels[1:]
    means, noises, standards = [], [], []
    for level in tqdm(levels, desc="looking", unit="level", disable=not progress, leave=False):
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        x_t = level.alpha * images + level.sigma * noise
        x0_hat = torch.cat([single.denoise(part, level) for part in x_t.split(64)])
        v = base.table(level.ratio, images.device)
        standards.append((base.basis.to_spectral(images - x0_hat).double().square() / v).float())
        means.append(x0_hat.float())
        noises.append(((x_t - level.alpha * x0_hat) / level.sigma).float())
    log_ratio = torch.tensor([level.ratio for level in levels], device=images.device).log()
    return _Looks(torch.stack(means), torch.stack(noises), log_ratio, torch.stack(standards))


def _cost(covariance: HeteroscedasticCovariance, look: _Look) -> Tensor:
    """Mean over coordinates of 1/2 (r^2 exp(-s) / v + s), (m,)."""
    x0_hat, noise, log_ratio, standard = look
    s = covariance.spread(covariance.head(x0_hat, noise, log_ratio))
    return 0.5 * (standard * (-s).exp() + s).mean((1, 2, 3))
