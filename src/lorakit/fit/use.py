"""Using what a fit brought: predict and evaluate from a run or adapter directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter import WEIGHTS, Adapter, load
from lorakit.attach import attach, detach
from lorakit.data.batches import Tokens
from lorakit.data.rows import Rows
from lorakit.errors import AdapterError, DataError, listed
from lorakit.files import read_json, read_tensors
from lorakit.fit.learner import scores_of
from lorakit.fit.settings import Settings
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.classify import HEAD, Classify, bootstrap
from lorakit.trunk import Trunk, resolve_dtype

TASK, HEAD_FILE = "lorakit_task.json", "lorakit_head.safetensors"  # beside a merged model


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text, and the probabilities of all."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Metrics over rows; `accuracy_interval` is a 95 % bootstrap interval; `per_label` has counts and F1."""

    metrics: dict[str, float]
    accuracy_interval: tuple[float, float]
    n_rows: int
    per_label: dict[str, dict[str, float]]


def open_run(path: str | Path) -> tuple[Adapter, Classify]:
    """Adapter and task of a run directory, of an adapter directory that a fit wrote, or of a merged model."""
    place = Path(path)
    if (place / TASK).is_file():  # a merged model: nothing to adapt, only its head
        head = read_tensors(place / HEAD_FILE)
        return Adapter({}, head, {"base_name": str(place)}), Classify.from_note(read_json(place / TASK))
    if (place / "adapter" / WEIGHTS).is_file():
        place = place / "adapter"
    adapter = load(place)
    note = adapter.meta.get("task")
    if not note:
        raise AdapterError(
            f"'{place}' does not say which task it was trained for; use the run directory that its fit wrote"
        )
    return adapter, Classify.from_note(note)


def _logits(
    run: str | Path | tuple[Adapter, Classify], rows: Rows, base: Base | None, truncate: bool
) -> tuple[Classify, torch.Tensor, Tokens]:
    adapter, task = open_run(run) if isinstance(run, str | Path) else run
    own = base or load_base(adapter.base_name, pool=task.pool, max_length=task.max_length)
    tokens = task.tokens(rows, own.tokenizer, truncate=truncate)
    had_head = hasattr(own.model, HEAD)
    task.prepare(own.model)
    try:
        attach(own.model, adapter, name="using")
        try:
            kind = resolve_dtype("auto", next(own.model.parameters()).device)
            with Trunk(own.model, dtype=kind, pad=tokens.pad, head=HEAD) as trunk:
                scores = scores_of(own.model, task, trunk, tokens, Settings())
            return task, scores, tokens
        finally:
            detach(own.model, "using")
    finally:
        if not had_head:
            del own.model._modules[HEAD]


def predict(
    run: str | Path | tuple[Adapter, Classify],
    texts: Sequence[str] | Rows,
    *,
    base: Base | None = None,
    truncate: bool = False,
) -> list[Prediction]:
    """The label of each text, in order. `base` saves loading the base again."""
    rows = texts if isinstance(texts, Rows) else Rows(tuple(texts), None, "texts", tuple(range(1, len(texts) + 1)))
    if not len(rows):
        raise DataError("there is no text to predict")
    empty = [line for text, line in zip(rows.texts, rows.lines) if not text.strip()]
    if empty:
        raise DataError(f"'{rows.source}': row {empty[0]} is empty")
    task, logits, _ = _logits(run, rows, base, truncate)
    result: list[Prediction] = []
    for text, row in zip(rows.texts, logits.softmax(-1).tolist()):
        best = max(range(len(row)), key=row.__getitem__)
        result.append(Prediction(text, task.labels[best], row[best], dict(zip(task.labels, row))))
    return result


def evaluate(
    run: str | Path | tuple[Adapter, Classify],
    rows: Rows,
    *,
    base: Base | None = None,
    truncate: bool = False,
) -> Evaluation:
    """Metrics of a run on labelled rows. DataError for labels it has not learned."""
    if rows.labels is None:
        raise DataError(f"'{rows.source}' has no labels to evaluate against")
    opened = open_run(run) if isinstance(run, str | Path) else run
    unseen = [
        f"'{rows.source}' row {line}: label '{label}' was not in the training data"
        for label, line in zip(rows.labels, rows.lines)
        if label not in opened[1].labels
    ]
    if unseen:
        raise DataError(listed(unseen, 5))
    task, logits, tokens = _logits(opened, rows, base, truncate)
    guess, labels = logits.argmax(-1), torch.tensor([label for (label,) in tokens.labels])
    per_label: dict[str, Any] = {}
    for k, label in enumerate(task.labels):
        true, said, hits = (labels == k).sum(), (guess == k).sum(), ((labels == k) & (guess == k)).sum()
        if int(true) or int(said):
            per_label[label] = {"rows": int(true), "predicted": int(said), "f1": 2 * int(hits) / int(true + said)}
    return Evaluation(task.metrics(logits, tokens), bootstrap((guess == labels).tolist()), len(rows), per_label)
