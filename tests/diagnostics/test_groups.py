"""The builder names axes, keeps numbers, and refuses what a file cannot hold."""

import numpy as np
import pytest

from smcdiff.diagnostics.groups import build


def arrays(**groups):
    return {"posterior": {"x": np.zeros((2, 3))}, **groups}


def test_every_group_has_its_axes():
    rng = np.random.default_rng(0)
    values = {
        "posterior": {"x": rng.normal(size=(2, 3, 1, 4, 5)), "sigma": rng.normal(size=(2, 3))},
        "sample_stats": {"log_weight": rng.normal(size=(2, 3))},
        "posterior_predictive": {"y": rng.normal(size=(2, 3, 1, 2, 2))},
        "log_likelihood": {"y": rng.normal(size=(2, 3, 1, 2, 2)), "z": rng.normal(size=(2, 3))},
        "prior": {"x": rng.normal(size=(1, 7, 1, 4, 5)), "sigma": rng.normal(size=(1, 7))},
        "prior_predictive": {"y": rng.normal(size=(1, 7, 1, 2, 2))},
        "observed_data": {"y": rng.normal(size=(1, 2, 2)), "z": rng.normal(size=(6,))},
        "constant_data": {"psf": rng.normal(size=(3, 3))},
        "smc_stats": {"ess": rng.normal(size=(2, 9)), "ancestors": rng.integers(8, size=(2, 9, 8))},
        "weighted_particles": {"x": rng.normal(size=(2, 8, 1, 4, 5)), "log_weight": rng.normal(size=(2, 8))},
    }
    picture, small = ("channel", "row", "col"), ("y_channel", "y_row", "y_col")
    expected = {
        "posterior": {"x": ("chain", "draw", *picture), "sigma": ("chain", "draw")},
        "sample_stats": {"log_weight": ("chain", "draw")},
        "posterior_predictive": {"y": ("chain", "draw", *small)},
        "log_likelihood": {"y": ("chain", "draw", *small), "z": ("chain", "draw")},
        "prior": {"x": ("chain", "draw", *picture), "sigma": ("chain", "draw")},
        "prior_predictive": {"y": ("chain", "draw", *small)},
        "observed_data": {"y": small, "z": ("z_dim_0",)},
        "constant_data": {"psf": ("psf_dim_0", "psf_dim_1")},
        "smc_stats": {"ess": ("chain", "step"), "ancestors": ("chain", "step", "particle")},
        "weighted_particles": {"x": ("chain", "particle", *picture), "log_weight": ("chain", "particle")},
    }
    groups = build(values, {"seed": 3, "exact": True, "name": "blur", "row": np.array([1.0, 2.0])})
    assert {g: {v: axes for v, (axes, _) in group.variables.items()} for g, group in groups.items()} == expected
    for name, group in groups.items():
        for variable, (axes, array) in group.variables.items():
            np.testing.assert_array_equal(array, values[name][variable])
            for axis, length in zip(axes, array.shape, strict=True):
                np.testing.assert_array_equal(group.coords[axis], np.arange(length))
    attributes = groups["posterior"].attributes
    assert attributes["exact"] == 1 and type(attributes["exact"]) is int
    np.testing.assert_array_equal(attributes["row"], [1.0, 2.0])


def test_an_empty_group_is_left_out():
    assert list(build(arrays(sample_stats={}, observed_data={}))) == ["posterior"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [("bool", "int8"), ("float16", "float32"), ("float32", "float32"), ("int32", "int32"), ("uint8", "uint8")],
)
def test_number_formats(given, stored):
    values = np.array([[0, 1, 1]]).astype(given)
    _, array = build({"posterior": {"x": values}})["posterior"].variables["x"]
    assert array.dtype == stored
    np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"posterior": {"draw": np.zeros((1, 2))}}, "names a dimension"),
        ({"posterior": {"log_weight": np.zeros((1, 2))}}, "names a dimension or a weight"),
        ({"posterior": {"x": np.zeros((1, 2), complex)}}, "complex"),
        ({"posterior": {"x": np.array([["a"]])}}, "expected numbers"),
        ({"posterior": {"x": np.array([[None]])}}, "expected numbers"),
        ({"posterior": {"x": np.zeros(3)}}, "expected axes \\('chain', 'draw'\\) in front"),
        ({"posterior": {"x": np.zeros((2, 3)), "z": np.zeros((2, 4))}}, "4 along 'draw'"),
        (arrays(log_likelihood={"y": np.zeros((2, 4))}), "4 along 'draw' in log_likelihood; the posterior has 3"),
        (arrays(smc_stats={"ess": np.zeros((3, 9))}), "3 along 'chain' in smc_stats"),
        (arrays(posteriors={"x": np.zeros((2, 3))}), "group 'posteriors'"),
        ({"observed_data": {"y": np.zeros(3)}}, "expected the posterior"),
        (
            arrays(
                observed_data={"x": np.zeros((4, 4))},
                constant_data={"x": np.zeros((5, 5))},
                prior={"x": np.zeros((1, 2, 6, 6))},
            ),
            "two other shapes",
        ),
    ],
)
def test_what_cannot_be_named_or_stored_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        build(given)


def test_attributes_that_a_file_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="attribute 'operator' of type list"):
        build(arrays(), {"operator": [1]})
