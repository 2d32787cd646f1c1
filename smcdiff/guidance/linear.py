r"""The linear-Gaussian measurement of a program, for the methods that are made for it.

Many published samplers solve ``y = A x_0 + sigma_y noise`` with a fixed linear A and a fixed sigma_y. Here a program
is recognised as such a problem, or it is said what in it is not and which method takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributions import Independent

from smcdiff.guidance.program import Program
from smcdiff.measurement import GaussianMeasurement, LinearOperator
from smcdiff.measurement.svd import SVD

__all__ = ["LinearMeasurement", "linear_measurement"]


@dataclass(frozen=True, eq=False)
class LinearMeasurement:
    """y = A x_0 + sigma_y noise.

    Args:
        latent: name of the site x_0, a diffusion prior.
        site: name of the observed site.
        operator: A.
        y: the measurement, of the shape of A x_0.
        sigma_y: standard deviation of the noise, 0-d or broadcastable to y.
        x: an event like x_0; its shape, dtype and device count.
    """

    latent: str
    site: str
    operator: LinearOperator
    y: Tensor
    sigma_y: Tensor
    x: Tensor

    @cached_property
    def svd(self) -> SVD | None:
        """A = U diag(s) V^T on such events, or None where no fast one is known."""
        return self.operator.svd(self.x)

    def require_svd(self, who: str) -> SVD:
        """The svd, which ``who`` needs.

        Raises:
            TypeError: where the operator has none, with what to use instead.
        """
        svd = self.svd
        if svd is None:
            raise TypeError(
                f"{who} needs the singular value decomposition of the operator and {type(self.operator).__name__} has "
                "none that is fast; use a blur with circular padding, or with reflection and a symmetric kernel, one "
                "operator in place of a composition, sd.Matrix for a small problem, or sd.Adapted or sd.TDS, which "
                "need only the transpose"
            )
        return svd

    def scalar_sigma(self, who: str) -> float:
        """sigma_y as one number, which ``who`` needs.

        Raises:
            TypeError: where it differs between measured values.
        """
        low, high = self._sigma_range
        if low != high:
            raise TypeError(
                f"{who} needs one noise level for all measured values and got sigma from {low:.4g} to {high:.4g}; use "
                "sd.Adapted or sd.TDS, which take any"
            )
        return low

    @cached_property
    def _sigma_range(self) -> tuple[float, float]:
        return float(self.sigma_y.min()), float(self.sigma_y.max())


#: What was found of each program that still exists: methods ask at every step, and looking waits for the device.
_FOUND: WeakKeyDictionary[Program, LinearMeasurement] = WeakKeyDictionary()


def linear_measurement(program: Program, who: str) -> LinearMeasurement:
    """The program as one linear-Gaussian measurement of one diffusion prior.

    Args:
        who: needs it, for the errors.

    Raises:
        TypeError: for a program with several sites, another noise law, an operator that is not linear, a noise level
            that is itself a latent, or a mask; each with the remedy.
    """
    found = _FOUND.get(program)
    if found is None:
        found = _FOUND[program] = _recognise(program, who)
    return found


def _recognise(program: Program, who: str) -> LinearMeasurement:
    remedy = "use sd.TDS or sd.DPS, which take any program"
    latents, laws = program.latents, program.probe.laws
    if len(latents) != 1 or not next(iter(latents.values())).is_diffusion or len(laws) != 1:
        raise TypeError(
            f"{who} needs a program with one diffusion prior, no other latent and one observed site; got the latents "
            f"{sorted(latents)} and the observed sites {sorted(laws)}; {remedy}"
        )
    (latent,), ((site, law),) = latents, laws.items()
    if site in program.probe.weighted:
        raise TypeError(
            f"{who} got the observed site {site!r} under a mask or a scale; leave values out with sd.Select"
        )
    while isinstance(law, Independent):
        law = law.base_dist
    if not isinstance(law, GaussianMeasurement):
        raise TypeError(
            f"{who} needs Gaussian noise of known operator, sd.GaussianMeasurement(A, x, sigma); the observed site "
            f"{site!r} has the law {type(law).__name__}; {remedy}"
        )
    if not isinstance(law.operator, LinearOperator):
        raise TypeError(
            f"{who} needs a linear operator and got {type(law.operator).__name__}; if it is linear, make it one with "
            f"sd.as_linear(operator, x), otherwise {remedy}"
        )
    x = program.probe.values[latent]
    if law.x.shape != x.shape or not torch.equal(law.x, x):
        raise TypeError(
            f"{who} needs the operator applied to the prior's own draw; at {site!r} the program changes x before it is "
            f"measured: put the change into the operator with sd.Compose, or {remedy}"
        )
    return LinearMeasurement(latent, site, law.operator, program.observed[site], law.sigma, x)
