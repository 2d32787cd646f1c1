r"""Where a particle filter stands after a step: all that the next step needs, and nothing tied to a process.

A :class:`FilterState` is a plain value of tensors and numbers, so it can be pickled, moved and continued from: the
steps that follow are the same, bit for bit, as if the run had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from smcdiff.smc.feynman_kac import Particles
from smcdiff.smc.records import StepRecord

__all__ = ["FilterState"]


@dataclass(frozen=True)
class FilterState:
    """Weighted particles after move i of K, and the evidence so far.

    The evidence of a chain up to here is ``log_z = log_z_settled + log-mean-exp(log_w)``: what its resamplings have
    settled, and the mean of the weights gathered since the last one.

    Args:
        step: i, 0 after the initial move.
        num_steps: K.
        particles: what the particles carry, each entry (b, n, *event).
        log_w: unnormalised log-weights since the chain's last resampling, (b, n), float64.
        w: the same normalised, (b, n), float64.
        ess: effective sample size of ``w``, (b,), float64.
        log_z: log normalising constant up to and with move i, (b,), float64, in nats.
        log_z_settled: its part up to the chain's last resampling, (b,), float64.
        faults: the first step at which a chain had a fault, {fault: (b,) of int64}; ``NEVER`` of
            :mod:`smcdiff.smc.faults` where it had none. :func:`~smcdiff.smc.faults.check` reads them.
        history: the records of steps 0 ... i.
        generator_state: state of the generator of all noise after this step.
    """

    step: int
    num_steps: int
    particles: Particles
    log_w: Tensor
    w: Tensor
    ess: Tensor
    log_z: Tensor
    log_z_settled: Tensor
    faults: Mapping[str, Tensor]
    history: tuple[StepRecord, ...]
    generator_state: Tensor

    @property
    def num_chains(self) -> int:
        """b."""
        return self.log_w.shape[0]

    @property
    def num_particles(self) -> int:
        """n, of each chain."""
        return self.log_w.shape[1]
