r"""A filter step captured as a CUDA graph: its hundred small kernels started by one call.

Where particles are few, a step on a GPU costs what it takes to start its kernels, some microseconds each, and not what
they compute. A graph holds the kernels of one step, from resampling to weights, the model's move included, and starts
them all at once, with the same numbers. It can only be started again with what it was captured with: the same code
path, the same shapes and *the same numbers that Python computed*. A diffusion chain computes other coefficients at each
step, so it needs one graph per step, which pays from the third run of the same model on; a model whose moves do not
look at the step index needs one graph in all, which pays within a run.

A step is carried out as usual on its first visit, which fills caches and loads kernels, captured on its second and
replayed from then on. Nothing is ever computed and thrown away.

Memory: one state, which all graphs read and write, the largest working memory of any one step, which they share since
they run one after the other, and the driver's own, some kilobytes per kernel of a graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smcdiff.smc.feynman_kac import FeynmanKac
from smcdiff.smc.state import FilterState
from smcdiff.smc.steps import Advanced, Steps

__all__ = ["Capture", "CaptureError"]


class CaptureError(RuntimeError):
    """A step that cannot be captured. The message says why and what to do."""


@dataclass(frozen=True)
class _Graph:
    """A captured step and the names of what it leaves in the buffers."""

    graph: torch.cuda.CUDAGraph
    outputs: Mapping[str, _Buffer]


#: A buffer by what it holds: name, shape, dtype.
_Buffer = tuple[str, torch.Size, torch.dtype]


class Capture:
    """The CUDA graphs of one model's filter steps; give it to :meth:`ParticleFilter.run` each time.

    What the model does on the host in a step, such as counting its network's evaluations, does not happen where the
    step is replayed. A step that waits for the device, or whose shapes depend on values, cannot be captured.

    Args:
        homogeneous: the model's moves 1 ... K do the same arithmetic and do not look at the step index, so that one
            graph serves all. The library cannot see whether that is so.
    """

    def __init__(self, *, homogeneous: bool = False) -> None:
        self.homogeneous = homogeneous
        self._bound: tuple[FeynmanKac, object] | None = None
        #: What the graphs draw from; it takes the state of the run's own generator before a step and gives it back.
        self._generator: torch.Generator | None = None
        self._visited: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._buffers: dict[_Buffer, Tensor] = {}
        self._pool: object = None
        self._at: Tensor | None = None
        #: log_w of the state that the buffers hold.
        self._held: Tensor | None = None

    @property
    def num_graphs(self) -> int:
        """How many steps have been captured."""
        return len(self._graphs)

    def bind(self, feynman_kac: FeynmanKac, settings: object) -> None:
        """See that the graphs are of this model and these settings.

        Raises:
            ValueError: for a model that is not on a CUDA device, or another model or filter than before.
        """
        device = feynman_kac.device
        if device.type != "cuda":
            raise ValueError(f"got a capture for a model on {device}; CUDA graphs need a CUDA device: leave it out")
        if self._bound is None:
            self._bound = (feynman_kac, settings)
            self._generator = torch.Generator(device=device)
            self._pool = torch.cuda.graph_pool_handle()
            self._at = torch.zeros((), dtype=torch.int64, device=device)
        model, others = self._bound
        if model is not feynman_kac or others != settings:
            raise ValueError(
                "got a capture that holds the graphs of another model or filter; a graph repeats what it was captured "
                "with, so give each model object and filter a Capture of its own"
            )

    def __call__(self, steps: Steps, state: FilterState, generator: torch.Generator) -> Advanced:
        """One step, in the manner of :class:`~smcdiff.smc.steps.Advance`."""
        i, inputs = state.step + 1, _tensors(state)
        key = (None if self.homogeneous else i, tuple((n, v.shape, v.dtype) for n, v in inputs.items()))
        if key not in self._visited:
            self._visited.add(key)
            self._held = None
            after = steps.advance(state, i, generator)
            for name, value in {**inputs, **_tensors(after)}.items():
                self._buffers.setdefault((name, value.shape, value.dtype), torch.empty_like(value))
            return after
        assert self._at is not None and self._generator is not None
        self._generator.set_state(generator.get_state())
        with torch.cuda.device(self._at.device):
            if state.log_w is not self._held:
                for name, value in inputs.items():
                    self._buffer(name, value).copy_(value)
            if key not in self._graphs:
                self._graphs[key] = self._captured(steps, state, inputs)
            graph = self._graphs[key]
            self._at.fill_(i)
            graph.graph.replay()
            after = _advanced({name: self._buffers[buffer].clone() for name, buffer in graph.outputs.items()})
        generator.set_state(self._generator.get_state())
        self._held = after.log_w
        return after

    def _captured(self, steps: Steps, state: FilterState, inputs: Mapping[str, Tensor]) -> _Graph:
        """The graph of a step from the buffers to the buffers; nothing is computed yet."""
        assert self._at is not None and self._generator is not None
        static = _with_tensors(state, {name: self._buffer(name, value) for name, value in inputs.items()})
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                outputs = _tensors(steps.advance(static, self._at, self._generator))
                taken = {value.untyped_storage().data_ptr() for value in self._buffers.values()}
                # what a buffer holds must be read before any of them is written
                values = {
                    name: value.clone() if value.untyped_storage().data_ptr() in taken else value
                    for name, value in outputs.items()
                }
                for name, value in values.items():
                    self._buffer(name, value).copy_(value)
        except RuntimeError as error:
            raise CaptureError(
                f"step {state.step + 1} of {state.num_steps} cannot be captured as a CUDA graph: it waits for the "
                "device, has shapes that depend on values or copies from the host. Run without a capture; torch says: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error
        return _Graph(graph, {name: (name, value.shape, value.dtype) for name, value in values.items()})

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer for values of that name, shape and dtype."""
        return self._buffers[name, like.shape, like.dtype]


_PARTICLES, _FAULTS = "particles/", "faults/"
_PLAIN = ("log_w", "w", "ess", "log_z", "log_z_settled")


def _tensors(values: FilterState | Advanced) -> dict[str, Tensor]:
    """All that a step reads, or writes, by name."""
    named = {name: getattr(values, name) for name in _PLAIN}
    named |= {f"{_PARTICLES}{name}": value for name, value in values.particles.items()}
    named |= {f"{_FAULTS}{name}": value for name, value in values.faults.items()}
    if isinstance(values, Advanced):
        assert values.ancestors is not None
        named |= {"chains": values.chains, "ancestors": values.ancestors}
    return named


def _under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _with_tensors(state: FilterState, named: Mapping[str, Tensor]) -> FilterState:
    plain: dict[str, Any] = {name: named[name] for name in _PLAIN}
    return replace(state, particles=_under(_PARTICLES, named), faults=_under(_FAULTS, named), **plain)


def _advanced(named: Mapping[str, Tensor]) -> Advanced:
    plain = {name: named[name] for name in (*_PLAIN, "chains", "ancestors")}
    return Advanced(particles=_under(_PARTICLES, named), faults=_under(_FAULTS, named), **plain)
