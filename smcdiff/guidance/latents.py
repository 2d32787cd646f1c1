r"""Latents other than pictures, as functions of standard normal noise.

A latent with prior density f is carried as z ~ N(0, I) of its own reverse chain, which is exact at any number of
steps, and enters the program as

    theta = F^{-1}(Phi(z)),

with F the prior's distribution function and Phi the standard normal's: affine for normals, through the transforms for
transformed distributions. The prior may depend on other latents, so hierarchical programs stay exact.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, TransformedDistribution

__all__ = ["UnmappablePrior", "from_standard_normal", "noise_shape"]


class UnmappablePrior(TypeError):
    """A latent whose prior is no known function of standard normal noise."""


def noise_shape(fn: Distribution, name: str) -> torch.Size:
    """Shape of the standard normal noise that :func:`from_standard_normal` turns into a draw of ``fn``.

    Raises:
        UnmappablePrior: for a discrete prior, or one without a quantile function, naming the site and the remedy.
    """
    if isinstance(fn, Delta) or getattr(fn.support, "is_discrete", False):
        raise UnmappablePrior(
            f"got the latent {name!r} with the discrete prior {type(fn).__name__}; a particle's latents must be "
            "continuous. Sum the latent out by hand, or run the program once for each of its values and compare the "
            "log_evidence"
        )
    if isinstance(fn, MaskedDistribution | Independent):
        return noise_shape(fn.base_dist, name)
    if _is_pushed_forward(fn):
        return noise_shape(fn.base_dist, name)
    if not isinstance(fn, MultivariateNormal):
        try:
            fn.icdf(torch.full((), 0.5, dtype=_dtype(fn)))
        except NotImplementedError:
            raise UnmappablePrior(
                f"got the latent {name!r} with the prior {type(fn).__name__}, which has no quantile function; take "
                "one that has (Normal, LogNormal, Uniform, HalfNormal, Exponential, Laplace, ...) or a "
                "TransformedDistribution of it"
            ) from None
    return fn.batch_shape + fn.event_shape


def from_standard_normal(fn: Distribution, z: Tensor) -> Tensor:
    """F^{-1}(Phi(z)): a draw of ``fn`` where z is standard normal; differentiable in z and in the parameters."""
    if isinstance(fn, MaskedDistribution | Independent):
        return from_standard_normal(fn.base_dist, z)
    if isinstance(fn, Normal):
        return fn.loc + fn.scale * z
    if isinstance(fn, MultivariateNormal):
        return fn.loc + (fn.scale_tril @ z[..., None])[..., 0]
    if _is_pushed_forward(fn):
        value = from_standard_normal(fn.base_dist, z)
        for transform in fn.transforms:
            value = transform(value)
        return value
    limits = torch.finfo(z.dtype)
    return fn.icdf(torch.special.ndtr(z).clamp(limits.tiny, 1 - limits.eps))


def _is_pushed_forward(fn: Distribution) -> TypeGuard[TransformedDistribution]:
    """Whether a draw of ``fn`` is a one-to-one function of a draw of its base (that of HalfNormal, |z|, is not)."""
    return isinstance(fn, TransformedDistribution) and all(transform.bijective for transform in fn.transforms)


def _dtype(fn: Distribution) -> torch.dtype:
    """The dtype of the distribution's first tensor parameter."""
    for name in fn.arg_constraints:
        value = getattr(fn, name, None)
        if isinstance(value, Tensor):
            return value.dtype
    return torch.get_default_dtype()
