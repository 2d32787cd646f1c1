"""The laws of a scanned picture's noise against dense normal laws: density, sums over the grid, draws, guides."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import smcdiff as sd
from benchmarks.sem_noise_laws import Family, Theta, blur, guide, relative_variance, row_noise
from benchmarks.sem_noise_statistics import coverage, decided, evidence, psnr, statistics

ROWS, COLUMNS = 2, 4


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A picture and a scene, (1, ROWS, COLUMNS) of float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand((1, ROWS, COLUMNS), generator=g, dtype=torch.float64) * 1.6 - 0.8
    return x + 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64), x


def mirrored_blur(x: Tensor, w: float) -> Tensor:
    """A Gaussian blur with mirrored borders as a circular one of the picture beside its mirror images."""
    whole = torch.cat([torch.cat([x, x.flip(-1)], -1), torch.cat([x, x.flip(-1)], -1).flip(-2)], -2)
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) * 2 * math.pi for n in whole.shape[-2:])
    gain = (-0.5 * w**2 * (rows[:, None] ** 2 + columns**2)).exp()
    return torch.fft.ifft2(gain * torch.fft.fft2(whole)).real[..., : x.shape[-2], : x.shape[-1]]


def dense(x: Tensor, theta: Theta) -> MultivariateNormal:
    """p(y given x, theta) with its covariance written out, rows one after the other."""
    clean = mirrored_blur(x, theta.w)[0]
    deviation = theta.sigma * (1 - theta.h + theta.h * (1 + clean).clamp(min=0.1)).sqrt()
    lag = (torch.arange(COLUMNS)[:, None] - torch.arange(COLUMNS)).abs()
    correlation = torch.block_diag(*[torch.tensor(theta.rho, dtype=torch.float64) ** lag] * ROWS)
    d = deviation.flatten()
    return MultivariateNormal(clean.flatten(), d[:, None] * correlation * d)


def nodes(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GRID = Family(nodes(0.2, 0.3), nodes(0.0, 0.4, 0.7), nodes(0.0, 0.6, 1.0), nodes(0.0, 0.8))


def at_every_node(y: Tensor, x: Tensor) -> Tensor:
    found = torch.empty(GRID.shape, dtype=torch.float64)
    for i, h in enumerate(GRID.h.tolist()):
        for j, w in enumerate(GRID.w.tolist()):
            for k, rho in enumerate(GRID.rho.tolist()):
                for m, sigma in enumerate(GRID.sigma.tolist()):
                    found[i, j, k, m] = dense(x, Theta(sigma, rho, h, w)).log_prob(y.flatten())
    return found


def test_density_at_every_node_is_the_dense_normal_one() -> None:
    y, x = pair()
    expected = at_every_node(y, x) - math.log(36)
    torch.testing.assert_close(GRID.log_joint(y, x), expected, rtol=1e-12, atol=1e-10)


def test_unknown_parameters_are_summed_out() -> None:
    y, x = pair(1)
    density = at_every_node(y, x).exp()
    assert float(GRID.log_prob(y, x)) == pytest.approx(float(density.mean().log()), abs=1e-10)
    found = GRID.marginals(GRID.log_joint(y, x))
    posterior = density / density.sum()
    torch.testing.assert_close(found["h"], posterior.sum((1, 2, 3)))
    torch.testing.assert_close(found["w"], posterior.sum((0, 2, 3)))
    torch.testing.assert_close(found["rho"], posterior.sum((0, 1, 3)))
    torch.testing.assert_close(found["sigma"], posterior.sum((0, 1, 2)))


def test_a_parameter_left_out_is_no_marginal() -> None:
    family = Family.of(rho=True)
    y, x = pair()
    assert set(family.marginals(family.log_joint(y, x))) == {"rho", "sigma"}
    assert family.nearest(Theta(9.0, 0.95, 0.5, 1.0)) == Theta(pytest.approx(0.8), pytest.approx(0.9), 0.0, 0.0)


def test_theta_is_drawn_with_its_posterior_probability() -> None:
    """n = 4000: the frequency of each of 36 nodes within 6 standard errors and a count; P < 36 * 2e-9."""
    y, x = pair(2)
    log_joint, generator, n = GRID.log_joint(y, x), torch.Generator().manual_seed(0), 4000
    counts: dict[Theta, int] = {}
    for _ in range(n):
        theta = GRID.draw(log_joint, generator)
        counts[theta] = counts.get(theta, 0) + 1
    p = log_joint.flatten().softmax(0).reshape(GRID.shape)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in GRID.shape)).tolist():
        i, j, k, m = index
        theta = Theta(float(GRID.sigma[m]), float(GRID.rho[k]), float(GRID.h[i]), float(GRID.w[j]))
        expected = n * float(p[i, j, k, m])
        assert abs(counts.get(theta, 0) - expected) < 6 * math.sqrt(expected) + 1


@pytest.mark.parametrize("w", [0.0, 0.5, 1.7])
def test_blur_is_a_convolution_of_the_mirrored_picture(w: float) -> None:
    _, x = pair()
    torch.testing.assert_close(blur(x, w), mirrored_blur(x, w), rtol=1e-12, atol=1e-12)


def test_draws_of_the_noise_have_the_law() -> None:
    """n = 40 000 draws: each entry of mean and covariance within 6 standard errors; P < 72 * 2e-9."""
    _, x = pair()
    theta, n = Theta(0.3, 0.6, 0.7), 40_000
    noise = row_noise(theta, x.expand(n, 1, ROWS, COLUMNS), torch.Generator().manual_seed(0)).flatten(1)
    law = dense(x, theta)
    d = law.variance.sqrt()
    assert bool((noise.mean(0).abs() < 6 * d / math.sqrt(n)).all())
    C = law.covariance_matrix
    error = ((C**2 + d[:, None] ** 2 * d**2) / n).sqrt()
    assert bool(((noise.mT @ noise / n - C).abs() < 6 * error).all())
    torch.testing.assert_close(relative_variance(x, 0.7), 0.3 + 0.7 * (1 + x).clamp(min=0.1))


def field_prior() -> tuple[sd.DiffusionPrior, Tensor]:
    """A Gaussian prior diagonal in the cosines, and its covariance over pixels."""
    g = torch.Generator().manual_seed(3)
    variance = torch.rand((1, ROWS, COLUMNS), generator=g, dtype=torch.float64) * 0.3 + 0.05
    zero = torch.zeros((1, ROWS, COLUMNS), dtype=torch.float64)
    field = sd.GaussianFieldDenoiser(zero, variance, sd.transforms.DCT)
    units = torch.eye(ROWS * COLUMNS, dtype=torch.float64).reshape(-1, 1, ROWS, COLUMNS)
    C = sd.transforms.inverse_dct(variance * sd.transforms.dct(units)).flatten(1)
    return sd.DiffusionPrior(field, sd.VPSchedule(), num_steps=20, grid=sd.KarrasGrid(), variance="full"), C


@pytest.mark.parametrize(
    "theta",
    [Theta(0.4, 0.35), Theta(0.4, 0.35, w=0.35), Theta(0.45, 0.3, h=0.2, w=0.35)],
    ids=["rows", "blurred", "signal"],
)
def test_reweighted_guide_gives_the_evidence_of_unknown_parameters(theta: Theta) -> None:
    """Under a Gaussian prior p(y given theta) is a dense normal density, the mean over nodes is the evidence.

    The nodes have h = 0, where that holds, though a guide may have another h; guides have more noise than the nodes, so
    that no weight is large. The weights' effective number is above 400, so that 6 standard errors are below 0.3.
    """
    prior, C = field_prior()
    family = Family(nodes(0.3, 0.4), nodes(0.2, 0.5), nodes(0.0), nodes(0.0, 0.5))
    y, x = pair(4)
    lead = guide(y, theta, prior, x)
    smc = sd.SMC(sd.Tilted(lead.program), 1000, seed=0, progress=False).run(lead.y)
    drawn = smc.posterior.values["x"][0]
    ratio = torch.stack([family.log_prob(y, one) for one in drawn]) - lead.log_prob(drawn)
    log_w = smc.posterior.log_w[0] + ratio
    assert 1 / float(log_w.softmax(0).square().sum()) > 400
    units = torch.eye(ROWS * COLUMNS, dtype=torch.float64).reshape(-1, 1, ROWS, COLUMNS)
    exact = []
    for sigma in family.sigma.tolist():
        for rho in family.rho.tolist():
            for w in family.w.tolist():
                A = mirrored_blur(units, w).flatten(1).mT
                noise = dense(torch.zeros_like(x), Theta(sigma, rho, 0.0)).covariance_matrix
                law = MultivariateNormal(torch.zeros(len(A), dtype=torch.float64), A @ C @ A.mT + noise)
                exact.append(law.log_prob(y.flatten()))
    expected = float(torch.stack(exact).logsumexp(0)) - math.log(len(exact))
    assert float(smc.log_evidence + log_w.logsumexp(0)) == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("theta", [Theta(0.3, 0.6, w=0.5), Theta(0.3, 0.6, h=0.8, w=0.5)], ids=["cosines", "rows"])
def test_density_of_a_guide_is_that_of_its_program(theta: Theta) -> None:
    prior, _ = field_prior()
    y, x = pair(5)
    lead = guide(y, theta, prior, x)
    conditioned = torch.stack([x, 0.5 * x])
    one = sd.SMC(sd.Tilted(lead.program), 2, seed=0, progress=False).run(lead.y).posterior
    torch.testing.assert_close(
        one.log_likelihood["y"].flatten(2).sum(2)[0].double(), lead.log_prob(one.values["x"])[0], rtol=1e-9, atol=1e-9
    )
    if theta.h:  # whitened rows: the dense law up to the volume of the map from y to y_0
        weight = dense(x, theta).covariance_matrix.diagonal().log().sum() / 2
        volume = -weight - ROWS * (COLUMNS - 1) / 2 * math.log(1 - theta.rho**2)
        expected = dense(x, theta).log_prob(y.flatten()) - volume
        torch.testing.assert_close(lead.log_prob(conditioned)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("theta", [Theta(0.3, 0.6, w=0.5), Theta(0.3, 0.6, h=0.8, w=0.5)], ids=["cosines", "rows"])
def test_operator_of_a_guide_has_its_transpose(theta: Theta) -> None:
    prior, _ = field_prior()
    y, x = pair(6)
    operator = pyro.poutine.trace(guide(y, theta, prior, x).program).get_trace(y).nodes["y"]["fn"].operator
    u, v = torch.randn((2, *x.shape), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    torch.testing.assert_close((operator(u) * v).sum(), (u * operator.adjoint(v)).sum(), rtol=1e-12, atol=1e-12)


def test_statistics_of_a_known_residual() -> None:
    """Alternating signs along the rows, alike in every column pair: correlations are -1, 1 and 1."""
    signs = torch.tensor([1.0, -1.0]).repeat(4).expand(6, 8)
    clean = torch.linspace(-0.5, 0.5, 8).expand(6, 8)
    power = 1 + torch.tensor([0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6])
    y = (clean + signs * power.sqrt())[None]
    found = statistics(y, clean[None], (float(y.min()), float(y.max())))
    assert found["column lag 1"] == pytest.approx(1.0)
    assert found["clipped"] == pytest.approx(12 / 48)
    plain = statistics((clean + signs)[None], clean[None], (-9.0, 9.0))
    assert (plain["row lag 1"], plain["row lag 2"]) == (pytest.approx(-1.0), pytest.approx(1.0))
    assert plain["clipped"] == 0
    rising = statistics((clean + signs * (1.5 + clean).sqrt())[None], clean[None], (-9.0, 9.0))
    assert rising["variance against signal"] > 0.95  # variance 1.5 + clean, but for the residual's mean
    assert abs(found["row lag 1"] + 1) < 0.1


def test_coverage_is_the_level_for_exact_draws_whatever_their_number() -> None:
    """90 000 pixels: each share within 6 standard errors; P < 3 * 2e-9.

    Of 7 draws all above the truth the rank is uniform below 1/8, so that the central 90 % hold it with probability
    1 - 0.05 * 8 = 0.6.
    """
    g, n = torch.Generator().manual_seed(0), 90_000
    both = torch.randn((8, n), generator=g, dtype=torch.float64)
    found = coverage(both[1:], both[0], seed=1)
    above = coverage(both[0] + torch.arange(1.0, 8.0)[:, None], both[0], seed=1)
    for share, expected in ((found["50"], 0.5), (found["90"], 0.9), (above["90"], 0.6)):
        assert abs(share - expected) < 6 * math.sqrt(expected * (1 - expected) / n)


def test_evidence_of_normal_log_weights() -> None:
    """For log-weights of exact mean m and variance v the second cumulant is m + v / 2, the evidence of normal ones."""
    log_w = torch.tensor([[0.0, 2.0, 4.0], [1.0, 3.0, 2.0]]).double() - 500
    found = evidence(log_w)
    flat = [0.0, 2.0, 4.0, 1.0, 3.0, 2.0]
    mean = sum(flat) / 6
    variance = sum((value - mean) ** 2 for value in flat) / 5
    assert found["bound"] == pytest.approx(mean - 500)
    assert found["cumulant"] == pytest.approx(mean + variance / 2 - 500)
    assert found["log_z"][1] == pytest.approx(math.log((math.e + math.e**3 + math.e**2) / 3) - 500)
    assert found["pooled"] == pytest.approx(math.log(sum(math.exp(value) for value in flat) / 6) - 500)
    weights = [math.exp(value) for value in flat]
    assert found["ess"] == pytest.approx(sum(weights) ** 2 / sum(w**2 for w in weights))


def test_evidence_decides_only_beyond_all_that_it_may_be() -> None:
    low = {"bound": 10.0, "pooled": 25.0, "cumulant": 30.0}
    assert decided({"bound": 31.0, "pooled": 40.0, "cumulant": 50.0}, low)
    assert not decided({"bound": 29.0, "pooled": 40.0, "cumulant": 50.0}, low)
    assert not decided({"bound": 31.0, "pooled": 40.0, "cumulant": 50.0}, {**low, "pooled": 32.0})


def test_psnr_of_a_shift() -> None:
    """An error of 0.2 on a scale of length 2 is 20 dB."""
    assert psnr(torch.full((1, 3, 3), 0.2), torch.zeros((1, 3, 3))) == pytest.approx(20.0, abs=1e-5)
