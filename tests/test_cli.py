"""The command line from argument to file: what it writes is the posterior, and what it refuses it names."""

import json
import re

import arviz
import numpy as np
import pytest
import torch
from PIL import Image

import smcdiff as sd
import smcdiff.cli
from smcdiff.cli import main
from smcdiff.diffusion.analytic import StandardNormalDenoiser
from smcdiff.restoration.acquisition import sharp
from smcdiff.restoration.demo import make_demo
from smcdiff.restoration.images import read_image
from smcdiff.restoration.noise_level import Noise
from smcdiff.restoration.report import Truth, psnr, retention
from smcdiff.restoration.restore import Effort, prepare
from tests.guidance.exact import chain_law

FILES = {
    "report.html",
    "observation.png",
    "mean.png",
    "sd.png",
    "draws.png",
    "panel.png",
    "evidence.png",
    "posterior.nc",
    "summary.txt",
}


@pytest.fixture
def white_noise_prior(monkeypatch):
    """Scenes of independent standard normal pixels, in the place of a trained prior."""

    def load(name, *, event_shape=None):
        denoiser = StandardNormalDenoiser(torch.Size(event_shape or (1, 2, 2)), torch.float32, torch.device("cpu"))
        return sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=5)

    monkeypatch.setattr(smcdiff.cli, "load_prior", load)


@pytest.fixture
def picture(tmp_path):
    """A 20 x 24 picture of 8 bits."""
    values = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_restore_writes_the_exact_posterior(white_noise_prior, tmp_path, capsys):
    values = np.array([[10, 120, 250], [200, 90, 30]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    effort = ["--particles", "400", "--chains", "16", "--steps", "40", "--quiet"]
    assert main(["restore", str(tmp_path / "a.png"), "--sigma", "0.5", "--out", str(tmp_path / "out"), *effort]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    # one pixel: x ~ N(0, v), y = x + 0.5 eps; v is the variance of the discretised chain, near 1, by its recursion
    picture, effort = read_image(tmp_path / "a.png"), Effort(steps=40)
    job = prepare(picture, sharp(Noise(0.5)), lambda shape: smcdiff.cli.load_prior("any", event_shape=shape), effort)
    v = float(chain_law(job.prior, torch.zeros(1).double(), torch.eye(1).double()).covariance)
    y = 2 * values.astype(float) / 255 - 1
    expected, spread = v / (v + 0.25) * y, np.sqrt(v * 0.25 / (v + 0.25))
    idata = arviz.from_netcdf(str(tmp_path / "out" / "posterior.nc"))
    particles = idata["weighted_particles"]
    w = np.exp(particles["log_weight"].values)
    mean = (w[..., None, None, None] * particles["x"].values).sum((0, 1))[0]
    # 6400 particles that count for over 1500 (asserted): 0.08 deviations of 0.45 are over 6 standard errors of 0.0115
    ess = 1 / (w**2).sum()
    assert ess > 1500 and np.abs(mean - expected).max() < 0.08
    assert idata["posterior"].attrs["tempering_exponent"] == 1.0
    written = read_image(tmp_path / "out" / "mean.png")[0].numpy()
    np.testing.assert_allclose(written, mean.clip(-1, 1), atol=1.01 / 255)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "observation.png")), values)
    text = (tmp_path / "out" / "summary.txt").read_text()
    white = float(re.search(r"black 0, white ([\d.]+)", text)[1])
    deviation = np.asarray(Image.open(tmp_path / "out" / "sd.png")) / 255 * white
    np.testing.assert_allclose(deviation, spread, rtol=0.15)  # over 6 of its standard errors, 1 / sqrt(2 * 1500) each
    assert np.asarray(Image.open(tmp_path / "out" / "draws.png")).shape == (2, 12)
    output = capsys.readouterr().out
    assert text in output and "on this machine" in output


def test_demo_compares_with_the_truth(white_noise_prior, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seed", "3", "--particles", "2", "--chains", "3", "--steps", "6"]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    demo, text = make_demo(3), (out / "summary.txt").read_text()
    particles = arviz.from_netcdf(str(out / "posterior.nc"))["weighted_particles"]
    x, w = torch.from_numpy(particles["x"].values).flatten(0, 1), np.exp(particles["log_weight"].values).ravel()
    mean = (torch.from_numpy(w)[:, None, None, None] * x).sum(0)
    assert f"PSNR of the posterior mean  {psnr(mean, demo.truth.image):.2f} dB" in text
    assert f"PSNR of the picture         {psnr(demo.y, demo.truth.image):.2f} dB" in text
    order = x.argsort(0).numpy()
    cumulative = w[order].cumsum(0)
    ends = [
        np.take_along_axis(np.take_along_axis(x.numpy(), order, 0), (cumulative < level).sum(0)[None], 0)[0]
        for level in (0.05, 0.95)
    ]
    truth = demo.truth.image.numpy()
    inside = (ends[0] <= truth) & (truth <= ends[1])
    assert f"inside the 90 % interval    {100 * inside.mean():.1f} % of all pixels" in text
    kept = float(retention(mean, demo.truth))
    assert f" pixels): {100 * kept:.0f} % +- " in text
    assert "verdict" in text and "tempering exponent" in text


def test_retention_by_hand():
    normal, clean = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    clean[0, 1] = torch.tensor([1.0, -2.0, 0.0])
    truth = Truth(clean, clean, normal, clean != 0, "bridge")
    assert float(retention(normal, truth)) == 0
    assert float(retention(clean, truth)) == pytest.approx(1)
    half = clean.clone()
    half[0, 1, 1] = 0.0  # <(1, 0), (1, -2)> / <(1, -2), (1, -2)>
    assert retention(torch.stack([half, 2 * clean]), truth).tolist() == pytest.approx([0.2, 2.0])


def test_psnr_by_hand():
    assert psnr(torch.tensor([0.1, -0.3]), torch.tensor([0.0, 0.0])) == pytest.approx(10 * np.log10(4 / 0.05))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers pipeline of a small network that was never trained, with sides in multiples of 4."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = 2
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=False,
    )
    path = tmp_path_factory.mktemp("prior")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 2e-2, "linear", prediction_type="v_prediction", clip_sample=False)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(path)
    (path / "smcdiff.json").write_text(json.dumps({"event_shape": [1, 16, 16], "space_to_depth": 2}))
    return path


SMALL = ["--particles", "2", "--chains", "2", "--steps", "3", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "canvas", "restored"),
    [
        (["--sigma", "0.2"], "20 x 24", (20, 24)),
        (["--sigma", "estimate", "--noise", "shot"], "20 x 24", (20, 24)),
        (["--sigma", "0.2", "--crop", "1,2,9,13"], "12 x 16", (9, 13)),
        (["--sigma", "0.2", "--operator", "blur", "--psf-sigma", "0.9"], "28 x 32", (20, 24)),
        (["--sigma", "0.2", "--operator", "downsample", "--factor", "3"], "60 x 72", (60, 72)),
        (["--sigma", "estimate", "--operator", "mask", "--mask", "MASK"], "20 x 24", (20, 24)),
        (["--sigma", "0.2", "--row-correlation", "0.5"], "20 x 24", (20, 24)),
    ],
)
def test_restore_with_a_network_of_ones_own(folder, picture, tmp_path, capsys, arguments, canvas, restored):
    mask = np.where(np.random.default_rng(1).random((20, 24)) < 0.8, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = [str(tmp_path / "mask.png") if a == "MASK" else a for a in arguments]
    out = tmp_path / "out"
    code = main(["restore", str(picture), "--prior", str(folder), "--out", str(out), *arguments, *SMALL])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert f"on a scene of {canvas} pixels" in captured.out
    assert np.asarray(Image.open(out / "mean.png")).shape == restored
    posterior = arviz.from_netcdf(str(out / "posterior.nc"))["posterior"]
    assert posterior["x"].shape == (2, 2, 1, *restored)
    assert ("sigma" in posterior) == ("estimate" in arguments)
    assert posterior.attrs["seed"] == 0 and posterior.attrs["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.png"], "there is no file"),
        (["PICTURE", "--operator", "blur"], "--operator blur and --psf-sigma go together"),
        (["PICTURE", "--factor", "2"], "--operator downsample and --factor go together"),
        (["PICTURE", "--sigma", "0"], "got sigma 0.0"),
        (["PICTURE", "--sigma", "-1"], "got sigma -1.0"),
        (["PICTURE", "--crop", "0,0,64,64"], "of a picture of 20 rows and 24 columns"),
        (["PICTURE", "--prior", "nowhere"], "nowhere"),
        (["PICTURE", "--chains", "0", "--sigma", "1"], "got chains 0"),
        (["PICTURE", "--white", "100"], "expected 0 to 100"),
        (["PICTURE", "--operator", "mask", "--mask", "SMALLER"], "mask of 8 x 8 pixels for a picture of 20 x 24"),
    ],
)
def test_errors_name_the_cause_and_leave_no_traceback(folder, picture, tmp_path, capsys, arguments, words):
    checker = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "smaller.png")
    names = {"PICTURE": str(picture), "SMALLER": str(tmp_path / "smaller.png")}
    arguments = [names.get(argument, argument) for argument in arguments]
    prior = [] if "--prior" in arguments else ["--prior", str(folder)]
    assert main(["restore", *arguments, *prior, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("smcdiff: error: ") and words in error


@pytest.mark.parametrize(
    "arguments", [["--sigma", "loud"], ["--crop", "1,2,3"], ["--crop", "0,0,0,5"], ["--row-correlation", "x"]]
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["restore", "a.png", "--out", "b", *arguments])
    assert stopped.value.code == 2 and "expected" in capsys.readouterr().err


def test_demo_pictures_follow_their_own_law():
    demo = make_demo(0)
    assert demo.y.shape == demo.truth.image.shape == (1, 64, 64)
    assert int(demo.truth.defect.sum()) >= 20
    assert torch.equal(make_demo(0).y, demo.y) and not torch.equal(make_demo(1).y, demo.y)
    assert {make_demo(seed).truth.name for seed in range(8)} == {"bridge", "missing"}
    # inside, where the border's surroundings do not matter, y - k * truth is noise of deviation 0.1
    residual = (demo.y - demo.acquisition.operator(demo.truth.image))[0, 5:-5, 5:-5]
    assert float(residual.std()) == pytest.approx(0.1, rel=0.08)  # 2916 pixels: 6 standard errors of 1.3 %
    assert abs(float(residual.mean())) < 6 * 0.1 / 54
