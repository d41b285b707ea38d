"""Frozen blocks that several processes hold together: each a part of every weight, all of one block at a time.

There is one room in memory, where the model is, for the weights of one block, and every block's parameters are windows
into it. Before a block runs forward, and before gradients come back to it, all processes put their parts into the room;
what autograd kept of a weight is the same window, and sees the same numbers again. Nothing else is moved: what is
frozen has no gradient to add up.

So all processes must run the same blocks in the same order: as many passes, whatever their texts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorakit.trunk.place import place_of

_ALIGNED = 64  # bytes: where a weight may begin in the room


class Peers(NamedTuple):
    """`size` processes, of which this is the one with that `number`.

    `join(whole, own)` fills `whole (size * bytes,)` with the `own (bytes,)` of all, in their order.
    """

    size: int
    number: int
    join: Callable[[Tensor, Tensor], None]


class Shards:
    """The frozen weights of these blocks, of which this process keeps its part, until the end of the `with` block.

    Vectors stay whole, and weights that are in several blocks, or outside of them too. On leaving every process has all
    of them again, bit for bit; not after an error, when nobody knows what the other processes do: then they are empty.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], peers: Peers) -> None:
        self.blocks, self._peers = list(blocks), peers
        homes: dict[int, set[int]] = {}  # by the id of a parameter: the blocks that have it, -1 for what is outside
        inside = {id(module) for block in self.blocks for module in block.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        for k, modules in enumerate([outside, *(block.modules() for block in self.blocks)], -1):
            for module in modules:
                for weight in module._parameters.values():
                    homes.setdefault(id(weight), set()).add(k)
        own = [[p for p in block.parameters() if len(homes[id(p)]) == 1 and _divided(p)] for block in self.blocks]
        self._weights = own
        self._own: list[Tensor] = []
        self._room = torch.empty(0, dtype=torch.uint8, device=place_of(model))
        self._inside = -1  # the block that is in the room
        self._handles: list[Any] = []

    @property
    def n_bytes(self) -> int:
        """Bytes of the parts that this process keeps; the room comes to that."""
        return sum(own.nbytes for own in self._own)

    @property
    def spared(self) -> int:
        """Bytes that this process is rid of."""
        whole = sum(weight.nbytes for weights in self._weights for weight in weights)
        return whole - self.n_bytes - self._room.nbytes

    @torch.no_grad()
    def __enter__(self) -> "Shards":
        size, number = self._peers.size, self._peers.number
        lengths = [sum(map(_bytes, weights)) for weights in self._weights]
        lengths = [length + -length % (size * _ALIGNED) for length in lengths]
        self._room = self._room.new_empty(max(lengths, default=0))
        for weights, length in zip(self._weights, lengths):
            begin, part = 0, length // size
            for weight in weights:
                window = self._room[begin : begin + weight.nbytes].view(weight.dtype).view(weight.shape)
                window.copy_(weight)
                weight.data = window
                begin += _bytes(weight)
            self._own.append(self._room[number * part : (number + 1) * part].clone())
        for k, block in enumerate(self.blocks):
            before = block.register_forward_pre_hook(partial(_before, self, k), prepend=True)  # updates read weights
            self._handles += [before, block.register_forward_hook(partial(_after, self, k))]
        return self

    @torch.no_grad()
    def __exit__(self, failed: Any, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for k, weights in enumerate(self._weights):
            if failed is None:
                self.fetch(k)
            for weight in weights:
                weight.data = weight.data.clone() if failed is None else weight.data.new_empty(0)
        self._own, self._room = [], self._room.new_empty(0)

    def bring(self, weight: Tensor) -> None:
        """Puts the block of this weight into the room, if it has one."""
        for k, weights in enumerate(self._weights):
            if any(weight is other for other in weights):
                self.fetch(k)

    def fetch(self, k: int) -> None:
        """Puts block k into the room, with all other processes."""
        if self._inside != k and self._weights[k]:
            own = self._own[k]
            self._peers.join(self._room[: self._peers.size * len(own)], own)
            self._inside = k


def frozen_bytes(model: nn.Module, shards: Sequence[Shards]) -> int:
    """Bytes of the frozen weights that are in this process' memory."""
    storages = (p.untyped_storage() for p in model.parameters() if not p.requires_grad)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + sum(shard.n_bytes for shard in shards)


def told(shards: Sequence[Shards], size: int) -> list[str]:
    """What is to be said of them where they spare no memory; each of `size` processes has the room beside its part."""
    if sum(shard.spared for shard in shards) > 0:
        return []
    counts, least = "+".join(str(len(shard.blocks)) for shard in shards), size // (size - 1) + 1
    return [
        f"shard spares no memory here: of {counts} blocks each of {size} processes holds its part, and one block as a "
        f"whole; it takes {least} blocks or more, so leave shard off"
    ]


def _divided(weight: Tensor) -> bool:
    """Vectors, which are small, stay whole, and of course what learns."""
    return not weight.requires_grad and weight.ndim > 1 and weight.is_contiguous()


def _bytes(weight: Tensor) -> int:
    return weight.nbytes + -weight.nbytes % _ALIGNED


def _before(shards: Shards, k: int, *_: Any) -> None:
    shards.fetch(k)


def _after(shards: Shards, k: int, module: nn.Module, args: Any, output: Any) -> None:
    """Lets the block be fetched again when the first gradient comes back to it."""
    for part in tree_leaves(output):
        if isinstance(part, Tensor) and part.requires_grad:
            part.register_hook(partial(_before, shards, k))  # type: ignore[no-untyped-call]
