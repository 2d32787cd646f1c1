"""The ArviZ object holds the run's numbers, in and out of a file, and ArviZ works on it, in both its generations."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import arviz
import matplotlib
import numpy as np
import pytest
import torch

import smcdiff as sd
from smcdiff.diagnostics import Run
from smcdiff.diagnostics.arviz import read, to_arviz, write
from smcdiff.diagnostics.export import chain_groups, from_groups, run_groups
from tests.diagnostics.models import GAIN, SHAPE, Y, model, random_run, real_run

matplotlib.use("agg")

ROOT = Path(__file__).parents[2]
FIELDS = ("log_w", "log_z", "ess", "log_z_path", "roots", "entropy", "resampled", "ancestors", "log_z_variance")


@pytest.fixture
def run():
    return random_run()


def values(group):
    return {name: array for name, (_, array) in group.variables.items()}


def test_groups_hold_what_was_measured(run):
    groups = run_groups(run)
    for name in ("ess", "roots", "entropy", "resampled", "ancestors"):
        np.testing.assert_array_equal(values(groups["smc_stats"])[name], getattr(run, name).transpose(0, 1))
    np.testing.assert_array_equal(values(groups["smc_stats"])["log_z"], run.log_z_path.T)
    np.testing.assert_array_equal(values(groups["weighted_particles"])["x"], run.values["x"])
    np.testing.assert_array_equal(values(groups["weighted_particles"])["log_weight"], run.log_w)
    np.testing.assert_array_equal(values(groups["observed_data"])["y"], run.observed["y"])
    np.testing.assert_array_equal(values(groups["constant_data"])["exposure"], run.constants["exposure"])
    assert values(groups["posterior"])["half"].dtype == np.float32
    assert groups["posterior"].variables["kernel"][0] == (
        "chain",
        "draw",
        "kernel_channel",
        "kernel_row",
        "kernel_col",
    )
    attributes = groups["posterior"].attributes
    log_z = run.log_z.double()
    np.testing.assert_allclose(attributes["log_evidence_per_chain"], log_z.numpy())
    assert attributes["log_evidence"] == pytest.approx(float(log_z.logsumexp(0)) - np.log(3))
    assert attributes["num_chains"] == 3 and attributes["num_particles"] == 8 and attributes["seed"] == 7


def test_draws_are_equally_weighted_particles_in_ancestor_order(run):
    groups = run_groups(run)
    posterior, w = values(groups["posterior"]), run.within_chain_log_w.exp()
    for c in range(3):
        picked = []
        for d in range(8):
            same = [i for i in range(8) if np.array_equal(posterior["x"][c, d], run.values["x"][c, i])]
            assert len(same) == 1
            picked += same
            i = same[0]
            assert posterior["scope.sigma"][c, d] == float(run.values["scope/sigma"][c, i])
            total = values(groups["log_likelihood"])["total"]
            assert total[c, d] == float(run.log_likelihood["total"][c, i])
        assert picked == sorted(picked)
        counts = np.bincount(picked, minlength=8)
        assert (np.abs(counts - 8 * w[c].numpy()) < 1).all()  # systematic: rounded up or down
    log_weight = values(groups["sample_stats"])["log_weight"]
    np.testing.assert_allclose(np.exp(log_weight).sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(log_weight, np.broadcast_to(run.chain_log_w.numpy()[:, None] - np.log(8), (3, 8)))


def test_a_tempered_run_keeps_its_exact_weights(run, tmp_path):
    tempered, exponent = run.tempered(12.0)
    assert 0 < exponent < 1
    write(run_groups(tempered), tmp_path / "run.nc")
    back = from_groups(read(tmp_path / "run.nc"))
    torch.testing.assert_close(back.log_w, tempered.log_w)
    torch.testing.assert_close(back.exact.log_w, run.log_w)
    assert back.exponent == exponent and back.exact.exponent == 1 and back.exact.exact_log_w is None


def test_a_file_gives_back_the_run(run, tmp_path):
    write(run_groups(run), tmp_path / "run.nc")
    back = from_groups(read(tmp_path / "run.nc"))
    for name in FIELDS:
        torch.testing.assert_close(getattr(back, name), getattr(run, name), check_dtype=False)
    assert set(back.values) == {"x", "kernel", "scope.sigma", "flag", "half"}
    torch.testing.assert_close(back.values["scope.sigma"], run.values["scope/sigma"])
    assert torch.equal(back.values["flag"].bool(), run.values["flag"])
    for name in ("y", "total"):
        torch.testing.assert_close(back.observed[name], run.observed[name])
    torch.testing.assert_close(back.constants["x.truth"], run.constants["x.truth"])
    assert {name: back.about[name] for name in run.about} == run.about
    write(run_groups(back), tmp_path / "again.nc")  # what was read can be written


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("not a netCDF file")
    with pytest.raises(ValueError, match="not a netCDF file"):
        read(tmp_path / "text.nc")
    with pytest.raises(ValueError, match="expected those of a run of sd.SMC"):
        from_groups(chain_groups({"posterior": {"x": torch.zeros(2, 3)}}))


def check_file(idata, groups, path):
    """Every group, name, axis, number format and number survives ``to_netcdf`` and back."""
    idata.to_netcdf(str(path))
    back = arviz.from_netcdf(str(path))
    for name, expected in groups.items():
        assert set(back[name].data_vars) == set(expected.variables)
        for variable, (axes, array) in expected.variables.items():
            actual = back[name][variable]
            assert actual.dims == axes and actual.dtype == array.dtype
            np.testing.assert_array_equal(actual, array)
            for axis in axes:
                np.testing.assert_array_equal(actual.coords[axis], expected.coords[axis])
        for attribute, value in expected.attributes.items():
            np.testing.assert_array_equal(back[name].attrs[attribute], value)


def test_a_file_of_arviz_gives_back_every_group(run, tmp_path):
    groups = run_groups(run)
    check_file(to_arviz(groups), groups, tmp_path / "a.nc")
    write(groups, tmp_path / "b.nc")
    check_file(arviz.from_netcdf(str(tmp_path / "b.nc")), groups, tmp_path / "c.nc")


#: So few draws tell little of a tail, and ArviZ says so.
FEW_DRAWS = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
#: ArviZ 0.23 against a Matplotlib that came after it.
OLD_PLOTS = pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")

ALL = {
    "posterior", "sample_stats", "posterior_predictive", "log_likelihood", "prior", "prior_predictive",
    "observed_data", "constant_data", "smc_stats", "weighted_particles",
}  # fmt: skip


@FEW_DRAWS
@OLD_PLOTS
def test_arviz_works_on_a_run(tmp_path):
    smc = real_run()
    idata = smc.to_arviz(posterior_predictive=True, prior=30)
    assert set(idata.groups()) == ALL
    assert idata["posterior"]["x"].dims == ("chain", "draw", "channel", "row", "col")
    assert idata["posterior_predictive"]["y"].shape == (4, 16, *SHAPE)
    assert idata["prior"]["x"].shape == idata["prior_predictive"]["y"].shape == (1, 30, *SHAPE)
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)
    assert float(idata["constant_data"]["gain"]) == 1.5
    np.testing.assert_allclose(idata["posterior"].attrs["log_evidence_per_chain"], smc.log_evidence_per_chain)
    summary = arviz.summary(idata, var_names=["sigma", "brightness"])
    draws = idata["posterior"]["sigma"].values
    assert summary.loc["sigma", "mean"] == pytest.approx(draws.mean(), abs=1e-3)
    assert summary.loc["sigma", "r_hat"] > 0.9
    loo = arviz.loo(idata, pointwise=True)
    assert loo.loo_i.shape == SHAPE and np.isfinite(loo.elpd_loo)
    for plot in (
        lambda: arviz.plot_trace(idata, var_names=["sigma", "brightness"]),
        lambda: arviz.plot_posterior(idata, var_names=["sigma"]),
        lambda: arviz.plot_forest(idata, var_names=["x"]),
        lambda: arviz.plot_dist_comparison(idata, var_names=["sigma"]),
        lambda: arviz.plot_khat(loo),
        lambda: arviz.plot_ppc(idata, num_pp_samples=8, random_seed=1),
        lambda: arviz.plot_loo_pit(idata, y="y"),
        lambda: arviz.plot_rank(idata, var_names=["sigma"]),
    ):
        plot()
        matplotlib.pyplot.close("all")
    check_file(idata, {n: g for n, g in smc._groups(True, 30).items()}, tmp_path / "run.nc")


def test_draws_from_prior_and_predictive_have_their_laws():
    number = 400
    idata = real_run().to_arviz(posterior_predictive=True, prior=number)
    x, sigma = idata["prior"]["x"].values[0], idata["prior"]["sigma"].values[0]
    y = idata["prior_predictive"]["y"].values[0]
    # standardised noise of the prior predictive: 4800 standard normals, independent of x and sigma. 5 standard errors
    # of mean and mean square, each exceeded with probability below 1e-6.
    noise = (y - 1.5 * x) / sigma[:, None, None, None]
    count = noise.size
    assert abs(noise.mean()) < 5 / count**0.5 and abs((noise**2).mean() - 1) < 5 * (2 / count) ** 0.5
    # log sigma ~ N(-0.5, 0.3)
    z = (np.log(sigma) + 0.5) / 0.3
    assert abs(z.mean()) < 5 / number**0.5 and abs((z**2).mean() - 1) < 5 * (2 / number) ** 0.5
    # no two measurements alike, and the posterior's own noise is new
    posterior = idata["posterior"]
    fresh = (idata["posterior_predictive"]["y"] - 1.5 * posterior["x"]) / posterior["sigma"]
    assert abs(float(fresh.mean())) < 5 / fresh.size**0.5
    assert abs(float((fresh**2).mean()) - 1) < 5 * (2 / fresh.size) ** 0.5
    assert len(np.unique(fresh.values)) == fresh.size
    again = real_run().to_arviz(posterior_predictive=True, prior=number)
    np.testing.assert_array_equal(again["prior_predictive"]["y"], idata["prior_predictive"]["y"])
    with pytest.raises(ValueError, match="got prior -1"):
        real_run().to_arviz(prior=-1)


def test_a_saved_run_is_the_run(tmp_path):
    smc = real_run()
    smc.save(tmp_path / "run.nc")
    back = from_groups(read(tmp_path / "run.nc"))
    torch.testing.assert_close(back.log_w, smc.posterior.log_w)
    torch.testing.assert_close(back.values["x"], smc.posterior.values["x"])
    assert str(sd.diagnostics.diagnose(back)) == str(smc.diagnostics())
    about = back.about
    assert about["seed"] == 1 and about["method"].startswith("TDS(twist=TweedieTwist(") and about["num_steps"] == 12
    assert (
        about["version of torch"] == torch.__version__.split("+")[0] or about["version of torch"] in torch.__version__
    )
    assert any("2306.17775" in paper for paper in json.loads(about["references"]))
    assert about["network_evaluations_forward"] == smc.network_evaluations[0] == 12 * 64


def test_steps_agree_with_the_filter():
    smc = real_run()
    history, run = smc.records, smc.posterior
    assert torch.equal(run.ancestors[1:], history.ancestors) and torch.equal(run.resampled[1:], history.resampled)
    assert torch.equal(run.ancestors[0], torch.arange(16).expand(4, 16)) and not run.resampled[0].any()
    w = run.within_chain_log_w.exp()
    torch.testing.assert_close(run.entropy[-1], -(w * w.log()).nan_to_num(0.0).sum(1))


@FEW_DRAWS
@OLD_PLOTS
@pytest.mark.parametrize("kind", ["gibbs", "metropolis"])
def test_arviz_works_on_markov_chains(kind, tmp_path):
    kernel = sd.TDS(model, sd.TweedieTwist())
    if kind == "gibbs":
        chain = sd.ParticleGibbs(kernel, 4, 12, 3, seed=0, progress=False)
    else:
        chain = sd.MarginalMH(kernel, ["sigma"], 4, 12, 3, seed=0, progress=False)
    chain.run(Y, gain=GAIN)
    idata = chain.to_arviz(posterior_predictive=True, prior=5)
    posterior = idata["posterior"]
    np.testing.assert_array_equal(posterior["x"], chain.get_samples(group_by_chain=True)["x"])
    assert posterior["x"].dims == ("chain", "draw", "channel", "row", "col") and posterior["x"].shape == (3, 12, *SHAPE)
    x, sigma = torch.from_numpy(posterior["x"].values), torch.from_numpy(posterior["sigma"].values)
    expected = torch.distributions.Normal(1.5 * x, sigma[..., None, None, None]).log_prob(Y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"], expected, rtol=1e-10)
    assert idata["posterior_predictive"]["y"].shape == (3, 12, *SHAPE) and float(idata["constant_data"]["gain"]) == 1.5
    assert np.isfinite(arviz.loo(idata).elpd_loo) and len(arviz.summary(idata, var_names=["sigma", "x"])) == 13
    arviz.plot_trace(idata, var_names=["sigma"])
    matplotlib.pyplot.close("all")
    idata.to_netcdf(str(tmp_path / "chain.nc"))
    assert arviz.from_netcdf(str(tmp_path / "chain.nc"))["posterior"].attrs["seed"] == 0
    if kind == "metropolis":
        accepted = idata["sample_stats"]["accepted"].values
        np.testing.assert_allclose(accepted.mean(1), chain.acceptance)
        stays = (posterior["sigma"].diff("draw") == 0).values
        np.testing.assert_array_equal(accepted[:, 1:] == 0, stays)
        assert idata["sample_stats"]["log_z"].shape == (3, 12)


def interpreter_with_arviz_1():
    """A Python with ArviZ 1: SMCDIFF_ARVIZ1_PYTHON, or one on the PATH that has it."""
    named = os.environ.get("SMCDIFF_ARVIZ1_PYTHON")
    for python in [named] if named else ["python3.12", "python3.13", "python3.14", "python3.15"]:
        if shutil.which(python):
            found = subprocess.run(
                [python, "-c", "import arviz; print(arviz.__version__)"], capture_output=True, text=True, env=clean()
            )
            if found.returncode == 0 and found.stdout.startswith("1."):
                return python
    if named:
        raise RuntimeError(f"SMCDIFF_ARVIZ1_PYTHON is {named!r}, which cannot import ArviZ 1")
    return None


def clean():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_arviz_1_in_another_interpreter(tmp_path):
    if arviz.__version__.startswith("0."):
        python = interpreter_with_arviz_1()
        if python is None:
            pytest.skip("no Python 3.12 or later with ArviZ 1 here; name one in SMCDIFF_ARVIZ1_PYTHON")
    else:
        python = sys.executable
    smc = real_run()
    groups = smc._groups(True, 30)
    arrays = {f"{group}/{name}": array for group, g in groups.items() for name, (_, array) in g.variables.items()}
    tails = {f"tail {k}": np.log(((1 - u) ** -k - 1) / k) for k in (-0.3, 0.3, 0.7, 1.2) for u in [quantiles(4000)]}
    expected = {name: sd.diagnostics.pareto_k(torch.from_numpy(log_w)) for name, log_w in tails.items()}
    np.savez(tmp_path / "arrays.npz", **arrays)
    np.savez(tmp_path / "tails.npz", **tails)
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    script = Path(__file__).with_name("arviz1.py")
    done = subprocess.run(
        [python, str(script), str(ROOT), str(tmp_path)], capture_output=True, text=True, env=clean(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all well\n")
    back = from_groups(read(tmp_path / "arviz1.nc"))  # a file written by ArviZ 1 is read here
    torch.testing.assert_close(back.log_w, smc.posterior.log_w)


def quantiles(size):
    return (np.arange(size) + 0.5) / size


def test_sites_that_name_a_dimension_are_refused(run):
    with pytest.raises(ValueError, match="names a dimension"):
        run_groups(Run({"row": torch.zeros(3, 8)}, run.log_w, run.log_z, run.ess, run.log_z_path))
