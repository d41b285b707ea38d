"""One group: attached layers that read one input, their factors as the products take them, and the calls it answers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.slots import Factors, Pair, Slot, WeightReader
from lorakit.kernels.lora import Layer, Ready, lora_group, padded_rank
from lorakit.kernels.products import pack

Member = tuple[nn.Module, Slot, Factors]


class Group:
    """Layers with one input, under one adapter. `now` are their factors as the products take them (see `refresh`).

    While it is not `steady`, a gain being too near 0 for the products, every layer runs by itself.
    """

    def __init__(self, members: Sequence[Member], dtype: torch.dtype, packs: bool) -> None:
        self.members = list(members)
        self.index = {id(slot): k for k, (_, slot, _) in enumerate(self.members)}
        self.readers = [WeightReader(module, slot.parameter, slot.kind) for module, slot, _ in members]
        self.packed = [pack(reader.operand()) if packs else None for reader in self.readers]
        self.steady = True
        self._x: tuple[Any, ...] = ()
        self._parts: list[Tensor | None] = []
        self.now = self._room(dtype)

    def _room(self, dtype: torch.dtype) -> Ready:
        """Zeros for all factors."""
        pairs = self.pairs()
        device, i = pairs[0].a.device, pairs[0].a.shape[1]
        ranks = [padded_rank(len(pair.a), device, dtype) for pair in pairs]
        a = torch.zeros(sum(ranks), i, dtype=dtype, device=device)
        return Ready(a, tuple(torch.zeros(r, len(pair.b), dtype=dtype, device=device) for pair, r in zip(pairs, ranks)))

    def pairs(self) -> list[Pair]:
        """What each member adds, as it stands now."""
        found = [factors.pair(reader) for (_, _, factors), reader in zip(self.members, self.readers)]
        return [pair for pair in found if pair is not None]

    def gains(self) -> list[Tensor]:
        """What multiplies outputs."""
        return [pair.gain for pair in self.pairs() if pair.gain is not None]

    def targets(self) -> Iterator[tuple[Tensor, Tensor, float | Tensor]]:
        """Where each factor has to be copied: (place, factor, what it is multiplied by)."""
        row = 0
        for pair, b in zip(self.pairs(), self.now.b):
            r = len(pair.a)
            yield self.now.a[row : row + r], pair.a, 1.0
            yield b[:r].T, pair.b, pair.scale
            row += len(b)

    def takes(self, slot: Slot, factors: Factors, x: Tensor) -> bool:
        """This call is one for the group."""
        return (
            self.steady
            and self.members[self.index[id(slot)]][2] is factors
            and x.dtype == self.now.a.dtype
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def run(self, slot: Slot, x: Tensor) -> Tensor:
        """The output of the layer of this slot."""
        k = self.index[id(slot)]
        call = (x, x._version, torch.is_grad_enabled())
        if self._x and self._x[0] is x and self._x[1:] == call[1:] and self._parts[k] is not None:
            part = self._parts[k]
        else:
            self._x, self._parts = call, list(self._compute(x))
            part = self._parts[k]
        self._parts[k] = None
        if not any(other is not None for other in self._parts):
            self._x = ()
        assert part is not None
        return part

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        return lora_group(x, self._layers(), self.now)

    def release(self) -> None:
        """Lets every layer run by itself again."""
        for _, slot, _ in self.members:
            slot.group = None

    def _layers(self) -> list[Layer]:
        layers = []
        for (module, _, _), reader, pair, packed in zip(self.members, self.readers, self.pairs(), self.packed):
            layers.append(Layer(reader.operand(), module.bias, *pair, packed=packed))  # type: ignore[arg-type]
        return layers
