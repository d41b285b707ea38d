"""What tasks that write share: losses of an answer's tokens, and whether answers end by themselves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.data.batches import Examples
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.overlap import overlap
from lorakit.tasks.task import Measured

_ASKED = 5  # held-out prompts that are tried after training
_PATIENCE = 2, 16, 256  # tokens a tried answer gets: so many times the expected ones, and so many more; at most


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over rows, and 95 % bootstrap `intervals` of some, over texts. `n_tokens` were to be written; `kind` says
    what they are.

    Where answers were written, there are `n_texts` of them, and the share `ended` ended by itself; `signature` is
    sacrebleu's; `missing` tells which packages would measure more.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    n_rows: int
    n_tokens: int
    kind: str
    n_texts: int = 0
    ended: float = 0.0
    signature: str = ""
    missing: str = ""

    @classmethod
    def of(cls, metrics: dict[str, float], sums: Tensor, n_rows: int, kind: str) -> "Evaluation":
        """Of what is learned, by the `sums_of_texts`."""
        return cls(metrics, {"loss": mean_interval(sums)}, n_rows, int(sums[:, 1].sum()), kind)

    def beside(
        self, answers: Sequence[str], stopped: Sequence[bool], references: Sequence[Sequence[str]]
    ) -> "Evaluation":
        """The same with how near answers that were written are to their references; did they end by themselves?"""
        near = overlap(answers, references)
        return replace(
            self,
            metrics=self.metrics | near.values,
            intervals=self.intervals | near.intervals,
            n_texts=len(answers),
            ended=sum(stopped) / len(answers),
            signature=near.signature,
            missing=near.missing,
        )

    def __str__(self) -> str:
        lines, texts = [], ""
        for name, value in self.metrics.items():
            low, high = self.intervals.get(name, (0.0, 0.0))
            between = f"   (95 % interval {low:.3f} to {high:.3f})" if name in self.intervals else ""
            lines.append(f"{name.replace('_', ' '):<15} {value:.3f}{between}")
        if self.n_texts:
            lines.append(f"{'ended by itself':<15} {self.ended:.1%} of {self.n_texts} answers")
            texts = f"{self.n_texts} texts, "
        lines.append(f"{'measured on':<15} {self.n_rows} rows, {texts}{self.n_tokens} {self.kind}")
        lines += [f"{word:<15} {text}" for word, text in (("BLEU", self.signature), ("note", self.missing)) if text]
        return "\n".join(lines)


def sums_of_texts(each: Tensor, owners: Tensor, n_texts: int) -> Tensor:
    """`(n_texts, 3)`: summed loss, tokens, how many were the most probable; from `each (tokens, 2)` and their texts."""
    each = each.double().cpu()
    each = torch.stack([each[:, 0], torch.ones(len(each), dtype=torch.float64), each[:, 1]], -1)
    return torch.zeros(n_texts, 3, dtype=torch.float64).index_add(0, owners, each).float()


def token_metrics(sums: Tensor) -> dict[str, float]:
    """Loss (nats for each token of an answer, over all tokens), perplexity, share of tokens predicted right."""
    loss, count, right = sums.double().sum(0).tolist()
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": right / count}


def mean_interval(scores: Tensor) -> tuple[float, float]:
    """95 % interval of the loss of a token, over texts."""
    return bootstrap(scores[:, :2], lambda sums: sums[:, 0] / sums[:, 1])


def no_scores(examples: Examples) -> Tensor:
    """Stands for scores where answers are only written."""
    raise AssertionError("answers are written, not scored")


def few_short(sizes: Sequence[int]) -> list[int]:
    """Places of a handful of answers, spread over the shorter half."""
    short = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))[: (len(sizes) + 1) // 2]
    n = min(_ASKED, len(short))
    return sorted(short[k * len(short) // n] for k in range(n))


def room_for(expected: int) -> int:
    """Tokens that an answer is given that should have so many."""
    times, more, bound = _PATIENCE
    return min(bound, times * expected + more)


def told_endings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many answers ended, one of them, and a warning if none did."""
    n, most, example = summary["tried"], summary["tried_tokens"], summary["example"]
    ended = round(summary["ends_by_itself"] * n)
    lines = [
        ("ends by itself", f"{ended} of {n} answers to held-out prompts within {most} tokens"),
        ("for example", f"{example['prompt'][-200:]!r}"),
        ("  it answers", f"{example['answer'][:200]!r}"),
        ("  expected", f"{example['expected'][:200]!r}"),
    ]
    if not ended:
        lines.append(("warning", "no answer ended by itself: train longer, or look whether the answers are cut"))
    return lines
