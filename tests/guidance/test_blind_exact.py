r"""Blind linear-Gaussian problems against quadrature: evidence, and posterior of the blur and of the picture.

    y = A(theta) x + sigma e,    x ~ N(mu, C) the exact law of the discretised chain,    theta (and sigma) latents.

Given theta all is Gaussian in closed form; over theta, of one or two dimensions, the trapezoidal rule in the standard
normal noise that theta is a function of is exact to many digits. The priors' chains have their full covariance, with
which they are exact for a Gaussian prior up to their first law; ``chain_law`` has that too.

Every estimate is held to a quantile of Student's law of 23 degrees of freedom, that of 24 independent chains, such that
all statements of a run together fail a true method with probability 1e-5, as far as means over a chain are normal; the
seeds are fixed. That a test has power is tested as well: standard errors are small beside the posterior's own spread,
and weights that are wrong in one term are found out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.guidance.blind_dps import ConstantStep
from smcdiff.guidance.program import Program
from smcdiff.guidance.twisted import TwistedModel
from smcdiff.measurement.psf import astigmatic_psf
from smcdiff.smc import Move, ParticleFilter, Records
from smcdiff.smc.feynman_kac import Particles
from tests.guidance.exact import NormalLaw, chain_law

D = torch.float64
CHAINS = 24


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


@dataclass(frozen=True)
class Exact:
    """Means and standard deviations: of the latents by site, and of x; flattened."""

    log_z: float
    mean: dict[str, Tensor]
    deviation: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    model: Callable[[Tensor], None]
    y: Tensor
    exact: Exact


@dataclass(frozen=True)
class Family:
    """What A(theta) and sigma are at quadrature's nodes.

    Args:
        shape: of the picture.
        statements: the program after its picture.
        matrices: (nodes, d, d) or (1, d, d).
        sigma: (nodes,) or (1,).
        latents: {site: (nodes, *event)}.
        z: nodes, (nodes, latent dimensions).
    """

    shape: tuple[int, ...]
    statements: Callable[[Tensor, Tensor], None]
    matrices: Tensor
    sigma: Tensor
    latents: dict[str, Tensor]
    z: Tensor


ONE = torch.linspace(-7, 7, 561, dtype=D)[:, None]
OFF_CENTRE = t(0.7, -1.5)
TWO = torch.cartesian_prod(*(torch.linspace(-6, 6, 61, dtype=D),) * 2)


def circulant(taps: Tensor, n: int) -> Tensor:
    """y[i] = k_0 x[i + 1] + k_1 x[i] + k_2 x[i - 1], (nodes, n, n)."""
    eye = torch.eye(n, dtype=D)
    return sum(taps[:, j, None, None] * eye.roll(1 - j, 1) for j in range(3))


def turned_gaussian(sigma_1: Tensor, sigma_2: Tensor, angle: float, size: int) -> Tensor:
    """exp(-x^T C^-1 x / 2) with C written out, of sum 1."""
    c, s = math.cos(angle), math.sin(angle)
    r = t(c, -s, s, c).reshape(2, 2)
    precision = torch.linalg.inv(r @ torch.stack((sigma_1, sigma_2), -1).square().diag_embed() @ r.mT)
    steps = torch.arange(size, dtype=D) - size // 2
    x = torch.stack(torch.broadcast_tensors(steps[None], -steps[:, None]), -1)
    k = torch.exp(-0.5 * torch.einsum("rcd,nde,rce->nrc", x, precision, x))
    return k / k.sum((1, 2), keepdim=True)


def circular(k: Tensor, n: int) -> Tensor:
    """The matrices of a circular convolution of n x n pixels, one product after the other."""
    size, matrices = k.shape[-1], torch.zeros(len(k), n, n, n, n, dtype=D)
    for row in range(n):
        for column in range(n):
            for a in range(size):
                for b in range(size):
                    matrices[:, row, column, (row + size // 2 - a) % n, (column + size // 2 - b) % n] += k[:, a, b]
    return matrices.reshape(len(k), n * n, n * n)


def gain(sigma: float, n: int) -> Family:
    def statements(x: Tensor, y: Tensor) -> None:
        g = pyro.sample("g", dist.LogNormal(t(0.0)[0], 0.4))
        pyro.sample("y", dist.Normal(g * x, sigma).to_event(1), obs=y)

    g = (0.4 * ONE[:, 0]).exp()
    return Family((n,), statements, g[:, None, None] * torch.eye(n, dtype=D), t(sigma), {"g": g}, ONE)


def three_taps() -> Family:
    def statements(x: Tensor, y: Tensor) -> None:
        side = pyro.sample("side", dist.Normal(t(0.0, 0.4), 0.1).to_event(1))
        kernel = torch.stack((side[..., 0], 1 - side.sum(-1), side[..., 1]), -1)
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(kernel[None]), x, 0.3), obs=y)

    side = t(0.0, 0.4) + 0.1 * TWO
    taps = torch.stack((side[:, 0], 1 - side.sum(1), side[:, 1]), 1)
    return Family((1, 1, 8), statements, circulant(taps, 8), t(0.3), {"side": side}, TWO)


def astigmatic() -> Family:
    def statements(x: Tensor, y: Tensor) -> None:
        widths = [pyro.sample(name, dist.LogNormal(t(loc)[0], 0.3)) for name, loc in (("s1", 0.3), ("s2", -0.7))]
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(astigmatic_psf(*widths, 0.4, 5)), x, 0.3), obs=y)

    widths = {"s1": (0.3 + 0.3 * TWO[:, 0]).exp(), "s2": (-0.7 + 0.3 * TWO[:, 1]).exp()}
    matrices = circular(turned_gaussian(widths["s1"], widths["s2"], 0.4, 5), 4)
    return Family((1, 4, 4), statements, matrices, t(0.3), widths, TWO)


def noise_level() -> Family:
    taps = t(0.2, 0.5, 0.3)[None]

    def statements(x: Tensor, y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(t(-1.0)[0], 0.5))
        pyro.sample("y", sd.GaussianMeasurement(sd.Blur(taps), x, s), obs=y)

    s = (-1.0 + 0.5 * ONE[:, 0]).exp()
    return Family((1, 1, 12), statements, circulant(taps, 12), s, {"s": s}, ONE)


FAMILIES: dict[str, Callable[[], Family]] = {
    "gain": lambda: gain(0.3, 8),
    "three taps": three_taps,
    "astigmatic": astigmatic,
    "noise level": noise_level,
    "gain, much noise": lambda: gain(1.0, 4),
}


@lru_cache
def problem(name: str, num_steps: int) -> Problem:
    """A family with a measurement made at the node of it that is nearest to an uneven point."""
    family = FAMILIES[name]()
    columns, d = family.shape[-1], math.prod(family.shape)
    place = torch.arange(d)
    at = torch.stack((place // columns, place % columns), -1).to(D)
    mean = torch.full(family.shape, 0.3, dtype=D)
    covariance = torch.exp(-(at[:, None] - at).square().sum(-1)) + 0.1 * torch.eye(d, dtype=D)
    prior = sd.DiffusionPrior(
        sd.GaussianDenoiser(mean, covariance), sd.VPSchedule(), num_steps, grid=sd.KarrasGrid(), variance="full"
    )
    law = chain_law(prior, mean.flatten(), covariance)
    generator = torch.Generator().manual_seed(2)
    node = int((family.z - OFF_CENTRE[: family.z.shape[1]]).square().sum(1).argmin())
    x = law.mean + torch.linalg.cholesky(law.covariance) @ torch.randn(d, generator=generator, dtype=D)
    matrix, sigma = (part[node if len(part) > 1 else 0] for part in (family.matrices, family.sigma))
    y = matrix @ x + sigma * torch.randn(d, generator=generator, dtype=D)

    def model(y: Tensor) -> None:
        family.statements(pyro.sample("x", prior), y)

    return Problem(model, y.reshape(family.shape), by_quadrature(family, law, y))


def by_quadrature(family: Family, law: NormalLaw, y: Tensor) -> Exact:
    A, eye = family.matrices, torch.eye(len(y), dtype=D)
    foretold = A @ law.covariance @ A.mT + family.sigma[:, None, None] ** 2 * eye
    missing = y - A @ law.mean
    normal = dist.MultivariateNormal(torch.zeros_like(y), foretold).log_prob(missing)
    log_w = (-0.5 * family.z.square().sum(1)).log_softmax(0) + normal
    w = log_w.softmax(0)
    pull = torch.linalg.solve(foretold, A @ law.covariance).mT
    centres = law.mean + (pull @ missing[..., None])[..., 0]
    left = (law.covariance - pull @ A @ law.covariance).diagonal(dim1=-2, dim2=-1)
    mean, deviation = {"x": w @ centres}, {"x": (w @ (left + (centres - w @ centres) ** 2)).sqrt()}
    for name, value in family.latents.items():
        rows = value.reshape(len(w), -1)
        mean[name] = w @ rows
        deviation[name] = (w @ (rows - mean[name]) ** 2).sqrt()
    return Exact(float(log_w.logsumexp(0)), mean, deviation)


@dataclass(frozen=True)
class Found:
    """What a filter says: log_z (b,), log-weights within each chain (b, n), values {site: (b, n, *event)}."""

    log_z: Tensor
    log_w: Tensor
    values: dict[str, Tensor]


def scores(found: Found, exact: Exact) -> tuple[dict[str, float], dict[str, float]]:
    """Of every statement: how many standard errors it is off at most, and the largest standard error beside the
    posterior's own spread (of the evidence: beside the evidence)."""
    ratio = (found.log_z - exact.log_z).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    off, size = {"evidence": abs(float(ratio.mean()) - 1) / error}, {"evidence": error / float(ratio.mean())}
    w = (found.log_z[:, None] + found.log_w.log_softmax(1)).flatten().softmax(0).reshape(found.log_w.shape)
    for name, mean in exact.mean.items():
        values = found.values[name].reshape(*w.shape, -1)
        squares = (values - mean) ** 2
        for what, f, truth, unit in (
            ("mean", values, mean, exact.deviation[name]),
            ("variance", squares, exact.deviation[name] ** 2, exact.deviation[name] ** 2),
        ):
            estimate = torch.einsum("bn,bnd->d", w, f)
            errors = torch.einsum("bn,bnd->bd", w, f - estimate).square().sum(0).sqrt()
            off[f"{what} of {name}"] = float(((estimate - truth) / errors).abs().max())
            size[f"{what} of {name}"] = float((errors / unit).max())
    return off, size


def limit(exact: Exact) -> float:
    """The standard errors that all statements together pass with probability 1e-5."""
    statements = 1 + 2 * sum(len(mean) for mean in exact.mean.values())
    return float(scipy.stats.t.ppf(1 - 0.5e-5 / statements, CHAINS - 1))


def run(problem: Problem, method: Any, n: int, seed: int = 3) -> Found:
    smc = sd.SMC(method, num_particles=n, num_chains=CHAINS, seed=seed, progress=False).run(problem.y)
    samples = smc.weighted_samples()
    return Found(smc.log_evidence_per_chain, samples.log_w, samples.values)


METHODS: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "widened": (lambda model: sd.TDS(model, sd.WidenedTwist()), 20, 500),
    "adapted": (lambda model: sd.Adapted(model, expansions=2), 8, 150),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gain", "three taps", "astigmatic", "noise level"])
def test_posterior_and_evidence(name: str, method: str) -> None:
    make, num_steps, n = METHODS[method]
    case = problem(name, num_steps)
    off, size = scores(run(case, make(case.model), n), case.exact)
    assert max(size.values()) < 0.2, size
    assert max(off.values()) < limit(case.exact), off


def test_blind_dps_with_its_weights() -> None:
    """Where the noise is strong enough for its point twist, and with steps short enough for its weights."""
    case = problem("gain, much noise", 15)
    method = sd.BlindDPS(case.model, {"x": ConstantStep(0.01), "g": ConstantStep(0.003)})
    off, size = scores(run(case, method, 1000), case.exact)
    assert max(size.values()) < 0.1, size
    assert max(off.values()) < limit(case.exact), off


@dataclass(frozen=True)
class Forgetful:
    """A twisted model whose weights lack one of their terms.

    Args:
        model: the model.
        term: the one it lacks: "log p - log q" or "log psi_t".
    """

    model: TwistedModel
    term: str

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    @property
    def device(self) -> torch.device:
        return self.model.device

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self.model.initial(num_chains, num_particles, generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        move = self.model.step(i, particles, generator)
        twists = move.particles["log_psi"] - particles["log_psi"]
        lacking = twists if self.term == "log p - log q" else move.log_g + particles["log_psi"]
        return replace(move, log_g=lacking if self.term else move.log_g)


def carried_forgotten(log_w: Tensor, resampled: Tensor) -> tuple[Tensor, Tensor]:
    """log_z and last weights if each move's weights replaced the carried ones; log_w (K + 1, b, n)."""
    carried = torch.where(resampled[..., None], 0.0, log_w[:-1])
    log_g = torch.cat((log_w[:1], log_w[1:] - carried))
    return (log_g.logsumexp(2) - math.log(log_g.shape[2])).sum(0), log_g[-1]


@pytest.mark.parametrize("wrong", ["", "log p - log q", "log psi_t", "carried weight"])
def test_a_wrong_weight_is_found_out(wrong: str) -> None:
    """The same statements, by the filter itself: they hold with the weights as they are, and with one term missing
    some is off by twice what is allowed at least."""
    case = problem("gain, much noise", 15)
    program = Program(case.model, (case.y,))
    model = TwistedModel(program, sd.TDS(case.model, sd.WidenedTwist()))
    feynman_kac = Forgetful(model, "" if wrong == "carried weight" else wrong)
    result = ParticleFilter().run(
        feynman_kac, num_particles=1000, num_chains=CHAINS, seed=3, records=Records(log_weights=True)
    )
    log_z, log_w = result.log_z, result.log_w
    if wrong == "carried weight":
        assert result.records.log_w is not None
        log_z, log_w = carried_forgotten(result.records.log_w, result.records.resampled)
    states = {name: result.particles[name].flatten(0, 1) for name in program.latents}
    values = {name: v.unflatten(0, log_w.shape) for name, v in program.values(states).items()}
    off, _ = scores(Found(log_z, log_w, values), case.exact)
    if wrong:
        assert max(off.values()) > 2 * limit(case.exact), off
    else:
        assert max(off.values()) < limit(case.exact), off
