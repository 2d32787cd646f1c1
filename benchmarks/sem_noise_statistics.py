r"""What sem_noise.py says of a run: statistics of residuals, coverage by ranks, and evidence from collapsed weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smcdiff.diagnostics.ranks import randomised_pit

__all__ = ["coverage", "decided", "evidence", "psnr", "statistics"]


def statistics(y: Tensor, clean: Tensor, ends: tuple[float, float]) -> dict[str, float]:
    """What the predictive checks look at.

    Args:
        y: a picture, (1, rows, columns).
        clean: what it would be without noise.
        ends: black and white; values at or beyond them are clipped.
    """
    r = (y - clean)[0].double()
    r = r - r.mean()
    return {
        "row lag 1": _correlation(r[:, 1:], r[:, :-1]),
        "row lag 2": _correlation(r[:, 2:], r[:, :-2]),
        "column lag 1": _correlation(r[1:], r[:-1]),
        "variance against signal": _correlation(r.square(), clean[0].double()),
        "clipped": float(((y <= ends[0] + 1e-4) | (y >= ends[1] - 1e-4)).double().mean()),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


def coverage(draws: Tensor, truth: Tensor, seed: int) -> dict[str, float]:
    """Shares of pixels inside the central 50 and 90 %, also of the darkest and the brightest quarter of the truth.

    Args:
        draws: (S, *event), equally weighted.
        truth: (*event).
        seed: of the ranks' random part.
    """
    uniform = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = randomised_pit(truth.double(), draws.double(), uniform)
    away, dark, bright = (2 * u - 1).abs(), truth <= truth.quantile(0.25), truth >= truth.quantile(0.75)
    inside = (away <= 0.9).double()
    return {
        "50": float((away <= 0.5).double().mean()),
        "90": float(inside.mean()),
        "90 dark": float(inside[dark].mean()),
        "90 bright": float(inside[bright].mean()),
    }


def psnr(image: Tensor, truth: Tensor) -> float:
    """In dB, for pictures on [-1, 1]."""
    return -10 * math.log10(float((image - truth).square().mean()) / 4)


def evidence(log_w: Tensor) -> dict[str, Any]:
    """Log-evidence and its bounds from log-weights (b, n) whose mean weight is unbiased for the evidence."""
    flat = log_w.double().flatten()
    return {
        "log_z": (log_w.double().logsumexp(1) - math.log(log_w.shape[1])).tolist(),
        "pooled": float(flat.logsumexp(0)) - math.log(len(flat)),
        "bound": float(flat.mean()),
        "cumulant": float(flat.mean() + flat.var() / 2),
        "variance": float(flat.var()),
        "ess": float(1 / flat.softmax(0).square().sum()),
        "draws": len(flat),
    }


def decided(better: dict[str, Any], worse: dict[str, Any]) -> bool:
    """Whether the bound of one program is above all that the evidence of the other may be."""
    return bool(better["bound"] > max(worse["pooled"], worse["cumulant"]))
