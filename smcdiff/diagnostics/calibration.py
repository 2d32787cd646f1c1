r"""The result of a calibration study: is a posterior the one its program implies?

In each replication a truth and a measurement are drawn from the program, a posterior is computed from the measurement
alone, and the truth is ranked among the posterior's draws, for many quantities at once. Whatever the program, exact
draws make every rank uniform (:mod:`smcdiff.diagnostics.ranks`). Ranks of coordinates alone do not tell the posterior
from the prior, which is calibrated as well: the data log-likelihood is always among the quantities, and does.

References:
    S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman, "Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration" (2018), arXiv 1804.06788.
    M. Modrak, A. H. Moon, S. Kim, P. Burkner, N. Huurre, K. Faltejskova, A. Gelman, A. Vehtari, "Simulation-Based
    Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity" (2022),
    arXiv 2211.02383: test quantities that depend on the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diagnostics.coverage import CoverageMap, central_coverage, coverage_map, highest_coverage, tarp_curve
from smcdiff.diagnostics.ranks import EcdfCurve, RankHistogram, Uniformity, ecdf_curve, rank_histogram, uniformity

__all__ = ["Calibration"]

#: Sites with more entries than this are tested by their mean and root mean square, not entry by entry.
_MOST_ENTRIES = 16


@dataclass(frozen=True)
class Calibration:
    """Randomised ranks of N replications.

    Args:
        pit: {quantity: (N, *shape)}, probability integral transforms of the truth among its draws, in [0, 1). The
            quantities are the latent sites, entry by entry; "SITE mean" and "SITE rms" over a site's entries;
            "log_likelihood" of the measurement; and whatever else the study was given.
        tarp: {site: (N,)}, share of draws nearer to the reference point than the truth.
        num_draws: L, draws per replication.

    Raises:
        ValueError: for quantities with different numbers of replications.
    """

    pit: Mapping[str, Tensor]
    tarp: Mapping[str, Tensor]
    num_draws: int

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in (*self.pit.items(), *self.tarp.items())}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"got numbers of replications {lengths}; expected at least one quantity, and one number")

    @property
    def num_replications(self) -> int:
        """N."""
        return len(next(iter(self.pit.values())))

    @property
    def scalars(self) -> dict[str, Tensor]:
        """{quantity: (N,)}: what is tested. Sites of at most 16 entries entry by entry, and TARP as "SITE tarp"."""
        found = {}
        for name, value in self.pit.items():
            columns = value.reshape(len(value), -1)
            if columns.shape[1] == 1:
                found[name] = columns[:, 0]
            elif columns.shape[1] <= _MOST_ENTRIES:
                found.update({f"{name}[{i}]": column for i, column in enumerate(columns.T)})
        found.update({f"{name} tarp": value for name, value in self.tarp.items()})
        return found

    def ranks(self, quantity: str) -> Tensor:
        """(N, *shape), integers 0 ... L: how many draws lie below the truth, ties at random."""
        pit = self._known(quantity)
        return (pit * (self.num_draws + 1)).long().clamp(max=self.num_draws)

    def tests(self) -> dict[str, Uniformity]:
        """Both tests of every scalar quantity."""
        return {name: uniformity(value) for name, value in self.scalars.items()}

    @property
    def p_value(self) -> float:
        """Of all the tests together, by Bonferroni: at most this probability of so bad a result for exact draws."""
        tests = self.tests()
        return min(1.0, len(tests) * min(test.p_value for test in tests.values()))

    def histogram(self, quantity: str, bins: int | None = None) -> RankHistogram:
        """Rank histogram of a scalar quantity."""
        return rank_histogram(self._scalar(quantity), bins)

    def ecdf(self, quantity: str, confidence: float = 0.95) -> EcdfCurve:
        """ECDF of a scalar quantity with its simultaneous band."""
        return ecdf_curve(self._scalar(quantity), confidence=confidence)

    def central_coverage(self, quantity: str, confidence: float = 0.95) -> EcdfCurve:
        """Coverage of central intervals of a scalar quantity against their level."""
        return central_coverage(self._scalar(quantity), confidence=confidence)

    def expected_coverage(self, quantity: str = "log_likelihood", confidence: float = 0.95) -> EcdfCurve:
        """Coverage of the region of highest values of a scalar quantity against its level."""
        return highest_coverage(self._scalar(quantity), confidence=confidence)

    def tarp_curve(self, site: str, confidence: float = 0.95) -> EcdfCurve:
        """TARP of a site: expected coverage against credibility level."""
        return tarp_curve(self._scalar(f"{site} tarp"), confidence=confidence)

    def coverage_map(self, site: str, level: float = 0.9) -> CoverageMap:
        """How often the central interval of ``level`` held each entry of a site."""
        return coverage_map(self._known(site), level)

    def __str__(self) -> str:
        lines = [f"{'quantity':<24} {'chi-square p':>12} {'ECDF p':>10} {'mean':>7} {'spread':>7}"]
        for name, test in self.tests().items():
            lines.append(
                f"{name:<24} {test.chi_square_p:>12.3g} {test.ecdf_p:>10.3g} {test.mean:>7.3f} {test.spread:>7.3f}"
            )
        return "\n".join(
            [
                *lines,
                f"{self.num_replications} replications, {self.num_draws} draws each: p = {self.p_value:.3g} in all",
            ]
        )

    def _known(self, quantity: str) -> Tensor:
        if quantity not in self.pit:
            raise KeyError(f"got {quantity!r}; expected one of {sorted(self.pit)}")
        return self.pit[quantity].to(torch.float64)

    def _scalar(self, quantity: str) -> Tensor:
        scalars = self.scalars
        if quantity in scalars:
            return scalars[quantity]
        if quantity in self.pit:
            known = self._known(quantity)
            columns = known.reshape(len(known), -1)
            raise ValueError(
                f"got {quantity!r}, which has {columns.shape[1]} entries; expected one number a replication, one of "
                f"{sorted(scalars)}"
            )
        raise KeyError(f"got {quantity!r}; expected one of {sorted(scalars)}")
