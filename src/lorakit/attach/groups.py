"""Groups: attached layers that read one input (q, k, v; gate, up) run as one, by what was seen to happen in a forward.

The first of them that is called computes all; the others take what is ready if they are called with that very input.
So nothing of the model's code has to be known, and a call that comes otherwise costs time, not correctness.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kernels.lora import Layer, Ready, lora_group, padded_rank
from lorakit.attach.kernels.products import pack
from lorakit.attach.slots import Factors, Slot, WeightReader, slots_of, switch_of


class Group:
    """Layers with one input, under one adapter. `now` are their factors as the products take them (see `refresh`)."""

    def __init__(self, members: Sequence[tuple[nn.Module, Slot, Factors]], dtype: torch.dtype, packs: bool) -> None:
        self.members = list(members)
        self.index = {id(slot): k for k, (_, slot, _) in enumerate(self.members)}
        readers = [WeightReader(module, slot.parameter, slot.kind) for module, slot, _ in members]
        self.packed = [pack(reader()) if packs else None for reader in readers]
        self._x: tuple[Any, ...] = ()
        self._parts: list[Tensor | None] = []
        device = members[0][2].tensors()["a"].device
        ranks = [padded_rank(factors.rank, device, dtype) for _, _, factors in members]
        i = members[0][2].tensors()["a"].shape[1]
        outs = [factors.tensors()["b"].shape[0] for _, _, factors in members]
        a = torch.zeros(sum(ranks), i, dtype=dtype, device=device)
        self.now = Ready(a, tuple(torch.zeros(r, o, dtype=dtype, device=device) for o, r in zip(outs, ranks)))

    def targets(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Where each factor has to be copied: (place, factor, what it is multiplied by)."""
        row = 0
        for (_, _, factors), b in zip(self.members, self.now.b):
            yield self.now.a[row : row + factors.rank], factors.tensors()["a"], 1.0
            yield b[: factors.rank].T, factors.tensors()["b"], factors.scale
            row += b.shape[0]

    def takes(self, slot: Slot, factors: Factors, x: Tensor) -> bool:
        """This call is one for the group."""
        return (
            self.members[self.index[id(slot)]][2] is factors
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
        layers = []
        for (module, slot, factors), packed in zip(self.members, self.packed):
            tensors = factors.tensors()
            weight = WeightReader(module, slot.parameter, slot.kind)()
            layers.append(Layer(weight, module.bias, tensors["a"], tensors["b"], factors.scale, packed))  # type: ignore[arg-type]
        return lora_group(x, layers, self.now)


class Groups:
    """All groups of a model under one adapter."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self._places = [entry for group in groups for entry in group.targets()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the factors are now; to be called whenever they have changed."""
        if self._places:
            scaled = [factor if by == 1 else factor * by for _, factor, by in self._places]
            torch._foreach_copy_([place for place, _, _ in self._places], scaled)

    def gradients_in_place(self, on: bool) -> None:
        """Whether the backward adds to the `.grad` that every factor has already, and tells autograd nothing."""
        for group in self.groups:
            factors = [(f.tensors()["a"].grad, f.tensors()["b"].grad) for _, _, f in group.members]
            windows = [(a, b) for a, b in factors if a is not None and b is not None]
            group.now = group.now._replace(into=tuple(windows) if on and len(windows) == len(factors) else ())

    def release(self) -> None:
        """Lets every layer run by itself again."""
        for group in self.groups:
            for _, slot, _ in group.members:
                slot.group = None


@contextmanager
def inputs_recorded(model: nn.Module) -> Iterator[list[tuple[Slot, Tensor]]]:
    """Yields a list of (slot, input) in the order of the calls of fused layers within the block."""
    switch = switch_of(model)
    switch.inputs = []
    try:
        yield switch.inputs
    finally:
        switch.inputs = None


def make_groups(
    model: nn.Module, name: str, calls: Sequence[tuple[Slot, Tensor]], dtype: torch.dtype, packs: bool = True
) -> Groups:
    """Groups for the adapter `name` from recorded calls. What is not a plain trained pair stays by itself.

    With `packs` frozen weights are kept a second time, in oneDNN's order, where that helps.
    """
    switch = switch_of(model)
    able: dict[int, tuple[nn.Module, Slot, Factors]] = {}
    for module, _, slot in slots_of(model, switch.names[name]):
        factors = slot._modules.get(name)
        if slot.drive == "fused" and isinstance(factors, Factors) and _plain(module, factors):
            able[id(slot)] = (module, slot, factors)
    seen: set[int] = set()
    groups: list[list[tuple[nn.Module, Slot, Factors]]] = []
    last: Tensor | None = None
    for slot, x in calls:
        if id(slot) not in able or id(slot) in seen:
            last = None
            continue
        seen.add(id(slot))
        if x is last:
            groups[-1].append(able[id(slot)])
        else:
            groups.append([able[id(slot)]])
        last = x
    made = Groups([Group(members, dtype, packs) for members in groups])
    for group in made.groups:
        for _, slot, _ in group.members:
            slot.group = group
    made.refresh()
    return made


def _plain(module: nn.Module, factors: Factors) -> bool:
    trained = any(name.startswith("trained_") for name in module._modules)
    return factors.method.name == "lora" and factors.tensors().keys() == {"a", "b"} and not trained
