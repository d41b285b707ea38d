"""Moments of an attached adapter, gathered while its model runs forward and backward in whatever way.

Hooks on the layers see inputs and the gradients of outputs; both are thin once the factors have been applied. Rows that
no gradient comes to (fillers, tokens that nobody reads) do not count.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.slots import Slot, WeightReader, home_of, slots_of
from lorakit.errors import AttachError, UsageError
from lorakit.mode import eval_mode
from lorakit.moments import Moments


class _Layer:
    """One pair: its factors, and the sums."""

    def __init__(self, module: nn.Module, slot: Slot, a: Tensor, b: Tensor) -> None:
        self._module, self._kind, self._a, self._b = module, slot.kind, a, b
        r = len(a)
        self.seen, self.n_rows = torch.zeros(r, r, dtype=torch.float64), 0
        self.asked = torch.zeros(r, r, dtype=torch.float64)  # of finished steps
        self.now = torch.zeros(r, r, dtype=torch.float64)  # of this one

    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not y.requires_grad:  # the graph begins here
            y = y.detach().requires_grad_().clone()
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        y.register_hook(lambda dy: self._add(x, dy))  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def _add(self, x: Tensor, dy: Tensor) -> None:
        dtype = x.dtype if x.is_floating_point() else dy.dtype
        h = self._kind.by_place(self._kind.inner(self._module, x, self._a.to(dtype)))
        t = self._kind.by_place(self._kind.outer(self._module, dy, self._b.mT.to(dy.dtype)))
        real = t.abs().amax(1) > 0
        h, t = h[real].float(), t[real].float()
        self.seen += (h.mT @ h).cpu()
        self.now += (t.mT @ t).cpu()
        self.n_rows += len(h)


class Watched:
    """The layers whose moments are gathered."""

    def __init__(self, layers: dict[str, _Layer]) -> None:
        self._layers, self._steps = layers, 0

    def __len__(self) -> int:
        return len(self._layers)

    def step(self, n_labels: int = 1) -> None:
        """A step is over, whose loss was the mean over so many labels."""
        self._steps += 1
        for layer in self._layers.values():
            layer.asked += n_labels * layer.now
            layer.now.zero_()

    def sums(self) -> Tensor:
        """Everything in one vector, which processes may add up before `found`."""
        parts = [(layer.seen, layer.asked, torch.tensor([layer.n_rows])) for layer in self._layers.values()]
        return torch.cat(
            [torch.zeros(0, dtype=torch.float64), *(part.flatten().double() for three in parts for part in three)]
        )

    def found(self, sums: Tensor | None = None) -> dict[str, Moments]:
        """The moments; a layer that no gradient came to has none."""
        sums, moments, at = self.sums() if sums is None else sums, {}, 0
        for path, layer in self._layers.items():
            r = len(layer.seen)
            seen, asked, n_rows = torch.split(sums[at : at + 2 * r * r + 1], [r * r, r * r, 1])
            at += 2 * r * r + 1
            if float(n_rows):
                parts = seen / n_rows, asked / max(1, self._steps)
                moments[path] = Moments(*(part.view(r, r).float() for part in parts))
        return moments


@contextmanager
def moments_watched(model: nn.Module) -> Iterator[Watched]:
    """Within the block, every pass with gradients counts for the one active adapter. Its factors must stand still."""
    home, switch = home_of(model)
    if len(switch.active) != 1:
        raise AttachError(f"moments are those of one adapter, and {len(switch.active)} are active; activate one")
    (name,) = switch.active
    layers, handles = {}, []
    try:
        for module, parameter, slot in slots_of(home, switch.names[name]):
            factors: Any = slot._modules[name]
            pair = factors.pair(WeightReader(module, parameter, slot.kind))
            if pair is None or not factors.method.exact_pair or slot.kind.name == "parameter":
                continue
            if pair.a.ndim == 2 and len(pair.a) and getattr(module, "groups", 1) == 1:
                layers[slot.path] = _Layer(module, slot, pair.a.detach(), pair.scale * pair.b.detach())
                handles.append(module.register_forward_hook(layers[slot.path].watch, with_kwargs=True))
        yield Watched(layers)
    finally:
        for handle in handles:
            handle.remove()


def moments(model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Moments]:
    """What the active adapter's pairs see and are asked for on data, for `truncate(moments=...)`.

    `loss(model, batch)` gives the mean loss of a batch, whose changes `truncate` then foretells in proportion (in nats,
    times the batch's size). A few hundred rows are enough: the numbers are r x r. Nothing is changed; the model is in
    eval mode meanwhile.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)  # gradients of outputs alone are wanted
    try:
        with eval_mode(model), torch.enable_grad(), moments_watched(model) as watched:
            for batch in batches:
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
                watched.step()
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
    found = watched.found()
    if not found:
        raise UsageError("no gradient came to any pair of the active adapter: are there batches, and is there a loss?")
    return found
