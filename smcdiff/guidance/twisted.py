r"""A program, its chains and a method as a Feynman-Kac model: the twisted particle filter.

    initial     x_T ~ p(x_T), N(0, (alpha_T^2 + sigma_T^2) I),   log_g = log psi_T(x_T)
    t -> s      x_s ~ q(x_s given x_t, y),                       log_g = log p(x_s given x_t) - log q(x_s given x_t, y)
                                                                         + log psi_s(x_s) - log psi_t(x_t)
    s = 0       psi_0 = p(y given x_0)

The weights of a whole path multiply to p(path) p(y given x_0) / q(path).

Each particle carries what its one network evaluation gave: x_t, x0_hat, log psi_t and the gradient of the proposal's
objective. They are resampled together, so nothing is ever computed twice or left behind.

References:
    L. Wu, B. Trippe, C. Naesseth, D. Blei, J. Cunningham, "Practical and Asymptotically Exact Conditional Sampling in
    Diffusion Models" (2023), arXiv 2306.17775, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.diffusion.covariance_models import DependsOnPath, Parts
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.kernels import Gaussian
from smcdiff.guidance.base import (
    ForwardOnly,
    IndependentTransition,
    InformedProposal,
    JointProposal,
    Method,
    Prediction,
    SiteStep,
    Transition,
    TransitionLaw,
    WithHeld,
)
from smcdiff.guidance.full_chains import Beside
from smcdiff.guidance.program import Program
from smcdiff.smc.feynman_kac import Move, Particles

__all__ = ["POINT_MASS", "Evaluations", "TwistedModel"]


@dataclass
class Evaluations:
    """Network evaluations so far, counted per particle.

    Args:
        forward: passes through the denoisers of the diffusion sites.
        backward: gradients with respect to x_t: of the proposal, and products with Jacobians in twists.
    """

    forward: int = 0
    backward: int = 0

    def count_backward(self, gradient: Tensor) -> None:
        """To be called with every gradient (m, ...) that has come back through a network to its x_t."""
        self.backward += len(gradient)


class TwistedModel:
    """The Feynman-Kac model of a method on a program. Filter step i goes from noise level k = K + 1 - i to k - 1.

    Args:
        program: latents with their chains, and the likelihood.
        method: a twist and a proposal.
        max_batch: largest number of particles put through the network at once; None puts all.
    """

    def __init__(self, program: Program, method: Method, max_batch: int | None = None) -> None:
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"got max_batch {max_batch}; expected at least 1 particle, or None for all at once")
        self.program, self.method, self.max_batch = program, method, max_batch
        self.evaluations = Evaluations()
        #: The last evaluation's graph, its buffers gone. While its nodes live, a CPU's allocator keeps the memory
        #: between them for the next evaluation and does not hand it back page by page; see benchmarks/overhead.py.
        self._spent_graph: Tensor | None = None
        #: False once a point mass other than the chain's own was proposed: such a path has no weight.
        self.has_density = True

    @property
    def num_steps(self) -> int:
        return self.program.num_steps

    @property
    def device(self) -> torch.device:
        return self.program.device

    def describe(self, i: int) -> str:
        """Filter step i in the words of the diffusion chain."""
        k = self.num_steps - i
        latents = self.program.latents.values()
        chain = next((latent.chain for latent in latents if latent.is_diffusion), next(iter(latents)).chain)
        return f"step k = {k} of K = {self.num_steps}, noise time t = {chain.levels[k].t:.6g}"

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        """x_T from the chain's first law, and log psi_T."""
        x = {}
        for name, latent in self.program.latents.items():
            chain = latent.chain
            noise = self._noise((num_chains, num_particles, *chain.shape), generator)
            held = self.program.held.get(name)
            first = chain.initial_mean + chain.initial_scale * noise
            x[name] = first if held is None else held[:, None].expand(noise.shape)
        particles, faults = self.evaluate(self.num_steps, x)
        return Move(particles, particles["log_psi"], faults)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """x_s from q, and the incremental weight."""
        x, log_ratio = self.propose(i, particles, generator)
        moved, faults = self.evaluate(self.num_steps - i, x, particles)
        return Move(moved, log_ratio + moved["log_psi"] - particles["log_psi"], faults)

    def propose(self, i: int, particles: Particles, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """x_s from q, {site: (b, n, *event)}, and log p(x_s given x_t) - log q(x_s given x_t, y), (b, n)."""
        b, n = particles["log_psi"].shape
        self.has_density = self.has_density and POINT_MASS not in particles
        transition = self._transition(i, particles, weighted=n > 1)
        x = transition.sample(lambda shape: self._noise(shape, generator))
        log_ratio = transition.log_ratio(x)
        return {name: value.unflatten(0, (b, n)) for name, value in x.items()}, log_ratio.reshape(b, n)

    def log_potential(self, i: int, previous: Particles | None, current: Particles) -> Tensor:
        """log G_i of given particles, as :meth:`step` reports it, (b, n); for conditional moves."""
        if previous is None:
            return current["log_psi"]
        log_ratio = self._transition(i, previous).log_ratio(self._states(current))
        return log_ratio.reshape(current["log_psi"].shape) + current["log_psi"] - previous["log_psi"]

    def log_transition(self, i: int, previous: Particles, current: Particles) -> Tensor:
        """log p(x_s given x_t) - log psi_t(x_t), (b, n): all of a path's density that depends on x_t.

        Raises:
            TypeError: where the proposal depends on more of a path than its last state.
        """
        self.check_past()
        log_p = self._transition(i, previous).log_p(self._states(current))
        return log_p.reshape(previous["log_psi"].shape) - previous["log_psi"]

    def check_past(self) -> None:
        """Refuse a proposal that knows more of a path than its last state: such a path cannot be given another past.

        Raises:
            TypeError: naming the latent.
        """
        for name, latent in self.program.latents.items():
            covariance = latent.chain.covariance
            if isinstance(covariance, Beside) and isinstance(covariance.given, DependsOnPath):
                raise TypeError(
                    f"got a proposal of {name!r} by a covariance that depends on a particle's path, which cannot be "
                    "given another past; take the prior's own covariance, or moves that trace the past "
                    "(Past.TRACED)"
                )

    def _states(self, particles: Particles) -> dict[str, Tensor]:
        return {name: particles[name].flatten(0, 1) for name in self.program.latents}

    def _transition(self, i: int, particles: Particles, *, weighted: bool = True) -> Transition:
        """p and q of filter step i, from what particles carry; particles and chains in one axis."""
        k = self.num_steps + 1 - i
        steps: dict[str, SiteStep] = {}
        laws: dict[str, tuple[TransitionLaw, TransitionLaw]] = {}
        for name, latent in self.program.latents.items():
            x_t = particles[name].flatten(0, 1)
            if name in self.program.held:
                stay = Gaussian(x_t, None)
                laws[name] = (stay, stay)
                continue
            prefix = f"{name}/"
            here = {key[len(prefix) :]: v.flatten(0, 1) for key, v in particles.items() if key.startswith(prefix)}
            parts = _parts(name, particles)
            estimate = Estimate(here["x0_hat"], here.get("variance"), here.get("fraction"), parts)
            p = latent.chain.transition(k, x_t, estimate)
            coefficients = latent.chain.step(k)
            own = None
            if f"{_OWN}x0_hat" in here:
                own = Estimate(here[f"{_OWN}x0_hat"], here.get(f"{_OWN}variance"), here.get(f"{_OWN}fraction"))
            steps[name] = SiteStep(self.program, name, k, coefficients, x_t, estimate, p, here.get("gradient"), own)
        proposal = self.method.proposal
        if isinstance(proposal, JointProposal):
            kept = {key: v.flatten(0, 1) for key, v in particles.items() if key.startswith(_CARRIED)}
            carried = {key[len(_CARRIED) :]: value for key, value in kept.items()}
            held = {name: particles[name].flatten(0, 1) for name in laws}
            return WithHeld(proposal.transition(steps, held, carried), IndependentTransition(laws))
        for name, step in steps.items():
            law, q = step.p, proposal.q(step)
            if isinstance(q, Gaussian) and q.variance is None and q is not law:
                # a point mass other than the chain's own has no weight: weighted particles keep to the chain,
                # and a single one, which needs no weight, goes without evidence
                q, self.has_density = (law, self.has_density) if weighted else (q, False)
            laws[name] = (law, q)
        return IndependentTransition(laws)

    def evaluate(
        self, k: int, x: dict[str, Tensor], before: Particles | None = None
    ) -> tuple[Particles, dict[str, Tensor]]:
        """All that particles at noise level k carry, and what went wrong in which chain.

        Args:
            before: what the same particles carried at the level before; None where there was none.
        """
        b, n = next(iter(x.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in x.items()}
        kept = {name: _parts(name, before or {}) for name in x}
        size = self.max_batch or b * n
        parts = []
        for start in range(0, b * n, size):
            chunk = {name: value[start : start + size] for name, value in flat.items()}
            if k:
                past = {name: {key: v[start : start + size] for key, v in old.items()} for name, old in kept.items()}
                parts.append(self._predict(k, chunk, past))
            else:
                parts.append({**chunk, "log_psi": self.program.log_prob(chunk)})
        whole = parts[0] if len(parts) == 1 else {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        particles = {key: value.unflatten(0, (b, n)) for key, value in whole.items()}
        faults = _faults(particles)
        if not self.has_density:  # a run that goes on from a checkpoint is to know
            particles[POINT_MASS] = torch.ones_like(particles["log_psi"])
        return particles, faults

    def _predict(self, k: int, x: dict[str, Tensor], past: dict[str, Parts]) -> Particles:
        """Denoisers, twist and gradient on one batch (m, *shape): the network's one evaluation."""
        proposal = self.method.proposal
        forward_only = isinstance(self.method, ForwardOnly) and self.method.forward_only
        with torch.set_grad_enabled(not forward_only):
            x = {name: value.detach().requires_grad_(not forward_only) for name, value in x.items()}
            for name, latent in self.program.latents.items():
                if latent.is_diffusion and not forward_only:
                    x[name].register_hook(self.evaluations.count_backward)
            estimates = {
                name: Estimate(x[name]) if name in self.program.held else latent.chain.estimate(k, x[name], past[name])
                for name, latent in self.program.latents.items()
            }
            prediction = Prediction(self.program, k, x, estimates)
            log_psi = self.method.twist.log_psi(prediction)
            objective = proposal.objective(prediction, log_psi)
            gradients: dict[str, Tensor] = {}
            if objective is not None:
                found = torch.autograd.grad(
                    objective.sum(), list(x.values()), allow_unused=True, materialize_grads=True
                )
                gradients = dict(zip(x, found, strict=True))
                self._spent_graph = objective
        own: dict[str, Estimate] = {}
        remembered: dict[str, Tensor] = {}
        with torch.no_grad():
            if isinstance(proposal, InformedProposal):
                own = proposal.inform(prediction)
            if isinstance(proposal, JointProposal):
                remembered = proposal.carry(prediction)
        diffusion = sum(latent.is_diffusion for latent in self.program.latents.values())  # these have networks
        extra = proposal.extra_passes if isinstance(proposal, JointProposal) else len(own)
        self.evaluations.forward += (diffusion + extra) * len(log_psi)
        carried: Particles = {"log_psi": log_psi.detach()}
        carried |= {f"{_CARRIED}{key}": tensor.detach() for key, tensor in remembered.items()}
        for name, value in x.items():
            estimate = estimates[name]
            carried[name] = value.detach()
            said = {"": estimate, _OWN: own[name]} if name in own else {"": estimate}
            for prefix, what in said.items():
                carried[f"{name}/{prefix}x0_hat"] = what.mean.detach()
                for part, tensor in (("variance", what.variance), ("fraction", what.fraction)):
                    if tensor is not None:
                        carried[f"{name}/{prefix}{part}"] = tensor.detach().expand(len(value), *tensor.shape[1:])
            for key, tensor in estimate.parts.items():
                carried[f"{name}/{_OF_COVARIANCE}{key}"] = tensor.detach()
            if gradients:
                carried[f"{name}/gradient"] = gradients[name]
        return carried

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.program.dtype, device=self.device)


#: Carried by particles whose path has no density, such as one on which a point mass was proposed.
POINT_MASS = "(point mass)"
#: Before the names of what a covariance model keeps of a particle, and of what a proposal's own denoiser said.
_OF_COVARIANCE, _OWN = "covariance/", "own/"
#: Before the names of what a joint proposal keeps of a particle; no site has this name.
_CARRIED = "(proposal)/"


def _parts(name: str, particles: Particles) -> Parts:
    """What the covariance of a latent keeps of each particle; particles and chains in one axis."""
    prefix = f"{name}/{_OF_COVARIANCE}"
    return {key[len(prefix) :]: value.flatten(0, 1) for key, value in particles.items() if key.startswith(prefix)}


def _faults(particles: Particles) -> dict[str, Tensor]:
    """Which chains hold a value that is not finite, by the sentence that names it."""
    named = {
        "x0_hat": "the denoiser of {!r} returned NaN or infinite values; check the network, its dtype and its input",
        "gradient": (
            "the gradient of the method's objective with respect to {!r} is NaN or infinite; check the likelihood at "
            "extreme values of the latents, or limit the proposal with max_shift"
        ),
    }
    faults = {}
    for key, value in particles.items():
        site, _, part = key.rpartition("/")
        if site and part in named:
            total = value.flatten(1).sum(1)  # over particles and event: one value that is not finite makes it so
            faults[named[part].format(site)] = ~torch.isfinite(total)
    return faults
