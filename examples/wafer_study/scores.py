r"""What a posterior says of a picture, and how far that is from the truth.

The reference of an inspection is the same die without the defect, ``normal``. A window of 5 x 5 pixels *differs* if the
mean of x - normal over it exceeds ``CONTRAST`` in size; a picture holds a defect if any window differs. The posterior
probability of that is the share of the draws of which it is true, P(defect given y) = E[1{defect in x} given y], and
with every window by itself it is a map. Besides,

    retention     <mean - normal, clean - normal> / |clean - normal|^2 over the defect's pixels: 1 if it is all there,
                  0 if it was smoothed away,
    coverage      share of pixels of x inside the central 50 and 90 % intervals, in and out of the defect's pixels,
    kernel error  |mean of k - k|_1 / 2, the share of the light that is put in the wrong place, 0 to 1.

Draws are weighted. Chains of twisted diffusion sampling count alike, for their evidence spreads far more than the
truth's; the weights of Tilted, which come at the end, are tempered to leave half of the particles effective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from examples.wafer_study.problems import CONTRAST, Problem, differing

__all__ = ["Posterior", "exact_coverage", "score"]


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws of a method.

    Args:
        x: (draws, 1, rows, columns).
        w: (draws,), weights of sum 1.
        kernel: (size, size), the posterior mean of the kernel; None where the method does not estimate it.
        forward, back: network evaluations.
        more: what else is to be kept.
    """

    x: Tensor
    w: Tensor
    kernel: Tensor | None
    forward: float
    back: float
    more: dict[str, Any]

    @property
    def mean(self) -> Tensor:
        return torch.einsum("d,d...->...", self.w, self.x.double()).float()

    @property
    def sd(self) -> Tensor:
        return torch.einsum("d,d...->...", self.w, (self.x - self.mean).double().square()).sqrt().float()

    def quantile(self, level: float) -> Tensor:
        """Interpolated between draws, each in the middle of its weight."""
        values, order = self.x.sort(0)
        w = self.w[order]
        middle = w.cumsum(0) - w / 2
        above = (middle < level).sum(0, keepdim=True)
        low, high = (above - 1).clamp(min=0), above.clamp(max=len(values) - 1)
        m_low, m_high = middle.gather(0, low), middle.gather(0, high)
        gap = (m_high - m_low).clamp(min=1e-12)
        share = ((level - m_low) / gap).clamp(0, 1)
        lower = values.gather(0, low)
        return (lower + share * (values.gather(0, high) - lower))[0].float()


def exact_coverage(draws: int, mass: float, number: int = 20_000) -> float:
    """What the interval of as many independent, equally weighted exact draws covers of another one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(draws + 1, 1, 1, number, generator=generator)
    exact = Posterior(x[:-1], torch.full((draws,), 1 / draws, dtype=torch.float64), None, 0, 0, {})
    inside = (x[-1] >= exact.quantile(0.5 - mass / 2)) & (x[-1] <= exact.quantile(0.5 + mass / 2))
    return float(inside.float().mean())


def score(problem: Problem, found: Posterior) -> dict[str, Any]:
    """All numbers of one picture and one method."""
    x, normal, clean, mask = problem.x, problem.normal, problem.clean, problem.mask
    mean, w = found.mean, found.w
    window = differing(found.x, normal)
    largest = window.flatten(1).amax(1)
    row: dict[str, Any] = {
        "defect": problem.defect,
        "kind": problem.picture.defect,
        "truth differs": problem.differs,
        "probability": float((w * (largest > CONTRAST)).sum()),
        "statistic": float((w * largest).sum()),
        "of the mean": float(differing(mean[None], normal).amax()),
        "psnr": float(10 * torch.log10(4 / (mean - x).square().mean())),
        "psnr of a draw": float((w * (10 * torch.log10(4 / (found.x - x).square().mean((1, 2, 3))))).sum()),
        "effective draws": float(1 / w.square().sum()),
        "draws": len(w),
        "forward": found.forward,
        "back": found.back,
    }
    if mask.any():
        gone = (clean - normal)[mask]
        row["retention"] = float(((mean - normal)[mask] * gone).sum() / gone.square().sum())
        row["probability at the defect"] = float((w * (window[:, mask].amax(1) > CONTRAST)).sum())
    for mass in (0.5, 0.9):
        inside = (x >= found.quantile(0.5 - mass / 2)) & (x <= found.quantile(0.5 + mass / 2))
        row[f"coverage {mass}"] = float(inside[~mask].float().mean())
        if mask.any():
            row[f"coverage {mass} in the defect"] = float(inside[mask].float().mean())
    if found.kernel is not None:
        row["kernel error"] = float(_embedded(found.kernel, problem.kernel).abs().sum() / 2)
    return row | found.more


def _embedded(kernel: Tensor, truth: Tensor) -> Tensor:
    """The difference of two kernels of different sizes, centre on centre."""
    size = max(len(kernel), len(truth)) + 1

    def place(k: Tensor) -> Tensor:
        before = size // 2 - len(k) // 2
        after = size - len(k) - before
        return pad(k, (before, after, before, after))

    return place(kernel) - place(truth)
