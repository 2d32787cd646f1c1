r"""A run's tensors as the arrays of an ArviZ object, and back.

- ``posterior``: every latent site; ``log_likelihood``: every observed site, pointwise; both at the equally weighted
  draws of :meth:`~smcdiff.diagnostics.run.Run.equal_draws`.
- ``sample_stats``: ``log_weight``, what a draw weighs when chains are pooled by their evidence, with logsumexp = 0 over
  all of them.
- ``weighted_particles``: the particles themselves with their pooled ``log_weight`` and, where that was tempered,
  ``exact_log_weight``.
- ``smc_stats``: ``ess``, ``entropy``, ``log_z``, ``roots``, ``resampled`` and ``ancestors`` over the steps.
- ``observed_data`` and ``constant_data``.

A Markov chain's draws are equally weighted as they are, and have neither weights nor steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smcdiff.diagnostics.groups import Attribute, Group, build
from smcdiff.diagnostics.run import Run

__all__ = ["chain_groups", "from_groups", "run_groups", "to_numpy"]

Tensors = Mapping[str, Tensor]
#: Larger genealogies are not written.
_MOST_ANCESTORS = 4_000_000
_STEP_STATS = ("ess", "entropy", "roots", "resampled", "ancestors")


def run_groups(run: Run, more: Mapping[str, Tensors] | None = None, seed: int = 0) -> dict[str, Group]:
    """The groups of a run.

    Args:
        run: the run.
        more: other groups, {group: {variable: tensor}}, such as draws from the posterior predictive.
        seed: of the resampling into equally weighted draws.
    """
    b, n = run.log_w.shape
    draws = run.equal_draws(seed)
    log_weight = (run.chain_log_w - math.log(n))[:, None].expand(b, n)
    stats = {name: value for name in _STEP_STATS if (value := getattr(run, name)) is not None}
    stats["log_z"] = run.log_z_path
    if run.ancestors is not None and run.ancestors.numel() > _MOST_ANCESTORS:
        del stats["ancestors"]
    particles = {**run.values, "log_weight": run.log_w}
    if run.exact_log_w is not None:
        particles["exact_log_weight"] = run.exact_log_w
    groups: dict[str, Tensors] = {
        "posterior": {name: take(value, draws) for name, value in run.values.items()},
        "sample_stats": {"log_weight": log_weight},
        "log_likelihood": {name: take(value, draws) for name, value in run.log_likelihood.items()},
        "smc_stats": {name: value.transpose(0, 1) for name, value in stats.items()},
        "weighted_particles": particles,
        "observed_data": run.observed,
        "constant_data": run.constants,
        **(more or {}),
    }
    log_z = run.log_z.to(torch.float64)
    about: dict[str, Attribute | bool] = {
        "inference_library": "smcdiff",
        "num_chains": b,
        "num_particles": n,
        "log_evidence": float(log_z.logsumexp(0) - math.log(b)),
        "log_evidence_per_chain": to_numpy(log_z),
        **run.about,
        "tempering_exponent": float(run.exponent),
    }
    if run.log_z_variance is not None:
        about["log_evidence_variance_per_chain"] = to_numpy(run.log_z_variance)
    built = build({group: {k: to_numpy(v) for k, v in tensors.items()} for group, tensors in groups.items()}, about)
    built["smc_stats"].attributes.update(built["posterior"].attributes)
    return built


def chain_groups(
    groups: Mapping[str, Tensors], about: Mapping[str, float | int | str] | None = None
) -> dict[str, Group]:
    """The groups of Markov chains, {group: {variable: (chains, draws, *event)}}."""
    arrays = {group: {name: to_numpy(value) for name, value in tensors.items()} for group, tensors in groups.items()}
    return build(arrays, {"inference_library": "smcdiff", **(about or {})})


def from_groups(groups: Mapping[str, Group]) -> Run:
    """The run that :func:`run_groups` wrote, less its pointwise log-likelihood, which was written at the draws alone.

    The slash in a site's name stays the full stop it became.

    Raises:
        ValueError: for groups of anything else.
    """
    missing = {"weighted_particles", "smc_stats", "posterior"} - set(groups)
    if missing:
        raise ValueError(
            f"got groups without {sorted(missing)}; expected those of a run of sd.SMC, as smc.save or `smcdiff "
            "restore` writes them"
        )

    def tensors(group: str) -> dict[str, Tensor]:
        variables = groups[group].variables if group in groups else {}
        return {name: torch.from_numpy(np.array(values)) for name, (_, values) in variables.items()}

    particles, stats = tensors("weighted_particles"), tensors("smc_stats")
    log_w, exact = particles.pop("log_weight"), particles.pop("exact_log_weight", None)
    attributes = groups["posterior"].attributes
    variance = attributes.get("log_evidence_variance_per_chain")
    parts = {name: stats[name].transpose(0, 1) for name in (*_STEP_STATS, "log_z") if name in stats}
    return Run(
        values=particles,
        log_w=log_w,
        log_z=torch.as_tensor(np.array(attributes["log_evidence_per_chain"], dtype=np.float64)).reshape(-1),
        ess=parts["ess"],
        log_z_path=parts["log_z"],
        roots=parts.get("roots"),
        entropy=parts.get("entropy"),
        resampled=None if "resampled" not in parts else parts["resampled"].bool(),
        ancestors=parts.get("ancestors"),
        log_z_variance=None if variance is None else torch.as_tensor(np.array(variance)).reshape(-1),
        observed=tensors("observed_data"),
        constants=tensors("constant_data"),
        about={name: value for name, value in attributes.items() if not isinstance(value, np.ndarray)},
        exact_log_w=exact,
        exponent=float(attributes.get("tempering_exponent", 1.0)),
    )


def take(values: Tensor, index: Tensor) -> Tensor:
    """values (b, n, *event) at index (b, m): (b, m, *event)."""
    chain = torch.arange(len(values), device=values.device)[:, None]
    return values[chain, index.to(values.device)]


def to_numpy(value: Tensor) -> NDArray[Any]:
    """A NumPy array; half precision becomes single, which NumPy and netCDF have."""
    value = value.detach().cpu()
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.to(torch.float32)
    array: NDArray[Any] = value.numpy()
    return array
