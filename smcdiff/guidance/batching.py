"""How many particles go through the network at once."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from smcdiff.diffusion.denoiser import Estimate
from smcdiff.guidance.base import ForwardOnly, Method, Prediction
from smcdiff.guidance.program import Program

__all__ = ["bytes_per_particle", "free_bytes", "max_batch_of_run", "pick_max_batch"]

#: Share of the free memory that a batch may fill; gradients and temporaries double what the graph saves.
_SHARE, _FACTOR = 0.5, 2.0
#: Taken to be free where the system does not say, in bytes.
_UNKNOWN = 2 * 2**30


def bytes_per_particle(program: Program, method: Method) -> int:
    """What automatic differentiation saves of one particle's evaluation, in bytes.

    The twist is included, but for methods that keep no graph: they may use ``torch.func`` in it, which cannot be
    watched. It takes one evaluation of the network, at the highest noise.
    """
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    k = program.num_steps
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        x = {
            name: torch.zeros((1, *latent.chain.shape), dtype=program.dtype, device=program.device, requires_grad=True)
            for name, latent in program.latents.items()
        }
        estimates = {
            name: Estimate(x[name]) if name in program.held else latent.chain.estimate(k, x[name])
            for name, latent in program.latents.items()
        }
        if not (isinstance(method, ForwardOnly) and method.forward_only):
            prediction = Prediction(program, k, x, estimates)
            method.proposal.objective(prediction, method.twist.log_psi(prediction))
    return max(saved, sum(value.numel() * value.element_size() for value in x.values()))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # systems that do not say
        return _UNKNOWN


def pick_max_batch(program: Program, method: Method) -> int:
    """The largest batch whose evaluation fits into half of the free memory; at least 1."""
    need = _FACTOR * bytes_per_particle(program, method)
    return max(1, int(_SHARE * free_bytes(program.device) / need))


def max_batch_of_run(max_batch: int | None, program: Program, method: Method, processes: int = 1) -> int:
    """Largest number of particles that a run puts through the network at once.

    Args:
        max_batch: what the user asks for; None takes what fits, by :func:`pick_max_batch`.
        program: to run.
        method: to run it by.
        processes: how many run side by side; on CPUs they share the memory.
    """
    if max_batch is not None:
        return max_batch
    sharing = processes if program.device.type == "cpu" else 1
    return max(1, pick_max_batch(program, method) // sharing)
