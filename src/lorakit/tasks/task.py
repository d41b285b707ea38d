"""What a task is: from rows to tokens with labels, from hidden states to a loss, from scores to metrics and answers.

The engine (trunk/, fit/) knows no task; a task knows no batch size, no dtype, no optimizer. A new one is one file in
this room: a class with `@TASKS.add_class`, or one of another package under the entry-point group `lorakit.tasks`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from lorakit.data.batches import Examples, Tokens
from lorakit.data.faults import BadRow, refuse
from lorakit.data.rows import Part, Splits
from lorakit.errors import DataError
from lorakit.plan import Plan
from lorakit.registry import Registry
from lorakit.rules import Rules
from lorakit.rules import plan as make_plan
from lorakit.tasks.base import Base, load_base
from lorakit.trunk import Trunk

_SHOWN = 5  # rows that a message names
Scores = Callable[[Examples], Tensor]  # what a task's `scores` gives for all examples: the trunk is run for it


class Evaluated(Protocol):
    """What `Task.evaluate` gives, at the least; `str` of it is for people."""

    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def skipped(self) -> tuple[BadRow, ...]: ...


@dataclass(frozen=True)
class Measured:
    """What an evaluation begins with: the rows that were left out of it."""

    skipped: tuple[BadRow, ...] = field(default=(), kw_only=True)


class Task(ABC):
    """One kind of job. The class says how to get data and base for it; an instance knows what it was trained for."""

    name: ClassVar[str]
    part: ClassVar[type[Part]]  # the form of its rows
    metric: ClassVar[str]  # by which the best is kept (see `better`) and the result is told
    drawn: ClassVar[str]  # the metric, from 0 to 1, that curve.png shows beside the loss
    head: ClassVar[str] = ""  # the module that is trained fully beside the adapter
    output: ClassVar[str] = "none"  # the head that the base brings along: see `load_base`
    wishes: ClassVar[tuple[str, ...]] = ()  # what a caller may ask of the base: names of arguments of `load_base`
    columns: ClassVar[tuple[str, ...]]  # what a caller may name of a table: names of arguments of `read`
    options: ClassVar[tuple[str, ...]] = ()  # what a caller may ask of `predict`
    asks: ClassVar[tuple[str, ...]] = ()  # what a caller may ask of `evaluate`
    choices: ClassVar[tuple[str, ...]] = ()  # what a caller may set for `fit`: fields of the task, kept in its note
    peft_task: ClassVar[str] = ""  # PEFT's task_type
    try_it: ClassVar[str] = "..."  # a text to try a fitted adapter with; "" where it takes no single text
    untold: ClassVar[tuple[str, ...]] = ()  # entries of `note` that are not for people to read
    from_scratch: bool = False  # the base knows nothing yet, and learns as a whole
    coupled: ClassVar[bool] = False  # the loss looks at all examples of a step together: see `coupled_loss`

    # ---------------------------------------------------------------- before there is one

    @classmethod
    @abstractmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Part:
        """The rows of one table; without what is to be learned if not `answers`. A column may be named `source`."""

    @classmethod
    def refuse_other(cls, rows: Part) -> None:
        """DataError if the rows are not of the form that the task takes."""
        if not isinstance(rows.core, cls.part):
            raise DataError(f"task '{cls.name}' takes {cls.part.__name__}, and these are {type(rows.core).__name__}")

    @classmethod
    @abstractmethod
    def asked(cls, given: Sequence[Any]) -> Part:
        """Rows to predict from Python values."""

    @classmethod
    def base_for(cls, name: str, data: Splits[Any] | None, **wishes: Any) -> Base:
        """The base of this name, to be trained on these rows."""
        return load_base(name, head=cls.output, **wishes)

    @classmethod
    def plan(cls, model: nn.Module, rank: int = 8, layers: Rules | None = None, **rules: Any) -> Plan:
        """What learns, by the rules of `lorakit.plan`."""
        return make_plan(model, rank, layers or None, **rules)

    @classmethod
    @abstractmethod
    def of(cls, data: Splits[Any], base: Base) -> Self:
        """The task for these rows and this base. DataError or UsageError if they do not go together."""

    @classmethod
    @abstractmethod
    def from_note(cls, note: Mapping[str, Any]) -> Self:
        """The inverse of `note`."""

    def chosen(self, choices: Mapping[str, Any]) -> Self:
        """The same with these of its `choices`. UsageError for a value that makes no sense."""
        return replace(self, **choices) if choices else self  # type: ignore[type-var]

    # ---------------------------------------------------------------- in training

    @abstractmethod
    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again: values that JSON has, and `name`."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk what it needs beside it (a head); what is there already is left as it is."""

    def trunk(self, model: Any, *, dtype: str, pad: int, keep: bool = True) -> Any:
        """What runs the model fast: a Trunk, or what has its face."""
        return Trunk(model, dtype=dtype, pad=pad, head=self.head, keep=keep)

    @abstractmethod
    def examples(self, rows: Any, tokenizer: Any, *, truncate: bool) -> Examples:
        """All rows, ready for the model. DataError names every row that cannot be used."""

    def preview(self, examples: Any, number: int, tokenizer: Any) -> str:
        """One example as the model sees it, for people; "" where that cannot be written."""
        if not isinstance(examples, Tokens):
            return ""
        return "  |  ".join(str(tokenizer.decode(examples.ids[i])) for i in examples.texts([number]))

    def informed(self, model: nn.Module, examples: Any, scores: Scores) -> Any:
        """The examples with what only the model can tell of them, asked once, before anything is learned.

        `scores` runs the model as it is now; within `lorakit.attach.disabled(model)` that is the plain base.
        """
        return examples

    @abstractmethod
    def loss(self, model: nn.Module, hidden: Any, batch: Any) -> Tensor:
        """The sum of the losses of all labels of the batch, in nats. `hidden` is what the batch gets from the trunk:
        for texts `(tokens, d)`, or `(reads, d)` of what is read."""

    @abstractmethod
    def scores(self, model: nn.Module, hidden: Any, batch: Any) -> Tensor:
        """What the metrics need of each example: `(examples, k)`, float32. Where `k` differs from pass to pass, rows
        are filled up with NaN."""

    def coupled_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of a whole step, by the scores `(examples, k)` of all its examples and their labels
        `(examples,)`; for a task that is `coupled`, whose `loss` is this of one pass."""
        raise NotImplementedError

    @abstractmethod
    def metrics(self, scores: Tensor, examples: Any) -> dict[str, float]:
        """Metrics over all examples from `scores (examples, k)`; `loss` is among them."""

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """A higher metric; the lower loss decides between equals."""
        return old is None or (new[self.metric], -new["loss"]) > (old[self.metric], -old["loss"])

    def calibrated(self, valid: Any, scores: Scores) -> Self:
        """The task for use: with what the validation examples settle once training is done (a threshold ...)."""
        return self

    def tried(self, base: Base, rows: Any) -> dict[str, Any]:
        """What the trained model does when it is tried on held-out rows: more values for the summary."""
        return {}

    # ---------------------------------------------------------------- in use

    def load_base(self, name: str) -> Base:
        """The base, as it was loaded for training."""
        return load_base(name, head=self.output, max_length=self.note().get("max_length"))

    @abstractmethod
    def predict(self, rows: Any, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Any]:
        """An answer for every row, in order. `base` has the adapter attached."""

    def answers(self, rows: Any, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> Iterator[Any]:
        """The same, each as it comes: one by one from a task that writes, else all at the end."""
        yield from self.predict(rows, base, scores, truncate=truncate, **options)

    @abstractmethod
    def evaluate(self, rows: Any, base: Base, scores: Scores, *, truncate: bool) -> Evaluated:
        """How good the answers are for rows whose right answers are known."""

    def shown(self, found: Sequence[Any]) -> str:
        """Predictions for people."""
        return "\n".join(map(str, found))

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What `tried` brought, for people: a word and a line each."""
        return []


TASKS: Registry[Any] = Registry("task", "lorakit.tasks")


def task_of(note: Mapping[str, Any]) -> Task:
    """The task that wrote this note."""
    task: Task = TASKS[note["name"]].from_note(note)
    return task


def figure(name: str, value: float) -> str:
    """A metric for people: an accuracy in per cent, everything else with three decimals."""
    return f"{value:.1%}" if name.endswith("accuracy") else f"{value:.3f}"


def refuse_long(
    rows: Part, lines: Sequence[int], ids: Sequence[Sequence[int]], max_length: int, noun: str = "text", why: str = ""
) -> None:
    """BadRowsError if a text has more tokens than the model has positions, or than it may take for the reason `why`.
    `lines`: the row of each; `noun`: what the texts are."""
    long = [(line, len(entry)) for line, entry in zip(lines, ids) if len(entry) > max_length]
    if long:
        line, n = max(long, key=lambda pair: pair[1])
        known = list(dict.fromkeys(map(str, dict(long))))
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        which = f" (rows {', '.join(known[:_SHOWN])}{more})" if len(known) > 1 else ""
        it, most = "it" if noun == "text" else f"the {noun}", f"{max_length} are the most{why}"
        refuse(
            [BadRow(rows.source, row, f"{it} has {count} tokens, and {most}") for row, count in long],
            f"'{rows.source}': {len(long)} of {len(ids)} {noun}s are longer than {max_length} tokens{which}, the "
            f"longest in row {line} with {n}{why and f'; {most}'}",
            "shorten them, or pass --truncate to cut them",
        )
