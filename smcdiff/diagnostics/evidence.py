r"""Programs compared by their evidence, with errors, beside leave-one-out.

For programs M_i that explain the same measurement, with Z_i = p(y given M_i) and prior probabilities pi_i,

    log B_ij = log Z_i - log Z_j,        p(M_i given y) = pi_i Z_i / sum_j pi_j Z_j.

With e_i the standard error of log Z_i over chains, independent between runs, the error of log B_ij is
sqrt(e_i^2 + e_j^2) and, by the delta method, that of p_i is p_i sqrt(sum_j ([i = j] - p_j)^2 e_j^2).

Leave-one-out is another question: how well each measured value is predicted from the others,

    elpd = sum_k log p(y_k given the rest),    p(y_k given the rest) = 1 / sum_s w_s / p(y_k given theta_s),

for values that are independent given the latents. It depends little on priors that the data overrule; the evidence
depends on them fully. The harmonic form above has heavy tails: a Pareto k-hat above 0.7 says not to trust it.

References:
    A. E. Raftery, R. E. Kass, "Bayes factors", Journal of the American Statistical Association 90 (1995).
    A. Vehtari, A. Gelman, J. Gabry, "Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC"
    (2016), arXiv 1507.04544: importance sampling for leave-one-out, and k-hat as its check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.weights import pareto_k
from smcdiff.smc.evidence import error_over_chains

__all__ = ["EvidenceComparison", "LeaveOneOut", "compare_evidence", "leave_one_out"]

#: Above this standard error over chains, in nats, the error itself is not to be believed.
_LARGEST_ERROR = 0.5


@dataclass(frozen=True)
class LeaveOneOut:
    """Predictive accuracy of a program on its own measurement.

    Args:
        elpd: expected log predictive density, summed over measured values, in nats.
        error: its standard error over measured values, sqrt(n) times their standard deviation; NaN for one value.
        k_hat: the worst Pareto shape of the importance weights; above 0.7 ``elpd`` is not to be trusted.
        pointwise: (n,), log p(y_k given the rest).
    """

    elpd: float
    error: float
    k_hat: float
    pointwise: Tensor


@dataclass(frozen=True)
class EvidenceComparison:
    """Programs with the evidence of the same measurement, best first.

    Args:
        names: of the M programs.
        log_evidence: (M,), in nats.
        error: (M,), its standard error over chains; NaN for a single chain, and where the chains disagree so much that
            a few of them decide the estimate and say nothing of its error.
        log_bayes_factor: (M, M), log Z_i - log Z_j.
        log_bayes_factor_error: (M, M), zero on the diagonal.
        probability: (M,), posterior probability.
        probability_error: (M,).
        loo: {name: leave-one-out}, of the programs whose runs have a pointwise log-likelihood.
    """

    names: tuple[str, ...]
    log_evidence: Tensor
    error: Tensor
    log_bayes_factor: Tensor
    log_bayes_factor_error: Tensor
    probability: Tensor
    probability_error: Tensor
    loo: Mapping[str, LeaveOneOut]

    def __str__(self) -> str:
        lines = [
            f"{'program':<20} {'log Z':>18} {'log B to best':>18} {'probability':>16} {'LOO elpd':>18} {'k-hat':>6}"
        ]
        for i, name in enumerate(self.names):
            loo = self.loo.get(name)
            lines.append(
                f"{name:<20} {_with_error(self.log_evidence[i], self.error[i]):>18} "
                f"{_with_error(self.log_bayes_factor[i, 0], self.log_bayes_factor_error[i, 0]):>18} "
                f"{_with_error(self.probability[i], self.probability_error[i], 3):>16} "
                + (f"{_with_error(loo.elpd, loo.error):>18} {loo.k_hat:>6.2f}" if loo else f"{'-':>18} {'-':>6}")
            )
        if bool(self.error.isnan().any()):
            lines.append("An error of ? is one that could not be given: run several chains, until they agree on log Z.")
        return "\n".join(lines)


def compare_evidence(runs: Mapping[str, Run], prior: Mapping[str, float] | None = None) -> EvidenceComparison:
    """Compare finished runs of several programs on the same measurement.

    Args:
        runs: {program: its run}, such as ``smc.posterior``; at least two.
        prior: {program: prior probability}, up to a factor; equal by default.

    Raises:
        ValueError: for a run without evidence, runs of different measurements, or a prior that does not fit.
    """
    if len(runs) < 2:
        raise ValueError(f"got the runs {list(runs)}; a comparison needs at least two")
    without = [name for name, run in runs.items() if not bool(torch.isfinite(run.log_z).any())]
    if without:
        raise ValueError(
            f"got the runs {without} without evidence: their method has no weights, or all of them are zero. Run them "
            "with a method whose every step has a density, such as sd.TDS, and at least two particles"
        )
    _refuse_other_measurements(runs)
    weights = dict.fromkeys(runs, 1.0) if prior is None else dict(prior)
    if weights.keys() != runs.keys() or not all(weight > 0 for weight in weights.values()):
        raise ValueError(
            f"got prior probabilities of {sorted(weights)}; expected a positive one of each of {sorted(runs)}"
        )
    log_z = {name: _pooled(run.log_z) for name, run in runs.items()}
    names = tuple(sorted(runs, key=lambda name: -log_z[name]))
    z = torch.tensor([log_z[name] for name in names], dtype=torch.float64)
    error = torch.tensor([_error(runs[name].log_z) for name in names], dtype=torch.float64)
    factor_error = (error[:, None].square() + error.square()).sqrt()
    probability = (z + torch.tensor([weights[name] for name in names], dtype=torch.float64).log()).softmax(0)
    slope = probability[:, None] * (torch.eye(len(names), dtype=torch.float64) - probability)
    return EvidenceComparison(
        names=names,
        log_evidence=z,
        error=error,
        log_bayes_factor=z[:, None] - z,
        log_bayes_factor_error=factor_error.fill_diagonal_(0.0),
        probability=probability,
        probability_error=(slope * error).square().sum(1).sqrt(),
        loo={name: leave_one_out(runs[name]) for name in names if runs[name].log_likelihood},
    )


def leave_one_out(run: Run) -> LeaveOneOut:
    """Leave-one-out of a run by importance sampling from its weighted particles.

    Raises:
        ValueError: for a run without pointwise log-likelihood.
    """
    if not run.log_likelihood:
        raise ValueError("got a run without pointwise log-likelihood; leave-one-out needs that of each measured value")
    log_w = run.log_w.flatten().cpu()
    sites = [value.flatten(0, 1).cpu().double() for value in run.log_likelihood.values()]
    each = torch.cat([value.reshape(len(log_w), -1) for value in sites], 1)
    log_ratio = log_w[:, None] - each
    pointwise = -log_ratio.logsumexp(0)
    shapes = [pareto_k(column) for column in log_ratio.T]
    known = [shape for shape in shapes if not math.isnan(shape)]
    return LeaveOneOut(
        elpd=float(pointwise.sum()),
        error=math.sqrt(len(pointwise)) * float(pointwise.std()) if len(pointwise) > 1 else math.nan,
        k_hat=max(known) if known else math.nan,
        pointwise=pointwise,
    )


def _pooled(log_z: Tensor) -> float:
    return float(log_z.double().logsumexp(0)) - math.log(len(log_z))


def _error(log_z: Tensor) -> float:
    if len(log_z) < 2:
        return math.nan
    error = float(error_over_chains(log_z.double()))
    return error if error < _LARGEST_ERROR else math.nan


def _refuse_other_measurements(runs: Mapping[str, Run]) -> None:
    data = {
        name: torch.cat([value.double().cpu().reshape(-1) for value in run.observed.values()])
        for name, run in runs.items()
        if run.observed
    }
    for name, y in data.items():
        first, reference = next(iter(data.items()))
        if y.shape != reference.shape or not torch.equal(y, reference):
            raise ValueError(
                f"got the runs {first!r} and {name!r} with different measurements ({reference.numel()} and {y.numel()} "
                "values); evidence can be compared for one and the same measurement only"
            )


def _with_error(value: float | Tensor, error: float | Tensor, digits: int = 2) -> str:
    shown = "?" if math.isnan(float(error)) else f"{float(error):.{digits}f}"
    return f"{float(value):.{digits}f} +- {shown}"
