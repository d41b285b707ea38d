"""What is told at the end of a run: what was trained on what, how it went, and what should make somebody doubt."""

import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from lorakit._version import __version__
from lorakit.adapter import Adapter
from lorakit.data import Splits
from lorakit.data.faults import BadRow, told
from lorakit.data.streamed import Streamed
from lorakit.fit.directory import Journal
from lorakit.fit.loop import State
from lorakit.fit.settings import Settings
from lorakit.fit.threads import processors
from lorakit.tasks.base import Base
from lorakit.tasks.task import Task

_WILD = 1.5  # the loss of a tenth of the run over that of its first steps
_NOTHING = 1e-4  # of the loss


def named(goal: Task) -> dict[str, Any]:
    """What a task is, as entries beside others: its name as `task`, and all else that it remembers for people."""
    told = {key: value for key, value in goal.note().items() if key not in goal.untold}
    return {"task" if key == "name" else key: value for key, value in told.items()}


def notes(
    journal: Journal, settings: Settings, before: float, after: float, skipped: Sequence[BadRow] = ()
) -> list[str]:
    """What somebody should know who believes that all went well. `before`, `after`: the loss on the test rows;
    `skipped` are rows that were left out."""
    losses = [record["loss"] for record in journal.records if record["kind"] == "step"]
    tenth, found = len(losses) // 10, told(skipped)
    if tenth >= 2:
        first = statistics.fmean(losses[:3])
        worst = max(statistics.fmean(losses[k : k + tenth]) for k in range(0, len(losses), tenth))
        if worst > _WILD * first:
            found.append(
                f"the training loss rose from {first:.3g} to {worst:.3g} on the way; the learning rate "
                f"{settings.rate:g} may be too high"
            )
    if after > before:
        found.append(f"the held-out loss was {before:.3g} before training and is {after:.3g}: it did not help there")
    elif before - after < _NOTHING * before:
        found.append("the held-out loss is what it was: nothing was learned; a higher learning rate may")
    if settings.threads > processors():
        found.append(f"{settings.threads} threads share {processors()} processors, which is slower than one for each")
    if journal.lost:
        found.append(f"records.jsonl lacked {journal.lost} steps before the checkpoint, so they are not in the curve")
    return found


def about(base: Base, goal: Task, adapter: Adapter, data: Splits[Any], learned: int) -> dict[str, Any]:
    """What was trained, on what, with what. `learned` numbers did; of tied weights an adapter has both ends."""
    return {
        "base": base.name,
        "learned_parameters": learned,
        "adapter_parameters": adapter.n_parameters,
        "adapter_bytes": adapter.n_bytes,
        "rows": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "streamed": {
            name: part.about()
            for name, part in (("train", data.train), ("valid", data.valid), ("test", data.test))
            if isinstance(part, Streamed)
        },
        **named(goal),
        "metric": goal.metric,
        "versions": {"lorakit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def course(state: State, records: list[dict[str, Any]], seconds: float, n_steps: int) -> dict[str, Any]:
    """How it went."""
    tokens = sum(record["n_tokens"] for record in records if record["kind"] == "step")
    return {
        "best_valid": state.best,
        "best_epoch": state.best_epoch,
        "stopped_early": state.stale > 0 and state.step < n_steps,
        "steps": state.step,
        "epochs": state.epoch,
        "train_s": round(state.seconds, 2),
        "total_s": round(seconds, 2),
        "tokens_per_s": round(tokens / state.seconds) if state.seconds else None,
        "threads": torch.get_num_threads(),
    }
