"""The MNIST study: its data against files written here, its programs against quadrature, its runs on small networks."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import smcdiff as sd
from examples.mnist import report, study
from examples.mnist.classifiers import Guide, Judge, accuracy, distorted, train_classifier
from examples.mnist.data import Digits, read_digits, read_kernels
from examples.mnist.programs import Classified, Measured, coverage, right, rmse
from tests.guidance.exact import chain_density, chain_law, check_evidence, weighted_moments

F64 = torch.float64


def write_idx(file: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    file.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """20 pictures; number i is i everywhere but for one pixel of 255, and shows the digit i % 7."""
    images = np.tile(np.arange(20)[:, None, None], (1, 28, 28))
    images[:, 3, 5] = 255
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(20) % 7)
    return tmp_path


def test_digits_are_padded_scaled_and_divided_by_the_last_figure_of_their_number(mnist: Path) -> None:
    digits = read_digits(mnist)
    assert digits.images.shape == (20, 1, 32, 32)
    assert torch.equal(digits.images[:, 0, 5, 7], torch.ones(20))
    assert torch.allclose(digits.images[:, 0, 2, 2], torch.arange(20) / 127.5 - 1)
    assert bool((digits.images[:, :, [0, 1, 30, 31]] == -1).all() and (digits.images[..., [0, 1, 30, 31]] == -1).all())
    assert torch.equal(digits.labels, torch.arange(20) % 7)
    numbers = {name: (digits.part(name).images[:, 0, 9, 9] + 1).mul(127.5).round().tolist() for name in PARTS}
    assert numbers == PARTS
    assert digits.part("held out").labels.tolist() == [0, 3]


PARTS = {
    "prior": [i for i in range(20) if i % 10],
    "guide": [i for i in range(20) if i % 2],
    "judge": [2, 4, 6, 8, 12, 14, 16, 18],
    "held out": [0, 10],
}


def test_missing_and_foreign_data_is_said_plainly(mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no MNIST in .*nowhere: t10k-images.* and t10k-labels.* missing. Give the fo"):
        read_digits(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="no blur kernels at .*none.npz. Give the file with --kernels"):
        read_kernels(tmp_path / "none.npz")
    with pytest.raises(SystemExit, match=r"no prior/model_index.json, guide.pt, judge.pt in .*; make them with python"):
        study.load(tmp_path, mnist, tmp_path / "none.npz", 4, 2, 0.1)
    (mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x0d\x01abcd"))
    with pytest.raises(SystemExit, match="is no IDX file of unsigned bytes"):
        read_digits(mnist)
    write_idx(mnist / "t10k-labels-idx1-ubyte.gz", np.arange(3))
    with pytest.raises(SystemExit, match=r"labels of shape \(3,\)"):
        read_digits(mnist)


def test_kernels_sum_to_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "kernels.npz", k0=np.array([[1.0, 3.0]]), k1=np.ones((2, 5)))
    kernels = read_kernels(tmp_path / "kernels.npz")
    assert torch.allclose(kernels["k0"], torch.tensor([[0.25, 0.75]])) and torch.allclose(
        kernels["k1"], torch.full((2, 5), 0.1)
    )


def toy_prior() -> sd.DiffusionPrior:
    means = torch.tensor([[-1.5], [1.0]], dtype=F64)
    weights = torch.tensor([0.7, 0.3], dtype=F64)
    denoiser = sd.GaussianMixtureDenoiser(means, torch.full((2, 1, 1), 0.2, dtype=F64), weights)
    return sd.DiffusionPrior(denoiser, sd.VPSchedule(), 12, variance="optimal", grid=sd.KarrasGrid())


def toy_guide(x: Tensor) -> Tensor:
    """Three classes: low, high and around 0.3; (m, 1) -> (m, 3)."""
    return torch.cat((-0.6 * x, 0.8 * x, 0.5 - 0.2 * x.sub(0.3).square()), 1)


GRID = torch.linspace(-8, 8, 1601, dtype=F64)
KERNELS = {"TDS": (sd.TDS, 300), "steering": (sd.FeynmanKacSteering, 600), "bootstrap": (sd.Bootstrap, 600)}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("label", range(3))
def test_the_posterior_of_a_class_is_that_of_the_known_classifier(name: str, label: int) -> None:
    """p(label) and E[x given label] by quadrature over the chain's own law."""
    density = chain_density(toy_prior(), GRID)
    joint = density * toy_guide(GRID[:, None]).softmax(1)[:, label]
    kernel, n = KERNELS[name]
    smc = sd.SMC(kernel(Classified(toy_prior(), toy_guide)), n, num_chains=24, seed=3, progress=False)
    smc.run(torch.tensor(label))
    check_evidence(smc, float((joint.sum() * (GRID[1] - GRID[0])).log()))
    mean, error, _ = weighted_moments(smc, "x")
    # As in check_evidence: 5 standard errors from 24 chains, below 1e-4 by chance; the seed is fixed.
    assert abs(float(mean) - float((joint * GRID).sum() / joint.sum())) < 5 * float(error) and float(error) < 0.05


def test_a_picture_has_the_evidence_of_its_gaussian_law() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=generator, dtype=F64)
    mean, covariance = torch.tensor([0.3, -0.2, 0.5], dtype=F64), 0.3 * root @ root.mT + 0.2 * torch.eye(3, dtype=F64)
    prior = sd.DiffusionPrior(sd.GaussianDenoiser(mean, covariance), sd.VPSchedule(), 10, variance="optimal")
    A = torch.randn(2, 3, generator=generator, dtype=F64)
    y = torch.tensor([0.4, -0.1], dtype=F64)
    _, log_z = chain_law(prior, mean, covariance).given(A, y, 0.5)
    model = Measured(prior, sd.Matrix(A), 0.5)
    smc = sd.SMC(sd.TDS(model, sd.TweedieTwist()), 200, num_chains=24, seed=1, progress=False).run(y)
    check_evidence(smc, log_z)


def test_judgements_by_hand() -> None:
    log_w = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]]).log() + 4
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 0, 2], [1, 2, 2]]), 4).float()
    assert torch.allclose(right(log_w, logits, 2), torch.tensor([0.8, 0.5]))
    truth, where = torch.zeros(1, 2, 2), torch.tensor([[True, False], [True, False]])
    estimate = torch.tensor([[[3.0, 100.0], [-4.0, 100.0]]])
    assert rmse(truth, estimate, where) == pytest.approx(12.5**0.5)


def test_coverage_is_the_level_for_exchangeable_draws_whatever_the_ties() -> None:
    generator = torch.Generator().manual_seed(5)
    everywhere = torch.ones(1, 200, 200, dtype=torch.bool)
    values = (0.5 * torch.randn(12, 1, 200, 200, generator=generator) - 0.9).clamp(min=-1)  # half of them black
    share = coverage(values[0], values[1:], everywhere, 0.8, seed=0)
    assert abs(share - 0.8) < 4.5 * (0.16 / 40_000) ** 0.5  # by chance below 1e-5
    narrow = values[1:].mean(0) + 0.2 * (values[1:] - values[1:].mean(0))
    assert coverage(values[0], narrow, everywhere, 0.8, seed=0) < 0.6


def test_coverage_takes_near_black_for_black_and_looks_only_where_asked() -> None:
    truth, where = torch.full((1, 100, 100), -1.0), torch.zeros(1, 100, 100, dtype=torch.bool)
    where[:, :50] = True
    draws = truth + 0.04 * torch.rand(9, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    draws[:, :, 50:] = 1.0
    assert abs(coverage(truth, draws, where, 0.9, seed=1) - 0.9) < 4.5 * (0.09 / 5000) ** 0.5  # below 1e-5


class Brightness(nn.Module):
    """Ten classes by the mean of a picture; with ``slope`` 0 all alike."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        centres = torch.linspace(-1, 1, 10)
        return -self.slope * (x.flatten(1).mean(1, keepdim=True) - centres).square()


def small_setting(slope: float) -> study.Setting:
    """Pictures of 8 x 8 under a Gaussian prior with the covariance that its denoiser knows."""
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 3, padding=1)
    network.requires_grad_(False)
    denoiser = sd.NetworkDenoiser(lambda x, t: network(x), (1, 8, 8), dtype=torch.float32, device=torch.device("cpu"))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), 6)
    images = torch.rand(12, 1, 8, 8) * 2 - 1
    return study.Setting(
        prior=prior,
        spectral={basis: prior.calibrate(images, basis=basis, progress=False) for basis in ("dct", "fft")},
        guide=Brightness(slope),
        judge=Brightness(1.0),
        digits=Digits(images, torch.arange(12) % 10),
        varied=torch.ones(8, 8, dtype=torch.bool),
        kernels={"k0": torch.full((3, 3), 1 / 9), "k1": torch.full((1, 4), 0.25)},
        draws=3,
        sigma=0.3,
    )


@pytest.mark.parametrize("method", study.METHODS)
def test_a_classifier_that_knows_nothing_gives_each_class_a_tenth_and_even_weights(method: str) -> None:
    row, pictures = study.classes(small_setting(0.0), method, 4, 3, 0)
    assert row["evidence"] == pytest.approx(0.1, rel=1e-5)
    assert row["ess"] == pytest.approx(1.0, rel=1e-5) and row["least ess"] == pytest.approx(1.0, rel=1e-5)
    assert row["roots"] == 4
    assert pictures["draw"].shape == (1, 8, 8)


def test_the_reference_weighs_draws_of_the_prior_by_the_guide() -> None:
    """A guide that knows nothing: each label has the share that the judge gives it, a tenth on average."""
    row, _ = study.reference(small_setting(0.0), 0, draws=70)
    assert row["right"] == pytest.approx(0.1, rel=1e-5)
    setting = dataclasses.replace(small_setting(30.0), judge=Brightness(200.0))
    row, _ = study.reference(setting, 3, draws=70)
    generator = torch.Generator().manual_seed(503)
    x = torch.cat([setting.prior.chain.sample(count, generator) for count in (64, 6)])
    p, judged = setting.guide(x).softmax(1), setting.judge(x).softmax(1)
    shares = [sum(p[i, c] for i in range(70) if judged[i].argmax() == c) / p[:, c].sum() for c in range(10)]
    assert row["right"] == pytest.approx(float(sum(shares)) / 10, rel=1e-5)
    assert row["sure"] == sum(bool(one.max() > 0.9) for one in judged) / 70
    assert 0 < row["sure"] < 1 and len({int(one.argmax()) for one in judged}) > 1


@pytest.mark.filterwarnings("ignore:the method's last step is a point mass")
@pytest.mark.parametrize("task", ["inpainting", "deblurring"])
@pytest.mark.parametrize("method", study.RESTORERS)
def test_restorations_run_and_count(task: str, method: str) -> None:
    setting = small_setting(1.0)
    row, pictures = study.restoration(setting, task, method, 1, 0)
    forward_only = method.startswith("Adapted")
    n = study.RESTORERS[method][1]
    assert row["evaluations"] == 6 * n * (1 if forward_only else 2)
    assert 0 <= row["coverage"] <= 1 and row["error of the mean"] <= row["error of a draw"] + 1e-6
    truth = pictures["truth"]
    assert any(torch.equal(truth, image) for image in setting.digits.images)
    if task == "inpainting":
        assert bool((pictures["measured"][:, 4:] == -1).all())
        assert float((pictures["measured"] - truth)[:, :4].std()) == pytest.approx(0.3, rel=0.6)  # 4.8 s.e.


@pytest.fixture
def small_plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The study on small networks with few runs; every run it does is put down in the list."""
    done: list[str] = []
    setting = small_setting(1.0)
    monkeypatch.setattr(study, "load", lambda *_: setting)
    monkeypatch.setattr(study, "PARTICLES", {1: 2, 2: 1})
    monkeypatch.setattr(study, "METHODS", {"TDS": sd.TDS})
    kept = dict(list(study.RESTORERS.items())[-2:])
    monkeypatch.setattr(study, "RESTORERS", kept)
    for name in ("classes", "restoration", "reference"):
        work = getattr(study, name)

        def watched(*args: object, work: object = work, **kwargs: object) -> object:
            done.append(f"{args[1:]} {kwargs}")
            return work(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(study, name, watched)
    yield done


def test_a_stopped_study_goes_on_where_it_stood(
    small_plan: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--mnist", "m", "--kernels", "k", "--weights", "w", "--seeds", "2", "--digits", "1", "--out"]
    monkeypatch.setattr("sys.argv", ["study", *arguments, str(tmp_path)])
    study.main()
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(rows) == len(small_plan) == len(set(small_plan)) == 2 * (1 + 2 * 1 * 2 + 2 * 10 * 1)
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:20]) + "\n")
    study.main()
    assert len(small_plan) == 2 * len(rows) - 20
    again = (tmp_path / "rows.jsonl").read_text().splitlines()
    strip = [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in (*rows, *again)]
    assert strip[: len(rows)] == strip[len(rows) :]
    monkeypatch.setattr("sys.argv", ["study", *arguments, str(tmp_path), "--steps", "7"])
    with pytest.raises(SystemExit, match="is of a study with other settings"):
        study.main()


def test_tables_are_means_over_seeds_with_their_standard_errors() -> None:
    """Per seed the mean over its runs first: seeds are what is independent."""
    rows = [
        {"key": {"task": "class", "method": "TDS", "n": 4, "label": label, "seed": seed}, "right": value}
        for seed, values in enumerate([(0.0, 1.0), (1.0, 1.0), (0.5, 0.1)])
        for label, value in enumerate(values)
    ]
    mean, error = report.over_seeds(rows, "right")
    per_seed = np.array([0.5, 1.0, 0.3])
    assert mean == pytest.approx(per_seed.mean()) and error == pytest.approx(per_seed.std(ddof=1) / 3**0.5)
    sums, _ = report.over_seeds(rows, "right", total=True)
    assert sums == pytest.approx(2 * per_seed.mean())


def test_classifiers_learn_what_can_be_told_apart() -> None:
    """Bright squares in one of two places, too far apart for the distortions to confuse them."""
    images = torch.full((40, 1, 32, 32), -1.0)
    labels = torch.arange(40) % 2
    images[labels == 0, :, 4:12, 12:20] = 1
    images[labels == 1, :, 20:28, 12:20] = 1
    for make in (Guide, Judge):
        network = train_classifier(make, images, labels, steps=25, seed=1, batch=16)
        assert accuracy(network, images, labels) == 1
        assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training


def test_distortions_move_a_picture_and_leave_black_black() -> None:
    black = torch.full((3, 1, 32, 32), -1.0)
    assert torch.equal(distorted(black, torch.Generator().manual_seed(0)), black)
    spot = black.clone()
    spot[:, :, 14:18, 14:18] = 1
    moved = distorted(spot, torch.Generator().manual_seed(0))
    along = torch.arange(32.0) - 15.5
    light = moved + 1
    mass = light.sum((1, 2, 3))
    centre = torch.stack(((light * along).sum((1, 2, 3)), (light * along[:, None]).sum((1, 2, 3))), 1) / mass[:, None]
    assert bool((centre.abs() < 2 / (1 - 0.12) + 0.5).all()) and bool((centre.abs().amax(1) > 0.05).all())
    assert bool(((mass / 32 - 1).abs() < 0.35).all())  # 16 pixels of light 2, scaled by at most 1.12 on each side
