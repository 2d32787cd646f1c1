"""Run by test_arviz.py under Python 3.12 or later with ArviZ 1, where torch need not be: builder and wrapper on arrays.

The package's own ``__init__`` files import torch, so they are passed over.
"""

import json
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import numpy as np

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")  # of so few draws
matplotlib.use("agg")
root, folder = (Path(argument) for argument in sys.argv[1:])
for name in ("smcdiff", "smcdiff.diagnostics"):
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")))]
    sys.modules[name] = package

from smcdiff.diagnostics.arviz import read, to_arviz, write  # noqa: E402
from smcdiff.diagnostics.groups import build  # noqa: E402

assert "torch" not in sys.modules

import arviz  # noqa: E402
import xarray  # noqa: E402

arrays: dict[str, dict[str, np.ndarray]] = {}
for key, array in np.load(folder / "arrays.npz").items():
    group, _, name = key.partition("/")
    arrays.setdefault(group, {})[name] = array
log_z = np.array([-1.0, -2.0, -1.5, -1.2])
attributes = {"log_evidence_per_chain": log_z, "seed": 1, "exact": True}
groups = build(arrays, attributes)
tree = to_arviz(groups)
assert isinstance(tree, xarray.DataTree) and set(tree.children) == set(arrays)

tree.to_netcdf(str(folder / "arviz1.nc"), engine="h5netcdf")
write(groups, folder / "own.nc")
for file in ("arviz1.nc", "own.nc"):
    back, own = arviz.from_netcdf(str(folder / file)), read(folder / file)
    for name, group in groups.items():
        for variable, (axes, array) in group.variables.items():
            assert back[name][variable].dims == own[name].variables[variable][0] == axes
            assert back[name][variable].dtype == array.dtype
            np.testing.assert_array_equal(back[name][variable], array)
    np.testing.assert_array_equal(back["posterior"].attrs["log_evidence_per_chain"], log_z)
    assert back["posterior"].attrs["exact"] == own["posterior"].attributes["exact"] == 1

summary = arviz.summary(tree, var_names=["sigma", "brightness"], round_to="none")
assert abs(float(summary.loc["sigma", "mean"]) - arrays["posterior"]["sigma"].mean()) < 1e-9
loo = arviz.loo(tree, var_name="y", pointwise=True)
assert np.isfinite(loo.elpd) and loo.elpd_i.size == arrays["observed_data"]["y"].size
arviz.plot_trace(tree, var_names=["sigma"], backend="matplotlib")
arviz.plot_dist(tree, var_names=["sigma", "brightness"], backend="matplotlib")
arviz.plot_forest(tree, var_names=["x"], backend="matplotlib")
arviz.plot_ppc_dist(tree, backend="matplotlib")

for name, expected in json.loads((folder / "expected.json").read_text()).items():
    log_w = xarray.DataArray(np.load(folder / "tails.npz")[name], dims="sample")
    # ArviZ 1 takes log-likelihoods, the negative of log-weights
    _, k_hat = (-log_w).azstats.psislw(dim="sample", r_eff=1.0)
    # its fit differs from that of ArviZ 0.23 in the fourth digit; a wrong sign or convention would differ in the first
    assert abs(float(k_hat) - expected) < 2e-3, (name, float(k_hat), expected)
print("all well")
