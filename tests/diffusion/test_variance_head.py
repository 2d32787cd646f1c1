"""Covariances that a head rescales: against dense matrices, a law whose factors are known, and exact evidences."""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import smcdiff as sd
from smcdiff.diffusion.adapters.calibrated import load_head, save_head
from smcdiff.diffusion.chain import ReverseChain
from smcdiff.diffusion.denoiser import Estimate
from smcdiff.diffusion.schedule import LogGrid, NoiseLevel
from smcdiff.diffusion.variance_head import (
    HeteroscedasticCovariance,
    VarianceHead,
    fit_variance_head,
)
from smcdiff.transforms import hartley

F64 = torch.float64
EVENT = (2, 4, 4)
LEVEL = NoiseLevel(1.0, 0.8, 0.6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def stirred(channels: int, rings: int | None, size: float = 0.3) -> VarianceHead:
    """A head whose factors differ from particle to particle."""
    head = VarianceHead(channels, rings, width=4).double()
    state = {name: size * random(*value.shape, seed=i) for i, (name, value) in enumerate(head.state_dict().items())}
    head.load_state_dict(state)
    return head.requires_grad_(False)


def model_of(basis: str, head: VarianceHead | None = None) -> HeteroscedasticCovariance:
    base = sd.SpectralCovariance(random(*EVENT, seed=1).square() + 0.1, basis)
    rings = None if basis == "pixels" else 3
    return HeteroscedasticCovariance(base, stirred(2, rings, 0.5) if head is None else head)


def matrix_of(basis: str) -> Tensor:
    """V, column by column from the definition of each basis."""
    i = torch.arange(4, dtype=F64)
    if basis == "pixels":
        one = torch.eye(16, dtype=F64)
    elif basis == "dct":
        cosines = (math.pi * (2 * i[:, None] + 1) * i / 8).cos() * (0.5 * (1 + (i > 0).to(F64))).sqrt() * 0.5**0.5
        one = torch.kron(cosines, cosines)
    else:
        phase = 2 * math.pi * (i[:, None, None, None] * i[:, None] + i[:, None, None] * i) / 4
        one = ((phase.cos() + phase.sin()) / 4).reshape(16, 16)
    return torch.block_diag(one, one)


def dense(basis: str, model: HeteroscedasticCovariance, x_t: Tensor, x0_hat: Tensor) -> Tensor:
    """C_t(x_t) written out, (m, d, d)."""
    noise = (x_t - LEVEL.alpha * x0_hat) / LEVEL.sigma
    s = model.head(x0_hat, noise, torch.full((len(x_t),), math.log(LEVEL.ratio), dtype=F64))
    spectrum = random(*EVENT, seed=1).square() + 0.1
    v = 1 / (1 / spectrum + 1 / LEVEL.ratio**2)
    factors = torch.zeros(len(x_t), *EVENT, dtype=F64)
    for j in range(4):
        for k in range(4):
            if basis == "pixels":
                factors[:, :, j, k] = s[:, :, j, k]
            else:
                across = [f / 4 if basis == "dct" else min(f, 4 - f) / 2 for f in (j, k)]
                factors[:, :, j, k] = s[:, min(2, int(3 * math.hypot(*across)))][:, None]
    matrix = matrix_of(basis)
    return matrix @ torch.diag_embed((v * factors.exp()).flatten(1)) @ matrix.mT


@pytest.mark.parametrize("basis", ["dct", "fft", "pixels"])
def test_against_dense_matrices(basis: str) -> None:
    sizes = torch.tensor([0.2, 1.0, 5.0], dtype=F64)[:, None, None, None]
    model, x_t, x0_hat = model_of(basis), sizes * random(3, *EVENT, seed=2), sizes * random(3, *EVENT, seed=3)
    parts = model.parts(sd.GaussianFieldDenoiser(x_t[0], torch.ones(1, dtype=F64)), x_t, LEVEL, Estimate(x0_hat))
    found, exact = model.at(LEVEL, parts, x_t), dense(basis, model, x_t, x0_hat)
    assert float((exact[0] - exact[1]).abs().max()) > 0.05  # the factors differ between particles
    r = random(3, *EVENT, seed=4)
    flat = r.flatten(1)
    torch.testing.assert_close(found.apply(r).flatten(1), (exact @ flat[..., None])[..., 0])
    torch.testing.assert_close(found.log_prob(r), MultivariateNormal(torch.zeros(32, dtype=F64), exact).log_prob(flat))
    units = torch.eye(32, dtype=F64).reshape(32, 1, *EVENT).expand(-1, 3, *EVENT)
    root = torch.stack([found.draw(unit).flatten(1) for unit in units], -1)
    torch.testing.assert_close(root @ root.mT, exact)
    torch.testing.assert_close(
        found.given(2.5).apply(r).flatten(1),
        torch.linalg.solve(torch.linalg.inv(exact) + 2.5 * torch.eye(32, dtype=F64), flat[..., None])[..., 0],
    )
    kept = {name: part[[2, 0]] for name, part in parts.items()}  # as particles are resampled
    torch.testing.assert_close(model.at(LEVEL, kept, x_t).apply(r[[2, 0]]), found.apply(r)[[2, 0]])


@pytest.mark.parametrize("basis", ["dct", "pixels"])
def test_an_untrained_head_changes_nothing(basis: str) -> None:
    model = model_of(basis, VarianceHead(2, None if basis == "pixels" else 3))
    x = random(3, *EVENT)
    parts = model.parts(sd.GaussianFieldDenoiser(x[0], torch.ones(1, dtype=F64)), x, LEVEL, Estimate(x))
    variance = model.at(LEVEL, parts, x).variance
    torch.testing.assert_close(variance, model.base.at(LEVEL, {}, x).variance.expand_as(variance), rtol=0, atol=0)


class Halves:
    """A denoiser that says 0 or 1 in all of the left half, and in all of the right half: what the mean is nearer."""

    event_shape, dtype, device = torch.Size([1, 8, 8]), torch.float32, torch.device("cpu")

    def __call__(self, x_t: Tensor, level: NoiseLevel) -> Estimate:
        means = x_t.unflatten(-1, (2, 4)).mean((-3, -1), keepdim=True)
        return Estimate((means > 0.5).float().expand(-1, -1, 8, -1, 4).flatten(-2))


@pytest.mark.parametrize("basis", ["dct", "pixels"])
def test_the_fit_finds_how_uncertain_a_picture_is(basis: str) -> None:
    """x_0 is N(0, 0.01^2) where the denoiser says 0 and N(1, 0.04^2) where it says 1, the noise many times as large.

    Whole pictures are one or the other, or each half for itself. Calibrated is the mean variance, 8.5e-4; the right
    factors are 1 / 8.5 and 16 / 8.5. A mean is on the wrong side of 1/2 by 5 deviations of the noise: never here.
    """
    generator = torch.Generator().manual_seed(0)
    sides = (torch.rand(512, 2, generator=generator) < 0.5).float()
    sides = sides[:, :1].expand(-1, 2) if basis == "dct" else sides
    wide = sides[:, None, None, :, None].expand(-1, 1, 8, -1, 4).flatten(-2)
    images = wide + (0.01 + 0.03 * wide) * torch.randn(wide.shape, generator=generator)
    chain = ReverseChain(Halves(), sd.VESchedule(0.3, 0.5), num_steps=3, grid=LogGrid())
    ratios = torch.tensor([level.ratio for level in chain.levels[1:]], dtype=F64)
    base = sd.SpectralCovariance(torch.full((3, 1, 8, 8), 8.5e-4), basis, ratios)
    fitted = fit_variance_head(chain, images, base, rings=2, width=8, steps=300, progress=False)
    level, x_t = chain.levels[2], images + 0.4 * torch.randn(images.shape, generator=generator)
    parts = fitted.covariance.parts(Halves(), x_t, level, Halves()(x_t, level))
    factor = fitted.covariance.at(level, parts, images).variance / 8.5e-4
    factor = factor.expand_as(wide)
    assert abs(float(factor[wide == 1].log().mean()) - math.log(16 / 8.5)) < 0.1
    assert abs(float(factor[wide == 0].log().mean()) + math.log(8.5)) < 0.1
    # the right factors gain (log 8.5e-4 - log variance) / 2 at each of 64 values, half of them of either kind
    most = 32 * math.log(8.5e-4) - 16 * (math.log(1e-4) + math.log(1.6e-3))
    assert 0.8 * most < float(fitted.gain[1]) < 1.2 * most
    assert float(fitted.spread[1]) > 1.0  # right: half of log 16


@pytest.mark.parametrize("basis", ["dct", "pixels"])
def test_factors_of_any_kind_leave_the_evidence_unbiased(basis: str) -> None:
    """1000 chains of 8 particles; 6 standard errors are passed with probability 2e-9."""
    spectrum = random(1, 4, 4, seed=1).square() + 0.2
    denoiser = sd.GaussianFieldDenoiser(torch.zeros(1, 4, 4, dtype=F64), spectrum)
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=6, grid=sd.KarrasGrid())
    y = torch.linspace(-1, 1, 16, dtype=F64).reshape(1, 4, 4)

    def model(y: Tensor) -> None:
        pyro.sample("y", sd.GaussianMeasurement(sd.Identity(), pyro.sample("x", prior), 0.5), obs=y)

    exact = Normal(0.0, (spectrum + 0.25).sqrt()).log_prob(hartley(y)).sum()
    base = sd.SpectralCovariance(torch.full((1, 4, 4), float(spectrum.mean()), dtype=F64), basis)
    head = stirred(1, None if basis == "pixels" else 3)
    method = sd.Adapted(model, HeteroscedasticCovariance(base, head))
    smc = sd.SMC(method, num_particles=8, num_chains=1000, seed=5, progress=False).run(y)
    ratio = (smc.log_evidence_per_chain - exact).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1) < 6 * error


def test_a_head_is_kept_and_read(tmp_path: Path) -> None:
    for rings in (None, 5):
        head = stirred(2, rings).float()
        save_head(tmp_path / "head.safetensors", head)
        x, ratio = random(2, *EVENT).float(), torch.tensor([0.1, -0.4])
        again = load_head(tmp_path / "head.safetensors")(x, 2 * x, ratio)
        torch.testing.assert_close(again, head(x, 2 * x, ratio), rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    base = sd.SpectralCovariance(torch.ones(1, 8, 8), "dct")
    with pytest.raises(ValueError, match="rings"):
        HeteroscedasticCovariance(base, VarianceHead(1, None))
    with pytest.raises(ValueError, match="channels"):
        HeteroscedasticCovariance(base, VarianceHead(3, 4))
    with pytest.raises(ValueError, match="rows, columns"):
        HeteroscedasticCovariance(sd.SpectralCovariance(torch.ones(8, 8), "dct"), VarianceHead(1, 4))
    chain = ReverseChain(Halves(), sd.VPSchedule(), num_steps=2)
    with pytest.raises(ValueError, match="kept back"):
        fit_variance_head(chain, torch.zeros(1, 1, 8, 8), base)
