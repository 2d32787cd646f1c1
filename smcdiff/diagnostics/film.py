"""How a picture came out of the noise, recorded while the filter runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smcdiff.smc.state import FilterState

__all__ = ["Film"]


@dataclass(frozen=True)
class Film:
    """A summary for ``sd.Records``: x_t of one particle and the weighted mean of x0_hat, of the first chain.

    Kept under a name, here "film", it comes back as (K + 1, 2, *event), for
    :func:`~smcdiff.diagnostics.plots.plot_film`::

        smc = sd.SMC(kernel, 16, records=sd.Records(summaries={"film": Film("x")})).run(y)
        x_t, x0_hat = smc.records.summaries["film"].unbind(1)
        plot_film({"x_t": x_t, "x0_hat": x0_hat})

    Args:
        site: of the diffusion prior.
    """

    site: str = "x"

    def __call__(self, state: FilterState) -> Tensor:
        x = state.particles[self.site][0]
        x0_hat = state.particles.get(f"{self.site}/x0_hat", state.particles[self.site])[0]  # at t = 0 they are one
        mean = torch.einsum("n,n...->...", state.w[0], x0_hat.to(state.w.dtype))
        return torch.stack([x[0], mean.to(x.dtype)])
