"""classify_pairs: whether a question belongs to a paragraph (XQuAD's English part, split by paragraph), MiniLM.

Each question stands once with its own paragraph, once with the paragraph that comes after it.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lorakit as lk
from lorakit.data import Rows, Splits
from lorakit.data.questions import load_questions
from lorakit.data.rows import split
from lorakit.tasks.base import load_base
from lorakit.tasks.classify import Classify
from lorakit.tasks.task import task_of
from sides.jobs import DATA
from sides.pooled import fitted, measured, outputs, trained

PEER = "peft, Trainer, pairs"
METRIC = "accuracy"
STEPS = 35  # one epoch

_LONG = 900  # characters: no pair is cut


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    data = _splits()
    adapter, base, spent = fitted("classify", data, seed, steps)
    found = lk.evaluate((adapter, task_of(adapter.meta["task"])), data.test, base=base)
    return {"metric": found.metrics["accuracy"], **spent}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    data = _splits()
    goal = Classify.of(data, load_base("minilm"))
    wanted = [[goal.labels.index(label)] for label in data.train.labels or ()]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels[:, 0])

    bias = torch.zeros(len(goal.labels))
    model, spent = trained([data.train.texts, data.train.others or ()], wanted, loss, bias, seed, steps)
    scores = outputs(model, [data.test.texts, data.test.others or ()])
    return {"metric": measured("classify", data, scores)["accuracy"], **spent}


def _splits() -> Splits[Rows]:
    parts = split(load_questions(Path(DATA) / "xquad" / "xquad.en.json.gz"), valid=0.05, test=0.3)
    found = []
    for part in (parts.train, parts.valid, parts.test):
        asked = [(q, c) for q, c in zip(part.questions, part.contexts) if len(c) < _LONG]
        contexts = list(dict.fromkeys(context for _, context in asked))
        after = dict(zip(contexts, [*contexts[1:], contexts[0]]))
        rows = [(q, c, "yes") for q, c in asked] + [(q, after[c], "no") for q, c in asked]
        texts, others, labels = zip(*rows)
        found.append(Rows(texts, labels, "xquad", tuple(range(1, len(rows) + 1)), others))
    return Splits(*found).checked()
