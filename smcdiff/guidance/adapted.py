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
pass per particle and step, no pass back. Where p(y given x_0) is not linear and Gaussian a quadratic takes its place in
twist and proposal (:mod:`smcdiff.guidance.information`), and psi_0 is the likelihood as it is, so that the weights
stay exact.

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

from torch import Tensor

from smcdiff.diffusion.covariance import Covariance, Diagonal
from smcdiff.diffusion.covariance_models import CovarianceModel
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import NoiseLevel
from smcdiff.guidance.base import IndependentTransition, Prediction, SiteStep
from smcdiff.guidance.conjugate_gradients import ConjugateGradients
from smcdiff.guidance.full_chains import Beside, FullChains, chain_against_own, foretold
from smcdiff.guidance.information import Conditioning
from smcdiff.guidance.program import Program
from smcdiff.guidance.quadratic import Conditioned, Covariances, Information, Noise, States

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
        expansions: how often a program that is not linear in its latents is expanded at every step: about x0_hat, and
            then on the way to the mode of x_0 given y. At least 1.
        solver: the settings of the conjugate gradients.

    Raises:
        ValueError: for less than one expansion; at the run, for a prior without a covariance.
        TypeError: at the run, for a program that it cannot take, with the remedy.
    """

    model: Callable[..., Any]
    covariance: CovarianceModel | None = None
    max_measurements: int = 64
    expansions: int = 4
    solver: ConjugateGradients = field(default_factory=ConjugateGradients)

    def __post_init__(self) -> None:
        if self.expansions < 1:
            raise ValueError(f"got expansions {self.expansions}; expected at least 1, about x0_hat")
        plain = self.model.model if isinstance(self.model, FullChains) else self.model
        object.__setattr__(self, "model", FullChains(plain, self.covariance))

    @property
    def forward_only(self) -> bool:
        return True

    @property
    def twist(self) -> _CovarianceTwist:
        return _CovarianceTwist(self)

    @property
    def proposal(self) -> _ConjugateProposal:
        return _ConjugateProposal(self)

    def looked(self, prediction: Prediction) -> tuple[States, States, Covariances, Information]:
        """x0_hat of the latents that move, the states of those that do not, C_t, and the likelihood's quadratic."""
        key = (id(self), "looked")
        if key not in prediction.memo:
            program, held = prediction.program, prediction.program.held
            estimates = {name: said for name, said in prediction.estimates.items() if name not in held}
            mean = {name: said.mean.detach() for name, said in estimates.items()}
            still = {name: prediction.x[name].detach() for name in held}
            covariances = self.covariances(program, prediction.k, estimates)
            information = self.information(program, mean, still, covariances)
            prediction.memo[key] = mean, still, covariances, information
        found: tuple[States, States, Covariances, Information] = prediction.memo[key]
        return found

    def met(self, prediction: Prediction) -> Conditioned:
        """N(x0_hat, C_t) and the likelihood's quadratic, for one prediction: what is solved once is kept."""
        key = (id(self), "met")
        if key not in prediction.memo:
            mean, _, covariances, information = self.looked(prediction)
            prediction.memo[key] = information.condition(mean, covariances)
        found: Conditioned = prediction.memo[key]
        return found

    def covariances(self, program: Program, k: int, estimates: dict[str, Estimate]) -> Covariances:
        """C_t of each of these latents at noise level k, for twist and proposal."""
        return {name: _covariance(program, k, name, estimate) for name, estimate in estimates.items()}

    def shared_covariance(self, program: Program, name: str, level: NoiseLevel, like: Tensor) -> Covariance:
        """C_t at any noise level, of a prior with one covariance for all particles."""
        model = program.latents[name].chain.covariance
        assert model is not None
        return (model.given_at if isinstance(model, Beside) else model.at)(level, {}, like)

    def information(
        self, program: Program, mean: States, held: States, covariances: Covariances, at: States | None = None
    ) -> Information:
        """The likelihood's quadratic; arguments as for :class:`smcdiff.guidance.information.Conditioning`."""
        how = Conditioning(self.max_measurements, self.expansions, self.solver)
        return how.information(program, mean, held, covariances, lambda: _highest(program), at)


@dataclass(frozen=True)
class _CovarianceTwist:
    """log psi_t = log of the integral of N(x_0; m, C_t) p(y given x_0)."""

    method: Adapted

    def log_psi(self, prediction: Prediction) -> Tensor:
        return _looked(self.method, prediction)["log_integral"]


@dataclass(frozen=True)
class _ConjugateProposal:
    """x_s = b x_t + c x_0' + kappa z, with x_0' drawn given y."""

    method: Adapted

    @property
    def extra_passes(self) -> int:
        return 0

    def objective(self, prediction: Prediction, log_psi: Tensor) -> None:
        return None

    def carry(self, prediction: Prediction) -> dict[str, Tensor]:
        return _looked(self.method, prediction)

    def transition(self, steps: dict[str, SiteStep], held: States, carried: dict[str, Tensor]) -> _ConjugateTransition:
        first = next(iter(steps.values()))
        mean = {name: step.estimate.mean for name, step in steps.items()}
        covariances = self.method.covariances(
            first.program, first.k, {name: step.estimate for name, step in steps.items()}
        )
        at = {key[len(_AT) :]: state for key, state in carried.items() if key.startswith(_AT)}
        information = self.method.information(first.program, mean, held, covariances, at or None)
        return _ConjugateTransition(steps, covariances, information, mean, carried["log_integral"])


def _looked(method: Adapted, prediction: Prediction) -> dict[str, Tensor]:
    """The log-integral of each particle, and where a program that is not linear was expanded."""
    if id(method) not in prediction.memo:
        *_, information = method.looked(prediction)
        found = {"log_integral": method.met(prediction).log_integral()}
        found |= {f"{_AT}{name}": state for name, state in information.expanded_at.items()}
        prediction.memo[id(method)] = found
    return dict(prediction.memo[id(method)])


_AT = "at/"


@dataclass(frozen=True, eq=False)
class _ConjugateTransition:
    steps: dict[str, SiteStep]
    covariances: Covariances
    information: Information
    mean: States
    log_integral: Tensor  # of the information under N(mean, covariances)

    def sample(self, noise: Noise) -> States:
        clean = self.information.condition(self.mean, self.covariances).draw(noise)
        return {
            name: _towards(step, clean[name], noise) if name in clean else step.p.sample(noise(step.x.shape))
            for name, step in self.steps.items()
        }

    def log_ratio(self, x: States) -> Tensor:
        means, covariances = {}, {}
        for name, step in self.steps.items():
            means[name], covariances[name] = foretold(step, self.covariances[name], x[name])
        known: Conditioned = self.information.condition(means, covariances)
        against = sum(chain_against_own(step, self.covariances[name], x[name]) for name, step in self.steps.items())
        return self.log_integral - known.log_integral() + against

    def log_p(self, x: States) -> Tensor:
        return IndependentTransition({name: (step.p, step.p) for name, step in self.steps.items()}).log_p(x)


def _covariance(program: Program, k: int, name: str, estimate: Estimate) -> Covariance:
    """C_t of one latent."""
    latent = program.latents[name]
    if not latent.is_diffusion:
        assert estimate.variance is not None
        return Diagonal(estimate.variance)
    level, model = latent.chain.levels[k], latent.chain.covariance
    assert model is not None
    find = model.given_at if isinstance(model, Beside) else model.at
    return find(level, estimate.parts, estimate.mean)


def _highest(program: Program) -> Tensor:
    """v of the program's one diffusion prior at the highest noise, where all particles share it."""
    name = next(name for name, latent in program.latents.items() if latent.is_diffusion)
    found = _covariance(program, program.num_steps, name, Estimate(program.probe.values[name][None]))
    assert isinstance(found, Diagonal)
    return found.variance


def _towards(step: SiteStep, clean: Tensor, noise: Noise) -> Tensor:
    """A draw of q(x_s given x_t, x_0)."""
    to = step.coefficients
    x_s = to.b * step.x + to.c * clean
    return x_s if to.kappa == 0 else x_s + to.kappa * noise(clean.shape)
