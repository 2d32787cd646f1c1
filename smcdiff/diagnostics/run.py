r"""A finished run as plain tensors: what every diagnostic, plot and export reads.

A run has b independent chains of n particles. Its pooled log-weights give chain c and particle i the weight

    w_{ci} = (Z_c / sum_c Z_c) (v_{ci} / sum_i v_{ci}),

with v the weights within the chain and Z_c the chain's estimate of the evidence, so that sum_{ci} w_{ci} f(x_{ci})
estimates the posterior mean of f from all chains at once.

Weights that have collapsed may be raised to a power for the sake of pictures (see
:func:`~smcdiff.diagnostics.weights.tempered`). Such a run keeps the exact ones beside them, and it is these that
diagnostics judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smcdiff.diagnostics.weights import tempered
from smcdiff.smc.resampling import Systematic

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """What is left of a run, on any device.

    Args:
        values: {site: (b, n, *event)}, the particles.
        log_w: (b, n), pooled log-weights, in nats; normalised here to logsumexp = 0 over all b n of them.
        log_z: (b,), log-evidence of each chain, in nats.
        ess: (steps, b), effective sample size after each step, the initial one included.
        log_z_path: (steps, b), the running log-evidence.
        roots: (steps, b), how many of the initial particles have descendants after each step; None if not recorded.
        entropy: (steps, b), of the weights within each chain after each step, between 0 and log n; None if not
            recorded.
        resampled: (steps, b) of bool, whether a chain was resampled before the step; None if not recorded.
        ancestors: (steps, b, n), index of each particle's parent among the particles of the step before; for the
            initial step a particle is its own parent. None if not recorded.
        log_z_variance: (b,), variance of ``log_z`` estimated from each chain's own genealogy; None where theory does
            not cover the run.
        log_likelihood: {observed site: (b, n, *its shape)}, pointwise, in nats.
        observed: {observed site: its value}.
        constants: {name: value}, what else the run was given. The truth of a site, where it is known, has the name
            "SITE.truth".
        about: numbers and strings that say where the run comes from: seed, method, versions.
        exact_log_w: (b, n), the pooled log-weights before they were raised to ``exponent``; None where they are
            ``log_w`` itself.
        exponent: see there.

    Raises:
        ValueError: for shapes that do not fit each other, or weights that are all zero.
    """

    values: Mapping[str, Tensor]
    log_w: Tensor
    log_z: Tensor
    ess: Tensor
    log_z_path: Tensor
    roots: Tensor | None = None
    entropy: Tensor | None = None
    resampled: Tensor | None = None
    ancestors: Tensor | None = None
    log_z_variance: Tensor | None = None
    log_likelihood: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, float | int | str] = field(default_factory=dict)
    exact_log_w: Tensor | None = None
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.log_w.ndim != 2:
            raise ValueError(f"got log_w of shape {tuple(self.log_w.shape)}; expected (chains, particles)")
        (b, n), steps = self.log_w.shape, self.ess.shape[0]
        expected: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("ess", "log_z_path", "roots", "entropy", "resampled"), (steps, b)),
            **dict.fromkeys(("log_z", "log_z_variance"), (b,)),
            "ancestors": (steps, b, n),
            "exact_log_w": (b, n),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"got {name} of shape {tuple(value.shape)}; expected {shape}")
        for group in (self.values, self.log_likelihood):
            for name, value in group.items():
                if value.shape[:2] != self.log_w.shape:
                    raise ValueError(
                        f"got {name!r} of shape {tuple(value.shape)}; expected {tuple(self.log_w.shape)} and the event"
                    )
        for name in ("log_w", "exact_log_w"):
            if getattr(self, name) is None:
                continue
            log_w = getattr(self, name).to(torch.float64)
            total = log_w.logsumexp((0, 1))
            if not bool(torch.isfinite(total)):
                raise ValueError("got weights that are all zero or not finite; expected at least one positive weight")
            object.__setattr__(self, name, log_w - total)

    @property
    def exact(self) -> Run:
        """The run with its exact weights."""
        if self.exact_log_w is None:
            return self
        return dataclasses.replace(self, log_w=self.exact_log_w, exact_log_w=None, exponent=1.0)

    @property
    def chain_log_w(self) -> Tensor:
        """(b,), the log-weight of each whole chain; logsumexp = 0."""
        return self.log_w.logsumexp(1)

    @property
    def within_chain_log_w(self) -> Tensor:
        """(b, n), log-weights with logsumexp = 0 in every chain; equal in a chain whose weight is zero."""
        within = self.log_w - self.chain_log_w[:, None]
        return within.where(torch.isfinite(self.chain_log_w)[:, None], within.new_tensor(within.shape[1]).log().neg())

    def equal_draws(self, seed: int = 0) -> Tensor:
        """(b, n) of int64: the particles of each chain that stand for it with equal weights, in ancestor order.

        Copies and relatives stand next to each other, so that autocorrelation counts them as what they are.
        """
        generator = torch.Generator().manual_seed(seed)
        return Systematic()(self.within_chain_log_w.exp().cpu(), generator)

    def mean(self, site: str) -> Tensor:
        """(*event), the weighted mean of a site over all chains."""
        return self._average(self.values[site].to(torch.float64))

    def sd(self, site: str) -> Tensor:
        """(*event), the weighted standard deviation of a site over all chains."""
        return self._average((self.values[site].to(torch.float64) - self.mean(site)).square()).sqrt()

    def quantile(self, site: str, level: float) -> Tensor:
        """(*event), the smallest particle value whose cumulative weight over all chains reaches ``level``.

        Raises:
            ValueError: for a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"got level {level}; expected a probability between 0 and 1")
        values, order = self.values[site].flatten(0, 1).to(torch.float64).sort(0)
        cumulative = self.log_w.exp().flatten()[order].cumsum(0)
        reached = (cumulative < level * cumulative[-1]).sum(0, keepdim=True)
        return values.gather(0, reached.clamp(max=len(values) - 1)).squeeze(0)

    def tempered(self, min_ess: float) -> tuple[Run, float]:
        """The run with pooled weights raised to the power that keeps their effective sample size above ``min_ess``.

        See :func:`~smcdiff.diagnostics.weights.tempered`; the exponent is the second value, 1 if nothing was changed.
        """
        exact = self.exact.log_w
        log_w, exponent = tempered(exact, min_ess)
        if exponent == 1:
            return self.exact, exponent
        return dataclasses.replace(self, log_w=log_w, exact_log_w=exact, exponent=exponent), exponent

    def _average(self, values: Tensor) -> Tensor:
        return torch.einsum("bn,bn...->...", self.log_w.exp().to(values.device), values)
