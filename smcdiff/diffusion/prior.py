"""A diffusion model as a Pyro distribution over clean events."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from smcdiff.diffusion.calibration import Calibration, calibrate
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.covariance_models import CovarianceModel, SpectralBasis
from smcdiff.diffusion.denoiser import Denoiser, WithVariance
from smcdiff.diffusion.kernels import Variance
from smcdiff.diffusion.schedule import Grid, Schedule
from smcdiff.diffusion.start import Start

__all__ = ["DiffusionPrior"]


class DiffusionPrior(TorchDistribution):
    """The law of x_0 under a reverse chain: p(x_0) = integral of p(x_{t_K}) prod_k p(x_{t_{k-1}} given x_{t_k}).

    Use it at a sample site of a Pyro program. It can be drawn from; its density is an integral over all paths and
    cannot be computed, which is why a posterior needs :class:`smcdiff.SMC`.

    Args:
        denoiser: gives E[x_0 given x_t].
        schedule: gives alpha_t and sigma_t.
        num_steps: K, the number of steps of the chain.
        eta: share of the ancestral noise, in [0, 1].
        variance: of a step: "posterior", "fixed_large", "learned", "optimal" or "full" (see
            :mod:`smcdiff.diffusion.kernels`).
        grid: where the noise times lie; None takes the schedule's default.
        clip: (low, high) that x0_hat is clipped to; part of the chain.
        batch_shape: independent events in one draw; Pyro's plates set it.
        start: begin part of the way, at a noised picture; the prior is then another one. None begins at noise.
        covariance: Cov[x_0 given x_t]; None takes the denoiser's own, where it knows one.

    Raises:
        ValueError: for an eta outside [0, 1], an unknown variance, more steps than the grid has distinct times, or a
            start that is not of a draw's shape or outside the schedule's times.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the base class declares it so)
    has_rsample = False

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        num_steps: int = 100,
        eta: float = 1.0,
        *,
        variance: Variance = "posterior",
        grid: Grid | None = None,
        clip: tuple[float, float] | None = None,
        batch_shape: tuple[int, ...] = (),
        start: Start | None = None,
        covariance: CovarianceModel | None = None,
    ) -> None:
        self.chain = ReverseChain(
            denoiser, schedule, num_steps, eta, variance, grid, clip, tuple(batch_shape), start, covariance
        )
        #: What was measured by :meth:`calibrate`, of a prior that it returned.
        self.calibration: Calibration | None = None
        super().__init__(torch.Size(batch_shape), denoiser.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *batch_shape, *event_shape): draws of x_0."""
        shape = torch.Size(sample_shape)
        return self.chain.sample(shape.numel()).reshape(shape + self.chain.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Not available: the density of x_0 is an integral over all reverse paths.

        Raises:
            RuntimeError: always, with what to do instead.
        """
        raise RuntimeError(
            "the density of a DiffusionPrior is an integral over all reverse paths and cannot be computed; for the "
            "posterior run smcdiff.SMC on the program, for the joint density of a path trace smcdiff.unroll(model)"
        )

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> DiffusionPrior:
        """The prior of that many independent events."""
        return self._with(batch_shape=tuple(batch_shape))

    def replace(
        self,
        *,
        denoiser: Denoiser | None = None,
        num_steps: int | None = None,
        variance: Variance | None = None,
        grid: Grid | None = None,
        start: Start | None = None,
        covariance: CovarianceModel | None = None,
    ) -> DiffusionPrior:
        """The same prior with another denoiser, number of steps, step variance, time grid, start or covariance."""
        return self._with(denoiser, num_steps, variance, grid, start=start, covariance=covariance)

    @property
    def covariance(self) -> CovarianceModel | None:
        """Cov[x_0 given x_t], where it is known."""
        return self.chain.covariance

    def with_measured_variance(self, images: Tensor, seed: int = 0, batch: int = 64) -> DiffusionPrior:
        """The same prior with ``variance="optimal"``, its Var[x_0 given x_t] measured on ``images``, level by level.

        Each level's variance is the mean of (x_0 - x0_hat)^2 over images, pixels and one noise draw per image: one
        network evaluation per image and step.

        Args:
            images: clean events the network was not trained on, (number, *event).

        Raises:
            ValueError: for images of another shape.
        """
        chain = self.chain
        if images.shape[1:] != chain.denoiser.event_shape or len(images) == 0:
            raise ValueError(
                f"got images of shape {tuple(images.shape)}; expected (number, *{tuple(chain.denoiser.event_shape)})"
            )
        single = chain.expand(())
        images = images.to(chain.denoiser.device, chain.denoiser.dtype)
        generator = torch.Generator(images.device).manual_seed(seed)
        errors = []
        with torch.no_grad():
            for k, level in enumerate(chain.levels[1:], start=1):
                noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
                noisy = level.alpha * images + level.sigma * noise
                parts = [single.estimate(k, part).mean for part in noisy.split(batch)]
                errors.append((torch.cat(parts) - images).double().square().mean())
        ratios = torch.tensor([level.ratio for level in chain.levels[1:]], dtype=torch.float64)
        denoiser = WithVariance(chain.denoiser, ratios, torch.stack(errors).cpu())
        return self._with(denoiser=denoiser, variance="optimal")

    def calibrate(
        self,
        images: Tensor,
        *,
        basis: SpectralBasis = "dct",
        seed: int = 0,
        batch: int = 64,
        progress: bool = True,
    ) -> DiffusionPrior:
        """The same prior with a spectral covariance of x_0 given x_t, measured at its noise levels.

        One network evaluation per image and step. The covariance serves other numbers of steps and time grids too:
        between measured levels it is interpolated. What :func:`smcdiff.diffusion.calibration.calibrate` reports of the
        residuals is in :attr:`calibration`.

        Args:
            images: clean events the network was not trained on, or draws from the prior, (number, *event).
            basis: "dct" for pictures with edges, "fft" where the measurement is a circular convolution, or "pixels".
            seed: of the noise.
            batch: images put through the network at once.
            progress: show a progress bar.

        Raises:
            ValueError: for images that cannot be used, or an unknown basis.
        """
        measured = calibrate(self.chain, images, basis=basis, seed=seed, batch=batch, progress=progress)
        calibrated = self.replace(covariance=measured.covariance)
        calibrated.calibration = measured
        return calibrated

    def _with(
        self,
        denoiser: Denoiser | None = None,
        num_steps: int | None = None,
        variance: Variance | None = None,
        grid: Grid | None = None,
        batch_shape: tuple[int, ...] | None = None,
        start: Start | None = None,
        covariance: CovarianceModel | None = None,
    ) -> DiffusionPrior:
        chain = self.chain
        return DiffusionPrior(
            denoiser or chain.denoiser,
            chain.schedule,
            chain.num_steps if num_steps is None else num_steps,
            chain.eta,
            variance=variance or chain.variance,
            grid=grid or chain.grid,
            clip=chain.clip,
            batch_shape=chain.batch_shape if batch_shape is None else batch_shape,
            start=start or chain.start,
            covariance=covariance or chain.covariance,
        )
