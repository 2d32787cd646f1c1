"""The wrapper that knows both generations of ArviZ, and the only module that imports it: late, for it takes seconds.

What the groups hold is decided in :mod:`smcdiff.diagnostics.groups`; here they become ``arviz.InferenceData``
(ArviZ 0.23, Python 3.11) or ``xarray.DataTree`` (ArviZ 1, Python 3.12 and later), and are read back from a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from smcdiff.diagnostics.groups import Group

__all__ = ["read", "to_arviz", "write"]


def to_arviz(groups: Mapping[str, Group]) -> Any:
    """``InferenceData`` where ArviZ has it, otherwise a ``DataTree``."""
    datasets = {name: xr.Dataset(group.variables, group.coords, group.attributes) for name, group in groups.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces version 1 when it is imported
        import arviz
    inference_data: Any = vars(arviz).get("InferenceData")  # hasattr would make ArviZ 1 warn
    return xr.DataTree.from_dict(datasets) if inference_data is None else inference_data(**datasets)


def write(groups: Mapping[str, Group], path: Path) -> None:
    """Write a netCDF file that ``arviz.from_netcdf`` reads, without waiting for ArviZ."""
    xr.DataTree.from_dict(
        {name: xr.Dataset(group.variables, group.coords, group.attributes) for name, group in groups.items()}
    ).to_netcdf(path, engine="h5netcdf")


def read(path: Path) -> dict[str, Group]:
    """The groups in a netCDF file.

    Raises:
        ValueError: for a file that is not netCDF.
        FileNotFoundError: where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        tree = xr.open_groups(path, engine="h5netcdf")
    except OSError as error:
        raise ValueError(f"got {path}, which is not a netCDF file: {error}") from error
    groups = {}
    for name, dataset in tree.items():
        with dataset:
            variables = {
                str(key): (tuple(str(axis) for axis in variable.dims), np.asarray(variable.values))
                for key, variable in dataset.data_vars.items()
            }
            coords = {str(key): np.asarray(values) for key, values in dataset.coords.items()}
            attributes = {
                str(key): value.item() if isinstance(value, np.generic) else value
                for key, value in dataset.attrs.items()
            }
            if variables:
                groups[name.strip("/")] = Group(variables, coords, attributes)
    return groups
