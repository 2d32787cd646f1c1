"""A measured covariance kept beside a network's weights, as ``covariance.safetensors`` in the prior's folder.

The file holds ``ratios``, sigma / alpha of the measured levels, and per basis the variances (levels, *event), under the
name of the basis.
"""

from __future__ import annotations

from pathlib import Path

import torch

from smcdiff.diffusion.covariance_models import BASES, SpectralBasis, SpectralCovariance

__all__ = ["FILE", "load_covariance", "save_covariance"]

FILE = "covariance.safetensors"


def save_covariance(folder: Path, covariances: list[SpectralCovariance]) -> None:
    """Write covariances measured at the same levels, one per basis, into a prior's folder.

    Raises:
        ValueError: for covariances of different levels or twice the same basis.
    """
    from safetensors.torch import save_file

    ratios = covariances[0].table.ratios
    names = [covariance.basis_name for covariance in covariances]
    if len(set(names)) < len(names) or any(not torch.equal(c.table.ratios, ratios) for c in covariances):
        raise ValueError(f"got covariances in the bases {names}; expected one per basis, all at the same noise levels")
    tensors: dict[str, torch.Tensor] = {
        covariance.basis_name: covariance.table.variances.float().contiguous() for covariance in covariances
    }
    save_file({"ratios": ratios, **tensors}, Path(folder) / FILE)


def load_covariance(folder: Path, basis: SpectralBasis, event_shape: tuple[int, ...]) -> SpectralCovariance | None:
    """The covariance kept in a folder, for pictures of this shape; None where none is kept.

    Raises:
        ValueError: for a basis that was not measured.
    """
    from safetensors.torch import load_file

    path = Path(folder) / FILE
    if not path.is_file():
        return None
    tensors = load_file(path)
    if basis not in tensors:
        raise ValueError(f"got the basis {basis!r}; {path.name} has {sorted(set(tensors) & set(BASES))}")
    covariance = SpectralCovariance(tensors[basis], basis, tensors["ratios"])
    return covariance if covariance.event_shape == tuple(event_shape) else covariance.resized(tuple(event_shape))
