"""A linear head on the pooled vector of a text, or of a pair of texts: what classify, labels and regress share.

The head is a child of the trunk called `classifier`, so the layer paths of the adapter are those of the plain
pretrained model, and the head travels with the adapter as a fully trained module (PEFT: modules_to_save).

The two texts of a pair run as one, joined as the base's tokenizer joins them; where it would put nothing between them
(most language models), a line break stands there.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.batches import TextBatch, Tokens
from lorakit.data.cells import text_of
from lorakit.data.rows import Texts
from lorakit.errors import DataError, listed
from lorakit.tasks.base import Base
from lorakit.tasks.heads import give_head
from lorakit.tasks.task import Task, refuse_long
from lorakit.trunk import Segments

GIVEN = "texts"  # the name of rows that were given, not read
HEAD = "classifier"


class Pooled(Task):
    """How the trunk is pooled, whether it reads pairs, and whether it is told by token types which text is which."""

    head = HEAD
    wishes = ("pool",)

    pool: str
    max_length: int
    pairs: bool
    types: bool

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """Outputs of the head."""

    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk its head; one of the right size is left as it is.

        Its weight begins at zero, so nothing is known of any text before training.
        """
        give_head(model, HEAD, self.n_outputs, "outputs", self.first_bias())

    def first_bias(self) -> Tensor:
        """What the head gives of every text before training: `(outputs,)`."""
        return torch.zeros(self.n_outputs)

    def tokens(self, rows: Texts, labels: Sequence[tuple[float, ...]], tokenizer: Any, truncate: bool) -> Tokens:
        """Token ids of all rows with their labels."""
        if (rows.others is not None) is not self.pairs:
            want, way = "pairs of texts", "give two for each row: --text and --text2 name their columns"
            if not self.pairs:
                want, way = "single texts", "name the column of the texts with --text alone"
            if rows.source == GIVEN:
                way = "give each a second one (--say2)" if self.pairs else "give each text alone (no --say2)"
            raise DataError(f"'{rows.source}' has {rows.kind}, and {want} were learned; {way}")
        texts: list[list[str]] = [list(rows.texts)]
        if rows.others is not None:
            texts.append(list(rows.others) if _separates(tokenizer) else [f"\n{text}" for text in rows.others])
        bounds = {"truncation": truncate, "max_length": self.max_length if truncate else None}
        encoded = tokenizer(*texts, **bounds, return_token_type_ids=self.types)
        ids = tuple(tuple(entry) for entry in encoded["input_ids"])
        refuse_long(rows, rows.lines, ids, self.max_length)
        types = tuple(tuple(entry) for entry in encoded["token_type_ids"]) if self.types else ()
        return Tokens(ids, tuple(labels), reads_of(ids, self.pool), rows.lines, tokenizer.pad_token_id or 0, types)

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """What the head gives of each text: `(texts, outputs)`, float32."""
        found: Tensor = model.get_submodule(HEAD)(vectors(hidden, batch))
        return found

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"pool": self.pool, "max_length": self.max_length, "pairs": self.pairs, "types": self.types}
        return {"name": self.name, **known}


def used(base: Base, rows: Texts) -> dict[str, Any]:
    """How a task for these rows uses this base: values for the fields of Pooled."""
    pairs = rows.core.others is not None
    types = pairs and int(getattr(base.model.config, "type_vocab_size", 0) or 0) > 1  # type: ignore[arg-type]
    return {"pool": base.pool, "max_length": base.max_length, "pairs": pairs, "types": types}


def noted(note: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a note."""
    pairs, types = bool(note.get("pairs", False)), bool(note.get("types", False))
    return {"pool": note["pool"], "max_length": int(note["max_length"]), "pairs": pairs, "types": types}


def given_texts(given: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None, tuple[int, ...]]:
    """Texts, second texts (None where no pairs are given), row numbers. DataError for what is neither text nor pair."""
    pairs = next((not isinstance(one, str | bytes) for one in given if isinstance(one, Sequence)), False)
    want = "a pair of texts" if pairs else "a text"
    rows = [tuple(one) if pairs and isinstance(one, Sequence) and not isinstance(one, str) else (one,) for one in given]
    faults: list[str] = []
    for line, (one, row) in enumerate(zip(given, rows), 1):
        if len(row) != 1 + pairs or not all(isinstance(text, str) for text in row):
            faults.append(f"row {line} is {one!r:.40}; it must be {want}")
            continue
        try:
            for text in row:
                text_of(text, f"a text of row {line}" if pairs else f"row {line}")
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(f"'{GIVEN}': {listed(faults, 5)}")
    others = tuple(row[1] for row in rows) if pairs else None
    return tuple(row[0] for row in rows), others, tuple(range(1, len(rows) + 1))


def second_texts(rows: Texts) -> tuple[str, ...]:
    """The second text of each row, "" where there is none."""
    return rows.others or ("",) * len(rows)


def whole(text: str, text2: str) -> str:
    """A text or a pair, on one line."""
    return f"{text} | {text2}" if text2 else text


def table_of(per_label: Mapping[str, Mapping[str, Any]], width: int) -> list[str]:
    """Counts and F1 of every label, a line each under a header."""
    return [
        f"{'label':<{width}}  rows  predicted     F1",
        *(
            f"{label:<{width}}  {values['rows']:4d}  {values['predicted']:9d}  {values['f1']:.3f}"
            for label, values in per_label.items()
        ),
    ]


def reads_of(ids: Sequence[Sequence[int]], pool: str) -> tuple[tuple[int, ...], ...]:
    """The place that is read of each text, pooled so; none of a text of which the mean is taken."""
    return tuple({"cls": (0,), "last": (len(entry) - 1,), "mean": ()}[pool] for entry in ids)


def vectors(hidden: Tensor, batch: TextBatch) -> Tensor:
    """The pooled vector of each text, whose places are read by `reads_of`: `(texts, d)`, float32."""
    return hidden.float() if batch.reads is not None else mean_of_segments(hidden, batch.segments)


def mean_of_segments(hidden: Tensor, segments: Segments) -> Tensor:
    """The mean hidden state of each text: `hidden (tokens, d)` -> `(texts, d)`, summed in float32."""
    owners = segments.owners().to(hidden.device)
    total = torch.zeros(len(segments), hidden.shape[1], device=hidden.device).index_add(0, owners, hidden.float())
    return total / segments.lengths.to(hidden.device)[:, None]


def _separates(tokenizer: Any) -> bool:
    """Does the tokenizer put a token of its own between the two texts of a pair?"""
    pair, single = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (True, False))
    return bool(pair > single)
