r"""A verdict on a run: good, doubtful or bad, with the reason and the remedy of every doubt.

With the chains' evidence estimates Z_1 ... Z_b the pooled one is Z = mean(Z_c), and the standard error of log Z is by
the delta method sd(Z_c) / (sqrt(b) Z); for a single chain it is read off its genealogy where theory covers the run (see
:mod:`smcdiff.smc.evidence`). The spread sd(log Z_c) tells how good each chain is: log Z_c is nearly normal
with variance s^2, of which about b exp(-s^2) chains count once they are weighed by Z_c; particle Markov chains are
tuned to s between 1 and 1.7.

References:
    A. Doucet, M. Pitt, G. Deligiannidis, R. Kohn, "Efficient implementation of Markov chain Monte Carlo when using an
    unbiased likelihood estimator" (2015), arXiv 1210.1871: the spread of log Z to aim at.
    A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto smoothed importance sampling" (2024),
    arXiv 1507.02646: limits of k-hat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.weights import effective_sample_size, pareto_k, perplexity
from smcdiff.smc.evidence import error_over_chains

__all__ = ["Diagnostics", "Finding", "Verdict", "diagnose"]

Verdict = Literal["good", "doubtful", "bad"]

#: Up to so many chains are written one by one.
_LISTED = 16


@dataclass(frozen=True)
class Finding:
    """One reason not to trust a result.

    Args:
        level: how much it matters, "doubtful" or "bad".
        reason: what was seen, as a sentence.
        remedy: what to do about it, as a sentence.
    """

    level: Verdict
    reason: str
    remedy: str


@dataclass(frozen=True)
class Diagnostics:
    """What the weights of a run say about it.

    Args:
        ess: (steps, b), effective sample size of each chain after each step.
        min_ess: its smallest value.
        min_ess_step: the step at which it was taken, 0 for the initial particles.
        entropy: (steps, b), of the weights of each chain after each step, in nats; None if not recorded.
        pooled_ess: effective sample size of all final particles, chains weighed by their evidence; of S = b n.
        perplexity: exp(entropy) of the same weights; of S.
        k_hat: Pareto shape of the same weights; NaN if there are too few, -inf if they are equal.
        roots: (b,), how many of the initial particles of each chain have descendants at the end; None if not recorded.
        log_z: (b,), log-evidence of each chain, in nats.
        log_z_spread: standard deviation of ``log_z`` over chains, in nats; NaN for one chain.
        log_evidence: the pooled estimate, in nats.
        log_evidence_error: its standard error, in nats; NaN where there is none: for one chain whose genealogy does
            not tell it, and where the chains disagree so much that a few of them decide the estimate and say nothing
            of its error.
        findings: what is wrong, worst first; empty if nothing is.
    """

    ess: Tensor
    min_ess: float
    min_ess_step: int
    entropy: Tensor | None
    pooled_ess: float
    perplexity: float
    k_hat: float
    roots: Tensor | None
    log_z: Tensor
    log_z_spread: float
    log_evidence: float
    log_evidence_error: float
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """ "good" if there are no findings, otherwise the level of the worst."""
        return self.findings[0].level if self.findings else "good"

    def __str__(self) -> str:
        roots = "not recorded" if self.roots is None else _listed(self.roots, ".0f")
        lines = [
            f"verdict                     {self.verdict}",
            f"log-evidence                {self.log_evidence:.2f} {self._error()}",
            f"log-evidence of each chain  {_listed(self.log_z, '.1f')}",
            f"spread over chains          {self.log_z_spread:.2f} nats",
            f"smallest ESS of a step      {self.min_ess:.1f}  (step {self.min_ess_step} of {len(self.ess) - 1})",
            f"ESS of all final particles  {self.pooled_ess:.1f}  (perplexity {self.perplexity:.1f})",
            f"Pareto k-hat                {self.k_hat:.2f}",
            f"surviving roots per chain   {roots}",
        ]
        return "\n".join(lines + [f"{f.level}: {f.reason} {f.remedy}" for f in self.findings])

    def _error(self) -> str:
        if math.isnan(self.log_evidence_error):
            return "nats, with no error that could be given"
        return f"+- {self.log_evidence_error:.2f} nats"


#: Above this relative standard error over chains the estimate of the error itself is not to be believed.
_LARGEST_ERROR = 0.5


def diagnose(run: Run) -> Diagnostics:
    """The numbers of a run and the verdict on them; of its exact weights, if it was tempered."""
    run = run.exact
    b, n = run.log_w.shape
    log_z = run.log_z.to(torch.float64)
    spread = float(log_z.std()) if b > 1 else math.nan
    pooled = effective_sample_size(run.log_w)
    k_hat = pareto_k(run.log_w)
    roots = None if run.roots is None else run.roots[-1]
    lowest = run.ess.amin(1)
    step = int(lowest.argmin())
    findings = [
        *_about_weights(b * n, pooled, k_hat),
        *_about_chains(n, log_z, spread),
        *_about_steps(n, float(lowest[step]), step, len(lowest) - 1),
        *_about_roots(n, roots),
    ]
    return Diagnostics(
        ess=run.ess,
        min_ess=float(lowest[step]),
        min_ess_step=step,
        entropy=run.entropy,
        pooled_ess=pooled,
        perplexity=perplexity(run.log_w),
        k_hat=k_hat,
        roots=roots,
        log_z=log_z,
        log_z_spread=spread,
        log_evidence=float(log_z.logsumexp(0) - math.log(b)),
        log_evidence_error=_error(run, log_z),
        findings=tuple(sorted(findings, key=lambda finding: finding.level)),  # "bad" sorts before "doubtful"
    )


def _error(run: Run, log_z: Tensor) -> float:
    """Standard error of the pooled log-evidence; NaN where it cannot be told."""
    if len(log_z) > 1:
        error = float(error_over_chains(log_z))
    elif run.log_z_variance is not None:
        error = math.sqrt(max(float(run.log_z_variance[0]), 0.0)) or math.nan
    else:
        return math.nan
    return error if error < _LARGEST_ERROR else math.nan


def _about_weights(size: int, pooled: float, k_hat: float) -> list[Finding]:
    found = []
    if size > 1 and pooled < min(10.0, 0.5 * size):
        collapsed = pooled < 2
        found.append(
            Finding(
                "bad" if collapsed else "doubtful",
                f"The {size} final particles count for {pooled:.1f} equally weighted ones.",
                "Use another twist, one that follows the posterior more closely; more particles alone rarely mend a "
                "collapse. The sweeps of sd.ParticleGibbs stay exact with few particles."
                if collapsed
                else "Use more particles, more chains, or a twist that follows the posterior more closely.",
            )
        )
    if size > 10 and k_hat > min(1 - 1 / math.log10(size), 0.7):
        found.append(
            Finding(
                "bad" if k_hat >= 1 else "doubtful",
                f"The weights have a heavy tail (Pareto k-hat {k_hat:.2f}): a few particles decide every average.",
                "Use a wider twist (sd.WidenedTwist, sd.TweedieTwist) or temper it (sd.tempered); more particles help "
                "slowly.",
            )
        )
    return found


def _about_chains(n: int, log_z: Tensor, spread: float) -> list[Finding]:
    found = []
    if bool(log_z.isnan().any()):
        found.append(
            Finding(
                "doubtful",
                "The method gives no weights and no evidence: its draws carry a bias of its own, not measured here.",
                "Run it with a step that has a density and several particles, or compare with a weighted method.",
            )
        )
    if len(log_z) == 1 or n == 1:
        found.append(
            Finding(
                "doubtful",
                "With one chain, or one particle a chain, there is nothing to compare it with.",
                "Run at least four chains of several particles before trusting anything here.",
            )
        )
    if spread > 1:
        found.append(
            Finding(
                "bad" if spread > 3 else "doubtful",
                f"The log-evidence of the chains spreads by {spread:.1f} nats: they do not agree on the posterior.",
                "Use more particles per chain, more steps, or a better twist, until the spread is near 1.",
            )
        )
    return found


def _about_steps(n: int, least: float, step: int, last: int) -> list[Finding]:
    if n == 1 or least >= max(0.05 * n, min(2.0, 0.5 * n)):
        return []
    if step == last:
        remedy = (
            "The last step meets the likelihood itself: use a twist that comes closer to it at low noise, or more "
            "steps there."
        )
    else:
        remedy = "Use more steps, or temper the twist (sd.tempered), which finds how far to trust it at each step."
    return [
        Finding(
            "doubtful",
            f"At step {step} of {last} the {n} particles of a chain counted for {least:.1f}: most of what it knew was "
            "lost.",
            remedy,
        )
    ]


def _about_roots(n: int, roots: Tensor | None) -> list[Finding]:
    if n == 1 or roots is None or int(roots.min()) > 1:
        return []
    single = int((roots == 1).sum())
    return [
        Finding(
            "doubtful",
            f"In {single} of {len(roots)} chains all particles descend from one: they are relatives, not independent.",
            "Count each such chain as about one draw: run more chains, or sd.ParticleGibbs, whose sweeps renew the "
            "paths.",
        )
    ]


def _listed(values: Tensor, digits: str) -> str:
    """One value of each chain, or their range where there are many."""
    if len(values) <= _LISTED:
        return " ".join(format(float(value), digits) for value in values)
    low, middle, high = (format(float(value), digits) for value in (values.amin(), values.median(), values.amax()))
    return f"{low} to {high}, median {middle}, {len(values)} chains"
