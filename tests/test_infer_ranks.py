"""The front door on two processes: exact answers, the same on both, runs that go on, errors that end both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.smc.conditional import ConditionalSMC
from smcdiff.smc.distributed import ChainsOverRanks, ParticlesOverRanks
from smcdiff.smc.sharding import derive_seed
from tests import infer_ranks_runs as runs
from tests.guidance.exact import NormalLaw, chain_law

ROOT = Path(__file__).parents[1]
SCENARIOS = ["exact", "small", "straight", "dies_in_chains", "dies_in_particles", "resumed", "errors"]
MODES = ["chains", "particles"]


@dataclass(frozen=True)
class Scenario:
    """Exit codes of the ranks, and what those that came to their end saved."""

    codes: list[int]
    found: list[dict[str, Any]]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """All scenarios, one after the other, in one child that imports torch once; it is given two minutes."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(runs.__file__)), str(folder), *SCENARIOS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    codes = [[int(code) for code in line.split()] for line in done.stdout.splitlines()]
    assert not any(1 in pair for pair in codes), done.stderr
    ended = {}
    for name, pair in zip(SCENARIOS, codes, strict=True):
        files = [folder / f"{name}.{rank}.pt" for rank in range(2)]
        ended[name] = Scenario(pair, [torch.load(file, weights_only=True) for file in files if file.exists()])
    return ended


def truth() -> tuple[NormalLaw, float]:
    """The posterior of the discretised chain, and its log-evidence."""
    return chain_law(runs.PRIOR, runs.MEAN, runs.COVARIANCE).given(runs.A, runs.Y, runs.SIGMA)


def score(log_w: Tensor, excess: Tensor) -> float:
    """Standard errors between the pooled mean of ``excess`` (b, n) and zero, over b independent chains."""
    of_chains = (log_w.exp() * excess).sum(1)
    return float(of_chains.sum() / of_chains.square().sum().sqrt())


@pytest.mark.parametrize("mode", MODES)
def test_evidence_is_the_closed_form(scenarios: dict[str, Scenario], mode: str) -> None:
    # exp(log_z) is unbiased: five standard errors over 2000 chains, failure 6e-7 each.
    found = scenarios["exact"].found[0][mode]
    assert found["log_z"].shape == (runs.CHAINS,)
    ratio = (found["log_z"] - truth()[1]).exp()
    error = ratio.std() / runs.CHAINS**0.5
    assert error < 0.03
    assert abs(ratio.mean() - 1) < 5 * error
    torch.testing.assert_close(found["log_evidence"], ratio.mean().log() + truth()[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_posterior_mean_and_variance_are_the_closed_form(scenarios: dict[str, Scenario], mode: str) -> None:
    # Z_hat times a chain's mean of f - E f has mean zero: five numbers at five standard errors, failure 3e-6 each mode.
    # Of 4 particles the spread of Z_hat is half of Z; chains pooled evenly are 8 standard errors away, particles 9.
    found, (law, _) = scenarios["exact"].found[0][mode], truth()
    x, log_w = found["values"]["x"], found["log_w"]
    assert x.shape == (runs.CHAINS, runs.PARTICLES, 2) and log_w.shape == (runs.CHAINS, runs.PARTICLES)
    centred = x - law.mean
    for i in range(2):
        assert abs(score(log_w, centred[..., i])) < 5
        for j in range(i + 1):
            assert abs(score(log_w, centred[..., i] * centred[..., j] - law.covariance[i, j])) < 5
    torch.testing.assert_close(found["values"]["total"], x.sum(-1))


@pytest.mark.parametrize("mode", MODES)
def test_every_particle_is_there_once_with_its_weight(scenarios: dict[str, Scenario], mode: str) -> None:
    found = scenarios["exact"].found[0][mode]
    x, log_w, log_z = found["values"]["x"], found["log_w"], found["log_z"]
    assert len(x[..., 0].unique()) == runs.CHAINS * runs.PARTICLES  # the last move has noise of its own
    within = found["last log_w"].log_softmax(1) + log_z[:, None]
    torch.testing.assert_close(log_w, within - within.logsumexp((0, 1)), rtol=0, atol=1e-12)
    in_all = runs.STEPS * runs.CHAINS * runs.PARTICLES
    assert found["evaluations"] == [in_all, in_all]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", ["exact", "straight", "small"])
def test_both_ranks_hold_the_same(scenarios: dict[str, Scenario], scenario: str, mode: str) -> None:
    """Values, weights, evidence, draws, steps, evaluations, the summary and the ArviZ export."""
    first, second = ({**rank[mode], "bar": ""} for rank in scenarios[scenario].found)
    assert same(first, second)


def test_chains_over_ranks_are_those_of_single_processes(scenarios: dict[str, Scenario]) -> None:
    found = scenarios["exact"].found[0]["chains"]
    half = runs.CHAINS // 2
    alone = [runs.posterior(runs.FILTER, half, derive_seed(runs.SEED, f"rank {rank}")) for rank in range(2)]
    log_z = torch.cat([smc.log_evidence_per_chain for smc in alone])
    assert torch.equal(found["log_z"], log_z)
    assert torch.equal(found["values"]["x"], torch.cat([smc.posterior.values["x"] for smc in alone]))
    of_chains = [smc.posterior.log_w - smc.posterior.log_w.logsumexp(1, keepdim=True) for smc in alone]
    log_w = torch.cat(of_chains) + log_z[:, None] - log_z.logsumexp(0)
    torch.testing.assert_close(found["log_w"], log_w, rtol=0, atol=1e-12)
    for name in ("ess", "log_z_path", "roots", "entropy", "resampled", "ancestors"):
        both = torch.cat([getattr(smc.posterior, name) for smc in alone], 1)
        assert torch.equal(found["steps"][name], both), name
    assert found["steps"]["resampled"].any() and not found["steps"]["resampled"].all()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_without_a_seed_takes_that_of_rank_0_and_one_bar_is_shown(
    scenarios: dict[str, Scenario], mode: str
) -> None:
    first, second = (rank[mode] for rank in scenarios["small"].found)
    torch.manual_seed(100)
    seed = int(torch.randint(2**62, ()))
    if mode == "chains":
        alone = runs.posterior(sd.ParticleFilter(), 3, derive_seed(seed, "rank 0"))
        assert torch.equal(first["x"][:3], alone.posterior.values["x"])
    w = first["log_w"].exp()
    torch.testing.assert_close(first["largest"][-1], (w / w.sum(1, keepdim=True)).amax(1), rtol=1e-12, atol=0)
    assert first["largest"].shape == (runs.STEPS + 1, 6)
    assert "log_z" in first["bar"] and second["bar"] == ""


def test_values_of_all_kinds_come_whole(scenarios: dict[str, Scenario]) -> None:
    parts = [runs.of_all_kinds(rank) for rank in range(2)]
    truth = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    for rank in scenarios["small"].found:
        assert same(rank["odd"], truth)
        assert rank["empty"]["none"].shape == (2, 0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_on_one_rank_goes_on_bit_for_bit(scenarios: dict[str, Scenario], mode: str) -> None:
    died = scenarios[f"dies_in_{mode}"]
    assert died.codes == [0, 7]
    kind, message, seconds = died.found[0]["dies"]
    assert kind == "RankError" and "lost the others: one of them died" in message
    assert seconds < 20  # at once: the time limit of an exchange, 600 s, is not waited for
    count = ("calls", "evaluations", "summary")
    for before, after in zip(scenarios["straight"].found, scenarios["resumed"].found, strict=True):
        assert after[mode]["calls"] < before[mode]["calls"] - 10  # it did go on, and did not start anew
        left = [{name: value for name, value in run[mode].items() if name not in count} for run in (before, after)]
        assert same(*left)


@pytest.mark.parametrize(
    ("name", "kinds", "says"),
    [
        ("raises in chains", ("RankError", "MemoryError"), "rank 0 of 2 lost the others: one of them died|no room"),
        ("raises in particles", ("RankError", "MemoryError"), "rank 0 of 2 lost the others: one of them died|no room"),
        ("raises before", ("RankError", "MemoryError"), "rank 0 of 2 lost|could not be connected|no room"),
        ("measurements", ("RankError", "RankError"), "2 ranks have different programs, measurements or checkpoints"),
        ("weights", ("RankError", "RankError"), "2 ranks have different programs, measurements or checkpoints"),
        ("settings", ("RankError", "RankError"), "2 ranks have different programs, measurements or checkpoints"),
        ("checkpoints", ("RankError", "RankError"), "2 ranks have different programs, measurements or checkpoints"),
        ("chains", ("ValueError", "ValueError"), "num_chains = 3 on 2 processes.*expected a multiple"),
        ("particles", ("ValueError", "ValueError"), "num_particles = 5 on 2 processes.*expected a multiple"),
        ("single", ("ValueError", "ValueError"), "num_particles = 2 on 2 processes.*at least 2 for each"),
        ("shape", ("ValueError", "ValueError"), r"a summary of shape \(\) of weights \(1, 4\); expected an entry for"),
        ("whole", ("ValueError", "ValueError"), r"summaries \['mean'\], which do not have the shape \(b, ...\)"),
        ("summaries", ("ValueError", "ValueError"), r"summaries \['mean'\].*a process sees its own particles alone"),
    ],
)
def test_a_run_ends_on_both_ranks_with_the_reason(
    scenarios: dict[str, Scenario], name: str, kinds: tuple[str, str], says: str
) -> None:
    for rank, kind in zip(scenarios["errors"].found, kinds, strict=True):
        got, message, seconds = rank[name]
        assert got == kind, message
        assert re.search(says, message), message
        assert seconds < 20


@pytest.mark.parametrize("filter", [ChainsOverRanks(), ParticlesOverRanks()])
def test_a_run_without_processes_says_how_to_start_them(filter: Any) -> None:
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        runs.posterior(filter, 2)


def test_conditional_moves_are_no_filter() -> None:
    with pytest.raises(TypeError, match="got filter ConditionalSMC.*made by ParticleGibbs"):
        runs.posterior(ConditionalSMC(), 2)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dictionaries; a NaN is equal to itself."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if not isinstance(a, Tensor):
        return bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
