"""Groups: attached layers that read one input (q, k, v; gate, up) run as one, by what was seen to happen in a forward.

The first of them that is called computes all; the others take what is ready if they are called with that very input.
So nothing of the model's code has to be known, and a call that comes otherwise costs time, not correctness.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.attach.convolution import Convolution, alike, norms_seen
from lorakit.attach.group import Group, Member
from lorakit.attach.once import Once
from lorakit.attach.slots import Factors, Slot, WeightReader, slots_of, switch_of
from lorakit.kernels.gains import fit
from lorakit.kernels.maps import Geometry


class Groups:
    """All groups of a model under one adapter, and the updates that are made once a step."""

    def __init__(self, groups: Sequence[Group], once: Once) -> None:
        self.groups = list(groups)
        self.once = once
        self._find_places()

    @torch.no_grad()
    def _find_places(self) -> None:
        self._places = [entry for group in self.groups for entry in group.targets()]
        self._gained = [(group, gains) for group in self.groups if (gains := group.gains())]
        self.refresh()

    def fold_norms(self, model: nn.Module, run: Callable[[], Tensor], tolerance: float) -> None:
        """Folds batch norms into the convolutions before them, where `run` proves that nothing changes."""
        with norms_seen(model, self.groups) as found:
            wanted = run()
        for norm, source in found.items():
            source.fold(norm)
        self._find_places()
        if found and not alike(run(), wanted, tolerance):
            for source in found.values():
                source.unfold()
            self._find_places()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the factors are now; to be called whenever they have changed."""
        self.once.refresh()
        steady = fit([gain for _, gains in self._gained for gain in gains])
        for group, gains in self._gained:
            group.steady = steady or fit(gains)
        if self._places:
            scaled = [(factor if _is_one(by) else factor * by).view_as(place) for place, factor, by in self._places]
            torch._foreach_copy_([place for place, _, _ in self._places], scaled)

    def gradients_in_place(self, on: bool) -> None:
        """Whether the backward adds to the `.grad` that factors and made updates have already, and tells autograd
        nothing; a step then begins with `clear` and ends with `settle`."""
        self.once.stand(on)
        for group in self.groups:
            pairs = group.pairs() if on else []
            learning = [t for a, b, _, gain in pairs for t in (a, b, gain) if t is not None and t.requires_grad]
            if not on or any(tensor.grad is None for tensor in learning):
                group.now = group.now._replace(into=(), gains=())
                continue
            into = tuple((a.grad, b.grad) for a, b, _, _ in pairs)
            gains = tuple(None if gain is None else gain.grad for *_, gain in pairs)
            group.now = group.now._replace(into=into, gains=gains)

    def clear(self) -> None:
        """Forgets gradients that were not settled."""
        self.once.clear()

    def settle(self) -> None:
        """Takes the gradients of made updates to their factors."""
        self.once.settle()

    def release(self) -> None:
        """Lets every layer run by itself again."""
        for group in self.groups:
            group.release()
        self.once.release()


def _is_one(by: float | Tensor) -> bool:
    return not isinstance(by, Tensor) and by == 1


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
    model: nn.Module,
    name: str,
    calls: Sequence[tuple[Slot, Tensor]],
    dtype: torch.dtype,
    packs: bool = True,
    part: nn.Module | None = None,
) -> Groups:
    """Groups for the adapter `name` from recorded calls, in the whole model or a part of it. What is not a pair, or
    made one, stays by itself.

    With `packs` frozen weights are kept a second time where that helps: in oneDNN's order, or beside their pair.
    """
    switch, once = switch_of(model), Once(model, part or model, name)
    able: dict[int, Member] = {}
    for module, parameter, slot in slots_of(model, switch.names[name]):
        factors, reader = slot._modules.get(name), WeightReader(module, parameter, slot.kind)
        runs = slot.kind.is_product or (packs and Geometry.of(module) is not None)
        if slot.drive == "fused" and runs and isinstance(factors, Factors) and _runs(module, factors, reader):
            able[id(slot)] = (module, slot, factors)
    seen: set[int] = set()
    groups: list[list[Member]] = []
    last: Tensor | None = None
    for slot, x in calls:
        if id(slot) not in able or id(slot) in seen:
            last = None
            continue
        seen.add(id(slot))
        if x is last and Geometry.of(able[id(slot)][0]) is None:
            groups[-1].append(able[id(slot)])
        else:
            groups.append([able[id(slot)]])
        last = x
    made = Groups([_group(members, dtype, packs) for members in groups], once)
    for group in made.groups:
        for _, slot, _ in group.members:
            slot.group = group
    return made


def _group(members: Sequence[Member], dtype: torch.dtype, packs: bool) -> Group:
    geometry = Geometry.of(members[0][0])
    return Group(members, dtype, packs) if geometry is None else Convolution(members[0], geometry, dtype)


def _runs(module: nn.Module, factors: Factors, reader: WeightReader) -> bool:
    trained = any(name.startswith("trained_") for name in module._modules)
    with torch.no_grad():
        pair = factors.pair(reader)
    plain = pair is not None and (pair.gain is None or Geometry.of(module) is None)
    return plain and not trained
