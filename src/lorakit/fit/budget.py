"""What a run will take of memory, told before it starts; and the largest passes that what is free allows.

A few short texts and a few of the longest are run, forward and backward, while every tensor that is alive is counted;
a line through the two counts gives a pass of any size. Attention keeps nothing of n x n; where it does, the long texts
tell. The rest is known: what the process has by then, and what training adds to it for good.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.data.batches import Batch, Examples, passes
from lorakit.data.rows import positions
from lorakit.errors import FitError
from lorakit.fit.learner import Learner
from lorakit.fit.settings import TOKENS_PER_PASS
from lorakit.trunk.memory import Bound, available_memory, forget_peak, give_back, resident

_ROOM = 1.45  # bytes taken for one that is alive: blocks of many sizes leave holes (1.3 to 1.7; benchmarks/memory.py)
_BESIDE = 64 << 20  # kernels, code and weights that are read for the first time (16 to 58 MiB with MiniLM)
_SHARE = 0.8  # of what is free; the rest is for others
MOST_TOKENS = {"cpu": TOKENS_PER_PASS, "cuda": 4 * TOKENS_PER_PASS}  # of a pass, where memory is not short
_FEW, _MANY = 384, 1024  # tokens of the two passes: logits come in chunks, which both should fill


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside it, until they are gone; `most` is their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(found):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._known:
                self.now += size
                self._known[key] = ref(storage, partial(self._gone, key, size))
        self.most = max(self.most, self.now)
        return found

    def _gone(self, key: int, n_bytes: int, _: Any) -> None:
        self.now -= n_bytes
        del self._known[key]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Of every plain tensor in there; packed weights have none that can be seen."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.layout == torch.strided]
    return [tensor.untyped_storage() for tensor in tensors]


class Line(NamedTuple):
    """Bytes of a pass: `fixed`, and `each` for every token of it."""

    fixed: float
    each: float

    @classmethod
    def through(cls, few: tuple[int, int], many: tuple[int, int]) -> "Line":
        """Through two counts (tokens, bytes); from nothing through the larger one if they lie too near."""
        each = (many[1] - few[1]) / max(1, many[0] - few[0])
        if many[0] < 2 * few[0] or each * many[0] > many[1]:
            return cls(0.0, many[1] / many[0])
        return cls(many[1] - each * many[0], each)

    def at(self, n_tokens: int) -> int:
        """Bytes in memory of a pass with so many tokens."""
        return int(_ROOM * (self.fixed + self.each * n_tokens))


class Budget:
    """The memory of one run: `resident` when it starts, `free` then, and what passes of any size add (`peak`).

    `parts` are the examples to train on ("train") and all that are only evaluated. Raises FitError if the longest text
    does not fit, before it is run.
    """

    def __init__(self, learner: Learner, parts: Mapping[str, Examples]) -> None:
        self.device = learner.flat.values.device
        self._given = learner.settings.tokens_per_pass > 0
        self.examples, self.padded = parts["train"], bool(learner.trunk.why_padded)
        self._steps = learner.batches(self.examples)
        self._others = [examples for name, examples in parts.items() if name != "train"]
        flat = learner.flat.values.nbytes
        average = 0 if learner.ema is None else flat
        prefixes = sum(prefix.n_bytes for prefix in learner.prefixes.values())
        self.kept = _BESIDE + 3 * flat + average + prefixes  # AdamW's two, the best; what the average stands in for
        self.written = 4 * flat + average  # a checkpoint, as bytes
        self._measure(learner)
        give_back(self.device)
        self.resident, self.free = resident(self.device), available_memory(self.device)

    def _measure(self, learner: Learner) -> None:
        """Two passes of training and of evaluation. Of a copy of the rows: the learner keeps no prefix of these."""
        examples = copy(self.examples)
        order = positions(np.argsort(examples.lengths, kind="stable"))
        trained: list[tuple[int, int]] = []
        evaluated: list[tuple[int, int]] = []
        for indices in (_first(examples, order, _FEW), _first(examples, order[::-1], _MANY)):
            batch = examples.gather(indices)
            n = self._size([examples.lengths[i] for i in indices])
            trained.append((n, _peak(partial(_train, learner, batch, examples))))
            evaluated.append((n, _peak(partial(_evaluate, learner, batch))))
            self.training = Line.through(trained[0], trained[-1])
            self.evaluation = Line.through(evaluated[0], evaluated[-1])
            self.free = available_memory(self.device)
            self._refuse_too_long()  # after the few too: the longest are not even tried
        learner.flat.clear()

    def _size(self, lengths: list[int]) -> int:
        """Tokens of a pass, padding included."""
        return len(lengths) * max(lengths) if self.padded else sum(lengths)

    def _largest(self, examples: Examples, indices: Any, most: int) -> int:
        return max(self._size([examples.lengths[i] for i in part]) for part in passes(examples, indices, most))

    def added(self, most: int) -> int:
        """Bytes that come to those of the start, with passes of at most so many tokens."""
        trained = max(self._largest(self.examples, indices, most) for indices in self._steps)
        evaluated = max(self._largest(examples, range(len(examples)), most) for examples in self._others)
        return self.kept + max(self.training.at(trained), self.evaluation.at(evaluated), self.written)

    def peak(self, most: int) -> int:
        """Bytes of the process at the most."""
        return self.resident + self.added(most)

    def tokens_per_pass(self) -> int:
        """The most tokens of a pass that leave a fifth of what is free to others; but room for the longest text."""
        most, longest = MOST_TOKENS[self.device.type], max(self.examples.lengths)
        while most > longest and self.added(most) > _SHARE * self.free:
            most = max(longest, most * 3 // 4)
        return most

    def begin(self, learner: Learner) -> dict[str, int]:
        """Bounds the learner by the estimate for its passes, counts the peak from here on; the numbers by name."""
        most = learner.settings.most_tokens
        peak = self.peak(most)
        if peak - self.resident > self.free:
            needed, free = (f"{n_bytes / 2**20:,.0f} MiB" for n_bytes in (peak - self.resident, self.free))
            way = "shorten the longest texts (--truncate cuts to what the model takes)"
            if self._given:
                way = "leave --tokens-per-pass open, lower it"
            elif most > max(self.examples.lengths):  # as it was settled when the run began
                way = "lower them with --tokens-per-pass"
            raise FitError(f"passes of {most:,} tokens need {needed}, and {free} are free; {way}, or free memory")
        if self.device.type == "cpu":
            learner.bound = Bound(peak, peak - self.resident)
        forget_peak(self.device)
        return {
            "start_bytes": self.resident,
            "estimated_bytes": peak,
            "free_bytes": self.free,
            "tokens_per_pass": most,
        }

    def _refuse_too_long(self) -> None:
        lengths = self.examples.lengths
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        needed = self.kept + self.training.at(lengths[longest])
        if needed > self.free:
            raise FitError(
                f"the example of row {self.examples.lines[longest]} with {lengths[longest]:,} tokens needs "
                f"{needed / 2**20:,.0f} MiB to be trained on, and {self.free / 2**20:,.0f} MiB are free; shorten it "
                "(--truncate cuts to what the model takes), train in bf16, adapt the last blocks only, or free memory"
            )


def _first(examples: Examples, order: Sequence[int], n_tokens: int) -> list[int]:
    """Texts from the front of the order until there are so many tokens."""
    found: list[int] = []
    for i in order:
        if n_tokens <= 0:
            break
        found.append(i)
        n_tokens -= examples.lengths[i]
    return found


def _peak(run: Callable[[], None]) -> int:
    """The most bytes that are alive at once of what it makes."""
    alive = _Alive()
    with alive:
        run()
    return alive.most


def _train(learner: Learner, batch: Batch, examples: Examples) -> None:
    loss = learner.loss(batch, examples)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _evaluate(learner: Learner, batch: Batch) -> None:
    learner.task.scores(learner.model, batch.hidden(learner.trunk), batch)
