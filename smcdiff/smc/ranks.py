r"""What the processes of one run say to each other, with every silence turned into an error.

The processes are those of ``torch.distributed``: rank r of R. A group of their own is opened for each run, with its own
time limit; when one process leaves the run, by an error or by dying, its connections close, and the next exchange of
every other one raises :class:`RankError`. A process that hangs is noticed when the time limit is over. Over Gloo the
tensors travel through the host's memory; over NCCL they stay on the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankError", "Ranks"]


class RankError(RuntimeError):
    """Another process of the run failed, died or stopped answering. The message says what to do."""


class Ranks:
    """The R processes of a run, as one of them sees the others.

    Args:
        group: of ``torch.distributed``, :meth:`open` makes one; None for one process that is alone.
        device: where the tensors travel over NCCL; None for the process's current GPU.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        self._group, self._device = group, torch.device("cpu")
        self.rank, self.count = 0, 1
        if group is not None:
            self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
            if "nccl" in dist.get_backend(group):
                self._device = device or torch.device("cuda", torch.cuda.current_device())

    @classmethod
    @contextmanager
    def open(cls, time_limit: float, device: torch.device | None = None) -> Iterator[Ranks]:
        """The processes of the default group, connected until the block is left.

        Args:
            time_limit: in seconds, for any one exchange: longer than the slowest rank can lag behind the fastest.
            device: where the run's tensors live; None for the process's current GPU over NCCL.

        Raises:
            RankError: where a process does not come.
            RuntimeError: where ``torch.distributed`` was not initialised.
            ValueError: for a time limit that is not positive and finite.
        """
        if not 0 < time_limit < math.inf:
            raise ValueError(f"got a time limit of {time_limit} s; expected a positive, finite number of seconds")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "got no processes to run on; start the program with torchrun and call "
                'torch.distributed.init_process_group("gloo"), or "nccl" on GPUs, first'
            )
        try:
            ranks = cls(dist.new_group(timeout=timedelta(seconds=time_limit)), device)
        except RuntimeError as error:
            raise RankError(f"the ranks could not be connected ({_first_line(error)}); see that all started") from error
        try:
            yield ranks
        finally:
            ranks._close()

    def gather(self, value: Tensor) -> Tensor:
        """The value of every rank, (R, *shape), on the device of ``value``; each rank's has the same shape."""
        if self.count == 1:
            return value[None]
        here = value.to(self._device).contiguous()
        parts = [torch.empty_like(here) for _ in range(self.count)]
        try:
            dist.all_gather(parts, here, group=self._group)
        except RuntimeError as error:
            raise self._silent(error) from error
        return torch.stack(parts).to(value.device)

    def gather_all(self, *groups: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """:meth:`gather` of many tensors of any dtype, in one exchange of their bytes."""
        values = [value for group in groups for value in group.values()]
        sent = [value.to(self._device).contiguous().flatten().view(torch.uint8) for value in values]
        came = self.gather(torch.cat(sent)).split([len(part) for part in sent], 1)
        whole = iter(
            part.clone(memory_format=torch.contiguous_format)  # a new tensor, aligned for its dtype
            .flatten()
            .view(value.dtype)
            .reshape(self.count, *value.shape)
            .to(value.device)
            for value, part in zip(values, came, strict=True)
        )
        return [{name: next(whole) for name in group} for group in groups]

    def exchange(self, rows: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        """Send rows (sum(outgoing), width), in the order of the ranks they are for; the rows that came, likewise."""
        here = rows.to(self._device).contiguous()
        came = here.new_empty((sum(incoming), here.shape[1]))
        try:
            dist.all_to_all_single(came, here, incoming, outgoing, group=self._group)
        except RuntimeError as error:
            raise self._silent(error) from error
        return came.to(rows.device)

    def agree(self, value: Tensor, what: str) -> None:
        """See that all ranks have the same 0-d integer, before an exchange whose sizes depend on it.

        Raises:
            RankError: if they have not, saying that ``what`` differs.
        """
        values = self.gather(value)
        if not bool((values == values[0]).all()):
            raise RankError(
                f"the {self.count} ranks have different {what}; call run with the same model and arguments on every "
                "rank, on devices of one kind and with one version of torch"
            )

    def settle(self, error: Exception | None) -> None:
        """Go on together or not at all: raise this rank's error, or name the ranks that have one.

        Raises:
            RankError: if other ranks gave an error.
        """
        failed = self.gather(torch.tensor(error is not None, dtype=torch.uint8)).nonzero().flatten().tolist()
        if error is not None:
            raise error
        if failed:
            raise RankError(
                f"rank {', '.join(map(str, failed))} of {self.count} failed and rank {self.rank} stops with it; the "
                "cause is the error that was raised there"
            )

    def _silent(self, error: RuntimeError) -> RankError:
        return RankError(
            f"rank {self.rank} of {self.count} lost the others: one of them died, raised an error or took longer than "
            "the time limit. Look for the first error in their output; a run with a checkpoint goes on where it stood "
            f"when it is started again. torch.distributed says: {_first_line(error)}"
        )

    def _close(self) -> None:
        """Close this rank's connections, so that no other rank waits for it."""
        group, self._group = self._group, None
        if group is not None:  # of None, all groups would be destroyed
            dist.destroy_process_group(group)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]
