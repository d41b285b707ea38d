"""Several processes on one run, as torchrun starts them: each takes a share of every step, their gradients are added.

A share is some of the step's texts, about equal in tokens. The loss is divided by the labels of the whole step, so the
sum over the shares is what one process would have got. All processes hold the whole base (or a part of it:
trunk/shards.py), read all data, and end with the same parameters; only the first writes.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lorakit.device import CPU, backend
from lorakit.errors import FitError, UsageError
from lorakit.fit.settings import GO_ON

_PATIENCE = timedelta(minutes=10)  # how long a process is waited for that neither ends nor answers

T = TypeVar("T")


class Workers:
    """The processes of a run, of which this is one. Inside `with` they can talk to each other.

    Whatever they say raises FitError if one of them is gone.
    """

    def __init__(self, size: int = 1, number: int = 0, device: torch.device = CPU) -> None:
        self.size, self.number, self.device = size, number, device
        self.first = number == 0
        self._began = False

    @classmethod
    def started(cls, device: torch.device = CPU, *, shard: bool = False) -> "Workers":
        """Those that torchrun has started, by itself or for accelerate, this one on `device`; this one alone if it has
        not.

        UsageError if accelerate was asked for several and started one, and if one is to `shard` its base.
        """
        if "WORLD_SIZE" not in os.environ and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
            raise UsageError(
                "accelerate launch --cpu starts one process, whatever --num_processes says, and leaves the others to "
                "MPI; say --multi_gpu in the place of --cpu, which starts them all, on processors too"
            )
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if shard and size == 1:
            raise UsageError(
                "shard divides the base among several processes, and this run has one; start it by "
                "torchrun --nproc-per-node N -m lorakit fit ..., or leave shard off"
            )
        return cls(size, int(os.environ.get("RANK", "0")), device)

    def __enter__(self) -> "Workers":
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(backend(self.device), timeout=_PATIENCE)
            self._began = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._began:
            dist.destroy_process_group()

    def share(self, texts: Sequence[int], sizes: Sequence[int], fixed: bool = False) -> list[int]:
        """This process' part of the texts: the longest (by `sizes`, in tokens) first, each to who has least yet.

        With `fixed` every text always comes to the same process.
        """
        if self.size == 1:
            return list(texts)
        if fixed:
            return [text for text in texts if text % self.size == self.number]
        loads, own = [0] * self.size, list[int]()
        for size, text in sorted(zip(sizes, texts), reverse=True):
            least = loads.index(min(loads))
            loads[least] += size
            if least == self.number:
                own.append(text)
        return own

    def add(self, tensor: Tensor) -> None:
        """Puts the sum over all processes in place of `tensor`."""
        if self.size > 1:
            self._ask(dist.all_reduce, tensor)

    def most(self, number: int) -> int:
        """The largest of the numbers that the processes give here."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        self._ask(dist.all_reduce, found, dist.ReduceOp.MAX)
        return int(found)

    def join(self, whole: Tensor, own: Tensor) -> None:
        """Fills `whole (size * n,)` with the `own (n,)` of every process, in their order.

        In place: gloo's all_gather makes a copy of the whole, and took 4 times as long with 37 MB.
        """
        parts = whole.chunk(self.size)
        parts[self.number].copy_(own)
        self._ask(_sent, parts)

    def gather(self, value: T) -> list[T]:
        """What every process gives here, in their order, to every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._ask(dist.all_gather_object, found, value)
        return found

    def agreed(self, value: T) -> T:
        """What the first process gives here, to every process."""
        return self.gather(value)[0]

    def _ask(self, what: Any, *given: Any) -> None:
        try:
            what(*given)
        except RuntimeError as error:  # also DistBackendError
            raise FitError(
                f"process {self.number} of {self.size} has lost another one; the last checkpoint is whole, if there is "
                f"one, and {GO_ON} from it"
            ) from error


def _sent(parts: Sequence[Tensor]) -> None:
    """Every process has every part, of which each had one."""
    for work in [dist.broadcast(part, k, async_op=True) for k, part in enumerate(parts)]:
        work.wait()
