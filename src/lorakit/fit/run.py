"""fit: from a model and rows to a run directory with an adapter that is proven on rows it has not seen.

The order of things is here; the run directory is in directory.py, a step in learner.py, the loop in loop.py.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lorakit._version import __version__
from lorakit.adapter import Adapter
from lorakit.attach import attached, base_fingerprint, collect
from lorakit.attach.slots import find_home
from lorakit.data import Splits, load_splits
from lorakit.data.batches import Examples
from lorakit.data.faults import counted, gathered, made, skipping, usable
from lorakit.device import name_of, resolve_device
from lorakit.errors import UsageError
from lorakit.fit.begin import Beginning, plan_of
from lorakit.fit.budget import Budget
from lorakit.fit.checkpoint import settled_before
from lorakit.fit.courses import courses_of, finished
from lorakit.fit.directory import Journal, alone_in, claim, clear, finish
from lorakit.fit.learner import Learner
from lorakit.fit.loop import Record, total_steps, train
from lorakit.fit.moments import moments_of, still_theirs
from lorakit.fit.settings import Settings, make_settings
from lorakit.fit.settle import settle
from lorakit.fit.summary import about, course, named, notes
from lorakit.fit.threads import threads_put_back
from lorakit.fit.tokenised import tokenised
from lorakit.fit.workers import Workers
from lorakit.kernels.native import reason
from lorakit.plan import Plan
from lorakit.tasks.base import Base
from lorakit.tasks.task import TASKS, Task, figure
from lorakit.trunk import eval_mode, place_of, placed, resolve_dtype
from lorakit.trunk.memory import peak_resident
from lorakit.trunk.shards import Peers, frozen_bytes, told

Watch = Callable[[Record, int], None]


@dataclass(frozen=True)
class Result:
    """What a fit brought: the adapter, metrics before and after on the test rows, records, and the run directory."""

    adapter: Adapter
    before: dict[str, float]
    metrics: dict[str, float]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    out: Path | None

    def __repr__(self) -> str:
        where = f", '{self.out}'" if self.out else ""
        name = self.summary["metric"]
        change = f"{name} {figure(name, self.before[name])} -> {figure(name, self.metrics[name])}"
        return f"Result({change}, {self.adapter!r}{where})"


@threads_put_back()
def fit(
    model: str | Path | Base,
    data: Any,
    task: str = "classify",
    *,
    plan: Plan | None = None,
    adapter: Adapter | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    consume: bool = False,
    watch: Watch | None = None,
    ready: Callable[[Splits[Any]], object] | None = None,
    **settings: Any,
) -> Result:
    """Trains an adapter, and a head where the task has one; keeps the best by the validation rows; reports on the test
    rows.

    `model` is a name for `load_base` or a loaded Base, which is left as it was (with `consume` its frozen weights may
    stay in `dtype`, which spares the memory of the originals); `data` a source for `load_splits` (a file, rows in
    memory ...), or its result. `task` is the name of one: "classify" (one label for each text), "generate" (a written
    answer to each prompt) ... (docs/tasks). `plan` defaults to rank 8 on every matrix; with `adapter` that one
    goes on learning, by the plan that it was made by. `settings` are those of
    `lorakit.fit.settings.Settings`, and the task's own `choices`. With `out`, a run directory is written; a run that
    was killed goes on with `resume=True` and ends with the very numbers of an uninterrupted one. Started by torchrun,
    its processes share the work of every step, and the first writes. `watch` is called with every Record and the total
    number of steps; before the first with one of kind "start", whose values tell memory: `estimated_bytes`,
    `free_bytes`, `tokens_per_pass`; and the first row as the model sees it, `seen`. `ready` is called with the rows of
    all parts, once it is known which of them can be used.
    """
    _refuse_other(model)
    if plan is not None and adapter is not None:
        raise UsageError("an adapter that goes on learning has its plan; give a plan or an adapter")
    plan = plan if adapter is None else plan_of(adapter)
    kind: type[Task] = TASKS[task]
    choices = {name: settings.pop(name) for name in kind.choices if name in settings}
    chosen = make_settings(settings)
    where = resolve_device(chosen.device, *([place_of(model.model)] if isinstance(model, Base) else []))
    chosen = replace(chosen, device=str(where), dtype=resolve_dtype(chosen.dtype, where))
    place = Path(out) if out is not None else None
    workers = Workers.started(where, shard=chosen.shard)
    writes = place if workers.first else None
    if writes is not None:
        claim(writes, resume, overwrite)
    began = time.perf_counter()
    with skipping(chosen.skip_bad, data.skipped if isinstance(data, Splits) else ()):
        data = data if isinstance(data, Splits) else load_splits(data, read=kind.read, seed=chosen.seed)
        with gathered(all_seen=True):
            data, base = usable(data, lambda rows: _base(model, kind, rows.checked()))
            base = _with_room(base, plan)
            known = data
            data, (goal, parts) = usable(
                data, lambda rows: _ready(kind, rows if rows is known else rows.checked(), base, choices, chosen)
            )
    _refuse_adapted(base)
    if ready is not None:
        ready(data)
    net, keep = base.model, isinstance(model, Base) and not consume
    moves = place_of(net) != where  # then what it was before waits there
    sizes = {
        "base_parameters": sum(p.numel() for p in net.parameters()),
        "base_bytes": sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())),
    }
    beginning = Beginning(net, goal, parts["train"], chosen, workers, place, resume, adapter)
    for examples in parts.values():
        if plan is not None and plan.prompt is not None:
            examples.extra = plan.prompt.length
    with (
        placed(net, where, keep=keep),
        eval_mode(net),
        workers,
        alone_in(writes, resume, overwrite),
        beginning.adapted(plan) as entries,
    ):
        identity = {
            "settings": chosen.values(),
            "plan": entries.toml(),
            "base": base_fingerprint(net, entries.layers, entries.prompt is not None),
            "base_name": base.name,
            "data": [rows.digest() for rows in (data.train, data.valid, data.test)],
            "adapter": adapter.digest if adapter is not None else "",
            **named(goal),
        }
        trunk = goal.trunk(net, dtype=chosen.dtype, pad=parts["train"].pad, keep=keep and not moves)
        if chosen.shard:
            trunk.share_out(Peers(workers.size, workers.number, workers.join))
        with trunk, closing(Learner(net, goal, trunk, chosen, workers)) as learner:
            if writes is not None and not resume:
                clear(writes)
            workers.most(0)  # the directory is there before anyone writes into it
            held = frozen_bytes(net, trunk.shards)
            shards_told = told(trunk.shards, workers.size) if chosen.shard else []
            if chosen.shard and not any(shards.n_bytes for shards in trunk.shards):
                raise UsageError(f"'{base.name}' has no stack of blocks to divide; leave shard off")
            parts = {name: goal.informed(net, examples, learner.scores) for name, examples in parts.items()}
            kept = learner.keep_prefix(parts, place)
            budget = Budget(learner, parts)
            earlier = settled_before(place / "checkpoint") if place and resume else None
            settled = settle(learner, parts["train"], entries, budget, earlier)
            memory = budget.begin(learner)
            before = learner.evaluate(parts["test"])
            n_steps = total_steps(len(parts["train"]), chosen)
            learner.courses = courses_of(net, n_steps)
            with Journal(learner, place, resume, identity, settled) as journal:
                state = journal.state
                if watch is not None:
                    seen = goal.preview(parts["train"], 0, base.tokenizer)
                    watch(Record("start", state.step, state.epoch, {**memory, "seen": seen}), n_steps)
                for record in train(learner, parts["train"], parts["valid"], state):
                    journal.add(record)
                    if watch is not None:
                        watch(record, n_steps)
            assert state.best_values is not None
            learner.ema = None
            learner.load(state.best_values)
            moments = moments_of(learner, parts["train"], n_steps)
            goal = learner.task = goal.calibrated(parts["valid"], learner.scores)
            metrics = learner.evaluate(parts["test"])
            memory["peak_bytes"] = peak_resident(where)
        tried = goal.tried(base, data.test.core) if workers.first else {}
        fitted = collect(net)
        adapter = finished(fitted).with_meta(
            base_name=base.name, task=goal.note(), metrics=metrics, lorakit=__version__
        )
        if goal.peft_task:
            adapter = adapter.with_meta(peft={"task_type": goal.peft_task})
        spent = time.perf_counter() - began + journal.seconds_before
        summary = {
            **about(base, goal, adapter, data, learner.flat.values.numel()),
            **course(state, journal.records, spent, n_steps),
            "before": before,
            "test": metrics,
            **sizes,
            "settings": chosen.filled(settled).values(),
            "dtype": trunk.precision,
            "device": chosen.device,
            "gpu": name_of(where),
            "padded": trunk.why_padded,
            "uncompiled": reason() if where.type == "cpu" else "",
            "prefix": kept,
            "settled": settled,
            "memory": memory,
            "processes": workers.size,
            "skipped": counted(data.skipped),
            "sharded": held if chosen.shard else 0,
            "notes": [*shards_told, *notes(journal, learner.settings, before["loss"], metrics["loss"], data.skipped)],
            **tried,
        }
        if writes is not None:
            finish(writes, goal, adapter, entries, journal.records, summary, still_theirs(moments, fitted, adapter))
            beginning.done()
    return Result(adapter, before, metrics, journal.records, summary, place)


def _refuse_other(model: object) -> None:
    """UsageError for what is no base."""
    if isinstance(model, nn.Module):
        raise UsageError(
            f"fit takes a Base, not a bare {type(model).__name__}: it needs its tokenizer too; "
            "lorakit.tasks.base.Base(model, tokenizer, name, pool, max_length) has both"
        )
    if not isinstance(model, str | Path | Base):
        raise UsageError(f"the model is {model!r:.60}; give the name or directory of a base, or a loaded Base")


def _refuse_adapted(base: Base) -> None:
    """UsageError for a base that has an adapter on already, which a run could not tell from its own."""
    names = attached(base.model) if find_home(base.model) is not None else ()
    if names:
        raise UsageError(
            f"the base '{base.name}' has adapters attached already ({', '.join(names)}); detach them, or merge them "
            "into it, and fit then"
        )


def _base(model: str | Path | Base, kind: type[Task], data: Splits[Any]) -> Base:
    kind.refuse_other(data.train)
    return model if isinstance(model, Base) else kind.base_for(str(model), data)


def _with_room(base: Base, plan: Plan | None) -> Base:
    """The base as texts see it that have a prompt in front of them."""
    if plan is None or plan.prompt is None:
        return base
    room = base.max_length - plan.prompt.length
    if room < 1:
        raise UsageError(f"a prompt of {plan.prompt.length} rows leaves no room: '{base.name}' takes {base.max_length}")
    return replace(base, max_length=room)


def _ready(
    kind: type[Task], data: Splits[Any], base: Base, choices: dict[str, Any], settings: Settings
) -> tuple[Task, dict[str, Examples]]:
    """The task for these rows, and the examples of every part."""
    goal = kind.of(data, base).chosen(choices)
    parts = {"train": data.train, "valid": data.valid, "test": data.test}
    make = partial(tokenised, goal, tokenizer=base.tokenizer, truncate=settings.truncate)
    return goal, dict(zip(parts, list(made(parts.values(), make))))
