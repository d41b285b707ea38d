"""fit: from a model and rows to a run directory with an adapter that is proven on rows it has not seen.

run/  plan.toml  adapter/  records.jsonl  curve.png  summary.json  checkpoint/ (while it runs)
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit._version import __version__
from lorakit.adapter import Adapter
from lorakit.attach import attach, base_fingerprint, collect, detach
from lorakit.data import Splits, load_splits
from lorakit.data.batches import Tokens
from lorakit.errors import FitError, MissingExtraError, UsageError
from lorakit.files import write_json, write_text
from lorakit.fit.budget import Budget
from lorakit.fit.checkpoint import load_checkpoint, save_checkpoint, settled_before
from lorakit.fit.curve import draw_curve
from lorakit.fit.learner import Learner
from lorakit.fit.loop import Record, State, total_steps, train
from lorakit.fit.settings import make_settings
from lorakit.fit.settle import settle
from lorakit.fit.threads import threads_put_back
from lorakit.fit.workers import Workers
from lorakit.plan import Plan
from lorakit.rules import plan as make_plan
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.task import TASKS, Task, figure
from lorakit.trunk import Trunk, resolve_dtype
from lorakit.trunk.memory import peak_resident

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
    model: str | Base,
    data: str | Path | Splits[Any],
    task: str = "classify",
    *,
    plan: Plan | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    consume: bool = False,
    watch: Watch | None = None,
    **settings: Any,
) -> Result:
    """Trains an adapter, and a head where the task has one; keeps the best by the validation rows; reports on the test
    rows.

    `model` is a name for `load_base` or a loaded Base, which is left as it was (with `consume` its frozen weights may
    stay in `dtype`, which spares the memory of the originals); `data` a source for `load_splits`, or its result. `task`
    is "classify" (one label for each text) or "generate" (a written answer to each prompt). `plan` defaults to rank 8
    on every matrix. `settings` are those of `lorakit.fit.settings.Settings`. With `out`, a run directory is written; a
    run that was killed goes on with `resume=True` and ends with the very numbers of an uninterrupted one. Started by
    torchrun, its processes share the work of every step, and the first writes. `watch` is called with every Record and
    the total number of steps; before the first with one of kind "start", whose values tell memory: `estimated_bytes`,
    `free_bytes`, `tokens_per_pass`.
    """
    kind: type[Task] = TASKS[task]
    chosen = make_settings(settings)
    chosen = replace(chosen, dtype=resolve_dtype(chosen.dtype, torch.device("cpu")))
    place = Path(out) if out is not None else None
    workers = Workers.started()
    if place is not None and workers.first:
        claim(place, resume, overwrite)
    began = time.perf_counter()
    data = (data if isinstance(data, Splits) else load_splits(data, read=kind.read, seed=chosen.seed)).checked()
    kind.refuse_other(data.train)
    base = load_base(model, head=kind.output) if isinstance(model, str) else model
    goal = kind.of(data, base)
    parts = {
        name: goal.tokens(rows, base.tokenizer, truncate=chosen.truncate)
        for name, rows in (("train", data.train), ("valid", data.valid), ("test", data.test))
    }
    consume = consume or isinstance(model, str)
    net, head = base.model, goal.head
    base_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
    had_head = hasattr(net, head)
    goal.prepare(net)
    try:
        entries = plan or make_plan(net, trained=(head,) if head else ())
        if head and not any(name == head or name.startswith(head + ".") for name in entries.trained):
            entries = Plan(entries.layers, (*entries.trained, head), entries.note)
        attach(net, entries, seed=chosen.seed)
        try:
            identity = {
                "settings": chosen.values(),
                "plan": entries.toml(),
                "base": base_fingerprint(net, entries.layers),
                "data": [rows.digest() for rows in (data.train, data.valid, data.test)],
                **_named(goal),
            }
            trunk = Trunk(net, dtype=chosen.dtype, pad=parts["train"].pad, head=head, keep=not consume)
            with workers, trunk:
                learner = Learner(net, goal, trunk, chosen, workers)
                try:
                    if place is not None and not resume and workers.first:
                        _clear(place)
                    kept = learner.keep_prefix(parts, place)
                    budget = Budget(learner, parts)
                    settled = workers.agreed(
                        settled_before(place / "checkpoint")
                        if place and resume
                        else settle(learner, parts["train"], entries, budget)
                    )
                    learner.settings = chosen.filled(settled)
                    torch.set_num_threads(learner.settings.threads)
                    memory = budget.begin(learner)
                    before = learner.evaluate(parts["test"])
                    records, state = _run(learner, parts, place, resume, identity, settled, watch, memory)
                    assert state.best_values is not None
                    learner.ema = None
                    learner.load(state.best_values)
                    metrics = learner.evaluate(parts["test"])
                    memory["peak_bytes"] = peak_resident()
                finally:
                    learner.release()
                why_padded = trunk.why_padded
            tried = goal.tried(base, data.test) if workers.first else {}
            adapter = collect(net).with_meta(
                base_name=base.name, task=goal.note(), metrics=metrics, lorakit=__version__
            )
        finally:
            detach(net)
    finally:
        if head and not had_head and head in net._modules:
            del net._modules[head]
    if goal.peft_task:
        adapter = adapter.with_meta(peft={"task_type": goal.peft_task})
    n_steps = total_steps(len(parts["train"]), chosen)
    spent = time.perf_counter() - began
    summary = _summary(base, goal, adapter, before, metrics, state, records, data, spent, n_steps, workers.size)
    summary |= {
        "base_bytes": base_bytes,
        "dtype": chosen.dtype,
        "padded": why_padded,
        "prefix": kept,
        "settled": settled,
        "memory": memory,
        **tried,
    }
    if place is not None and workers.first:
        _finish(place, goal, adapter, entries, records, summary)
    return Result(adapter, before, metrics, records, summary, place)


def _named(goal: Task) -> dict[str, Any]:
    """What a task is, as entries beside others: its name as `task`, and all else that it remembers."""
    return {"task" if key == "name" else key: value for key, value in goal.note().items()}


def claim(place: Path, resume: bool, overwrite: bool) -> None:
    """The run directory must be new, unless it is to go on or to be replaced. Changes nothing yet."""
    if resume and overwrite:
        raise UsageError("resume goes on with a run and overwrite begins it anew; give one of them")
    if place.exists() and not place.is_dir():
        raise UsageError(f"'{place}' is a file; name a directory for the run")
    if resume and not (place / "checkpoint").is_dir():
        state = (
            "does not exist"
            if not place.is_dir()
            else "holds a finished run"
            if _is_done(place)
            else "has no checkpoint"
        )
        raise UsageError(f"'{place}' {state}; there is nothing to resume")
    if place.is_dir() and any(place.iterdir()) and not resume:
        if not overwrite:
            raise UsageError(
                f"'{place}' is not empty; go on with --resume, replace it with --overwrite, or name another directory"
            )
        if not (_is_done(place) or (place / "checkpoint").exists() or (place / "records.jsonl").exists()):
            raise UsageError(f"'{place}' holds no run of lorakit, so it is not overwritten; name another directory")
    host = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not host.is_dir() or not os.access(host, os.W_OK):
        raise UsageError(f"cannot write into '{place}': '{host}' is {'not writable' if host.is_dir() else 'a file'}")


def _is_done(place: Path) -> bool:
    return (place / "summary.json").exists()


def _clear(place: Path) -> None:
    """Makes the run directory, or empties it of the run that is to be replaced."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write into '{place}': {error.strerror or error}") from None
    for name in ("summary.json", "records.jsonl", "plan.toml", "curve.png"):
        (place / name).unlink(missing_ok=True)
    for file in place.glob("prefix_*.bin"):  # of a run that was killed
        file.unlink()
    for name in ("checkpoint", "adapter"):
        shutil.rmtree(place / name, ignore_errors=True)


def _run(
    learner: Learner,
    parts: dict[str, Tokens],
    place: Path | None,
    resume: bool,
    identity: dict[str, Any],
    settled: dict[str, Any],
    watch: Watch | None,
    memory: dict[str, int],
) -> tuple[list[dict[str, Any]], State]:
    chosen = learner.settings
    state, records = State(settled=settled), []
    if place is not None and resume:
        state = load_checkpoint(place / "checkpoint", learner, identity)
        records = _read_records(place / "records.jsonl", state.step, state.epoch)
    stream = None
    if place is not None and learner.workers.first:
        write_text(place / "records.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        stream = open(place / "records.jsonl", "a", encoding="utf-8")  # noqa: SIM115  # closed below
    total = total_steps(len(parts["train"]), chosen)
    if watch is not None:
        watch(Record("start", state.step, state.epoch, {**memory}), total)
    try:
        for record in train(learner, parts["train"], parts["valid"], state):
            line = {"kind": record.kind, "step": record.step, "epoch": record.epoch, **record.values}
            records.append(line)
            due = record.kind == "valid" or (chosen.checkpoint_steps and record.step % chosen.checkpoint_steps == 0)
            if stream is not None and place is not None:
                stream.write(json.dumps(line) + "\n")
                if due:
                    stream.flush()
                    os.fsync(stream.fileno())
                    save_checkpoint(place / "checkpoint", learner, state, identity)
            if watch is not None:
                watch(record, total)
    except OSError as error:
        raise FitError(f"cannot write into '{place}': {error.strerror or error}; free some space and resume") from None
    finally:
        if stream is not None:
            stream.close()
    return records, state


def _read_records(path: Path, step: int, epoch: int) -> list[dict[str, Any]]:
    """The records up to the checkpoint; later ones will be made again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut short by the kill
        if record["step"] > step or (record["kind"] == "valid" and record["epoch"] > epoch):
            break
        records.append(record)
    return records


def _best_epoch(goal: Task, records: list[dict[str, Any]]) -> int:
    """Epoch of the kept parameters: the first of the best."""
    best: dict[str, Any] | None = None
    for record in records:
        if record["kind"] == "valid" and goal.better(record, best):
            best = record
    assert best is not None
    return int(best["epoch"])


def _summary(
    base: Base,
    goal: Task,
    adapter: Adapter,
    before: dict[str, float],
    metrics: dict[str, float],
    state: State,
    records: list[dict[str, Any]],
    data: Splits[Any],
    seconds: float,
    n_steps: int,
    n_processes: int,
) -> dict[str, Any]:
    tokens = sum(record["n_tokens"] for record in records if record["kind"] == "step")
    return {
        "base": base.name,
        "base_parameters": sum(p.numel() for p in base.model.parameters()),
        "adapter_parameters": adapter.n_parameters,
        "adapter_bytes": adapter.n_bytes,
        "rows": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        **_named(goal),
        "metric": goal.metric,
        "before": before,
        "test": metrics,
        "best_valid": state.best,
        "best_epoch": _best_epoch(goal, records),
        "stopped_early": state.stale > 0 and state.step < n_steps,
        "steps": state.step,
        "epochs": state.epoch,
        "train_s": round(state.seconds, 2),
        "total_s": round(seconds, 2),
        "tokens_per_s": round(tokens / state.seconds) if state.seconds else None,
        "threads": torch.get_num_threads(),
        "processes": n_processes,
        "versions": {"lorakit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _finish(
    place: Path, goal: Task, adapter: Adapter, plan: Plan, records: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    plan.save(place / "plan.toml")
    adapter.save(place / "adapter")
    try:
        draw_curve(records, place / "curve.png", goal.drawn)
        summary["curve"] = "curve.png"
    except MissingExtraError as error:
        summary["curve"] = f"not drawn: {error}"
    write_json(place / "summary.json", summary)
    shutil.rmtree(place / "checkpoint", ignore_errors=True)
