"""Using what a fit brought: predict and evaluate from a run or adapter directory."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter import Adapter, load
from lorakit.attach import activate, active, attach, detach
from lorakit.attach.slots import find_home
from lorakit.data.batches import Examples
from lorakit.data.faults import gathered, skipping, usable
from lorakit.data.memory import in_memory
from lorakit.data.rows import Part
from lorakit.data.streamed import Streamed, joined
from lorakit.device import resolve_device
from lorakit.errors import AdapterError, DataError, UsageError, nearest
from lorakit.files import read_json, read_tensors
from lorakit.fit.directory import unfinished
from lorakit.fit.learner import scores_of
from lorakit.fit.settings import Settings
from lorakit.notes import WEIGHTS
from lorakit.quantize import quantize
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.task import Evaluated, Scores, Task, task_of
from lorakit.trunk import eval_mode, place_of, placed, resolve_dtype

TASK, HEAD_FILE = "lorakit_task.json", "lorakit_head.safetensors"  # beside a merged model

Run = str | Path | tuple[Adapter, Task]


def open_run(path: str | Path) -> tuple[Adapter, Task]:
    """Adapter and task of a run directory, of an adapter directory that a fit wrote, or of a merged model."""
    place = Path(path)
    if (place / TASK).is_file():  # a merged model: nothing to adapt, only its head, where the task has one
        head = read_tensors(place / HEAD_FILE) if (place / HEAD_FILE).is_file() else {}
        return Adapter({}, head, {"base_name": str(place)}), task_of(read_json(place / TASK))
    adapter = adapter_in(place)
    note = adapter.meta.get("task")
    if not note:
        raise AdapterError(
            f"'{place}' does not say which task it was trained for; use the run directory that its fit wrote"
        )
    return adapter, task_of(note)


def adapter_in(path: str | Path) -> Adapter:
    """The adapter of a run directory, or in this adapter directory. AdapterError says what else a directory is."""
    place = Path(path)
    if (place / "adapter" / WEIGHTS).is_file():
        return load(place / "adapter")
    if (place / WEIGHTS).is_file():
        return load(place)
    if (place / TASK).is_file():
        raise AdapterError(
            f"'{place}' is a merged model: its adapter is in its weights; name the run that it was merged from"
        )
    if state := unfinished(place):
        raise AdapterError(f"'{place}' {state}")
    if (place / "config.json").is_file():
        raise AdapterError(f"'{place}' is a model without an adapter; name a run of fit, or an adapter directory")
    return load(place)


def opened_run(run: Run) -> tuple[Adapter, Task]:
    """The run, opened if it is a path."""
    return open_run(run) if isinstance(run, str | Path) else run


def load_base_of(adapter: Adapter, name: str | None = None, task: Task | None = None) -> Base:
    """The base that an adapter was made on, or the one of this name, as the task loads it (the adapter's own, if none
    is given), and quantized as it was then."""
    place = name or adapter.base_name
    if not place:
        raise UsageError("the adapter does not say which base it was made on; name it with --base")
    note = adapter.meta.get("task")
    task = task or (task_of(note) if note else None)
    if task is not None:
        base = task.load_base(place)
    else:
        heads = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}
        base = load_base(place, head=heads.get((adapter.meta.get("peft") or {}).get("task_type", ""), "none"))
    if how := adapter.meta.get("quantized"):
        quantize(base.model, **how)
    return base


Watch = Callable[[int, int], object]  # how many are done, of how many


@contextmanager
def used(
    run: Run, base: Base | None, device: str = "auto", watch: Watch | None = None
) -> Iterator[tuple[Task, Base, Scores]]:
    """Within the block, the base is on the device and has the adapter on, it alone; with it what gives the scores of
    texts."""
    adapter, task = opened_run(run)
    where = resolve_device(device, *([place_of(base.model)] if base else []))
    own = base or load_base_of(adapter, task=task)
    had_head = hasattr(own.model, task.head)
    before = active(own.model) if find_home(own.model) is not None else ()
    task.prepare(own.model)

    def scores(examples: Examples) -> torch.Tensor:
        kind = resolve_dtype("auto", where)
        with task.trunk(own.model, dtype=kind, pad=examples.pad) as trunk:
            return scores_of(own.model, task, trunk, examples, Settings(), watch=watch)

    try:
        with torch.inference_mode(False), placed(own.model, where, keep=base is not None), eval_mode(own.model):
            attach(own.model, adapter, name="using")
            try:
                yield task, own, scores
            finally:
                detach(own.model, "using")
                if before:
                    activate(own.model, before)
    finally:
        if task.head and not had_head:
            del own.model._modules[task.head]


def predict(
    run: Run,
    given: Sequence[Any] | Part,
    *,
    base: Base | None = None,
    truncate: bool = False,
    device: str = "auto",
    watch: Watch | None = None,
    **options: Any,
) -> list[Any]:
    """The answer to each text, in order, as the task gives it: a Prediction (classify), a Generation (generate) ...

    `given` is a list of texts (or of what else the task is asked: lists of messages, users ...), or rows that were
    read. `base` saves loading the base again; it is left as it was. `device` is that of `fit`. `watch` is called with
    how many are done, and of how many. `options` are those of the task; `generate` takes max_new_tokens, temperature
    and seed. UsageError for one text that stands alone.
    """
    opened = opened_run(run)
    _refuse_single(opened[1], given)
    if not len(given):
        raise DataError("there is no text to predict")
    rows = given if isinstance(given, Part) else opened[1].asked(given)
    if isinstance(rows, Streamed):
        rows = joined(list(rows.chunks()))
    return list(predictions(opened, [rows], base=base, truncate=truncate, device=device, watch=watch, **options))


def predictions(
    run: Run,
    parts: Iterable[Part],
    *,
    base: Base | None = None,
    truncate: bool = False,
    device: str = "auto",
    watch: Watch | None = None,
    **options: Any,
) -> Iterator[Any]:
    """The answers to the rows of all parts, one part after the other, as `predict` gives them, each as it comes; for
    rows that need not all be in memory. `watch` counts within a part."""
    opened = opened_run(run)
    refuse_unknown(opened[1], options, opened[1].options)
    with used(opened, base, device, watch) as (task, own, scores):
        for rows in parts:
            task.refuse_other(rows)
            yield from task.answers(rows, own, scores, truncate=truncate, watch=watch, **options)


def _refuse_single(task: Task, given: object) -> None:
    """UsageError for one text, path or mapping, whose letters or keys would be taken for what is asked."""
    if isinstance(given, str | bytes | PathLike | Mapping):
        way = ""
        if isinstance(given, str | PathLike) and os.path.isfile(given):
            read = f"lorakit.tasks.task.TASKS['{task.name}'].read"
            way = f", or the rows of a table: {read}({str(given)!r:.60}, answers=False)"
        raise UsageError(f"{given!r:.60} stands alone, and predict takes a list; put it into one: [...]{way}")


def refuse_unknown(task: Task, options: Iterable[str], known: Sequence[str]) -> None:
    """UsageError for an option that is not among those that the task knows."""
    for name in options:
        if name not in known:
            raise UsageError(f"task '{task.name}' takes no option '{name}'{nearest(name, known)}")


def evaluate(
    run: Run,
    rows: Any,
    *,
    base: Base | None = None,
    truncate: bool = False,
    device: str = "auto",
    skip_bad: int = 0,
    watch: Watch | None = None,
    **options: Any,
) -> Evaluated:
    """Metrics of a run on rows with their right answers, a file of them, or what
    `load_splits` takes as rows in memory; on the `device`, as with `fit`. DataError for what it has not learned.
    `options` are what the task `asks`; `generate` takes write.

    Up to `skip_bad` rows that cannot be used are left out; `skipped` of the result says which.
    """
    opened = opened_run(run)
    refuse_unknown(opened[1], options, opened[1].asks)
    with skipping(skip_bad) as skipped:
        if not isinstance(rows, Part):
            with gathered():
                rows = opened[1].read(rows if isinstance(rows, str | Path) else in_memory(rows))
        opened[1].refuse_other(rows)
        with used(opened, base, device, watch) as (task, own, scores):
            _, found = usable(rows, lambda rows: task.evaluate(rows, own, scores, truncate=truncate, **options))
    return replace(found, skipped=skipped.bad) if skipped.bad else found  # type: ignore[type-var]
