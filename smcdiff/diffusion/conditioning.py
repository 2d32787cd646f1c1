r"""Denoisers conditioned on something: classifier guidance and classifier-free guidance.

Both change the score and so the clean estimate, x0_hat = (x_t + sigma_t^2 score) / alpha_t:

    classifier        score + w grad log p(c given x_t),    x0_hat + w (sigma_t^2 / alpha_t) grad log p(c given x_t)
    classifier-free   score_u + w (score_c - score_u),      x0_hat_u + w (x0_hat_c - x0_hat_u)

With w = 1 and exact parts they are E[x_0 given x_t, c]. Any other w gives the score of p(x_t) p(c given x_t)^w at
every single level, which no noising links to one another: the chain built on it is a prior of its own, not the
distribution p(x_0) p(c given x_0)^w. For that, put the classifier of clean pictures into the program and let
:class:`smcdiff.SMC` condition on it.

References:
    P. Dhariwal, A. Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), arXiv 2105.05233, algorithm 2.
    J. Ho, T. Salimans, "Classifier-Free Diffusion Guidance" (2022), arXiv 2207.12598; w here is 1 plus theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smcdiff.diffusion.denoiser import Denoiser, Estimate
from smcdiff.diffusion.schedule import NoiseLevel

__all__ = ["ClassifierFree", "ClassifierGuided"]


class ClassifierGuided:
    """x0_hat + w (sigma_t^2 / alpha_t) grad log p(c given x_t).

    It takes a pass of the classifier forward and back besides the denoiser's evaluation. Var[x_0 given x_t, c] is not
    known, so the estimate has none; a learned variance of the step is kept.

    Args:
        denoiser: of the unconditional model.
        log_prob: (x_t of shape (m, *event), level) -> log p(c given x_t), (m,), of a classifier that knows noisy
            pictures, up to a constant.
        scale: w.

    Raises:
        ValueError: for a scale that is not finite, or, at the call, for a log_prob of another shape.
    """

    def __init__(
        self, denoiser: Denoiser, log_prob: Callable[[Tensor, NoiseLevel], Tensor], scale: float = 1.0
    ) -> None:
        _check(scale)
        self.denoiser, self.log_prob, self.scale = denoiser, log_prob, scale
        self.event_shape, self.dtype, self.device = denoiser.event_shape, denoiser.dtype, denoiser.device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        estimate = self.denoiser(x_t, level)
        differentiated = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            x = x_t if differentiated else x_t.detach().requires_grad_()
            log_prob = self.log_prob(x, level)
            if tuple(log_prob.shape) != (len(x),):
                raise ValueError(
                    f"got a log_prob of shape {tuple(log_prob.shape)} for {len(x)} events; expected ({len(x)},), one "
                    "number for each"
                )
            (gradient,) = torch.autograd.grad(log_prob.sum(), x, create_graph=differentiated)
        shift = self.scale * level.sigma**2 / level.alpha * gradient
        return Estimate(estimate.mean + shift, fraction=estimate.fraction)


class ClassifierFree:
    """x0_hat_u + w (x0_hat_c - x0_hat_u).

    It takes an evaluation of both networks. Where the variance of x_0 given x_t is known to the conditional one it is
    that one's for w = 1, and unknown otherwise; a learned variance of the step is the conditional one's.

    Args:
        conditional: x0_hat_c, with its condition built in.
        unconditional: x0_hat_u, on the same events.
        scale: w; 0 is the unconditional model, 1 the conditional one.

    Raises:
        ValueError: for a scale that is not finite, or denoisers of different events.
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, scale: float) -> None:
        _check(scale)
        if conditional.event_shape != unconditional.event_shape:
            raise ValueError(
                f"got a conditional denoiser of events {tuple(conditional.event_shape)} and an unconditional one of "
                f"{tuple(unconditional.event_shape)}; expected the same"
            )
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale
        self.event_shape, self.dtype, self.device = conditional.event_shape, conditional.dtype, conditional.device

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        given, without = self.conditional(x_t, level), self.unconditional(x_t, level)
        mean = without.mean + self.scale * (given.mean - without.mean)
        return Estimate(mean, given.variance if self.scale == 1 else None, given.fraction)


def _check(scale: float) -> None:
    if not abs(scale) < float("inf"):
        raise ValueError(f"got scale {scale}; expected a finite number")
