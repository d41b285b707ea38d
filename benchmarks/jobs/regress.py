"""regress: how alike two descriptions of restaurants are, for pairs of sentences of the E2E challenge.

Each was written from attributes (name, food, area ...); the number is what share of both sets of attributes they have
in common (Jaccard, 1901). Half of the pairs are drawn at random, half near each other in the order of attributes.
"""

import csv
import gzip
import io
import os
import random
from pathlib import Path

from torch.nn.functional import mse_loss

import lorakit as lk
from lorakit.data import Rated, Splits
from lorakit.tasks.base import load_base
from lorakit.tasks.regress import Regress
from lorakit.tasks.task import task_of
from sides.pooled import fitted, measured, outputs, trained

PEER = "peft, Trainer, MSE"
METRIC = "Pearson"
STEPS = 60

_DATA = Path(os.environ.get("LORAKIT_DATA", "../shared/data")) / "e2e_official"
_NEAR = 40  # rows
_PAIRS = 3000


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    data = _splits()
    adapter, base, spent = fitted("regress", data, seed, steps)
    found = lk.evaluate((adapter, task_of(adapter.meta["task"])), data.test, base=base)
    return {"metric": found.metrics["pearson"], **spent}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    data = _splits()
    goal = Regress.of(data, load_base("minilm"))
    wanted = [[(number - goal.mean) / goal.deviation] for number in data.train.numbers or ()]
    model, spent = trained(
        [data.train.texts, data.train.others or ()], wanted, mse_loss, goal.first_bias(), seed, steps
    )
    scores = outputs(model, [data.test.texts, data.test.others or ()])
    return {"metric": measured("regress", data, scores)["pearson"], **spent}


def _splits() -> Splits[Rated]:
    """No attributes of a held-out pair are in a training pair."""
    text = gzip.decompress((_DATA / "devset.csv.gz").read_bytes()).decode()
    rows = sorted((row["mr"], row["ref"]) for row in csv.DictReader(io.StringIO(text)))
    meanings = sorted({meaning for meaning, _ in rows})
    draw = random.Random(0)
    draw.shuffle(meanings)
    ends = {"test": meanings[:60], "valid": meanings[60:120], "train": meanings[120:]}
    parts = {name: [row for row in rows if row[0] in set(own)] for name, own in ends.items()}
    sizes = {"train": _PAIRS, "valid": 400, "test": 800}
    return Splits(**{name: _pairs(own, sizes[name], name, draw) for name, own in parts.items()}).checked()


def _pairs(rows: list[tuple[str, str]], n: int, name: str, draw: random.Random) -> Rated:
    texts, others, numbers = [], [], []
    for k in range(n):
        i = draw.randrange(len(rows))
        j = draw.randrange(len(rows)) if k % 2 else (i + draw.randint(1, _NEAR)) % len(rows)
        (meaning, text), (meaning2, text2) = rows[i], rows[j]
        own, their = set(meaning.split(", ")), set(meaning2.split(", "))
        texts.append(text)
        others.append(text2)
        numbers.append(len(own & their) / len(own | their))
    return Rated(tuple(texts), tuple(numbers), name, tuple(range(1, n + 1)), tuple(others))
