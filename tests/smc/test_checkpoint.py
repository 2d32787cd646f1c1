"""Checkpoints: killed and resumed equals never stopped; what is of another run, broken or not writable is said."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from smcdiff.smc import FilterError, FilterState, ParticleFilter, Records
from smcdiff.smc.checkpoint import Checkpoint, CheckpointError, CheckpointWarning, digest, load, save, versions
from tests.smc import killed_runs
from tests.smc.models import CPU, Bootstrap, LinearGaussian

MODEL = Bootstrap(LinearGaussian.example(2, num_steps=6))
NUMBERS = {"num_particles": 8, "num_chains": 3, "seed": 4}
RECORDS = Records(
    log_weights=True, summaries={"mean": lambda state: (state.w[..., None] * state.particles["x"]).sum(1)}
)


def states(**changed: object) -> list[FilterState]:
    return list(ParticleFilter().iterate(MODEL, **{**NUMBERS, **changed}, records=RECORDS))


def each_step(path: Path, **identity: str) -> Checkpoint:
    return Checkpoint(path, identity or {"program": "a"}, every_seconds=None, every_steps=1)


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[FilterState], None]:
    def progress(state: FilterState) -> None:
        if state.step == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_state_survives_the_file_bit_for_bit(tmp_path: Path, step: int) -> None:
    state = states()[step]
    save(tmp_path / "a.pt", state, {"program": "a"})
    back = load(tmp_path / "a.pt", {"program": "a"}, CPU)
    assert back.step == step and back.num_steps == 6
    for name in ("log_w", "w", "ess", "log_z", "log_z_settled", "generator_state"):
        assert torch.equal(getattr(back, name), getattr(state, name))
        assert getattr(back, name).dtype == getattr(state, name).dtype
    assert torch.equal(back.particles["x"], state.particles["x"])
    assert back.faults.keys() == state.faults.keys()
    assert all(torch.equal(back.faults[name], state.faults[name]) for name in state.faults)
    assert len(back.history) == step + 1
    for a, b in zip(back.history, state.history, strict=True):
        for name in ("ess", "log_z", "resampled", "ancestors", "log_w"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        assert torch.equal(a.summaries["mean"], b.summaries["mean"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6])
def test_a_stopped_run_goes_on_from_its_file(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "run.checkpoint.pt"
    straight = ParticleFilter().run(MODEL, **NUMBERS, records=RECORDS)
    with pytest.raises(Stopped):
        ParticleFilter().run(MODEL, **NUMBERS, records=RECORDS, checkpoint=each_step(path), progress=stop_at(stop))
    seen: list[int] = []
    result = ParticleFilter().run(
        MODEL, **NUMBERS, records=RECORDS, checkpoint=each_step(path), progress=lambda state: seen.append(state.step)
    )
    assert seen == list(range(max(0, stop), 7))  # the stopped step itself was not kept
    assert torch.equal(result.log_z, straight.log_z)
    assert torch.equal(result.particles["x"], straight.particles["x"])
    assert torch.equal(result.records.log_z, straight.records.log_z)
    assert torch.equal(result.records.summaries["mean"], straight.records.summaries["mean"])
    assert load(path, read_identity(path), CPU).step == 6


def read_identity(path: Path) -> dict[str, str]:
    return torch.load(path, weights_only=True)["identity"]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_equals_one_that_was_not(tmp_path: Path, seed: int) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(killed_runs.__file__)), str(tmp_path), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    kills = [int(step) for step in done.stdout.split()]
    assert len(kills) >= 5 and kills == sorted(kills)
    assert len({step for step in kills if 0 < step < 200}) >= 3, "too few were killed on the way"
    straight = ParticleFilter().run(killed_runs.MODEL, **killed_runs.NUMBERS)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert torch.equal(result["log_z"], straight.log_z)
    assert torch.equal(result["x"], straight.particles["x"])
    assert torch.equal(result["ancestors"], straight.records.ancestors)


def kept(path: Path) -> None:
    ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path, program="a", prior="p"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 5}, "seed: 4 there, 5 here"),
        ({"num_particles": 9}, "particles: 8 there, 9 here"),
        ({"num_chains": 2}, "chains: 3 there, 2 here"),
        ({"records": Records(ancestors=False)}, "records: ancestors True"),
    ],
)
def test_a_checkpoint_of_other_numbers_is_refused(tmp_path: Path, changed: dict[str, object], says: str) -> None:
    kept(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(CheckpointError, match=f"is of another run .*{re.escape(says)}.*; delete or rename it"):
        ParticleFilter().run(
            MODEL, **{**NUMBERS, **changed}, checkpoint=each_step(tmp_path / "a.pt", program="a", prior="p")
        )
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_checkpoint_of_another_program_filter_model_or_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    kept(path)
    same = each_step(path, program="a", prior="p")
    with pytest.raises(CheckpointError, match="prior: p there, q here; program: a there, b here"):
        ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path, program="b", prior="q"))
    with pytest.raises(CheckpointError, match="prior: p there, nothing here"):
        ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path, program="a"))
    with pytest.raises(CheckpointError, match=r"filter: .*ess_threshold=0.5.* there, .*ess_threshold=0.7.* here"):
        ParticleFilter(ess_threshold=0.7).run(MODEL, **NUMBERS, checkpoint=same)
    with pytest.raises(CheckpointError, match="steps: 6 there, 5 here"):
        ParticleFilter().run(Bootstrap(LinearGaussian.example(2, num_steps=5)), **NUMBERS, checkpoint=same)
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(CheckpointError, match=r"torch: .* there, 1.0 here"):
        ParticleFilter().run(MODEL, **NUMBERS, checkpoint=same)


def test_a_checkpoint_of_another_smcdiff_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another version wrote, and one that was written where smcdiff was not installed."""
    path = tmp_path / "a.pt"
    here = versions()["smcdiff"]

    def other(name: str) -> str:
        return "0.0.1" if name == "smcdiff" else "another package"

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for wrote, word in ((other, "0.0.1"), (missing, "not installed")):
        if word == here:
            continue
        path.unlink(missing_ok=True)
        with monkeypatch.context() as there:
            there.setattr(metadata, "version", wrote)
            kept(path)
            kept(path)
        before = path.read_bytes()
        says = rf"is of another run \(smcdiff: {re.escape(word)} there, {re.escape(here)} here\); delete or rename it"
        with pytest.raises(CheckpointError, match=says):
            kept(path)
        assert path.read_bytes() == before


def test_a_broken_file_and_another_format(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    kept(path)
    whole = path.read_bytes()
    for broken in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"could not be read .*; delete or rename it"):
            kept(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="has format 99, not 1; delete"):
        kept(path)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_from_the_start_is_an_error(tmp_path: Path) -> None:
    with files_no_larger_than(100), pytest.raises(CheckpointError, match=r"of 0\.0 MiB could not be written: File too"):
        kept(tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_does_not_cost_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    straight = ParticleFilter().run(MODEL, **NUMBERS)
    sizes = []
    for state in ParticleFilter().iterate(MODEL, **NUMBERS):
        save(tmp_path / "size", state, {})
        sizes.append((tmp_path / "size").stat().st_size)
    (tmp_path / "size").unlink()
    assert sizes[-1] > sizes[0] + 1000
    room = (sizes[0] + sizes[-1]) // 2 + 500
    with files_no_larger_than(room), pytest.warns(CheckpointWarning, match="free some space.*; the run goes on"):
        result = ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path))
    assert torch.equal(result.log_z, straight.log_z)
    last = load(path, read_identity(path), CPU).step
    assert 0 <= last < 6, "the last checkpoint that could be written stays"
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    went_on = ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path))
    assert torch.equal(went_on.log_z, straight.log_z)


def test_a_folder_that_becomes_read_only_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second write on nothing can be renamed or removed: each write warns, and the first checkpoint stays."""
    path = tmp_path / "a.pt"
    straight = ParticleFilter().run(MODEL, **NUMBERS)
    replace_file = os.replace
    asked = 0

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def once(old: Path, new: Path) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            refuse()
        replace_file(old, new)
        folder.setattr(Path, "unlink", refuse)

    with monkeypatch.context() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder.setattr(os, "replace", once)
        result = ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path))
    assert asked == 7
    assert [warning.category for warning in caught] == [CheckpointWarning] * 6
    said = (
        re.escape(f"the checkpoint {path} of ") + ".* could not be written: Read-only file system; .*; the run goes on"
    )
    assert all(re.fullmatch(said, str(warning.message)) for warning in caught)
    assert torch.equal(result.log_z, straight.log_z)
    assert torch.equal(result.particles["x"], straight.particles["x"])
    assert load(path, read_identity(path), CPU).step == 0
    went_on = ParticleFilter().run(MODEL, **NUMBERS, checkpoint=each_step(path))
    assert torch.equal(went_on.log_z, straight.log_z)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"No such file or directory; .*give a path in a folder that exists"):
        kept(tmp_path / "missing" / "a.pt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        kept(tmp_path / "file" / "a.pt")

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        kept(tmp_path / "a.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_fault_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    y = MODEL.model.y.clone()
    y[3] = torch.nan
    broken = Bootstrap(replace(MODEL.model, y=y))
    with pytest.raises(FilterError, match="step 3 of 6"):
        ParticleFilter().run(broken, **NUMBERS, checkpoint=each_step(path))
    assert load(path, read_identity(path), CPU).step == 2


def test_it_is_written_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smcdiff.smc import checkpoint as module

    written: list[int] = []
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(module, "save", lambda path, state, identity: written.append(state.step))
    ParticleFilter().run(MODEL, **NUMBERS, checkpoint=Checkpoint(tmp_path / "a.pt", {}, None, 4))
    assert written == [0, 4, 6]
    written.clear()
    # the clock moves 10 s at each look, and keeping looks once as well: step 3 is the first with 25 s since step 0
    ParticleFilter().run(MODEL, **NUMBERS, checkpoint=Checkpoint(tmp_path / "a.pt", {}, 25.0))
    assert written == [0, 3, 6]


@pytest.mark.parametrize("intervals", [(None, None), (0.0, None), (None, 0), (-1.0, 3)])
def test_intervals_are_checked(intervals: tuple[float | None, int | None]) -> None:
    with pytest.raises(ValueError, match="expected a positive interval"):
        Checkpoint("a.pt", {}, *intervals)


def test_a_start_and_a_checkpoint_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        ParticleFilter().run(MODEL, **NUMBERS, start=states()[0], checkpoint=each_step(tmp_path / "a.pt"))


def test_digests_tell_things_apart() -> None:
    x = torch.arange(6.0)
    same = [digest(x, "a"), digest(x.clone(), "a"), digest(torch.arange(12.0)[:6], "a")]
    assert len(set(same)) == 1
    others = [x.double(), x.reshape(2, 3), x + 1, x.to(torch.bfloat16), torch.tensor(0.0), torch.tensor([]), "x", b"x"]
    digests = {digest(other) for other in others} | {digest("a", x), digest("ax"), digest("a", "x"), same[0]}
    assert len(digests) == len(others) + 4
