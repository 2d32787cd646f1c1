r"""The locally optimal proposal with a calibrated covariance of x_0 given x_t.

Model p(x_0 given x_t) as N(m, C_t), m = x0_hat and C_t known. Then each step is conjugate, with
q(x_s given x_t, x_0) = N(b x_t + c x_0, kappa^2 I):

    chain      p(x_s given x_t)    = N(b x_t + c m,  kappa^2 I + c^2 C_t)
    twist      psi_t(x_t)          = integral of N(x_0; m, C_t) p(y given x_0) dx_0
    proposal   q(x_s given x_t, y):  x_0' from N(m, C_t) conditioned on y,  x_s = b x_t + c x_0' + kappa z
    weight     log_g = log psi_s(x_s) - log integral of N(x_0; m_st, C_st) p(y given x_0) dx_0,
               C_st = (C_t^-1 + (c / kappa)^2 I)^-1,   m_st = m + C_st (c / kappa^2) (x_s - b x_t - c m)

By Bayes log p - log q + log psi_s - log psi_t collapses to that weight: what the network says at x_s against what the
Gaussian at x_t foretold it would say. It is zero where p(x_0 given x_t) is Gaussian with that covariance. One forward
pass per particle and step, no pass back. Where p(y given x_0) is not linear and Gaussian its Gauss-Newton quadratic
about m takes its place in twist and proposal (:mod:`smcdiff.guidance.gauss_newton`), and psi_0 is the likelihood as
it is, so that the weights stay exact.

References:
    M. Pitt, N. Shephard, "Filtering via Simulation: Auxiliary Particle Filters" (1999): full adaptation.
    G. Cardoso, Y. Janati, S. Le Corff, E. Moulines, "Monte Carlo guided Diffusion for Bayesian linear inverse problems"
    (2023), arXiv 2308.07983: conjugate steps with an isotropic C_t.
    S. Rissanen, M. Heinonen, A. Solin, "Free Hunch: Denoiser Covariance Estimation for Diffusion Models Without Extra
    Costs" (2024), arXiv 2410.11149: cosine-diagonal covariances in guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smcdiff.diffusion.covariance import Covariance, Diagonal
from smcdiff.diffusion.covariance_models import CovarianceModel
from smcdiff.diffusion.kernels import full_transition
from smcdiff.guidance.base import IndependentTransition, Prediction, SiteStep, log_ratio
from smcdiff.guidance.conjugate_gradients import ConjugateGradients
from smcdiff.guidance.full_chains import FullChains
from smcdiff.guidance.gauss_newton import Conditioned, Information, States
from smcdiff.guidance.information import informed

__all__ = ["Adapted"]


@dataclass(frozen=True)
class Adapted:
    """The locally optimal proposal of a Pyro program.

    Its diffusion priors are run with ``variance="full"``, whatever they say: that chain is the prior which the
    posterior and the evidence are of. It is close to the trained model at few steps already.

    Args:
        model: the Pyro program.
        covariance: C_t of all diffusion priors; None takes each prior's own, which exact denoisers have and
            :meth:`smcdiff.DiffusionPrior.calibrate` gives to trained ones. Where a prior has its own and another is
            given, the given one is used by twist and proposal alone, and the weights correct for the difference.
        max_measurements: up to so many measured values the measurement's derivative is written out, which takes any
            program and covariance; more need an operator and a covariance with a common basis, or conjugate gradients.
        solver: the settings of the conjugate gradients.

    Raises:
        ValueError: at the run, for a prior without a covariance.
        TypeError: at the run, for a program that it cannot take, with the remedy.
    """

    model: Callable[..., Any]
    covariance: CovarianceModel | None = None
    max_measurements: int = 64
    solver: ConjugateGradients = field(default_factory=ConjugateGradients)

    def __post_init__(self) -> None:
        if not isinstance(self.model, FullChains):
            object.__setattr__(self, "model", FullChains(self.model, self.covariance))

    @property
    def forward_only(self) -> bool:
        return True

    @property
    def twist(self) -> _CovarianceTwist:
        return _CovarianceTwist(self)

    @property
    def proposal(self) -> _ConjugateProposal:
        return _ConjugateProposal(self)

    def covariances(self, steps: dict[str, SiteStep]) -> dict[str, Covariance]:
        """C_t of each latent, for twist and proposal."""
        found: dict[str, Covariance] = {}
        for name, step in steps.items():
            latent = step.program.latents[name]
            if not latent.is_diffusion:
                assert step.estimate.variance is not None
                found[name] = Diagonal(step.estimate.variance)
                continue
            model, parts = latent.chain.covariance, step.estimate.parts
            if self.covariance is not None and self.replaces(step):
                model = self.covariance
                parts = model.parts(latent.chain.denoiser, step.x, step.coefficients.t, step.estimate)
            assert model is not None
            found[name] = model.at(step.coefficients.t, parts, step.x)
        return found

    def replaces(self, step: SiteStep) -> bool:
        """Whether C_t is another covariance than that of the latent's own chain."""
        latent = step.program.latents[step.name]
        return latent.is_diffusion and self.covariance is not None and self.covariance is not latent.chain.covariance

    def informed(self, steps: dict[str, SiteStep], covariances: dict[str, Covariance]) -> Information:
        """The likelihood's quadratic about x0_hat."""
        program = next(iter(steps.values())).program
        mean = {name: step.estimate.mean for name, step in steps.items()}
        return informed(program, mean, covariances, self.max_measurements, self.solver)


@dataclass(frozen=True)
class _CovarianceTwist:
    """log psi_t = log of the integral of N(x_0; m, C_t) p(y given x_0)."""

    method: Adapted

    def log_psi(self, prediction: Prediction) -> Tensor:
        steps = {name: SiteStep.at(prediction, name) for name in prediction.x if name not in prediction.program.held}
        covariances = self.method.covariances(steps)
        mean = {name: step.estimate.mean for name, step in steps.items()}
        return self.method.informed(steps, covariances).condition(mean, covariances).log_integral()


@dataclass(frozen=True)
class _ConjugateProposal:
    """x_s = b x_t + c x_0' + kappa z, with x_0' drawn given y."""

    method: Adapted

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def transition(self, steps: dict[str, SiteStep]) -> _ConjugateTransition:
        covariances = self.method.covariances(steps)
        information = self.method.informed(steps, covariances)
        mean = {name: step.estimate.mean for name, step in steps.items()}
        conditioned = information.condition(mean, covariances)
        others = frozenset(name for name, step in steps.items() if self.method.replaces(step))
        return _ConjugateTransition(steps, covariances, information, conditioned, others)


@dataclass(frozen=True, eq=False)
class _ConjugateTransition:
    steps: dict[str, SiteStep]
    covariances: dict[str, Covariance]
    information: Information
    conditioned: Conditioned
    others: frozenset[str]  # latents whose C_t is not their chain's own

    def sample(self, noise: Callable[[torch.Size], Tensor]) -> States:
        clean = self.conditioned.draw(noise)
        return {
            name: _towards(step, clean[name], noise) if name in clean else step.p.sample(noise(step.x.shape))
            for name, step in self.steps.items()
        }

    def log_ratio(self, x: States) -> Tensor:
        means, covariances = {}, {}
        for name, step in self.steps.items():
            means[name], covariances[name] = _foretold(step, self.covariances[name], x[name])
        foretold = self.information.condition(means, covariances)
        return self.conditioned.log_integral() - foretold.log_integral() + self._chain_against_own(x)

    def log_p(self, x: States) -> Tensor:
        return IndependentTransition({name: (step.p, step.p) for name, step in self.steps.items()}).log_p(x)

    def _chain_against_own(self, x: States) -> Tensor:
        """log p(x_s given x_t) - log N(x_s; b x_t + c m, kappa^2 I + c^2 C_t), zero where C_t is the chain's own."""
        total = torch.zeros((), dtype=torch.float64, device=next(iter(x.values())).device)
        for name, step in self.steps.items():
            if name in self.others:
                own = full_transition(step.coefficients, step.x, step.estimate.mean, self.covariances[name])
                total = total + log_ratio(step.p, own, x[name])
        return total


def _towards(step: SiteStep, clean: Tensor, noise: Callable[[torch.Size], Tensor]) -> Tensor:
    """A draw of q(x_s given x_t, x_0)."""
    to = step.coefficients
    x_s = to.b * step.x + to.c * clean
    return x_s if to.kappa == 0 else x_s + to.kappa * noise(clean.shape)


def _foretold(step: SiteStep, covariance: Covariance, x_s: Tensor) -> tuple[Tensor, Covariance]:
    """m_st and C_st: what N(m, C_t) says of x_0 once x_s is seen."""
    to, mean = step.coefficients, step.estimate.mean
    if to.kappa == 0:  # x_s is b x_t + c x_0 itself
        return (x_s - to.b * step.x) / to.c, covariance.given(float("inf"))
    given = covariance.given((to.c / to.kappa) ** 2)
    return mean + given.apply(to.c / to.kappa**2 * (x_s - to.b * step.x - to.c * mean)), given
