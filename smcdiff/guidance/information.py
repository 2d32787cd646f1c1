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

from torch import Tensor

from smcdiff.diffusion.covariance import Diagonal
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
        expansions: how often a program that is not linear is expanded, about x0_hat first and then about the mean
            given the expansion before.
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
            if (
                surrogate is None
                and count > self.max_measurements
                and picture is not None
                and len(spectral.variance) == 1
            ):
                surrogate = _iterative(program, spectral.basis, self.solver, highest)
        if surrogate is not None and picture is not None and picture.exact:
            return surrogate
        expand = self._expansion(program, held, spectral, surrogate, count)
        if at:
            return expand({**mean, **at})
        if surrogate is not None:
            found = expand(surrogate.condition(mean, covariances).mean())
        else:
            found = expand(mean)
        linear = picture is not None and picture.exact
        for _ in range(0 if linear else self.expansions - 1):
            found = expand({**mean, **found.condition(mean, covariances).mean()})
        return found

    def _expansion(
        self,
        program: Program,
        held: States,
        spectral: Diagonal | None,
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
        if spectral is not None:
            basis, name = spectral.basis, measured_latent(program, spectral.basis)
            if name is not None:
                return lambda at: diagonal_expansion(program, {**at, **held}, name, basis)
        names = sorted(program.latents)
        raise TypeError(
            f"{_WHO} got {count} measured values of {names} and found no way to condition on them: it needs one "
            "diffusion prior under Gaussian or Poisson noise whose mean is affine in it, with one covariance for all "
            "particles and no other latent, or operators and a covariance that are diagonal in one basis. Use another "
            f"covariance or operator, Adapted(max_measurements={count}) if memory allows, or sd.TDS"
        )


def _spectral(program: Program, covariances: Covariances) -> Diagonal | None:
    """The covariance of the program's one diffusion prior where it is diagonal in a basis."""
    found = [covariances[name] for name, latent in program.latents.items() if latent.is_diffusion]
    return found[0] if len(found) == 1 and isinstance(found[0], Diagonal) else None


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
