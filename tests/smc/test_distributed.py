"""Several processes run one filter: exact answers, the fewest particles moved, ranks that die, runs that go on."""

from __future__ import annotations

import itertools
import math
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

from smcdiff.smc import ParticleFilter, Systematic
from smcdiff.smc.checkpoint import Checkpoint, CheckpointError, CheckpointWarning
from smcdiff.smc.distributed import _Saver
from smcdiff.smc.genealogy import paths, roots
from smcdiff.smc.ranks import Ranks
from smcdiff.smc.resampling import Multinomial
from smcdiff.smc.sharding import Placed, derive_seed, moved, place
from tests.smc import distributed_runs
from tests.smc.models import HiddenMarkov, LinearGaussian

ROOT = Path(__file__).parents[2]


SCENARIOS = [
    "exact",
    "three_ranks",
    "errors",
    "dies",
    "dies_in_chains",
    "stalls",
    "straight",
    "dies_with_particles",
    "dies_with_chains",
    "other_run",
    "resumed",
]


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
    command = [sys.executable, str(Path(distributed_runs.__file__)), str(folder), *SCENARIOS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    codes = [[int(code) for code in line.split()] for line in done.stdout.splitlines()]
    ended = {}
    for name, pair in zip(SCENARIOS, codes, strict=True):
        files = [folder / f"{name}.{rank}.pt" for rank in range(len(pair))]
        ended[name] = Scenario(pair, [torch.load(file, weights_only=True) for file in files if file.exists()])
    assert not any(1 in pair for pair in codes), done.stderr
    return ended


@pytest.fixture
def exact(scenarios: dict[str, Scenario]) -> list[dict[str, Any]]:
    return scenarios["exact"].found


@pytest.fixture
def errors(scenarios: dict[str, Scenario]) -> list[dict[str, Any]]:
    return scenarios["errors"].found


def score(log_ratio: Tensor) -> float:
    """Standard errors between the mean of exp(log_ratio) and one."""
    ratio = torch.exp(log_ratio)
    return ((ratio.mean() - 1) / (ratio.std() / math.sqrt(ratio.numel()))).item()


@pytest.mark.parametrize("d", [1, 3])
def test_optimal_twist_has_exact_evidence_on_two_ranks(exact: list[dict[str, Any]], d: int) -> None:
    # Resampled before every move: the evidence is exact only if x and the twist's value travel together.
    truth = LinearGaussian.example(d, num_steps=8).kalman[2][-1].expand(5)
    for rank in exact:
        found = rank[f"twisted {d}"]
        torch.testing.assert_close(found["log_z"], truth, rtol=0, atol=1e-9)
        torch.testing.assert_close(found["w"], torch.full((5, 3), 1 / 6, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_evidence_of_sharded_particles_is_unbiased(exact: list[dict[str, Any]], n: int) -> None:
    # 20 000 chains of n particles, half of each chain on either rank: five standard errors, failure 6e-7 each.
    first, second = (rank[f"hidden {n}"] for rank in exact)
    assert torch.equal(first["log_z"], second["log_z"])
    assert abs(score(first["log_z"] - HiddenMarkov.example().log_evidence)) < 5
    if n < 6:
        share = first["resampled"].double().mean(-1)
        assert ((share > 0) & (share < 1)).sum() >= 4, "some chains must resample at a step where others do not"
    else:
        assert first["resampled"].all()


@pytest.mark.parametrize("n", [2, 4, 6])
def test_filtering_law_of_sharded_particles(exact: list[dict[str, Any]], n: int) -> None:
    # Z_hat sum_j w_j [x_j = s] is unbiased for p(y, x_K = s): three states at five standard errors, failure 2e-6.
    truth = HiddenMarkov.example().forward[-1]
    mass = sum(
        torch.einsum("bm,bms->bs", found["w"], torch.nn.functional.one_hot(found["particles"]["state"], 3).double())
        for found in (rank[f"hidden {n}"] for rank in exact)
    )
    estimate = exact[0][f"hidden {n}"]["log_z"].exp()[:, None] * mass
    error = (estimate.mean(0) - truth) / (estimate.std(0) / math.sqrt(len(estimate)))
    assert error.abs().max() < 5


def test_chains_over_ranks_pool_the_chains_of_all(exact: list[dict[str, Any]]) -> None:
    # Five standard errors over 20 000 chains, failure 6e-7; each rank's chains are those of one process with its seed.
    first, second = (rank["chains"] for rank in exact)
    assert torch.equal(first["log_z"], second["log_z"])
    assert torch.equal(first["log_z"], torch.cat([first["local log_z"], second["local log_z"]]))
    assert abs(score(first["log_z"] - HiddenMarkov.example().log_evidence)) < 5
    for rank, found in enumerate((first, second)):
        seed = derive_seed(1, f"rank {rank}")
        alone = ParticleFilter().run(HiddenMarkov.example(), num_particles=4, num_chains=10_000, seed=seed)
        assert torch.equal(alone.log_z, found["local log_z"])
        assert torch.equal(alone.particles["state"], found["particles"]["state"])


@pytest.mark.parametrize(("scenario", "ranks", "n"), [("exact", 2, 10), ("three_ranks", 3, 12)])
def test_the_right_particles_travel_whole(scenarios: dict[str, Scenario], scenario: str, ranks: int, n: int) -> None:
    """What the final particles carry, in six dtypes and shapes, is what the recorded ancestors say."""
    shards = [rank["labelled"] for rank in scenarios[scenario].found]
    assert len(shards) == ranks
    whole = {name: torch.cat([shard["particles"][name] for shard in shards], 1) for name in shards[0]["particles"]}
    ancestors = shards[0]["ancestors"]
    assert all(torch.equal(ancestors, shard["ancestors"]) for shard in shards)
    root, chain = roots(ancestors)[-1], torch.arange(7)[:, None].expand(7, n)
    assert torch.equal(whole["root"], root)
    assert torch.equal(whole["odd"], root % 2 == 1)
    assert torch.equal(whole["chain"], chain.to(torch.uint8))
    assert torch.equal(whole["pair"][..., 0, 0], torch.complex(root.float(), chain.float()))
    assert torch.equal(whole["path"][:, :, -1], whole["x"].half())
    # Particles with the same ancestor at a step have the same path up to it; others do not (x is continuous).
    line = paths(ancestors)
    for i in range(1, 13):
        same = line[i][:, :, None] == line[i][:, None, :]
        assert torch.equal(same, (whole["path"][:, :, None, i] == whole["path"][:, None, :, i]).all(-1))
    assert (shards[0]["moved"] > 0).any(), "nothing travelled, so nothing was tested"
    assert torch.equal(shards[0]["moved"], moved(ancestors, ranks))
    offspring = torch.nn.functional.one_hot(ancestors // (n // ranks), ranks).sum(-2)
    assert torch.equal(shards[0]["moved"], (offspring - n // ranks).clamp(min=0).sum(-1))
    w = torch.cat([shard["w"] for shard in shards], 1)
    torch.testing.assert_close(w.sum(1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=0)


def test_as_few_particles_move_as_there_is_surplus(exact: list[dict[str, Any]]) -> None:
    for name in ("hidden 2", "hidden 4", "hidden 6", "labelled", "twisted 3"):
        found = exact[0][name]
        ancestors = found["ancestors"]
        m = ancestors.shape[-1] // 2
        on_first = (ancestors < m).sum(-1)
        assert torch.equal(found["moved"], (on_first - m).abs())  # of two ranks, one has the surplus


@pytest.mark.parametrize(("n", "ranks"), [(6, 1), (6, 2), (6, 3), (6, 6), (8, 4)])
@pytest.mark.parametrize("resampler", [Systematic(), Multinomial()])
def test_placing_keeps_the_ancestors_and_moves_the_least(n: int, ranks: int, resampler: Any) -> None:
    g = torch.Generator().manual_seed(n + ranks)
    weights = torch.rand((40, n), generator=g, dtype=torch.float64) ** 8
    weights[0], weights[1, 1:], weights[2] = 1.0, 0.0, 0.0
    drawn = resampler(weights, torch.Generator().manual_seed(0))
    placed = Placed(resampler, ranks)(weights, torch.Generator().manual_seed(0))
    assert torch.equal(placed, place(drawn.flip(-1), ranks)), "the order drawn in does not matter"
    assert torch.equal(placed.sort(-1).values, drawn.sort(-1).values)
    m = n // ranks
    offspring = torch.nn.functional.one_hot(drawn // m, ranks).sum(1)
    assert torch.equal(moved(placed, ranks), (offspring - m).clamp(min=0).sum(-1))
    if n == 6:  # against all orders
        for row, count in zip(placed[:12], moved(placed, ranks)[:12], strict=True):
            orders = torch.tensor(list(itertools.permutations(row.tolist())))
            assert moved(orders, ranks).min() == count
    identity = torch.arange(n).expand(3, n)
    assert torch.equal(place(identity, ranks), identity)


def test_streams_of_a_run_have_seeds_of_their_own() -> None:
    streams = ["all ranks", *(f"rank {rank}" for rank in range(20))]
    seeds = {derive_seed(seed, stream) for seed in range(50) for stream in streams}
    assert len(seeds) == 50 * 21
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 50 * 21  # the CPU's generator takes the low 32 bits alone


@pytest.mark.parametrize(
    ("name", "kinds", "says"),
    [
        ("sharded NaN", ("FilterError", "FilterError"), "failed at step 5 of 30 in chain 1 of 4: the incremental"),
        ("sharded fault", ("FilterError", "FilterError"), "failed at step 4 of 30 in chain 2 of 4: the sky fell"),
        ("chain NaN", ("FilterError", "RankError"), "failed at step 5 of 30 in chain 1 of 2|rank 0 of 2 failed"),
        ("raises", ("RankError", "MemoryError"), "rank 0 of 2 lost the others: one of them died.*goes on|no room"),
        ("particles", ("ValueError", "ValueError"), "num_particles = 7 on 2 ranks; expected a positive multiple"),
        ("chains", ("ValueError", "ValueError"), "num_chains = 3 on 2 ranks; expected a positive multiple"),
        ("summaries", ("ValueError", "ValueError"), "a rank sees its own particles alone"),
        ("limit", ("ValueError", "ValueError"), "time limit of 0.0 s; expected a positive"),
        ("seeds", ("RankError", "RankError"), "2 ranks have different runs or arguments; call run with the same"),
        ("ancestors", ("RankError", "RankError"), "2 ranks have different ancestors; .* devices of one kind"),
    ],
)
def test_a_run_ends_on_every_rank_with_the_reason(
    errors: list[dict[str, Any]], name: str, kinds: tuple[str, str], says: str
) -> None:
    for rank, kind in zip(errors, kinds, strict=True):
        got, message, seconds = rank[name]
        assert got == kind, message
        assert re.search(says, message), message
        assert seconds < 20


@pytest.mark.parametrize("scenario", ["dies", "dies_in_chains"])
def test_a_rank_that_dies_ends_the_run_of_the_other(scenarios: dict[str, Scenario], scenario: str) -> None:
    ended = scenarios[scenario]
    assert ended.codes == [0, 7]
    kind, message, seconds = ended.found[0]["dies"]
    assert kind == "RankError" and "rank 0 of 2 lost the others: one of them died" in message
    assert seconds < 20  # at once: the time limit of an exchange, 600 s, is not waited for


def test_a_rank_that_hangs_ends_the_run_of_the_other_at_the_time_limit(scenarios: dict[str, Scenario]) -> None:
    kind, message, seconds = scenarios["stalls"].found[0]["stalls"]
    assert kind == "RankError" and "took longer than the time limit" in message
    assert 1 <= seconds < 4.5  # the limit is 1 s, the other sleeps for 5


def test_a_run_without_processes_says_how_to_start_them() -> None:
    with (
        pytest.raises(RuntimeError, match="start the program with torchrun and call torch\\.distributed\\.init"),
        Ranks.open(1.0, torch.device("cpu")),
    ):
        pass


def test_a_run_killed_on_one_rank_goes_on_bit_for_bit(scenarios: dict[str, Scenario]) -> None:
    # Rank 1 died at step 17 (11 with chains). Then rank 0 lost its step 16, as if it had been killed while it wrote it.
    for scenario in ("dies_with_particles", "dies_with_chains"):
        assert scenarios[scenario].codes == [0, 7]
        assert scenarios[scenario].found[0]["dies"][0] == "RankError"
    first, second = scenarios["other_run"].found
    assert sorted(first["kept"]["particles"]) == sorted(second["kept"]["particles"]) == [15, 16]
    assert first["left"] == [15] and sorted(second["left"]) == [15, 16]
    assert 10 in first["kept"]["chains"] and 10 in second["kept"]["chains"]
    for before, after in zip(scenarios["straight"].found, scenarios["resumed"].found, strict=True):
        for mode in ("particles", "chains"):
            assert same(before[mode], after[mode]), mode


class Alone:
    """One process that is all the ranks there are."""

    rank, count = 0, 1

    def gather(self, value: Tensor) -> Tensor:
        return value[None]

    def settle(self, error: Exception | None) -> None:
        if error is not None:
            raise error


def test_the_file_written_over_is_never_the_one_all_ranks_have(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.pt", {"program": "a"}, every_seconds=None, every_steps=1)
    states = list(ParticleFilter().iterate(HiddenMarkov.example(), num_particles=2, seed=0))

    def held() -> list[int]:
        files = sorted(tmp_path.glob("run.rank0.?.pt"))
        return sorted(int(torch.load(file, weights_only=True)["state"]["step"]) for file in files)

    for begin, end in ((0, 3), (3, 5), (5, 7)):  # an odd number of writes, an even one, and one that is not a first
        saver = _Saver(checkpoint, {}, Alone())  # type: ignore[arg-type]
        start = saver.start(torch.device("cpu"))
        assert (start is None) if begin == 0 else (start is not None and start.step == begin - 1)
        for state in states[begin:end]:
            before = held()
            saver.keep(state)
            assert held() == sorted({*before[-1:], state.step})


def test_a_write_that_fails_is_a_warning_and_the_next_goes_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "run.pt", {"program": "a"}, every_seconds=None, every_steps=1)
    states = list(ParticleFilter().iterate(HiddenMarkov.example(), num_particles=2, seed=0))
    saver = _Saver(checkpoint, {}, Alone())  # type: ignore[arg-type]
    saver.keep(states[0])
    saver.keep(states[1])

    def full(*arguments: object) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("smcdiff.smc.distributed.save", full)
        with pytest.warns(CheckpointWarning, match="the disk is full; the run goes on"):
            saver.keep(states[2])
        with pytest.raises(CheckpointError, match="the disk is full"):
            _Saver(checkpoint, {}, Alone()).keep(states[2])  # type: ignore[arg-type]
    saver.keep(states[3])
    assert (tmp_path / "run.rank0.b.pt").exists()
    start = _Saver(checkpoint, {}, Alone()).start(torch.device("cpu"))  # type: ignore[arg-type]
    assert start is not None and start.step == 3
    (tmp_path / "run.rank0.a.pt").unlink()
    start = _Saver(checkpoint, {}, Alone()).start(torch.device("cpu"))  # type: ignore[arg-type]
    assert start is not None and start.step == 1


def test_a_checkpoint_of_another_run_is_refused_on_every_rank(scenarios: dict[str, Scenario]) -> None:
    for rank in scenarios["other_run"].found:
        kind, message, _ = rank["other"]
        assert kind == "CheckpointError" and "seed: 6 there, 7 here" in message


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dictionaries."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else bool(a == b)
