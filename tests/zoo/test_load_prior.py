"""Loading priors by name and from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smcdiff.diffusion.schedule import KarrasGrid
from smcdiff.zoo import load_prior, shipped_priors
from tests.diffusion.adapters.pipelines import save_pipeline


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    """All settings reach the chain, and the network is the one in the folder."""
    unet = save_pipeline(tmp_path, factor=2, prediction_type="sample", clip_sample=False)
    for name in (tmp_path, str(tmp_path)):
        prior = load_prior(
            name,
            event_shape=(1, 12, 8),
            num_steps=6,
            dtype=torch.float64,
            eta=0.4,
            variance="fixed_large",
            grid=KarrasGrid(),
            clip=(-3.0, 2.0),
        )
        chain = prior.chain
        assert (chain.num_steps, chain.eta, chain.variance) == (6, 0.4, "fixed_large")
        assert (chain.grid, chain.clip, prior.event_shape) == (KarrasGrid(), (-3.0, 2.0), (1, 12, 8))
        x_t = torch.randn(2, 1, 12, 8, dtype=torch.float64)
        with torch.no_grad():
            output = unet(torch.nn.functional.pixel_unshuffle(x_t, 2), 10).sample
        expected = torch.nn.functional.pixel_shuffle(output, 2)
        got = chain.denoiser(x_t, chain.schedule.level(11)).mean
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_an_unknown_name_lists_those_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pipeline(tmp_path / "grains")
    save_pipeline(tmp_path / "wires")
    monkeypatch.setattr("smcdiff.zoo.FOLDER", tmp_path)
    assert shipped_priors() == ("grains", "wires")
    with pytest.raises(
        FileNotFoundError, match=r"'grain', which neither ships nor is a folder; expected one of grains, "
    ):
        load_prior("grain")


def test_a_string_is_a_name_first_and_a_path_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pipeline(tmp_path / "zoo/grains")
    save_pipeline(tmp_path / "here/grains", channels=3)
    monkeypatch.setattr("smcdiff.zoo.FOLDER", tmp_path / "zoo")
    monkeypatch.chdir(tmp_path / "here")
    assert load_prior("grains").event_shape == (1, 8, 8)
    assert load_prior(Path("grains")).event_shape == (3, 8, 8)
    assert load_prior("./grains").event_shape == (3, 8, 8)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a diffusers pipeline folder: it lacks model_index.json"):
        load_prior(tmp_path)
