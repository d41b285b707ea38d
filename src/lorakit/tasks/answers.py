"""What tasks that write share: losses of an answer's tokens, and whether answers end by themselves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.data.batches import Examples
from lorakit.tasks.intervals import bootstrap

_ASKED = 5  # held-out prompts that are tried after training
_PATIENCE = 2, 16, 256  # tokens a tried answer gets: so many times the expected ones, and so many more; at most


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
