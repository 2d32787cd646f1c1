"""The front door: checkpoints of a program's run."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import smcdiff as sd
from smcdiff.smc import FilterState
from smcdiff.smc.checkpoint import CheckpointError

F64 = torch.float64
Y = torch.tensor([0.5, -0.2], dtype=F64)


class Interrupted(Exception):
    """In place of a power cut."""


class Network(torch.nn.Module):
    """A denoiser's network that fails at its ``last`` call."""

    def __init__(self, last: int | None = None, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=F64))
        self.calls, self.last = 0, last

    def forward(self, x: torch.Tensor, index: float) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise Interrupted
        return self.gain * x


def smc(path: Path, network: Network, sigma: float = 0.5, seed: int = 3, **options) -> sd.SMC:
    prior = sd.DiffusionPrior(sd.NetworkDenoiser(network, (2,), sd.from_clean), sd.VPSchedule(), 30)

    def model(y=None):
        x = pyro.sample("x", prior)
        return pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

    return sd.SMC(sd.TDS(model, **options), 8, 2, seed=seed, progress=False, checkpoint=path, checkpoint_steps=1)


def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = smc(tmp_path / "whole.pt", Network()).run(Y)
    path = tmp_path / "cut.pt"
    with pytest.raises(Interrupted):
        smc(path, Network(last=20)).run(Y)
    network = Network()
    resumed = smc(path, network).run(Y)
    assert network.calls < 30  # it did go on, and did not start anew
    assert torch.equal(resumed.weighted_samples().values["x"], whole.weighted_samples().values["x"])
    assert torch.equal(resumed.log_evidence_per_chain, whole.log_evidence_per_chain)


def test_a_point_mass_is_remembered(tmp_path: Path) -> None:
    """DPS as published has no evidence, and still has none when a finished run is read from its checkpoint."""
    for steps in (30, 0):
        network = Network()
        prior = sd.DiffusionPrior(sd.NetworkDenoiser(network, (2,), sd.from_clean), sd.VPSchedule(), 30)

        def model(y=None, prior=prior):
            return pyro.sample("y", dist.Normal(pyro.sample("x", prior), 0.5).to_event(1), obs=y)

        smc = sd.SMC(sd.DPS(model, 0.1), 1, 2, seed=1, progress=False, checkpoint=tmp_path / "run.pt", max_batch=2)
        with pytest.warns(UserWarning, match="point mass"):
            smc.run(Y)
        assert network.calls <= steps + 5  # the second time only what looks at the program
        assert bool(smc.log_evidence.isnan())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sigma": 0.6}, "likelihood"),
        ({"seed": 4}, "seed"),
        ({"network": Network(gain=0.4)}, "latents"),
        ({"max_shift": 1.0}, "method"),
    ],
)
def test_another_run_is_refused_with_the_reason(tmp_path: Path, change: dict, word: str) -> None:
    path = tmp_path / "run.pt"
    smc(path, Network()).run(Y)
    with pytest.raises(CheckpointError, match=f"another run.*{word}"):
        smc(path, **{"network": Network(), **change}).run(Y)


def test_another_measurement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    smc(path, Network()).run(Y)
    with pytest.raises(CheckpointError, match="another run.*measurement"):
        smc(path, Network()).run(Y + 0.1)


@pytest.mark.parametrize(
    ("steps", "seconds", "step"), [(7, None, 14), (None, 1e-9, 19), (None, 3600.0, 0), (7, 3600.0, 14)]
)
def test_checkpoints_come_as_often_as_asked(
    tmp_path: Path, steps: int | None, seconds: float | None, step: int
) -> None:
    """The step that a run of 30 steps has kept when it is cut at its step 20."""
    path = tmp_path / "run.pt"
    prior = sd.DiffusionPrior(sd.NetworkDenoiser(Network(), (2,), sd.from_clean), sd.VPSchedule(), 30)

    def model(y=None):
        return pyro.sample("y", dist.Normal(pyro.sample("x", prior), 0.5).to_event(1), obs=y)

    def cut(state: FilterState) -> torch.Tensor:
        if state.step == 20:
            raise Interrupted
        return state.ess

    options = {"progress": False, "checkpoint_seconds": seconds, "checkpoint_steps": steps}
    with pytest.raises(Interrupted):
        sd.SMC(sd.TDS(model), 8, 2, seed=3, checkpoint=path, records=sd.Records(summaries={"cut": cut}), **options).run(
            Y
        )
    assert torch.load(path, weights_only=True)["state"]["step"] == step


def test_intervals_of_checkpoints_are_checked_at_once(tmp_path: Path) -> None:
    for interval in ({"checkpoint_seconds": 0.0}, {"checkpoint_seconds": None}, {"checkpoint_steps": -1}):
        with pytest.raises(ValueError, match="expected a positive interval"):
            sd.SMC(sd.TDS(lambda: None), 2, seed=0, checkpoint=tmp_path / "run.pt", **interval)


def test_a_checkpoint_needs_a_seed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a seed"):
        sd.SMC(sd.TDS(lambda: None), 2, checkpoint=tmp_path / "run.pt")
