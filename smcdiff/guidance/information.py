r"""How a program's likelihood is made a quadratic: which of the ways its operators and covariances allow.

one basis            C and A^T Sigma^-1 A are diagonal in one basis (blur and Fourier, masks and pixels, white noise
                     and any): elementwise
few measured values  H written out: any program, any covariance
neither              conjugate gradients, for one picture, affine operators and one covariance for all particles

Where other latents stand beside one picture and there are many measured values, the picture is conditioned elementwise
with the others at their estimates, and the others follow their chains. What none of these can take, and has one picture
with a covariance diagonal in a basis, is conditioned elementwise by the curvature's diagonal alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Corrected, Diagonal
from smcdiff.guidance.conjugate_gradients import ConjugateGradients, IterativeMeasurement, LinearSystem
from smcdiff.guidance.curvature import curvature_expansion
from smcdiff.guidance.elementwise import DiagonalMeasurement, diagonal_expansion, diagonal_measurement, measured_latent
from smcdiff.guidance.gauss_newton import check_laws, few_measurements
from smcdiff.guidance.picture import picture_measurement
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Covariances, Information, States
from smcdiff.transforms import Basis

__all__ = ["Conditioning"]

_WHO = "sd.Adapted"


@dataclass(frozen=True)
class Conditioning:
    """How the likelihood is made a quadratic.

    Args:
        max_measurements: up to so many measured values H is written out.
        expansions: how often a program that is not linear is expanded, about x0_hat first and then on the way to the
            mode of x_0 given y; under noise of which a normal law is near, twice in any case, from that law's mean.
        solver: the settings of the conjugate gradients.
    """

    max_measurements: int
    expansions: int
    solver: ConjugateGradients

    def information(
        self,
        program: Program,
        mean: States,
        held: States,
        covariances: Covariances,
        highest: Callable[[], Tensor],
        at: States | None = None,
    ) -> Information:
        """The log-likelihood's quadratic.

        Args:
            mean: x0_hat of the latents that move, {site: (m, *shape)}.
            held: the states of those that do not.
            covariances: of those that move, given x_t.
            highest: makes the variance of the one picture at the highest noise, in its covariance's coordinates.
            at: where a program that is not linear was expanded last, if that is known.

        Raises:
            TypeError: where none of the ways is open, with what to do.
        """
        count = sum(value.numel() for value in program.observed.values())
        spectral, picture = _spectral(program, covariances), picture_measurement(program)
        surrogate: DiagonalMeasurement | IterativeMeasurement | None = None
        if spectral is not None:
            surrogate = diagonal_measurement(program, spectral.basis)
            many = count > self.max_measurements
            shared = isinstance(spectral, Diagonal) and len(spectral.variance) == 1
            if surrogate is None and many and picture is not None and shared:
                surrogate = _iterative(program, spectral.basis, self.solver, highest)
        if surrogate is not None and picture is not None and picture.exact:
            return surrogate
        expand = self._expansion(program, held, spectral, surrogate, count)
        if at:
            return expand({**mean, **at})
        if surrogate is not None:  # near enough for a single step from its mean to the mode
            once = expand(surrogate.condition(mean, covariances).mean())
            return expand(once.condition(mean, covariances).mean())
        start = mean
        if picture is None or not picture.exact:
            climb = _Climb(program, mean, held, covariances)
            for _ in range(self.expansions - 1):
                start = climb.higher(start, expand(start).condition(mean, covariances).mean())
        return expand(start)

    def _expansion(
        self,
        program: Program,
        held: States,
        spectral: Diagonal | Corrected | None,
        surrogate: DiagonalMeasurement | IterativeMeasurement | None,
        count: int,
    ) -> Callable[[States], Information]:
        """What expands the program's law about a state of the latents that move."""
        if surrogate is not None:
            law = surrogate
            return lambda at: law.expanded(program, at)
        if count <= self.max_measurements:
            check_laws(program, _WHO)
            return lambda at: few_measurements(program, at, held)
        if spectral is None:
            raise TypeError(
                f"{_WHO} got {count} measured values of {sorted(program.latents)} and no way to condition on them: "
                f"more than {self.max_measurements} need one diffusion prior with a covariance diagonal in a basis, "
                f"such as a calibrated one. Use that, Adapted(max_measurements={count}) if memory allows, or sd.TDS"
            )
        basis, name = spectral.basis, measured_latent(program, spectral.basis)
        if name is not None:
            return lambda at: diagonal_expansion(program, {**at, **held}, name, basis)
        check_laws(program, _WHO)
        (picture,) = (name for name, latent in program.latents.items() if latent.is_diffusion)
        return lambda at: curvature_expansion(program, {**at, **held}, picture, basis)


@dataclass(frozen=True, eq=False)
class _Climb:
    """The way to the mode of N(x_0; mean, covariances) p(y given x_0), each particle by itself."""

    program: Program
    mean: States
    held: States
    covariances: Covariances

    def height(self, at: States) -> Tensor:
        """log N(at; mean, covariances) + log p(y given at), (m,) of float64."""
        total = self.program.log_prob({**at, **self.held})
        for name, state in at.items():
            total = total + self.covariances[name].log_prob(state - self.mean[name])
        return total

    def higher(self, at: States, towards: States) -> States:
        """``towards``, or half the way there, or ``at``: the highest of the three."""
        best, height = at, self.height(at)
        for share in (0.5, 1.0):
            tried = {name: torch.lerp(state, towards.get(name, state), share) for name, state in at.items()}
            reached = self.height(tried)
            rises = reached > height
            height = torch.where(rises, reached, height)
            best = {
                name: torch.where(rises.reshape(-1, *(1,) * (state.ndim - 1)), tried[name], state)
                for name, state in best.items()
            }
        return best


def _spectral(program: Program, covariances: Covariances) -> Diagonal | Corrected | None:
    """The covariance of the program's one diffusion prior where it is diagonal in a basis, up to a correction of low
    rank."""
    found = [covariances[name] for name, latent in program.latents.items() if latent.is_diffusion]
    return found[0] if len(found) == 1 and isinstance(found[0], Diagonal | Corrected) else None


_SYSTEMS = "linear systems"


def _iterative(
    program: Program, basis: Basis, settings: ConjugateGradients, highest: Callable[[], Tensor]
) -> IterativeMeasurement:
    key = (_SYSTEMS, basis.to_spectral, basis.from_spectral, settings)
    if key not in program.cache:
        picture = picture_measurement(program)
        assert picture is not None
        program.cache[key] = IterativeMeasurement(picture.name, LinearSystem(picture, basis, highest(), settings))
    found: IterativeMeasurement = program.cache[key]
    return found
