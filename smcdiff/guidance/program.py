r"""A Pyro program as a joint chain of its latents and a likelihood.

The program is run once on a probe to see its sites: diffusion priors, other latents, observations. From then on it is
a function of the latents' chain states alone, run on all particles at once by ``torch.func.vmap``: the program itself
is written for one particle, as any Pyro program is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, Independent

from smcdiff.diffusion.analytic import StandardNormalDenoiser
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import VPSchedule
from smcdiff.guidance.latents import from_standard_normal, noise_shape
from smcdiff.measurement.noise import gaussian_moments

__all__ = ["Latent", "Probe", "Program", "Score", "not_gaussian", "pointwise_log_prob"]

#: log-density of an observed site, elementwise or already summed: (site name, its law, its value) -> tensor.
Score = Callable[[str, Distribution, Tensor], Tensor]


def pointwise_log_prob(name: str, fn: Distribution, value: Tensor) -> Tensor:
    """log p(value) without the sum over independent entries, where the law says which they are."""
    if isinstance(fn, Independent):
        return pointwise_log_prob(name, fn.base_dist, value)
    pointwise = getattr(fn, "log_prob_pointwise", None)
    return fn.log_prob(value) if pointwise is None else pointwise(value)


def not_gaussian(who: str, name: str, fn: Distribution) -> TypeError:
    """The error for a law that is not normal with independent entries where a method needs it."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return TypeError(
        f"{who} needs Gaussian noise; the observed site {name!r} has the law {type(fn).__name__}. Use "
        "sd.GaussianMeasurement or a Normal there, or sd.TDS with sd.PointTwist(), which takes any likelihood"
    )


@dataclass(frozen=True)
class Latent:
    """One latent site of a program.

    Args:
        name: of the site.
        chain: the reverse chain of its state: the picture itself for a diffusion prior, standard normal otherwise.
        is_diffusion: whether the site is a diffusion prior.
    """

    name: str
    chain: ReverseChain
    is_diffusion: bool


@dataclass(frozen=True)
class Probe:
    """One run of a program on arbitrary latents: what it is made of, before any particle exists.

    Args:
        values: of the latents, {site: tensor}.
        laws: of the observed sites given these, {site: law}.
        weighted: the observed sites under a mask or a scale.
    """

    values: dict[str, Tensor]
    laws: dict[str, Distribution]
    weighted: set[str]


class Program:
    """p(latents) p(y given latents) of a Pyro program run with these arguments.

    Args:
        model: a Pyro program with at least one observed site.
        args, kwargs: what it is called with, measurements among them.
        held: latents that stay where they are, {site: standard normal noise of each chain, (b, *shape)}; none of
            them a diffusion prior. The evidence is then that of the program given their values.

    Raises:
        ValueError: for a program that observes nothing, a measurement that is not finite or of a shape that its law
            does not have, diffusion priors with different numbers of steps, or a subsampled plate.
        UnmappablePrior: for a latent that is discrete or whose prior has no quantile function.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        held: dict[str, Tensor] | None = None,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs or {}
        #: What methods have computed of this program once and for all.
        self.cache: dict[Any, Any] = {}
        self.held = held or {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            trace = pyro.poutine.trace(_Probe()(model)).get_trace(*args, **self._kwargs)
        sites: dict[str, Any] = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        plates = {name: site["fn"] for name, site in sites.items() if isinstance(site["fn"], _Subsample)}
        sites = {name: site for name, site in sites.items() if name not in plates}
        laws: dict[str, Distribution] = {name: site["fn"] for name, site in sites.items() if not site["is_observed"]}
        for name, plate in plates.items():
            if plate.subsample_size is not None and plate.subsample_size < plate.size:
                raise ValueError(
                    f"got the subsampled plate {name!r}; a likelihood of a random part of the data has random "
                    "weights. Use the plate without subsample_size"
                )
        self.observed: dict[str, Tensor] = {
            name: site["value"] for name, site in sites.items() if site["is_observed"] and not _is_deterministic(site)
        }
        if not self.observed:
            raise ValueError(
                f"got a program that observes nothing, with the sites {sorted(sites)}; give SMC.run the measurement "
                "that the program passes on as obs="
            )
        for name, value in self.observed.items():
            _check_observation(name, sites[name]["fn"], value, sites[name]["mask"])
        #: The sites as the probe saw them: laws of the observed ones with the latents' probe values in them.
        self.probe = Probe(
            values={name: sites[name]["value"] for name in laws},
            laws={name: sites[name]["fn"] for name in self.observed},
            weighted={
                name for name in self.observed if _masks(sites[name]["mask"]) or not _is_one(sites[name]["scale"])
            },
        )
        if not laws:
            raise ValueError(
                f"got a program without latents, with the sites {sorted(sites)}; there is nothing to infer. Its "
                "evidence is pyro.poutine.trace(model).get_trace(...).log_prob_sum()"
            )
        for name in laws:
            if _masks(sites[name]["mask"]) or not _is_one(sites[name]["scale"]):
                raise ValueError(
                    f"got the latent {name!r} under poutine.scale or poutine.mask; a chain has the density of its "
                    "prior. Change the prior itself, or weigh it by pyro.factor"
                )
        chains = _diffusion_chains(laws)
        first = next(iter(chains.values()), None)
        self.dtype, self.device = self._number_format(first)
        self.latents = {
            name: Latent(name, chains[name], True)
            if name in chains
            else Latent(name, self._noise_chain(name, fn, first), False)
            for name, fn in laws.items()
        }
        self.num_steps = first.num_steps if first else 100
        for name, value in self.held.items():
            latent = self.latents.get(name)
            if latent is None or latent.is_diffusion or value.shape[1:] != latent.chain.shape:
                raise ValueError(
                    f"got the latent {name!r} held at noise of shape {tuple(value.shape)}; expected (chains, *shape) "
                    "for one of the latents that are not diffusion priors: "
                    f"{ {n: tuple(known.chain.shape) for n, known in self.latents.items() if not known.is_diffusion} }"
                )

    @property
    def probe_states(self) -> dict[str, Tensor]:
        """Chain states of one particle to run the program at: the probe's pictures, other latents' medians."""
        return {
            name: self.probe.values[name].to(self.dtype)
            if latent.is_diffusion
            else torch.zeros(latent.chain.shape, dtype=self.dtype, device=self.device)
            for name, latent in self.latents.items()
        }

    def log_prob(self, states: dict[str, Tensor], score: Score = pointwise_log_prob) -> Tensor:
        """log p(y given latents), shape (m,) of float64, or the sum of another ``score`` over the observed sites.

        Args:
            states: chain states at noise level 0 (or estimates of them), {site: (m, *shape)}.
        """

        def one(state: dict[str, Tensor]) -> Tensor:
            terms = self._run(state, score).terms.values()
            total = sum(term.sum(dtype=torch.float64) for term in terms)
            return torch.as_tensor(total, dtype=torch.float64, device=self.device)

        return self._map(one, states)

    def pointwise(self, states: dict[str, Tensor], score: Score = pointwise_log_prob) -> dict[str, Tensor]:
        """``score`` of each observed site, unsummed: {site: (m, *shape)}."""
        return self._map(lambda state: self._run(state, score).terms, states)

    def moments(self, states: dict[str, Tensor], who: str) -> tuple[Tensor, Tensor, Tensor]:
        """The measurement, its mean and its precision under Gaussian noise, all observed sites in a row.

        A site's scale multiplies its precision, and where it is masked the precision is 0.

        Args:
            who: needs this, for the error.

        Returns:
            y (values,), mean (m, values) and precision (m, values), in the order of :attr:`observed`.

        Raises:
            TypeError: where a law is not normal with independent entries.
        """

        def moments_of(name: str, fn: Distribution, value: Tensor) -> Tensor:
            noise = gaussian_moments(fn)
            if noise is None:
                raise not_gaussian(who, name, fn)
            return torch.stack((noise.loc.expand(value.shape), 1 / noise.variance.expand(value.shape)))

        def one(state: dict[str, Tensor]) -> Tensor:
            fill = self._run(state, moments_of)
            rows = []
            for name, pair in fill.raw.items():
                weight = fill.weights[name](torch.ones_like(pair[1]))
                rows.append(torch.stack((pair[0], pair[1] * weight)).flatten(1))
            return torch.cat(rows, -1)

        mean, precision = self._map(one, states).unbind(1)
        y = torch.cat([value.reshape(-1) for value in self.observed.values()]).to(mean.dtype)
        return y, mean, precision

    def scores(self, state: dict[str, Tensor], score: Score) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """``score`` of each observed site for one particle, and what the site's scale and mask make of such values.

        Args:
            state: {site: (*shape)}, without a particles' axis; call it under ``torch.func.vmap`` for more.
        """
        fill = self._run(state, score)
        return {name: (raw, fill.weights[name]) for name, raw in fill.raw.items()}

    def values(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The latents and deterministic sites in the program's own units: {site: (m, *event)}."""
        return self._map(lambda state: self._run(state, pointwise_log_prob).values, states)

    def identity(self) -> dict[str, str]:
        """What a run's result depends on, in words, for the checkpoint of a run: numbers that the program gives at
        fixed states, so that a change of operator, noise law, prior, network or measurement shows in them."""
        generator = torch.Generator().manual_seed(0)
        states, sites = {}, []
        for name, latent in self.latents.items():
            chain = latent.chain
            noise = torch.randn((1, *chain.shape), generator=generator, dtype=torch.float64)
            noise = noise.to(self.device, self.dtype)
            with torch.no_grad():
                top, bottom = (chain.estimate(k, chain.levels[k].sigma * noise).mean for k in (chain.num_steps, 1))
            states[name] = top + 0.1 * noise
            settings = f"{chain.num_steps} steps, eta {chain.eta}, {chain.variance} variance, clip {chain.clip}"
            settings += "" if chain.start is None else f", {chain.start}"
            shown = f"x0_hat {float(top.double().sum()):.5g}, {float(bottom.double().sum()):.5g}"
            levels = sum(level.alpha + 3 * level.sigma * k for k, level in enumerate(chain.levels))
            shown += f", levels {levels:.8g}"
            if chain.variance == "full":
                with torch.no_grad():
                    laws = [chain.transition(k, noise, chain.estimate(k, noise)) for k in (chain.num_steps, 1)]
                shown += ", steps " + ", ".join(f"{float(law.sample(noise).double().sum()):.6g}" for law in laws)
            sites.append(f"{name} {tuple(chain.shape)}: {settings}, {shown}")
        data = [f"{name} {tuple(y.shape)}: {float(y.double().sum()):.8g}" for name, y in self.observed.items()]
        with torch.no_grad():
            likelihood = f"{float(self.log_prob(states)):.6g}"
        return {"latents": "; ".join(sites), "measurement": "; ".join(data), "likelihood at a fixed state": likelihood}

    def _run(self, state: dict[str, Tensor], score: Score) -> _Fill:
        fill = _Fill(state, score)
        with pyro.validation_enabled(False):
            fill(self._model)(*self._args, **self._kwargs)
        return fill

    def _map(self, one: Callable[[dict[str, Tensor]], Any], states: dict[str, Tensor]) -> Any:
        """``one`` on every particle at once."""
        try:
            return torch.func.vmap(one)(states)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise RuntimeError(
                "the program cannot be run on all particles at once. Between its latents and its observations it must "
                "be a function of tensors: no .item(), no `if` on a latent's value, no in-place change of a tensor "
                f"that no latent went into, no random draw outside pyro.sample. torch says: {error}"
            ) from error

    def _number_format(self, chain: ReverseChain | None) -> tuple[torch.dtype, torch.device]:
        if chain is not None:
            return chain.denoiser.dtype, chain.denoiser.device
        value = next(iter(self.observed.values()))
        return (value.dtype if value.is_floating_point() else torch.get_default_dtype()), value.device

    def _noise_chain(self, name: str, fn: Distribution, beside: ReverseChain | None) -> ReverseChain:
        """The exact chain of a latent's standard normal noise, on the grid of the program's diffusion prior."""
        batch_shape = tuple(fn.batch_shape)
        event_shape = noise_shape(fn, name)[len(batch_shape) :]
        denoiser = StandardNormalDenoiser(event_shape, self.dtype, self.device)
        if beside is None:
            return ReverseChain(denoiser, VPSchedule(), variance="optimal", batch_shape=batch_shape)
        return replace(
            beside, denoiser=denoiser, eta=1.0, variance="optimal", clip=None, batch_shape=batch_shape, start=None
        )


class _Fill(Messenger):
    """Gives the latents their values and collects the score of each observed site."""

    def __init__(self, state: dict[str, Tensor], score: Score) -> None:
        super().__init__()
        self.state, self.score = state, score
        self.values: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.weights: dict[str, Callable[[Tensor], Tensor]] = {}

    @property
    def terms(self) -> dict[str, Tensor]:
        """The scores with the sites' scale and mask applied."""
        return {name: self.weights[name](score) for name, score in self.raw.items()}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["is_observed"]:
            if _is_deterministic(msg):
                self.values[name] = msg["value"]
            else:
                self.raw[name] = self.score(name, fn, msg["value"])
                self.weights[name] = _weight(len(fn.batch_shape), msg["scale"], msg["mask"])
        elif name in self.state:
            state = self.state[name]
            msg["value"] = state if isinstance(fn, DiffusionPrior) else from_standard_normal(fn, state)
            msg["done"] = True
            self.values[name] = msg["value"]


class _Probe(Messenger):
    """Draws diffusion sites by one evaluation of the denoiser at the highest noise, in place of a whole chain."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, DiffusionPrior) and not msg["is_observed"]:
            chain = fn.chain
            noise = torch.randn(chain.shape, dtype=chain.denoiser.dtype, device="cpu").to(chain.denoiser.device)
            estimate = chain.estimate(chain.num_steps, (chain.initial_mean + chain.initial_scale * noise)[None])
            msg["value"], msg["done"] = estimate.mean[0], True


def _weight(batch_dim: int, scale: Any, mask: Any) -> Callable[[Tensor], Tensor]:
    """Pyro's scale and mask of a site, whose axes are those of the law's batch, for scores that keep the event's."""

    def weigh(score: Tensor) -> Tensor:
        event = (None,) * (score.ndim - batch_dim)
        scale_there, mask_there = (
            part[(..., *event)] if isinstance(part, Tensor) and part.ndim else part for part in (scale, mask)
        )
        return scale_and_mask(score, scale_there, mask_there)

    return weigh


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"] and site["infer"].get("_deterministic"))


def _diffusion_chains(laws: dict[str, Distribution]) -> dict[str, ReverseChain]:
    chains = {name: fn.chain for name, fn in laws.items() if isinstance(fn, DiffusionPrior)}
    steps = {name: chain.num_steps for name, chain in chains.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"got diffusion priors with different numbers of steps, {steps}; all chains of a program take their steps "
            "together: give them one num_steps, for instance by prior.replace(num_steps=...)"
        )
    for name, chain in chains.items():
        if chain.eta == 0:
            raise ValueError(
                f"got the diffusion prior {name!r} with eta = 0, a deterministic chain without a density; particles "
                "cannot be weighed on it. Take eta in (0, 1]"
            )
    return chains


def _masks(mask: Any) -> bool:
    """Whether a site's mask may leave anything out."""
    return mask is not None and mask is not True


def _is_one(scale: Any) -> bool:
    return bool((torch.as_tensor(scale) == 1).all())


def _check_observation(name: str, fn: Distribution, value: Tensor, mask: Any) -> None:
    law = fn.base_dist if isinstance(fn, MaskedDistribution) else fn
    if not isinstance(value, Tensor):
        raise ValueError(f"got a {type(value).__name__} as the measurement at {name!r}; expected a tensor")
    if value.is_complex():
        raise ValueError(f"got a complex measurement at {name!r}; give real and imaginary part, torch.view_as_real(y)")
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(
            f"got a measurement at {name!r} with {bad} of {value.numel()} values NaN or infinite; leave these pixels "
            "out with sd.Select, in the operator and in the measurement"
        )
    expected = law.batch_shape + law.event_shape
    if value.shape != expected:
        raise ValueError(
            f"got a measurement at {name!r} of shape {tuple(value.shape)}; its law {type(law).__name__} has shape "
            f"{tuple(expected)}. Give a measurement of that shape, or put the site in a pyro.plate of the data's size"
        )
    if isinstance(mask, Tensor) and mask.ndim > len(law.batch_shape):
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)} on the site {name!r}, whose batch shape is "
            f"{tuple(law.batch_shape)}; Pyro masks whole events. Leave parts of an event out with sd.Select"
        )
    support: Any = law.support
    inside = support.check(value)
    if mask is not None:
        inside = inside | ~torch.as_tensor(mask)
    if not bool(inside.all()):
        raise ValueError(
            f"got a measurement at {name!r} that its law {type(law).__name__} cannot give: expected values in "
            f"{support}. Check its units, or take another law"
        )
