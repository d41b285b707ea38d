"""How a run begins: the head of its task, the plan, and fresh factors, from data where their start asks for it.

What was measured cannot be measured again to the bit, so factors that came of it are kept in the run directory
(`start/`) until it is done: a run that goes on begins with them.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import Adapter, load
from lorakit.attach import attach, detach, init
from lorakit.data.batches import Examples, Tokens, passes, training_batches
from lorakit.describe import describe
from lorakit.errors import UsageError
from lorakit.fit.settings import Settings
from lorakit.fit.workers import Workers
from lorakit.measure import data_needs, redistributed, watched
from lorakit.method import METHODS, STARTS, Measured
from lorakit.plan import LayerPlan, Plan
from lorakit.prompt import PromptPlan
from lorakit.quantize import forget
from lorakit.tasks.task import Task

START = "start"  # in a run directory
_BATCHES = 16  # of the training rows are measured
_HEAD_RATE = 1e-2  # for a head that knows nothing, through which no gradient would come


class Beginning:
    """Of one run: its model, task, examples to learn from, settings; `place` is its directory, `resume` whether it goes
    on; `given` is the adapter that it begins with, where it does not begin with a fresh one."""

    def __init__(
        self,
        net: nn.Module,
        goal: Task,
        examples: Examples,
        settings: Settings,
        workers: Workers,
        place: Path | None,
        resume: bool,
        given: Adapter | None = None,
    ) -> None:
        self._net, self._goal, self._examples, self._settings = net, goal, examples, settings
        self._workers, self._place, self._resume, self._given = workers, place, resume, given

    @contextmanager
    def adapted(self, plan: Plan | None) -> Iterator[Plan]:
        """Within the block the model has the task's head and fresh factors by the plan, which is given, head
        included, with the ranks that its start chose."""
        net, head = self._net, self._goal.head
        had_head = hasattr(net, head)
        self._goal.prepare(net)
        try:
            entries = plan or self._goal.plan(net, trained=(head,) if head else ())
            if head and not any(name == head or name.startswith(head + ".") for name in entries.trained):
                entries = replace(entries, trained=(*entries.trained, head))
            entries, fresh = (entries, self._headed()) if self._given is not None else self._begun(entries)
            attach(net, entries if fresh is None else fresh, seed=self._settings.seed, trainable=True)
            forget(net)
            try:
                yield entries
            finally:
                detach(net)
        finally:
            if head and not had_head and head in net._modules:
                del net._modules[head]

    def _headed(self) -> Adapter:
        """The given adapter, with the task's head as it is on the model where it brings none."""
        assert self._given is not None
        head, goal = self._goal.head, self._goal.note()
        before: Mapping[str, Any] = self._given.meta.get("task") or goal
        if head and any(name.startswith(f"{head}.") for name in self._given.trained):
            for key in ("name", "labels"):
                if before.get(key) != goal.get(key):
                    raise UsageError(
                        f"the adapter's head was trained for {key} {_short(before.get(key))}, and the rows are for "
                        f"{_short(goal.get(key))}; give it such rows, or begin with a fresh adapter"
                    )
        fresh = {name: p.detach().clone() for name, p in self._net.named_parameters() if name.startswith(f"{head}.")}
        return replace(self._given, trained={**(fresh if head else {}), **self._given.trained})

    def done(self) -> None:
        """Removes what was kept for going on."""
        if self._place is not None and self._workers.first:
            shutil.rmtree(self._place / START, ignore_errors=True)

    def _begun(self, plan: Plan) -> tuple[Plan, Adapter | None]:
        """The plan and its fresh factors, if they begin from data; else they follow from the plan and the seed."""
        if not data_needs(plan):
            return plan, None
        if self._settings.shard:
            raise UsageError(
                "a start that begins from data is measured on the whole base; leave shard off, or the start"
            )
        kept = self._place / START if self._place is not None else None
        if self._resume and kept is not None:
            if not (kept / "plan.toml").is_file():
                raise UsageError(f"'{kept}' is gone, with what this run began from; begin again with --overwrite")
            return Plan.load(kept / "plan.toml"), load(kept)
        found = None
        if self._workers.first:
            measured = self._measured(plan)
            chosen = redistributed(plan, {spec.path: spec for spec in describe(self._net)}, measured)
            found = chosen, init(self._net, chosen, seed=self._settings.seed, measured=measured)
        entries, fresh = self._workers.agreed(found) or (plan, None)
        if kept is not None and fresh is not None and self._workers.first:
            fresh.save(kept)
            entries.save(kept / "plan.toml")
        return entries, fresh

    def _measured(self, plan: Plan) -> Mapping[str, Measured]:
        """What the layers of the plan see of the first batches, and are asked for."""
        goal, net, settings, examples = self._goal, self._net, self._settings, self._examples
        needs = data_needs(plan)
        steep = any("gradient" in wanted for wanted in needs.values())
        if steep and type(goal).informed is not Task.informed:
            raise UsageError(
                f"task '{goal.name}' has no loss before the model has informed its rows; take a start without gradients"
            )
        with goal.trunk(net, dtype=settings.dtype, pad=examples.pad) as trunk:
            batches = list(training_batches(examples, settings.batch_size, settings.seed, 0, False))[:_BATCHES]
            most = settings.most_tokens if not trunk.why_padded else 1  # a text by itself needs no fillers
            parts = [part for batch in batches for part in passes(examples, batch, most)]
            with _head_that_knows(net, goal.head if steep else "") as step:
                if step is not None:
                    for part in parts:
                        batch = examples.gather(part)
                        with torch.no_grad():
                            hidden = batch.hidden(trunk, None)
                        step(goal.loss(net, hidden, batch) / max(1, examples.n_labels(part)))
                real: int | None = None
                with watched(net, needs, lambda: real) as found:
                    for part in parts:
                        batch = examples.gather(part)
                        real = batch.n_tokens if isinstance(examples, Tokens) else None
                        with torch.set_grad_enabled(steep):
                            hidden = batch.hidden(trunk, None)
                            if steep:
                                goal.loss(net, hidden, batch).backward()  # type: ignore[no-untyped-call]
        return found


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plan_of(adapter: Adapter) -> Plan:
    """The plan that an adapter comes closest to."""
    layers = {
        path: LayerPlan(
            layer.method,
            layer.rank,
            layer.scale if METHODS[layer.method].takes_scale else "",
            layer.start if layer.start in STARTS else "",
        )
        for path, layer in adapter.layers.items()
    }
    prompt = adapter.prompt
    asked = None if prompt is None else PromptPlan(prompt.method, prompt.length, prompt.start)
    return Plan(layers, tuple(sorted(adapter.trained)), prompt=asked)


@contextmanager
def _head_that_knows(net: nn.Module, name: str) -> Iterator[Callable[[Tensor], None] | None]:
    """Within the block the head may learn by steps on a loss; behind it, it is what it was. None for no head.

    A head begins at zero, so that no gradient would come through it.
    """
    if not name:
        yield None
        return
    head = net.get_submodule(name)
    kept = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    asked = {id(p): p.requires_grad for p in head.parameters()}
    optimizer = torch.optim.AdamW(head.requires_grad_().parameters(), lr=_HEAD_RATE)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    try:
        yield step
    finally:
        head.load_state_dict(kept)
        for parameter in head.parameters():
            parameter.requires_grad_(asked[id(parameter)])
            parameter.grad = None
