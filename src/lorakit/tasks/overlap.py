"""How near written texts are to references: BLEU and chrF (sacrebleu), ROUGE (rouge-score).

Each by its well-kept library, an extra; without it the values are missing, and `missing` says how to get them. A text
may have several references.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.tasks.intervals import bootstrap

_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """`values` by name: BLEU and chrF from 0 to 100, ROUGE F1 from 0 to 1; 95 % `intervals` of bleu and rouge.

    `signature` says how BLEU was computed.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    signature: str = ""
    missing: str = ""


def references(asked: Sequence[Hashable], answers: Sequence[str]) -> tuple[list[int], list[list[str]]]:
    """Of each different question the place where it is first asked, and all different answers to it."""
    places: dict[Hashable, list[int]] = {}
    for i, question in enumerate(asked):
        places.setdefault(question, []).append(i)
    known = [list(dict.fromkeys(answers[i] for i in own)) for own in places.values()]
    return [own[0] for own in places.values()], known


def overlap(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    """All measures that are installed. `references[i]` are those of answer i."""
    found, missing = Overlap(), []
    for measure, package in ((_bleu, "sacrebleu"), (_rouge, "rouge-score")):
        try:
            part = measure(answers, references)
        except ImportError:
            missing.append(package)
            continue
        found = Overlap(found.values | part.values, found.intervals | part.intervals, found.signature + part.signature)
    way = f"{' and '.join(missing)} not installed: pip install 'lorakit[translate]'" if missing else ""
    return Overlap(found.values, found.intervals, found.signature, way)


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    from sacrebleu.metrics import BLEU, CHRF

    single = BLEU(effective_order=True)
    counts = []
    for answer, known in zip(answers, references):
        one: Any = single.sentence_score(answer, list(known))
        counts.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    table = np.asarray(counts)

    def bleu(sums: np.ndarray) -> list[float]:
        found = []
        for *grams, said, wanted in sums.astype(int).tolist():
            half = len(grams) // 2
            found.append(BLEU.compute_bleu(grams[:half], grams[half:], said, wanted, smooth_method="exp").score)
        return found

    longest = max(map(len, references))
    streams = [[known[k] if k < len(known) else None for known in references] for k in range(longest)]
    whole, chrf = BLEU(), CHRF()
    score = float(whole.corpus_score(list(answers), streams).score)
    values = {"bleu": score, "chrf": float(chrf.corpus_score(list(answers), streams).score)}
    return Overlap(values, {"bleu": bootstrap(table, bleu)}, str(whole.get_signature()))


def _rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE))
    each = [scorer.score_multi(list(known), answer) for answer, known in zip(answers, references)]
    tables = {name: np.asarray([one[theirs].fmeasure for one in each]) for theirs, name in _ROUGE.items()}
    means = {name: float(table.mean()) for name, table in tables.items()}
    return Overlap(means, {name: bootstrap(table) for name, table in tables.items()})
