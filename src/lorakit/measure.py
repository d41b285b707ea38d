"""What the layers of a model see and are asked for on real data, gathered before anything is attached.

Second moments of inputs and gradients of weights: what starts that look at data (eva, corda, lora-ga, eora) begin from.
Layers are watched by hooks, so that any way of running the model will do.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.describe import Found, locate
from lorakit.errors import PlanError, UsageError, nearest
from lorakit.method import METHODS, STARTS, Measured, settled
from lorakit.plan import LayerPlan, Plan
from lorakit.update import LayerSpec


def needs_of(plan: Plan) -> dict[str, frozenset[str]]:
    """Layer path -> what its start wants to know; only of those that want anything."""
    starts = {path: settled(layer).start for path, layer in plan.layers.items() if layer.method in METHODS}
    wanted = {path: STARTS[start].needs for path, start in starts.items() if start in STARTS}
    return {path: needs for path, needs in wanted.items() if needs}


def data_needs(plan: Plan) -> dict[str, frozenset[str]]:
    """The same, of what data tells alone."""
    found = {path: needs - {"original"} for path, needs in needs_of(plan).items()}
    return {path: needs for path, needs in found.items() if needs}


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    plan: Plan,
    *,
    loss: Callable[[Any], Tensor] | None = None,
) -> dict[str, Measured]:
    """Runs the model on batches and returns what the starts of a plan need of each of its layers.

    A batch is what the model is called with: a mapping of keywords, a tuple of arguments, or one argument. `loss` makes
    the loss of what the model gives, for starts that want gradients; without it the model's own `.loss` is taken.
    Nothing is changed; the model is in eval mode meanwhile. The starts of a quantized base (loftq) need no batches.
    """
    needs = needs_of(plan)
    if not needs:
        raise UsageError("no start of this plan needs to be measured; attach it as it is")
    training = model.training
    model.eval()
    try:
        with watched(model, needs) as found:
            gradients = any("gradient" in wanted for wanted in needs.values())
            for batch in batches:
                with torch.set_grad_enabled(gradients):
                    answer = _called(model, batch)
                    if gradients:
                        (loss(answer) if loss is not None else _own_loss(answer)).backward()  # type: ignore[no-untyped-call]
    finally:
        model.train(training)
    return found


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _own_loss(answer: Any) -> Tensor:
    found: Tensor | None = getattr(answer, "loss", None)
    if found is None:
        raise UsageError("a start of this plan needs gradients, and the model gives no loss; pass loss=...")
    return found


@contextmanager
def watched(
    model: nn.Module, needs: Mapping[str, Iterable[str]], rows: Callable[[], int | None] = lambda: None
) -> Iterator[dict[str, Measured]]:
    """Within the block every pass through the layers counts; the dict is filled at its end.

    `rows` tells how many of a pass's rows are real, where fillers stand behind them. Gradients are those of whatever
    is run backward within the block; no weight has to require one.
    """
    found: dict[str, Measured] = {}
    watches = {path: _Watch(_place(model, path), frozenset(wanted), rows) for path, wanted in needs.items()}
    try:
        for watch in watches.values():
            watch.begin()
        yield found
    finally:
        for watch in watches.values():
            watch.end()
    found |= {path: watch.result(path) for path, watch in watches.items()}


def _place(model: nn.Module, path: str) -> Found:
    place = locate(model, path)
    if place is None or place.kind.name == "parameter":
        raise PlanError(f"'{path}' is no layer of this {type(model).__name__} that can be watched")
    return place


class _Watch:
    """One layer."""

    def __init__(self, place: Found, needs: frozenset[str], rows: Callable[[], int | None]) -> None:
        self._place, self._needs, self._rows = place, needs, rows
        self._handle: Any = None
        self._n = self._n_backward = 0
        self._inputs: Tensor | None = None
        self._mean: Tensor | None = None
        self._gradient: Tensor | None = None

    def begin(self) -> None:
        self._handle = self._place.module.register_forward_hook(self._seen, with_kwargs=True)

    def end(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def result(self, path: str) -> Measured:
        if "inputs" in self._needs and self._inputs is None:
            raise PlanError(f"nothing ran through '{path}' while it was measured")
        if "gradient" in self._needs and self._gradient is None:
            raise PlanError(f"no gradient came to '{path}' while it was measured")
        n = max(1, self._n)
        return Measured(
            None if self._inputs is None else self._inputs / n,
            None if self._mean is None else self._mean / n,
            None if self._gradient is None else self._gradient / max(1, self._n_backward),
        )

    def _seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if "inputs" in self._needs:
            self._count(module, x.detach())
        if "gradient" not in self._needs or not torch.is_grad_enabled():
            return None
        if not y.requires_grad:  # the graph begins here
            y = y.detach().requires_grad_().clone()
        y.register_hook(lambda dy: self._add(module, x.detach(), dy))  # type: ignore[no-untyped-call]
        return y

    def _count(self, module: nn.Module, x: Tensor) -> None:
        flat = self._place.kind.rows(module, x)
        if flat is None:
            raise PlanError(f"the inputs of '{self._place.spec.path}' are no rows that can be counted")
        real = self._rows()
        flat = (flat if real is None else flat[:real]).float()
        if self._inputs is None or self._mean is None:
            self._inputs, self._mean = flat.new_zeros(flat.shape[1], flat.shape[1]), flat.new_zeros(flat.shape[1])
        self._inputs.addmm_(flat.T, flat)
        self._mean += flat.sum(0)
        self._n += len(flat)

    @torch.enable_grad()
    def _add(self, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        o, i = self._place.spec.matrix
        weight = torch.zeros(o, i, dtype=dy.dtype, device=dy.device, requires_grad=True)
        y = self._place.kind.dense(module, x.to(dy.dtype) if x.is_floating_point() else x, weight)
        (gradient,) = torch.autograd.grad(y, weight, dy)
        self._gradient = gradient.float() if self._gradient is None else self._gradient + gradient.float()
        self._n_backward += 1


def redistributed(plan: Plan, specs: Mapping[str, LayerSpec], measured: Mapping[str, Measured]) -> Plan:
    """The plan with the ranks that its starts choose by what was measured; a layer of rank 0 falls out.

    A layer keeps the number that multiplies it.
    """
    layers = dict(plan.layers)
    groups: dict[str, dict[str, LayerPlan]] = {}
    for path, layer in plan.layers.items():
        groups.setdefault(settled(layer).start, {})[path] = settled(layer)
    for start, own in groups.items():
        if start not in STARTS:
            continue
        known = {path: (specs[path], layer.rank, measured[path]) for path, layer in own.items() if path in measured}
        for path, rank in STARTS[start].ranks(known).items():
            if rank == 0:
                del layers[path]
            elif rank != own[path].rank:
                layers[path] = replace(own[path], rank=rank, scale=own[path].scale_value)
    return replace(plan, layers=layers)


def refuse_unmeasured(plan: Plan, measured: Mapping[str, Measured]) -> None:
    """PlanError for layers whose start needs what was not measured."""
    missing = [
        (path, sorted(needs))
        for path, needs in data_needs(plan).items()
        if path not in measured or not needs <= measured[path].known
    ]
    if missing:
        path, needs = missing[0]
        start = settled(plan.layers[path]).start
        hint = nearest(path, measured) if measured else ""
        raise PlanError(
            f"start '{start}' begins from data: it needs the {' and '.join(needs)} of '{path}'"
            f"{f' and {len(missing) - 1} more layers' if len(missing) > 1 else ''}, which were not measured{hint}; "
            "fit measures them, from Python lorakit.measure(model, batches, plan) does"
        )
