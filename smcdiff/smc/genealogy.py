r"""Who descends from whom: what the ancestors of a run tell about its particles.

With a_i(j) the index, after move i - 1, of the parent of particle j after move i, ``ancestors`` of shape (K, b, n)
holds a_1 ... a_K. The path of final particle j is  p_K(j) = j,  p_{i-1}(j) = a_i(p_i(j)),  and its root is p_0(j).

References:
    P. Jacob, L. Murray, S. Rubenthaler, "Path storage in the particle filter", Statistics and Computing 25 (2015),
    arXiv:1307.3180: with resampling at every step the paths coalesce O(n log n) steps before the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["coalescence_step", "follow", "paths", "roots", "surviving_roots"]


def roots(ancestors: Tensor) -> Tensor:
    """Index of the initial particle from which each particle descends, (K + 1, b, n) of int64."""
    first = torch.arange(ancestors.shape[-1], device=ancestors.device).expand(ancestors.shape[1:])
    generations = [first]
    for parents in ancestors:
        generations.append(generations[-1].gather(-1, parents))
    return torch.stack(generations)


def surviving_roots(ancestors: Tensor) -> Tensor:
    """How many initial particles have descendants after each move, (K + 1, b) of int64, between 1 and n."""
    return _distinct(roots(ancestors))


def paths(ancestors: Tensor) -> Tensor:
    """Index, after each move, of the ancestor of each final particle, (K + 1, b, n) of int64."""
    last = torch.arange(ancestors.shape[-1], device=ancestors.device).expand(ancestors.shape[1:])
    backwards = [last]
    for parents in ancestors.flip(0):
        backwards.append(parents.gather(-1, backwards[-1]))
    return torch.stack(backwards[::-1])


def coalescence_step(ancestors: Tensor) -> Tensor:
    """Last step at which all final particles have one common ancestor, (b,) of int64; -1 if they have none."""
    one = _distinct(paths(ancestors)) == 1
    step = torch.arange(one.shape[0], device=one.device)[:, None]
    return torch.where(one, step, -1).amax(0)


def follow(values: Tensor, paths: Tensor) -> Tensor:
    """Values (K + 1, b, n, *event) of all particles, along the paths (K + 1, b, m): (K + 1, b, m, *event)."""
    index = paths.reshape(*paths.shape, *(1,) * (values.dim() - 3)).expand(*paths.shape, *values.shape[3:])
    return values.gather(2, index)


def _distinct(indices: Tensor) -> Tensor:
    """Number of distinct indices 0 ... n - 1 along the last axis."""
    present = torch.zeros_like(indices).scatter_(-1, indices, 1)
    return present.sum(-1)
