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
from smcdiff.guidance.elementwise import diagonal_expansion, diagonal_measurement, measured_latent
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
        spectral = _spectral(program, covariances)
        if spectral is not None:
            exact = diagonal_measurement(program, spectral.basis)
            if exact is not None:
                return exact
        if count <= self.max_measurements:
            check_laws(program, _WHO)
            return self._expanded(program, mean, held, covariances, at)
        if spectral is not None:
            if len(spectral.variance) == 1 and picture_measurement(program) is not None:
                return _iterative(program, spectral.basis, self.solver, highest)
            name = measured_latent(program, spectral.basis)
            if name is not None:
                return diagonal_expansion(program, {**mean, **held}, name, spectral.basis)
            check_laws(program, _WHO)
            (name,) = (name for name, latent in program.latents.items() if latent.is_diffusion)
            return curvature_expansion(program, {**mean, **held}, name, spectral.basis)
        raise TypeError(
            f"{_WHO} got {count} measured values of {sorted(mean)} and found no way to condition on them: with so many "
            "it needs one diffusion prior whose covariance is diagonal in a basis. Use another covariance, "
            f"Adapted(max_measurements={count}) if memory allows, or sd.TDS"
        )

    def _expanded(
        self, program: Program, mean: States, held: States, covariances: Covariances, at: States | None
    ) -> Information:
        if at is not None:
            return few_measurements(program, at, held)
        found = few_measurements(program, mean, held)
        for _ in range(self.expansions - 1):
            found = few_measurements(program, found.condition(mean, covariances).mean(), held)
        return found


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
