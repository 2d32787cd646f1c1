"""A measured covariance kept beside a network's weights, as ``covariance.safetensors`` in the prior's folder.

The file holds ``ratios``, sigma / alpha of the measured levels, and per basis the variances (levels, *event), under the
name of the basis. A variance head is a file of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch

from smcdiff.diffusion.covariance_models import BASES, SpectralBasis, SpectralCovariance
from smcdiff.diffusion.variance_head import VarianceHead

__all__ = ["FILE", "load_covariance", "load_head", "save_covariance", "save_head"]

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


def save_head(path: Path, head: VarianceHead) -> None:
    """Write a head to a safetensors file."""
    from safetensors.torch import save_file

    sizes = {"channels": str(head.channels), "rings": str(head.rings or 0), "width": str(head.width)}
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, path, metadata=sizes)


def load_head(path: Path) -> VarianceHead:
    """A head that :func:`save_head` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        sizes = {name: int(value) for name, value in file.metadata().items()}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    head = VarianceHead(sizes["channels"], sizes["rings"] or None, sizes["width"])
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)
