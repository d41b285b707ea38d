"""Tasks of the evaluation harness lm-eval (Gao et al., EleutherAI), with the adapter on and, beside it, without.

The model runs by its own code in the dtype that it was loaded in, as lm-eval runs any causal language model; how tasks
are asked and measured is all lm-eval's. An extra: pip install 'lorakit[harness]'.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.attach import disabled
from lorakit.errors import LorakitError, MissingExtraError, UsageError, nearest
from lorakit.fit.use import Run, opened_run, used
from lorakit.tasks.base import Base

_FILES = (".yaml", ".yml")
_TOGETHER = 8  # requests
_DRAWS = 1000  # of the standard errors that lm-eval finds by bootstrap


@dataclass(frozen=True)
class Figure:
    """A value and its standard error; None where lm-eval knows none."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.error:.4f}" if self.error is not None else "")


Figures = dict[str, dict[str, Figure]]  # task -> metric (with the filter of answers, where there is one) -> figure


@dataclass(frozen=True)
class Harness:
    """What lm-eval measured: `adapted`, and `base` without the adapter; None for a merged model, which has none."""

    adapted: Figures
    base: Figures | None
    version: str

    def __str__(self) -> str:
        rows = [("task", "metric", "with the adapter", "the base alone" if self.base else "")]
        for task, metrics in self.adapted.items():
            rows += [
                (task, metric, str(figure), str(self.base[task][metric]) if self.base else "")
                for metric, figure in metrics.items()
            ]
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"by lm-eval {self.version}; value ± standard error"])


def harness(
    run: Run,
    tasks: Sequence[str],
    *,
    base: Base | None = None,
    device: str = "auto",
    limit: int | None = None,
    chat: bool = False,
) -> Harness:
    """Metrics of these tasks of lm-eval: names it knows, or paths of its YAML files.

    `limit` takes only the first rows of each. With `chat` they are asked by the base's chat template. UsageError for a
    run that is no causal language model, or a task that lm-eval does not know; MissingExtraError without lm-eval.
    """
    opened = opened_run(run)
    adapter, task = opened
    if task.output != "causal":
        raise UsageError(
            f"the run was fitted to {task.name}; lm-eval asks causal language models (generate, complete ...)"
        )
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it must be at least 1")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("lm-eval", "harness") from None
    with _quiet(), used(opened, base, device) as (_, own, _scores):
        named = [name for name in tasks if not name.endswith(_FILES)]
        manager = TaskManager(include_defaults=bool(named) or any(_is_group(Path(name)) for name in tasks))
        for name in named:
            if name not in manager.all_tasks:
                raise UsageError(f"lm-eval knows no task '{name}'{_near(name, manager.all_tasks)}")
        asked = HFLM, manager, list(tasks), limit, chat, task.note().get("max_length")
        adapted = _measured(own, *asked)
        plain = None
        if not adapter.is_empty:  # a merged model has nothing to take off
            with disabled(own.model):
                plain = _measured(own, *asked)
    return Harness(adapted, plain, str(lm_eval.__version__))


def _is_group(file: Path) -> bool:
    """Whether this file of lm-eval names other tasks, perhaps its own; reading those takes ten seconds."""
    if not file.is_file():
        raise UsageError(f"there is no file '{file}', in which a task of lm-eval should be")
    return "group:" in file.read_text(encoding="utf-8")


def _near(name: str, known: Sequence[str]) -> str:
    return nearest(name, known) if "did you mean" in nearest(name, known) else "; a YAML file is given by its path"


def _measured(
    base: Base, wrap: Any, manager: Any, tasks: list[str], limit: int | None, chat: bool, max_length: int | None
) -> Figures:
    from lm_eval import simple_evaluate

    try:
        model = wrap(
            pretrained=base.model,
            tokenizer=base.tokenizer,
            backend="causal",
            batch_size=_TOGETHER,
            max_length=max_length,
        )
        found: Any = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_DRAWS,
            log_samples=False,
            apply_chat_template=chat,
        )
    except Exception as error:  # of a task's file, its data, its metrics: lm-eval raises what these please
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LorakitError(f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {reason}") from error
    return {task: _figures(metrics) for task, metrics in found["results"].items()}


def _figures(metrics: dict[str, Any]) -> dict[str, Figure]:
    """lm-eval tells `acc,none` and `acc_stderr,none`."""
    found: dict[str, Figure] = {}
    for key, value in metrics.items():
        name, comma, sieve = key.partition(",")
        if comma and isinstance(value, int | float) and not name.endswith("_stderr"):
            error = metrics.get(f"{name}_stderr,{sieve}")
            known = float(error) if isinstance(error, int | float) else None
            found[name if sieve == "none" else f"{name} ({sieve})"] = Figure(float(value), known)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, lm-eval tells only what is wrong."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
