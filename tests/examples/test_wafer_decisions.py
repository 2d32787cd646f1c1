"""The study of decisions on wafer patches: its closed forms against others, its particles against these."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import smcdiff as sd
from examples import wafer_decisions as example
from smcdiff.transforms import hartley

F64 = torch.float64
#: Six standard deviations of a chain's log-evidence for a normal prior: the chain starts at N(0, I), without the share
#: alpha_T = 0.0064 of x_0, which moves the mean log-weight of eight particles by 0.0064 |E[x_0 given y]| / sqrt(8), and
#: |E[x_0 given y]| is about 6 or less here.
START = 6 * 0.0064 * 6 / 8**0.5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of 8 x 8 pixels, so 16 measured values."""
    monkeypatch.setattr(example, "SIDE", 8)


def test_patches_are_pairs_that_differ_by_the_defect_in_their_middle() -> None:
    normal, defect = example.patches(np.random.default_rng(0), 7)
    assert normal.shape == defect.shape == (7, 1, example.SIDE, example.SIDE)
    change = (normal - defect).abs()
    assert bool((change.amax((1, 2, 3)) > 0.2).all())
    inner = change[..., 2:-2, 2:-2]
    assert bool((inner.amax((1, 2, 3)) == change.amax((1, 2, 3))).all())


@pytest.mark.usefixtures("small")
def test_the_evidence_of_one_template_is_exact_with_particles() -> None:
    """With one template the prior is normal: sd.Adapted has all its log-weights alike, up to the chain's start."""
    normal, _ = example.patches(np.random.default_rng(1), 2)
    one = example.Templates(normal[:1], torch.ones(1, dtype=F64))
    y = example.measured(normal[1], torch.Generator().manual_seed(0))
    found = example.run(one.program(), y, 0).log_evidence_per_chain
    torch.testing.assert_close(found, one.log_evidence(y).expand(8), rtol=0, atol=START)
    both = example.Templates(normal, torch.tensor([0.25, 0.75], dtype=F64))
    parts = torch.stack([example.Templates(t[None], torch.ones(1, dtype=F64)).log_evidence(y) for t in normal])
    torch.testing.assert_close(both.log_evidence(y), (parts + both.weights.log()).logsumexp(0))


def test_shares_are_those_of_the_normal_densities() -> None:
    means = torch.from_numpy(np.random.default_rng(2).normal(0, 0.02, (3, 1, example.SIDE, example.SIDE)))
    mixture = example.Templates(means, torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    x = means[1:] + 0.01
    log_density = torch.distributions.Normal(means, example.S).log_prob(x[:, None]).flatten(2).sum(-1)
    expected = mixture.weights * log_density.exp() / (mixture.weights * log_density.exp()).sum(1, keepdim=True)
    torch.testing.assert_close(mixture.shares(x), expected)


@pytest.mark.parametrize("name", ["gaussian", "defocus", "motion"])
def test_the_evidence_of_a_blur(name: str) -> None:
    """Against the dense normal density, and the particles against it."""
    kernel = example.kernels()[name]
    rows, columns = (torch.arange(side, dtype=F64) - side // 2 for side in kernel.shape)
    assert float(kernel.sum()) == pytest.approx(1)
    assert float((kernel * (rows[:, None] ** 2 + columns**2)).sum()) == pytest.approx(2, abs=0.01)
    blurred = example.Blurred(kernel, side=6)
    y = blurred.draw(torch.Generator().manual_seed(0))
    pixels = torch.eye(36, dtype=F64).reshape(-1, 1, 6, 6)
    field = (sd.Blur(kernel)(hartley(blurred.spectrum.sqrt() * pixels))).flatten(1)
    covariance = field.T @ field + blurred.SIGMA**2 * torch.eye(36, dtype=F64)
    exact = MultivariateNormal(torch.zeros(36, dtype=F64), covariance).log_prob(y.flatten())
    torch.testing.assert_close(blurred.log_evidence(y), exact)
    assert float(blurred.spectrum.mean()) == pytest.approx(1)
    found = example.run(blurred.program(), y, 0).log_evidence_per_chain
    torch.testing.assert_close(found, exact.expand(8), rtol=0, atol=START)


@pytest.mark.usefixtures("small")
def test_the_study_ends_in_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exact claims are Bayes' formula; where the evidence is near exact, so are the claims from it."""
    monkeypatch.setattr("sys.argv", ["wafer_decisions.py", "--out", str(tmp_path), "--problems", "1"])
    example.main()
    result = json.loads((tmp_path / "wafer_decisions.json").read_text())
    for claims in result["populations"].values():
        for claim in claims:
            off = claim["error_defect"] - claim["error_normal"]
            log_odds = math.log(claim["exact"] / (1 - claim["exact"])) + off
            assert claim["evidence"] == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=0.2)
    for claim in result["blurs"]:
        assert claim["evidence"] == pytest.approx(claim["exact"], abs=0.02)
    assert (tmp_path / "wafer_decisions.png").stat().st_size > 10_000
    assert "fresh patches, draws" in capsys.readouterr().out
