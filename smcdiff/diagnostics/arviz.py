r"""A run as an ArviZ object. This is the only module that imports ArviZ, and it does so late: it takes seconds.

Chains are independent particle systems and draws are equally weighted particles of a chain, resampled in ancestor
order so that copies and relatives stand next to each other and ``arviz.ess`` counts them as what they are. Groups:

- ``posterior``: every latent site, (chain, draw, *event); an event of three axes is (channel, row, col);
- ``sample_stats``: ``log_weight`` (chain, draw), what a draw weighs when chains are pooled by their evidence, with
  logsumexp = 0 over all of them;
- ``log_likelihood``: every observed site, pointwise (chain, draw, *its shape), and ``observed_data``: its value;
- ``smc_stats``: ``ess``, ``log_z`` and ``roots`` over (chain, step);
- ``weighted_particles``: the particles before resampling, (chain, particle, *event), with their ``log_weight``.

Attributes hold numbers and strings only, so that every group survives ``to_netcdf`` and back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from smcdiff.diagnostics.run import Run
from smcdiff.smc.resampling import Systematic

__all__ = ["groups", "to_arviz"]

Attributes = Mapping[str, float | int | str]
Variables = dict[str, tuple[tuple[str, ...], NDArray[Any]]]

_IMAGE = ("channel", "row", "col")
_RESERVED = {"chain", "draw", "step", "particle", "log_weight", *_IMAGE}


def groups(run: Run, attributes: Attributes | None = None, seed: int = 0) -> dict[str, xr.Dataset]:
    """The datasets of a run, by group.

    Args:
        run: the run.
        attributes: more to write on the posterior, such as a tempering exponent.
        seed: of the resampling into equally weighted draws.

    Raises:
        ValueError: for a site with the name of a dimension, or an attribute that netCDF cannot hold.
    """
    b, n = run.log_w.shape
    generator = torch.Generator().manual_seed(seed)
    ancestors = Systematic()(run.within_chain_log_w.exp().cpu(), generator)
    axes = _Axes()
    values = {_name(site): value for site, value in run.values.items()}
    observed = {_name(site): value for site, value in run.observed.items()}
    log_likelihood = {_name(site): value for site, value in run.log_likelihood.items()}

    def variables(tensors: Mapping[str, Tensor], *leading: str) -> Variables:
        return {name: ((*leading, *axes(name, v.shape[len(leading) :])), _array(v)) for name, v in tensors.items()}

    def draws(tensors: Mapping[str, Tensor]) -> Variables:
        return variables({name: _take(v, ancestors) for name, v in tensors.items()}, "chain", "draw")

    chains, steps = ("chain", np.arange(b)), ("step", np.arange(len(run.ess)))
    over_draws = {"chain": chains, "draw": ("draw", np.arange(n))}
    over_steps = {"chain": chains, "step": steps}
    log_weight = (run.chain_log_w - np.log(n))[:, None].expand(b, n)
    smc_stats = {"ess": run.ess, "log_z": run.log_z_path}
    if run.roots is not None:
        smc_stats["roots"] = run.roots.to(torch.int64)
    log_z = run.log_z.to(torch.float64)
    found = {
        "posterior": xr.Dataset(draws(values), over_draws),
        "sample_stats": xr.Dataset(variables({"log_weight": log_weight}, "chain", "draw"), over_draws),
        "smc_stats": xr.Dataset(variables({k: v.T for k, v in smc_stats.items()}, "chain", "step"), over_steps),
        "weighted_particles": xr.Dataset(
            variables({**values, "log_weight": run.log_w}, "chain", "particle"),
            {"chain": chains, "particle": ("particle", np.arange(n))},
        ),
    }
    if observed:
        found["observed_data"] = xr.Dataset(variables(observed))
    if log_likelihood:
        found["log_likelihood"] = xr.Dataset(draws(log_likelihood), over_draws)
    about: dict[str, Any] = {
        "inference_library": "smcdiff",
        "inference_library_version": _version(),
        "log_evidence": float(log_z.logsumexp(0) - np.log(b)),
        "log_evidence_per_chain": _array(log_z),
        "num_chains": b,
        "num_particles": n,
        **{name: _attribute(name, value) for name, value in (attributes or {}).items()},
    }
    for name in ("posterior", "smc_stats"):
        found[name].attrs.update(about)
    return found


def to_arviz(run: Run, attributes: Attributes | None = None, seed: int = 0) -> Any:
    """The run as ``arviz.InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (ArviZ 1); arguments as :func:`groups`."""
    datasets = groups(run, attributes, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces version 1 when it is imported
        import arviz
    if hasattr(arviz, "InferenceData"):
        inference_data: Any = arviz.InferenceData
        return inference_data(**datasets)
    return xr.DataTree.from_dict(datasets)


class _Axes:
    """Names of the event axes of every variable; a name stands for one length throughout."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}

    def __call__(self, name: str, event: Sequence[int]) -> tuple[str, ...]:
        own = tuple(f"{name}_dim_{i}" for i in range(len(event)))
        for axes in (_IMAGE if len(event) == 3 else own, own, tuple(f"pointwise_{axis}" for axis in own)):
            if all(self.lengths.get(axis, length) == length for axis, length in zip(axes, event, strict=True)):
                self.lengths.update(zip(axes, event, strict=True))
                return axes
        raise ValueError(f"got {name!r} with shape {tuple(event)} and with other shapes in the same run")


def _name(site: str) -> str:
    """The name of a site's variable; a slash would open a group in the file."""
    if site in _RESERVED:
        raise ValueError(f"got a site named {site!r}, which names a dimension or a weight; give the site another name")
    return site.replace("/", ".")


def _version() -> str:
    try:
        return version("smcdiff")
    except PackageNotFoundError:
        return "not installed"


def _take(values: Tensor, ancestors: Tensor) -> Tensor:
    chain = torch.arange(len(values), device=values.device)[:, None]
    return values[chain, ancestors.to(values.device)]


def _array(value: Tensor) -> NDArray[Any]:
    """A NumPy array of a number format that netCDF holds: no bool, no bfloat16, no complex numbers."""
    value = value.detach().cpu()
    if value.is_complex():
        raise ValueError("got complex values, which netCDF cannot hold; keep real and imaginary part as two sites")
    if value.dtype == torch.bool:
        value = value.to(torch.int8)
    elif value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)
    array: NDArray[Any] = value.numpy()
    return array


def _attribute(name: str, value: object) -> float | int | str:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float | int | str):
        return value
    raise ValueError(f"got attribute {name!r} of type {type(value).__name__}; expected a number or a string")
