r"""Arrays as the named groups of an ArviZ object: the one place that knows names, dimensions and number formats.

It takes a plain ``{group: {variable: array}}`` and gives every axis its name, and needs NumPy alone, so that it runs
wherever ArviZ does. Chains are independent particle systems, or Markov chains; draws are equally weighted.

    group                                                     axes in front of an event's own
    posterior, sample_stats, log_likelihood,                  chain, draw
    posterior_predictive, prior, prior_predictive
    smc_stats                                                 chain, step (0 for the initial particles)
    weighted_particles                                        chain, particle
    observed_data, constant_data                              none

An event of three axes is a picture, (channel, row, col). A name stands for one length throughout, so that a second
picture ``y`` of another size has (y_channel, y_row, y_col). Every axis has a coordinate, 0, 1, 2 ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "Attribute", "Group", "build"]

Array = NDArray[Any]
#: {group: {variable: array}}.
Arrays = Mapping[str, Mapping[str, Array]]
Attribute = float | int | str | Array

_DRAWS = ("chain", "draw")
_LEADING: dict[str, tuple[str, ...]] = {
    "posterior": _DRAWS,
    "sample_stats": _DRAWS,
    "log_likelihood": _DRAWS,
    "posterior_predictive": _DRAWS,
    "prior": _DRAWS,
    "prior_predictive": _DRAWS,
    "smc_stats": ("chain", "step"),
    "weighted_particles": ("chain", "particle"),
    "observed_data": (),
    "constant_data": (),
}
_PICTURE = ("channel", "row", "col")
#: Variables of the library's own whose further axes have a name already.
_AXES = {("smc_stats", "ancestors"): ("particle",)}
_DIMENSIONS = {*_DRAWS, "step", "particle", *_PICTURE}
#: Groups whose variables are the program's sites.
_SITES = set(_LEADING) - {"sample_stats", "smc_stats"}
_WEIGHTS = {"log_weight", "exact_log_weight"}


@dataclass(frozen=True)
class Group:
    """One group.

    Args:
        variables: {name: (names of its axes, values)}.
        coords: {axis: its coordinate}.
        attributes: numbers, strings and rows of numbers, which a netCDF file can hold.
    """

    variables: dict[str, tuple[tuple[str, ...], Array]]
    coords: dict[str, Array]
    attributes: dict[str, Attribute]


def build(arrays: Arrays, attributes: Mapping[str, Attribute | bool] | None = None) -> dict[str, Group]:
    """Name everything.

    Args:
        arrays: {group: {variable: array}}; groups without a variable are left out.
        attributes: written on the posterior.

    Raises:
        ValueError: for a group that is not in the table above, axes in front that differ in length within a group or
            from the posterior's, a site with the name of a dimension or a weight, and values or attributes that netCDF
            cannot hold.
    """
    names = _Names()
    groups = {}
    for group, variables in arrays.items():
        if group not in _LEADING:
            raise ValueError(f"got the group {group!r}; expected some of {list(_LEADING)}")
        if not variables:
            continue
        leading, named = _LEADING[group], {}
        lengths: dict[str, int] = {}
        for key, values in variables.items():
            name = _variable(group, key)
            array = _storable(group, key, np.asarray(values))
            if array.ndim < len(leading):
                raise ValueError(f"got {group}/{key} of shape {array.shape}; expected axes {leading} in front")
            own = _AXES.get((group, name)) or names(name, array.shape[len(leading) :])
            axes = (*leading, *own)
            for axis, length in zip(axes, array.shape, strict=True):
                if lengths.setdefault(axis, length) != length:
                    raise ValueError(
                        f"got {group}/{key} with {length} along {axis!r}, where others have {lengths[axis]}"
                    )
            named[name] = (axes, array)
        coords = {axis: np.arange(length) for axis, length in lengths.items()}
        groups[group] = Group(named, coords, {})
    _check_draws(groups)
    for name, value in (attributes or {}).items():
        groups["posterior"].attributes[name] = _attribute(name, value)
    return groups


class _Names:
    """Names of the event axes of every variable; a name stands for one length throughout."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}

    def __call__(self, name: str, event: Sequence[int]) -> tuple[str, ...]:
        own = tuple(f"{name}_{axis}" for axis in _PICTURE) if len(event) == 3 else _numbered(name, len(event))
        for axes in (_PICTURE if len(event) == 3 else own, own, tuple(f"pointwise_{axis}" for axis in own)):
            if all(self.lengths.get(axis, length) == length for axis, length in zip(axes, event, strict=True)):
                self.lengths.update(zip(axes, event, strict=True))
                return axes
        raise ValueError(f"got {name!r} with shape {tuple(event)} and with two other shapes in the same object")


def _numbered(name: str, axes: int) -> tuple[str, ...]:
    return tuple(f"{name}_dim_{i}" for i in range(axes))


def _variable(group: str, key: str) -> str:
    """The name of a variable; a slash would open a group in the file."""
    if key in _DIMENSIONS or (group in _SITES - {"weighted_particles"} and key in _WEIGHTS):
        raise ValueError(f"got a site named {key!r}, which names a dimension or a weight; give the site another name")
    return key.replace("/", ".")


def _storable(group: str, key: str, array: Array) -> Array:
    """The values in a number format that netCDF holds: no bool, no half precision, no complex numbers, no objects."""
    if array.dtype.kind == "c":
        raise ValueError(
            f"got complex values in {group}/{key}, which netCDF cannot hold; keep real and imaginary part as two sites"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"got {group}/{key} with values of type {array.dtype}; expected numbers")
    if array.dtype.kind == "b":
        return array.astype(np.int8)
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    return array


def _check_draws(groups: Mapping[str, Group]) -> None:
    """Groups over the posterior's chains and draws have as many of them as it has."""
    if "posterior" not in groups:
        raise ValueError(f"got the groups {list(groups)}; expected the posterior among them, with at least one site")
    expected = {axis: len(values) for axis, values in groups["posterior"].coords.items()}
    for name, group in groups.items():
        for axis in _LEADING[name]:
            if name in ("prior", "prior_predictive") or axis not in expected:
                continue
            if len(group.coords[axis]) != expected[axis]:
                raise ValueError(
                    f"got {len(group.coords[axis])} along {axis!r} in {name}; the posterior has {expected[axis]}"
                )


def _attribute(name: str, value: object) -> Attribute:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float | int | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return value
    raise ValueError(
        f"got attribute {name!r} of type {type(value).__name__}; expected a number, a string or a row of numbers"
    )
