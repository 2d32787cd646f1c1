r"""A covariance of x_0 given x_t that each particle corrects by what the denoiser told it on its way.

With the natural parameter theta = alpha_t x_t / sigma_t^2 and snr = alpha_t^2 / sigma_t^2,

    p(x_0 given x_t)  ~  p(x_0) exp(theta^T x_0 - snr |x_0|^2 / 2),      C_t = d m / d theta at that snr,

and m is the gradient of a convex function of theta. For a Gaussian prior C_t^-1 m_t = h + theta_t with one h at all
levels, and C_s^-1 = C_t^-1 + a I with a = snr_s - snr_t. So the way of a particle from level t to a less noisy s tells
of C_s, whatever was known of it:

    a secant met on the way             C_s (theta_s - theta_t - a m_t) = m_s - m_t
    a secant known before               C_t s = y   becomes   C_s (s + a y) = y

and C is the calibrated covariance D after the quasi-Newton (BFGS) updates by the last r secants, oldest first, in
compact form (with S and Y the secants in columns, L below and Delta on the diagonal of S^T Y):

    C = D - [D S, Y] [[S^T D S, L], [L^T, -Delta]]^-1 [D S, Y]^T,

positive definite wherever all s^T y are positive. It has the latest secant, and all of them where they are those of one
matrix. No pass through the network beside those of the run.

References:
    S. Rissanen, M. Heinonen, A. Solin, "Free Hunch: Denoiser Covariance Estimation for Diffusion Models Without Extra
    Costs" (2024), arXiv 2410.11149: time and space updates along a trajectory.
    R. Byrd, J. Nocedal, R. Schnabel, "Representations of quasi-Newton matrices and their use in limited memory methods"
    (1994), theorem 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Corrected, Diagonal
from smcdiff.diffusion.covariance_models import Parts, SpectralCovariance
from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel

__all__ = ["FreeHunchCovariance"]


@final
@dataclass(frozen=True)
class FreeHunchCovariance:
    """A spectral covariance and what each particle's last steps add to it, for ``sd.Adapted(model, covariance=...)``.

    It depends on the path of a particle, so it serves twist and proposal, and the prior's chain keeps a covariance of
    its own; the weights are exact. For a Gaussian prior every secant is, and r of them tell of r directions. Each
    particle carries 2 r + 2 pictures more. Where a picture has many measured values and no basis in common with the
    base, the curvature's diagonal takes the place of conjugate gradients, which need one covariance for all particles.

    Args:
        base: D, the covariance before anything is learnt, such as that of a calibrated prior.
        secants: r, how many are kept, at least 1.
        highest: sigma / alpha above which nothing is learnt: while p(x_0 given x_t) has many modes, a step's secant
            says little of it.
        trust: a secant whose s^T y is not within this factor of s^T C s is left out; above 1.

    Raises:
        ValueError: for a number outside its domain.
    """

    base: SpectralCovariance
    secants: int = 4
    highest: float = 2.0
    trust: float = 4.0

    def __post_init__(self) -> None:
        if self.secants < 1 or not self.highest > 0 or not self.trust > 1:
            raise ValueError(
                f"got secants {self.secants}, highest {self.highest}, trust {self.trust}; expected at least 1 secant, "
                "a positive noise level and a factor above 1"
            )

    @property
    def depends_on_path(self) -> bool:
        return True

    def parts(self, denoiser: Denoiser, x_t: Tensor, level: NoiseLevel, estimate: Estimate) -> Parts:
        """The last secants, and what the next one needs; ``estimate.parts`` are those of the level before."""
        self.base.parts(denoiser, x_t, level, estimate)  # refuses pictures of another shape
        basis, snr, before = self.base.basis, level.ratio**-2, estimate.parts
        theta = basis.to_spectral(level.alpha / level.sigma**2 * x_t)
        mean = basis.to_spectral(estimate.mean)
        now = {"theta": theta, "mean": mean, "snr": theta.new_full((len(theta),), snr, dtype=torch.float64)}
        if not before:
            empty = theta.new_zeros(len(theta), self.secants, *theta.shape[1:])
            return {**now, "steps": empty, "answers": empty}
        a = (snr - before["snr"]).reshape(-1, *(1,) * (theta.ndim - 1)).to(theta.dtype)
        steps, answers = before["steps"] + a[:, None] * before["answers"], before["answers"]
        if level.ratio <= self.highest:
            step = theta - before["theta"] - a * before["mean"]
            answer = mean - before["mean"]
            known = Corrected(*self._corrected(level, steps, answers))
            believed, seen = _inner(step, known.apply(step)), _inner(step, answer)
            good = (seen > believed / self.trust) & (seen < believed * self.trust)
            keep = good.reshape(a.shape)
            step, answer = torch.where(keep, step, 0.0), torch.where(keep, answer, 0.0)
            steps = torch.cat([steps[:, 1:], step[:, None]], 1)
            answers = torch.cat([answers[:, 1:], answer[:, None]], 1)
        return {**now, "steps": steps, "answers": answers}

    def at(self, level: NoiseLevel, parts: Parts, like: Tensor) -> Corrected | Diagonal:
        if not parts:  # of no particle yet
            return self.base.at(level, {}, like)
        return Corrected(*self._corrected(level, parts["steps"], parts["answers"]), self.base.basis)

    def _corrected(self, level: NoiseLevel, steps: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, W = [D S, Y] and the core of the compact form; a secant that was left out is a pair of zeros."""
        variance = self.base.at(level, {}, steps[:, 0]).variance
        length = (steps.flatten(2).double() * answers.flatten(2).double()).sum(2).sqrt()  # Delta becomes I
        left_out = length == 0
        scale = torch.where(left_out, 0.0, 1 / torch.where(left_out, 1.0, length))
        scale = scale.reshape(*scale.shape, *(1,) * (steps.ndim - 2)).to(steps.dtype)
        steps, answers = scale * steps, scale * answers
        factors = torch.cat([variance[:, None] * steps, answers], 1)
        s, w = steps.flatten(2).double(), factors.flatten(2).double()
        below = (s @ w[:, self.secants :].mT).tril(-1)
        eye = torch.eye(self.secants, dtype=s.dtype, device=s.device)
        top = torch.cat([s @ w[:, : self.secants].mT + left_out.double().diag_embed(), below], 2)
        core = -torch.linalg.inv_ex(torch.cat([top, torch.cat([below.mT, -eye.expand_as(below)], 2)], 1))[0]
        return variance, factors, 0.5 * (core + core.mT)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of each particle, (m,) of float64."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)
