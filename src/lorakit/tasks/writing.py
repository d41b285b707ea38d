"""Tasks that write, and learn it token by token: what they share, and what those share that write on by a causal model.

The loss of a token of what is written is their metric. A causal model reads the hidden state of the token before it;
there is no head of its own, the base's writes.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorakit.data.batches import TextBatch
from lorakit.data.rows import Part
from lorakit.errors import UsageError
from lorakit.tasks.answers import sums_of_texts, token_metrics
from lorakit.tasks.base import Base
from lorakit.tasks.causal import each_loss, head_of, summed_loss
from lorakit.tasks.decode import Answers, Spoken, continued
from lorakit.tasks.task import Scores, Task, refuse_long
from lorakit.tasks.template import SHARE, Text, cut


class Writing(Task):
    """Measured by the loss of each token that is to be written. `scores` are `sums_of_texts`."""

    metric = "loss"
    drawn = "token_accuracy"

    def metrics(self, scores: Tensor, examples: Any) -> dict[str, float]:
        """Loss (nats for each token that is learned, over all of them), perplexity, share of tokens predicted right."""
        return token_metrics(scores)

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """A lower loss."""
        return old is None or new["loss"] < old["loss"]

    @abstractmethod
    def answers(
        self, rows: Any, base: Base, scores: Scores, *, truncate: bool = False, **options: Any
    ) -> Iterator[Any]:
        """What is written for each row, as it comes; `options` are those of `say`."""

    def predict(self, rows: Any, base: Base, scores: Scores, *, truncate: bool = False, **options: Any) -> list[Any]:
        """What is written for each row; `options` are those of `say`."""
        return list(self.answers(rows, base, scores, truncate=truncate, **options))


class CausalWriting(Writing):
    """By a causal language model. `plain_logits`: they are hidden states times a weight (tasks/causal.py)."""

    output = "causal"
    options = ("max_new_tokens", "temperature", "seed")
    peft_task = "CAUSAL_LM"

    max_length: int
    plain_logits: bool

    def prepare(self, model: nn.Module) -> None:
        """The base brings its head; UsageError where it does not."""
        head_of(model)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed cross-entropy in nats."""
        return summed_loss(model, hidden, batch.labels, self.plain_logits)

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Of each text: summed loss, tokens that are learned, how many of them were the most probable ones."""
        each = each_loss(model, hidden, batch.labels, self.plain_logits)
        owners = batch.segments.owners()
        owners = owners if batch.reads is None else owners[batch.reads.cpu()]
        return sums_of_texts(each, owners, len(batch.segments))

    def say(
        self,
        rows: Part,
        questions: Sequence[tuple[int, ...]],
        base: Base,
        *,
        begin: int | None,
        ends: frozenset[int],
        truncate: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        heard: Callable[[str], object] | None = None,
        watch: Callable[[int, int], object] | None = None,
    ) -> tuple[list[tuple[int, ...]], Answers]:
        """What is asked, and what comes behind it: the most probable token each time, or one drawn if `temperature` is
        above 0.

        `truncate` cuts the beginning of what is asked (not `begin`) where there is no room left. `heard` gets the
        answer to a single question piece by piece, as it is written.
        """
        if max_new_tokens < 1 or temperature < 0:
            raise UsageError(
                f"max_new_tokens is {max_new_tokens} and temperature {temperature}; they must be at least 1 and 0"
            )
        asked = list(questions)
        longest = max(1, self.max_length - (min(max_new_tokens, self.max_length // SHARE) if truncate else 1))
        if truncate:
            asked = [cut(Text(ids, (), len(ids)), longest, begin).ids for ids in asked]
        refuse_long(rows, rows.lines, asked, longest)
        written = continued(
            base.model,
            asked,
            ends=ends,
            most=max_new_tokens,
            max_length=self.max_length,
            temperature=temperature,
            seed=seed,
            heard=None if heard is None else Spoken(base.tokenizer, ends, heard).hear,
            watch=watch,
        )
        return asked, written
