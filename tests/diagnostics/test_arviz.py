"""The ArviZ object holds the run's numbers, in and out of a file."""

import arviz
import numpy as np
import pytest
import torch

from smcdiff.diagnostics import Run
from smcdiff.diagnostics.arviz import groups, to_arviz


@pytest.fixture
def run():
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    b, n, steps = 3, 8, 5
    return Run(
        values={
            "x": randn(b, n, 1, 4, 6),
            "kernel": randn(b, n, 1, 3, 3),
            "scope/sigma": randn(b, n).double(),
            "flag": randn(b, n, 2) > 0,
            "half": randn(b, n).bfloat16(),
        },
        log_w=3 * randn(b, n),
        log_z=100 * randn(b),
        ess=randn(steps, b).double().exp(),
        log_z_path=randn(steps, b).double(),
        roots=torch.arange(steps * b).reshape(steps, b),
        log_likelihood={"y": randn(b, n, 1, 4, 6), "total": randn(b, n)},
        observed={"y": randn(1, 4, 6), "total": randn(2, 5)},
    )


def test_dimensions_are_named(run):
    found = groups(run)
    assert found["posterior"]["x"].dims == ("chain", "draw", "channel", "row", "col")
    assert found["posterior"]["kernel"].dims == ("chain", "draw", "kernel_dim_0", "kernel_dim_1", "kernel_dim_2")
    assert found["posterior"]["scope.sigma"].dims == ("chain", "draw")
    assert found["posterior"]["flag"].dtype == np.int8
    assert found["posterior"]["half"].dtype == np.float32
    assert found["observed_data"]["y"].dims == ("channel", "row", "col")
    assert found["log_likelihood"]["y"].dims == ("chain", "draw", "channel", "row", "col")
    assert found["log_likelihood"]["total"].dims == ("chain", "draw")
    assert found["observed_data"]["total"].dims == ("total_dim_0", "total_dim_1")
    assert found["smc_stats"]["ess"].dims == ("chain", "step")
    for name in ("ess", "roots"):
        np.testing.assert_array_equal(found["smc_stats"][name], getattr(run, name).T)
    np.testing.assert_array_equal(found["smc_stats"]["log_z"], run.log_z_path.T)


def test_draws_are_equally_weighted_particles_in_ancestor_order(run):
    found = groups(run)
    w = run.within_chain_log_w.exp()
    for c in range(3):
        picked = []
        for d in range(8):
            draw = {name: value[c, d].values for name, value in found["posterior"].items()}
            same = [i for i in range(8) if np.array_equal(draw["x"], run.values["x"][c, i])]
            assert len(same) == 1
            picked += same
            i = same[0]
            assert draw["scope.sigma"] == float(run.values["scope/sigma"][c, i])
            assert found["log_likelihood"]["total"][c, d] == float(run.log_likelihood["total"][c, i])
        assert picked == sorted(picked)
        counts = np.bincount(picked, minlength=8)
        assert (np.abs(counts - 8 * w[c].numpy()) < 1).all()  # systematic: rounded up or down
    log_weight = found["sample_stats"]["log_weight"].values
    np.testing.assert_allclose(np.exp(log_weight).sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(log_weight, np.broadcast_to(run.chain_log_w.numpy()[:, None] - np.log(8), (3, 8)))


def test_weighted_particles_are_all_there(run):
    particles = groups(run)["weighted_particles"]
    np.testing.assert_array_equal(particles["x"], run.values["x"])
    np.testing.assert_array_equal(particles["log_weight"], run.log_w)


def test_a_file_gives_back_every_group(run, tmp_path):
    idata = to_arviz(run, {"tempering_exponent": 0.25, "exact": True, "operator": "blur"})
    idata.to_netcdf(str(tmp_path / "posterior.nc"))
    back = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    for name, expected in groups(run).items():
        actual = back[name]
        assert set(actual.data_vars) == set(expected.data_vars)
        for variable, values in expected.items():
            assert actual[variable].dims == values.dims and actual[variable].dtype == values.dtype
            np.testing.assert_array_equal(actual[variable], values)
    attributes = back["posterior"].attrs
    assert attributes["tempering_exponent"] == 0.25 and attributes["exact"] == 1 and attributes["operator"] == "blur"
    log_z = run.log_z.double()
    np.testing.assert_allclose(attributes["log_evidence_per_chain"], log_z.numpy())
    assert attributes["log_evidence"] == pytest.approx(float(log_z.logsumexp(0)) - np.log(3))
    assert attributes["num_chains"] == 3 and attributes["num_particles"] == 8
    summary = arviz.summary(back, var_names=["scope.sigma"], kind="stats")
    expected_mean = groups(run)["posterior"]["scope.sigma"].mean()
    assert float(summary["mean"].iloc[0]) == pytest.approx(float(expected_mean), abs=1e-3)


def test_what_a_file_cannot_hold_is_refused(run):
    with pytest.raises(ValueError, match="attribute 'operator' of type list"):
        groups(run, {"operator": [1]})
    shape = run.log_w.shape
    for site, value, words in (
        ("draw", torch.zeros(shape), "names a dimension"),
        ("log_weight", torch.zeros(shape), "names a dimension or a weight"),
        ("z", torch.zeros(shape, dtype=torch.complex64), "complex"),
    ):
        with pytest.raises(ValueError, match=words):
            groups(Run({site: value}, run.log_w, run.log_z, run.ess, run.log_z_path))
