"""What a prompt is: rows that learn and stand in front of every text. No update of a weight, so it is no `Method`.

A **prompt method** says where the rows stand (among the inputs, or among the keys and values of every attention), and
how they come of what learns. A new one is one file in `prompts/`, or an entry point of another package.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.errors import PlanError, UsageError, listed, nearest
from lorakit.registry import Registry
from lorakit.update import same_tensor

LENGTH = 20  # rows, where nobody says how many
ROWS = "rows"  # the factor that a prompt consists of, once it is learned


class Sizes(NamedTuple):
    """Of a model: the numbers of an input row; for prompts among keys and values those of a key of all heads, the
    attention layers, heads of keys and values, and the numbers of a head."""

    width: int
    layers: int = 0
    heads: int = 0
    head: int = 0

    def rows(self, length: int) -> tuple[int, ...]:
        """Shape of a prompt: `(length, width)` among the inputs, else `(length, layers, 2, heads, head)`: keys, then
        values."""
        return (length, self.layers, 2, self.heads, self.head) if self.layers else (length, self.width)


class Reads(Protocol):
    """The base, as far as a prompt looks at it to begin."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def vocabulary(self) -> int: ...

    def inputs(self, tokens: Tensor) -> Tensor:
        """The input rows of `tokens (n,)`: `(n, width)`."""
        ...

    def states(self, tokens: Tensor) -> Tensor:
        """The keys and values of `tokens (n,)` as one text, in every layer: `(n, layers, 2, heads, head)`."""
        ...


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """What a prompt is to be: its method, how many rows, how they begin ("" is the method's own).

    `words` are tokens that it begins as (their tokenizer's numbers), repeated or cut to the length; without them the
    start "words" draws tokens.
    """

    method: str = "soft"
    length: int = LENGTH
    start: str = ""
    words: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "PromptPlan":
        """From "soft" or "soft:20", the method and how many rows. UsageError for what is neither."""
        method, colon, length = text.partition(":")
        if colon and not length.isdecimal():
            raise UsageError(f"prompt '{text}' is not a method and a number of rows, as '{method or 'soft'}:20' is")
        return cls(method, int(length) if colon else LENGTH)

    def faults(self) -> list[str]:
        """What is wrong with it, of any model."""
        if self.method not in PROMPTS:
            known = ", ".join(PROMPTS.names())
            return [f"unknown prompt method '{self.method}'{nearest(self.method, PROMPTS.names())}; use {known}"]
        starts = PROMPTS[self.method].starts
        found = [] if self.length >= 1 else [f"a prompt of {self.length} rows; use 1 or more"]
        if self.start and self.start not in starts:
            way = f"use {' or '.join(starts)}" if starts else "it begins in its own way; leave it out"
            found.append(f"prompt '{self.method}' has no start '{self.start}'; {way}")
        if self.words and (self.start or next(iter(starts), "")) != "words":
            found.append(f"prompt '{self.method}' with start '{self.start}' does not begin as words; leave them out")
        return found

    def settled(self) -> "PromptPlan":
        """With the method's own start, where it is left to it. PlanError for what is wrong with it."""
        if faults := self.faults():
            raise PlanError(listed(faults))
        return replace(self, start=self.start or next(iter(PROMPTS[self.method].starts), ""))


class PromptMethod(ABC):
    """Class attributes: `name`; `rows_are`, `parameters`, `use` and `source` (the docs' table); `inputs` (the rows
    stand among the inputs, not among keys and values); `starts` (how they may begin, the usual one first; none if it
    has a way of its own); `pace` (its learning rate beside lora's, as measured); `peft_type` and `peft_config` (PEFT's
    twin)."""

    name: ClassVar[str]
    rows_are: ClassVar[str]
    parameters: ClassVar[str]
    use: ClassVar[str]
    source: ClassVar[str]
    inputs: ClassVar[bool]
    starts: ClassVar[tuple[str, ...]] = ("words", "normal")
    pace: ClassVar[float] = 1.0
    peft_type: ClassVar[str | None] = None
    peft_config: ClassVar[Mapping[str, object]] = {}

    @abstractmethod
    def shapes(self, sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
        """Shape of everything that learns."""

    @abstractmethod
    def init(self, plan: PromptPlan, base: Reads, generator: torch.Generator) -> dict[str, Tensor]:
        """How it begins, float32. `plan` is settled."""

    @abstractmethod
    def rows(self, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
        """The rows, as `sizes.rows` has them, of what learns."""

    def size(self, sizes: Sizes, length: int) -> int:
        """Numbers that learn."""
        return sum(map(prod, self.shapes(sizes, length).values()))


PROMPTS: Registry[PromptMethod] = Registry("prompt method", "lorakit.prompts")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt as an adapter holds it: what learns or, once that is done, the rows alone."""

    method: str
    sizes: Sizes
    factors: Mapping[str, Tensor]
    start: str = ""

    @property
    def rows(self) -> Tensor:
        """The rows themselves; see `Sizes.rows`."""
        return rows_of(PROMPTS[self.method], self.factors, self.sizes)

    @property
    def length(self) -> int:
        """How many."""
        return len(next(iter(self.factors.values())))

    @property
    def inputs(self) -> bool:
        """Do they stand among the inputs?"""
        return PROMPTS[self.method].inputs

    def finished(self) -> "Prompt":
        """With the rows alone, which need no network that makes them any more."""
        return replace(self, factors={ROWS: self.rows.detach().clone()})

    def faults(self) -> list[str]:
        """Factors that are missing, too many, or of a shape that the sizes do not have."""
        method = PROMPTS[self.method]
        wanted = {ROWS: self.sizes.rows(self.length)}
        if self.factors.keys() != wanted.keys():
            wanted = method.shapes(self.sizes, self.length)
        found = {name: tuple(factor.shape) for name, factor in self.factors.items()}
        faults = [
            f"prompt '{self.method}': factor '{name}' is {found.get(name, 'missing')}; it must be {shape}"
            for name, shape in wanted.items()
            if found.get(name) != shape
        ]
        return faults + [f"prompt '{self.method}' has no factor '{name}'" for name in found if name not in wanted]

    def same_as(self, other: "Prompt | None") -> bool:
        """Equal in meaning and bit for bit."""
        return (
            other is not None
            and (self.method, self.sizes) == (other.method, other.sizes)
            and self.factors.keys() == other.factors.keys()
            and all(same_tensor(factor, other.factors[name]) for name, factor in self.factors.items())
        )


def rows_of(method: PromptMethod, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """The rows, be they learned or still to be made."""
    return factors[ROWS] if ROWS in factors else method.rows(factors, sizes)


def tokens_of(plan: PromptPlan, vocabulary: int, generator: torch.Generator) -> Tensor:
    """The tokens that a prompt begins as `(length,)`: the plan's words over and over, or drawn. PlanError for words
    that the base does not know."""
    if not plan.words:
        return torch.randint(vocabulary, (plan.length,), generator=generator)
    strange = [word for word in plan.words if not 0 <= word < vocabulary]
    if strange:
        raise PlanError(f"the prompt's word {strange[0]} is none of the base's {vocabulary:,} tokens")
    return torch.tensor(repeated(plan.words, plan.length))


def repeated(words: Sequence[int], length: int) -> list[int]:
    """Over and over, cut to the length."""
    return [words[k % len(words)] for k in range(length)]
