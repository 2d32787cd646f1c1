r"""Pyro state-space models on the particle filter, written as for ``pyro.infer.SMCFilter``.

A model is an object with ``init(state, ...)`` and ``step(state, ...)`` that draws x_i and observes y_i by
``pyro.sample`` and keeps in ``state`` whatever the next step needs. A guide is an object of the same form that proposes
the model's latent sites, and may say by ``pyro.factor`` how well a particle is placed for what is still to come. With
log psi_i the sum of the guide's factors in step i,

    G_i = p(x_i | x_{i-1}) p(y_i | x_i) psi_i(x_i) / (q(x_i | x_{i-1}) psi_{i-1}(x_{i-1})),      psi_{-1} = psi_K = 1,

so the twists cancel along a path and the evidence is p(y_0, ..., y_K) whatever guide and factors are used. With
q proportional to p(x_i | x_{i-1}) p(y_i | x_i) psi_i(x_i) and psi_i(x) = p(y_{i+1}, ..., y_K | x_i = x) it is exact at
any number of particles.

Densities of torch draw from torch's global generator only. During a step that generator therefore takes over the state
of the run's own, and is put back afterwards: a run depends on its seed alone, and does not disturb the caller's noise.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyro
import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from smcdiff.smc import Move, Particles

__all__ = ["InitAndStep", "ParticleState", "StateSpaceModel"]

#: The particles' entry for log psi_i, (b, n), float64; it is there before the last step.
LOG_PSI = "guide.log_psi"

_BAD_FACTOR = (
    "the guide's pyro.factor is NaN or infinite; a twist must be positive, or the paths that it forbids are lost from "
    "the evidence: use a finite number, such as -1e4 where little is to be expected"
)


class InitAndStep(Protocol):
    """A model or a guide: its first argument is the state, the others are those of that step."""

    @property
    def init(self) -> Callable[..., Any]:
        """Draws x_0, and observes y_0 if there is one."""

    @property
    def step(self) -> Callable[..., Any]:
        """Draws x_i given what ``state`` holds of the past, and observes y_i."""


class ParticleState(UserDict[str, Tensor]):
    """What a model keeps from one step to the next, {name: (particles, *event)}. Models write it, guides read it.

    Args:
        num_particles: b n, particles of all chains, in the leading dimension of every entry.
        values: what to start with.

    Raises:
        TypeError: for an entry that is not a tensor.
        ValueError: for an entry without the leading dimension.
        RuntimeError: when a guide writes.
    """

    def __init__(self, num_particles: int, values: Mapping[str, Tensor]) -> None:
        self.num_particles, self.read_only = num_particles, False
        super().__init__(values)

    def __setitem__(self, name: str, value: Tensor) -> None:
        if self.read_only:
            raise RuntimeError(
                f"got {name!r} written to the state by the guide; leave that to the model, which runs next"
            )
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"got a {type(value).__name__} as the state's {name!r}; expected a tensor, named by a string"
            )
        if value.shape[:1] != (self.num_particles,):
            raise ValueError(
                f"got the state's {name!r} of shape {tuple(value.shape)}; expected {self.num_particles} particles in "
                "its leading dimension. What is the same for all particles belongs to the model object; otherwise "
                "expand it"
            )
        super().__setitem__(name, value)


class StateSpaceModel:
    """The Feynman-Kac model of a Pyro state-space model, its guide and its observations.

    The sites of ``init`` and ``step`` are run for all particles of all chains at once, inside a plate "particles" that
    adds their dimension on the left of the dimensions that ``max_plate_nesting`` leaves to the model's own plates.

    The model and the guide may count their steps in attributes of their own; such an attribute may depend on the
    arguments but on nothing that was drawn. If a run goes on from a later step, the steps before it are first gone
    through with one particle, so that the counters are right. One object serves one run at a time.

    Pyro's validation is left as it is. On an accelerator every check waits for the device: run inside
    ``pyro.validation_enabled(False)`` once the model is known to be right. Noise from numpy or Python's ``random`` is
    not controlled by the seed.

    References:
        P. Guarniero, A. M. Johansen, A. Lee, "The iterated auxiliary particle filter", Journal of the American
        Statistical Association 112 (2017), arXiv:1511.06286: twisting functions.

    Args:
        model: p, with ``init(state, *init_args)`` and ``step(state, *arguments)``.
        guide: q and psi, called with the same arguments before the model; None proposes from the model.
        observations: what ``step`` is called with for i = 1 ... K: a tensor, split along its first dimension, or a
            sequence whose entries are one argument each, or a tuple of arguments. None is a missing observation: the
            model then draws it, and no guide needs to propose it.
        init_args: what ``init`` is called with, y_0 among it if the model observes one.
        max_plate_nesting: number of dimensions that the model's own plates take, as for ``SMCFilter``.

    Raises:
        ValueError: for observations that are not finite; while running, for sites of model and guide that do not
            match, an observation that the model does not use, or a density without the particles' dimension.
    """

    def __init__(
        self,
        model: InitAndStep,
        guide: InitAndStep | None,
        observations: Sequence[Any] | Tensor,
        *,
        init_args: tuple[Any, ...] = (),
        max_plate_nesting: int = 0,
    ) -> None:
        self._model, self._guide, self._nesting = model, guide, max_plate_nesting
        self._args = [init_args, *(entry if isinstance(entry, tuple) else (entry,) for entry in observations)]
        tensors = [(i, value) for i, args in enumerate(self._args) for value in args if isinstance(value, Tensor)]
        for i, value in tensors:
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"got a NaN or infinite value in {self.describe(i)}; give None for a missing observation, or fill "
                    "in any finite number and leave it out with pyro.poutine.mask in the model"
                )
        self._device = tensors[0][1].device if tensors else torch.device("cpu")
        self._position: int | None = None  # the step that model and guide have taken last

    @property
    def num_steps(self) -> int:
        """K, the number of observations after the initial one."""
        return len(self._args) - 1

    @property
    def device(self) -> torch.device:
        """Where the first tensor among the arguments is; the CPU if there is none."""
        return self._device

    def describe(self, i: int) -> str:
        """Name of step i in the user's terms."""
        return f"observations[{i - 1}]" if i else "init"

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        """Run ``init``."""
        return self._move(0, {}, (num_chains, num_particles), generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        """Run ``step`` with observation i."""
        if self._position != i - 1:
            aside = torch.Generator(self.device).manual_seed(0)
            move = self._move(0, {}, (1, 1), aside)
            for earlier in range(1, i):
                move = self._move(earlier, move.particles, (1, 1), aside)
        b, n = particles[LOG_PSI].shape
        return self._move(i, particles, (b, n), generator)

    def _move(self, i: int, particles: Particles, shape: tuple[int, int], generator: torch.Generator) -> Move:
        entries = {name: value.flatten(0, 1) for name, value in particles.items()}
        log_psi_before = entries.pop(LOG_PSI, 0.0)
        state = ParticleState(shape[0] * shape[1], entries)
        self._position = None
        try:
            with _drawing_from(generator):
                log_g, log_psi = self._take(i, state)
        except Exception as error:
            error.add_note(f"This was in step {i} of {self.num_steps}, {self.describe(i)}.")
            raise
        self._position = i
        if i < self.num_steps:
            state[LOG_PSI] = log_psi
        else:
            log_psi = torch.zeros_like(log_psi)  # psi_K = 1, whatever the guide says
        return Move(
            particles={name: value.unflatten(0, shape) for name, value in state.items()},
            log_g=(log_g + log_psi - log_psi_before).unflatten(0, shape),
            faults={_BAD_FACTOR: ~torch.isfinite(log_psi).unflatten(0, shape).all(-1)},
        )

    def _take(self, i: int, state: ParticleState) -> tuple[Tensor, Tensor]:
        """log p(x_i, y_i | x_{i-1}) - log q(x_i | x_{i-1}) and log psi_i(x_i), each (particles,)."""
        method, args = "step" if i else "init", self._args[i]
        program = getattr(self._model, method)
        proposed: dict[str, Any] = {}
        log_g = log_psi = torch.zeros(state.num_particles, dtype=torch.float64, device=self.device)
        with pyro.poutine.block(), pyro.plate("particles", state.num_particles, dim=-1 - self._nesting):
            if self._guide is not None:
                state.read_only = True
                trace = pyro.poutine.trace(getattr(self._guide, method)).get_trace(state, *args)
                state.read_only = False
                proposed, factors = _sites(trace)
                for name, site in factors.items():
                    if not isinstance(site["fn"], Unit):
                        raise ValueError(
                            f"got the observed site {name!r} in the guide; a guide draws the model's latents and may "
                            "use pyro.factor. Put the observation into the model"
                        )
                    log_psi = log_psi + _log_prob(name, site, state.num_particles)
                program = pyro.poutine.replay(program, trace)
            latents, observed = _sites(pyro.poutine.trace(program).get_trace(state, *args))
        self._check_sites(i, latents, observed, proposed)
        for name, site in proposed.items():
            log_g = log_g + _log_prob(name, latents[name], state.num_particles)
            log_g = log_g - _log_prob(name, site, state.num_particles)
        for name, site in observed.items():
            log_g = log_g + _log_prob(name, site, state.num_particles)
        return log_g, log_psi

    def _check_sites(self, i: int, latents: dict[str, Any], observed: dict[str, Any], proposed: dict[str, Any]) -> None:
        gap = any(value is None for value in self._args[i])
        if i and self._args[i] and not gap and not observed:
            raise ValueError(
                f"got an observation, but the model observes nothing: its sites are {sorted(latents)}. Pass it on as "
                "obs=..., or give None among the arguments of a step without an observation"
            )
        if proposed.keys() - latents.keys():
            raise ValueError(
                f"got the sites {sorted(proposed.keys() - latents.keys())} in the guide; the latent sites of the model "
                f"are {sorted(latents)}. Give the guide the same names"
            )
        missing = latents.keys() - proposed.keys()
        if self._guide is not None and missing and not gap:
            raise ValueError(
                f"got a guide without the model's latent sites {sorted(missing)}; its own are {sorted(proposed)}. "
                "Sample them in the guide, from the model's own law if there is no better one; if one of them is an "
                "observation, give it"
            )


def _sites(trace: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The latent and the observed sites of a trace; plates and deterministic values are neither."""
    latents: dict[str, Any] = {}
    observed: dict[str, Any] = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or (site["infer"] or {}).get("_deterministic"):
            continue
        if isinstance(site["fn"], _Subsample):
            if site["fn"].subsample_size not in (None, site["fn"].size):
                raise ValueError(
                    f"got the subsampled plate {name!r}; the evidence of a random part of the data is another one. Use "
                    "the plate without subsample_size"
                )
            continue
        (observed if site["is_observed"] else latents)[name] = site
    return latents, observed


def _log_prob(name: str, site: Any, num_particles: int) -> Tensor:
    """log-density of a site, summed over all dimensions but that of the particles: (particles,), float64."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    log_prob = scale_and_mask(log_prob, site["scale"], site["mask"])
    if log_prob.shape[:1] != (num_particles,):
        raise ValueError(
            f"got a log-density of shape {tuple(log_prob.shape)} at the site {name!r}; expected {num_particles} "
            "particles in its leading dimension. Declare a vector by .to_event(1), or raise max_plate_nesting to the "
            "number of dimensions that the model's plates take"
        )
    return log_prob.to(torch.float64).flatten(1).sum(-1) if log_prob.dim() > 1 else log_prob.to(torch.float64)


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Inside, torch's global generator of the device goes on where ``generator`` is; outside it is as it was."""
    device = generator.device
    cuda = device.type == "cuda"
    before = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()

    def put(state: Tensor) -> None:
        torch.cuda.set_rng_state(state, device) if cuda else torch.set_rng_state(state)

    put(generator.get_state())
    try:
        yield
        generator.set_state(torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state())
    finally:
        put(before)
