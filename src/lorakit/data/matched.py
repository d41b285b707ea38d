"""Texts that belong together, ready for the model: each different text once, and the examples that are made of them."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lorakit.data.batches import Examples, TextBatch, Tokens


class Matched(Examples):
    """`texts`, each with one label, its key; and for every example the places of the texts that it is made of.

    The key of a text is its place, or its class if there are `classes`. With those every example is one text, until an
    epoch begins: then it is that and another of its class.
    """

    def __init__(
        self, texts: Tokens, members: Sequence[tuple[int, ...]], lines: tuple[int, ...], classes: bool = False
    ) -> None:
        self.texts, self.members, self.lines, self.pad = texts, list(members), lines, texts.pad
        self.classes = classes
        self._kin: dict[int, list[int]] = defaultdict(list)
        for place in sorted({own[0] for own in members}) if classes else ():
            self._kin[self._key(place)].append(place)
        self._measure()

    def _key(self, place: int) -> int:
        return int(self.texts.labels[place][0])

    def _measure(self) -> None:
        lengths = self.texts.lengths
        self._lengths = [sum(lengths[place] for place in own) for own in self.members]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self._lengths

    @property
    def text_lengths(self) -> list[int]:
        """Tokens of each text."""
        return self.texts.lengths

    def begin(self, seed: int, epoch: int) -> None:
        """Gives each text of a class another of it."""
        if not self.classes:
            return
        draw = random.Random(seed * 1_000_003 + epoch)
        self.members = [(own[0], self._other(own[0], draw)) for own in self.members]
        self._measure()

    def _other(self, place: int, draw: random.Random) -> int:
        """Another text of the class; the same where it is alone."""
        kin = self._kin[self._key(place)]
        found = kin[draw.randrange(max(1, len(kin) - 1))]
        return kin[-1] if found == place else found

    def n_labels(self, indices: Sequence[int]) -> int:
        """Every example is one."""
        return len(indices)

    def gather(self, indices: Sequence[int]) -> TextBatch:
        """The texts of these examples, end to end; their keys are the labels."""
        batch = self.texts.gather([place for i in indices for place in self.members[i]])
        return replace(batch, examples=tuple(indices))

    def candidates(self) -> list[int]:
        """For every example the place of the text that is to be found: the positive; where there are classes itself."""
        side = 0 if self.classes else 1
        return [own[side] for own in self.members]

    def belonging(self) -> list[set[int]]:
        """For every example the places of all that belong to its first text: its class, or the positives of it."""
        if self.classes:
            return [set(self._kin[self._key(own[0])]) - {own[0]} for own in self.members]
        found: dict[int, set[int]] = defaultdict(set)
        for own in self.members:
            found[own[0]].add(own[1])
        return [found[own[0]] for own in self.members]
