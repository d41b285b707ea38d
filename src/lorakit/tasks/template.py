"""How a dialogue is written as tokens, and which of them are answers.

With a chat template (Jinja, as the tokenizer brings it): the answer of turn k is what the dialogue up to k has beyond
the dialogue before k with the generation prompt; the longer one must begin with the shorter one. So the place of the
answer is found for any template, without knowing its marks. An answer is learned up to the mark that ends it
(`<|im_end|>` ...); white space behind that mark is not. A template without such a mark gets the tokenizer's
end-of-text token behind the last answer.

A template may write an earlier answer otherwise than the last one (Qwen 3 drops its thoughts), or move the system turn.
Then each answer becomes a text of its own, written exactly as the model will be asked for it.

Without a chat template ours is taken: every system or user turn and a line break, every answer and the end-of-text
token; before all of it the begin-of-text token, where the tokenizer puts one before texts:

    [bos] system \\n prompt \\n answer [eos] prompt \\n answer [eos] ...

Prompt and answer are made into tokens apart from each other. So their boundary is one between tokens, the same in
training and when an answer is asked for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from lorakit.data.dialogues import Dialogues, Turn, Turns
from lorakit.data.faults import refuse_rows
from lorakit.errors import DataError, LorakitError, UsageError

CHOICES = ("auto", "plain")
SHARE = 4  # a cut text keeps at least a quarter of its room for what was asked
X = TypeVar("X")
Y = TypeVar("Y")


class Piece(NamedTuple):
    """A stretch of a text: its words, and whether the model is to learn to write it."""

    text: str
    answer: bool


class Text(NamedTuple):
    """Token ids, the places of those that are to be learned, and where the last answer begins."""

    ids: tuple[int, ...]
    learned: tuple[int, ...]
    answer: int


def chosen_template(tokenizer: Any, choice: str) -> str:
    """The chat template by which this base is to be asked; "" for ours. `choice`: "auto" (its own, if any), "plain"."""
    if choice not in CHOICES:
        raise UsageError(f"unknown template '{choice}'; use one of {', '.join(CHOICES)}")
    if choice == "plain" or not getattr(tokenizer, "chat_template", None):
        return ""
    return str(tokenizer.get_chat_template())


@dataclass(frozen=True)
class Template:
    """Writes dialogues by a chat template; by ours if it is ""."""

    tokenizer: Any
    chat: str

    def texts(self, data: Dialogues) -> list[list[Text]]:
        """The texts of each dialogue: mostly one. DataError names every row that the template cannot write."""
        if not self.chat:
            self.eos  # noqa: B018  # without it no answer could ever end
        pieces = _each(data, data.turns, self._pieces)
        ids = iter(self._ids(piece.text for texts in pieces for text in texts for piece in text))
        filled = [[[(piece, next(ids)) for piece in text] for text in texts] for texts in pieces]
        return _each(data, filled, lambda texts: [self._text(text) for text in texts])

    def questions(self, data: Dialogues) -> list[tuple[int, ...]]:
        """Token ids of dialogues that end with what is asked, up to where the answer begins."""
        turns = tuple((*turns, Turn("assistant", "x")) for turns in data.turns)
        found = self.texts(Dialogues(turns, data.source, data.lines))
        return [texts[-1].ids[: texts[-1].answer] for texts in found]

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the mark that the chat template puts behind it, and end-of-text."""
        found = {self.tokenizer.eos_token_id} - {None}
        if self.chat:
            pieces = self._pieces((Turn("user", "a"), Turn("assistant", "b")))[-1]
            (ids,) = self._ids([pieces[-1].text])
            last = ids[self._length(ids) - 1] if ids else None
            added: Any = getattr(self.tokenizer, "added_tokens_decoder", {})
            if last in {*added, *self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}:
                found.add(last)
        return frozenset(found)

    def _pieces(self, turns: Turns) -> list[list[Piece]]:
        """The texts of a dialogue, each as stretches that are tokenized apart."""
        return self._chat_pieces(turns) if self.chat else [_plain_pieces(turns)]

    def _chat_pieces(self, turns: Turns) -> list[list[Piece]]:
        answers = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
        asked = [self._render(turns[:k], True) for k in answers]
        whole = [self._render(turns[: k + 1], False) for k in answers]
        for k, before, text in zip(answers, asked, whole):
            if not text.startswith(before) or len(text) == len(before):
                raise DataError(
                    "the chat template does not write an answer behind what it writes to ask for it; "
                    "take lorakit's plain template (--template plain)"
                )
            for place, turn in enumerate(turns[: k + 1]):
                if place in answers and place != k:
                    continue  # templates may shorten earlier answers, and then they are learned by themselves
                if _squeezed(turn.content) not in _squeezed(text[len(before) :] if place == k else before):
                    raise DataError(
                        f"the chat template leaves out a part of turn {place + 1} ({turn.role}); change the turn, or "
                        "take lorakit's plain template (--template plain)"
                    )
        if not all(whole[-1].startswith(text) for text in (*asked, *whole)):
            return [[Piece(b, False), Piece(text[len(b) :], True)] for b, text in zip(asked, whole)]
        pieces: list[Piece] = []
        end = 0
        for before, text in zip(asked, whole):
            pieces += [Piece(text[end : len(before)], False), Piece(text[len(before) :], True)]
            end = len(text)
        return [pieces]

    def _render(self, turns: Turns, ask: bool) -> str:
        messages = [turn._asdict() for turn in turns]
        write = self.tokenizer.apply_chat_template
        try:
            return str(write(messages, chat_template=self.chat, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template refuses it ({str(error).strip() or type(error).__name__})") from None

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text, without what the tokenizer would put around it."""
        given = list(texts)
        return list(self.tokenizer(given, add_special_tokens=False)["input_ids"]) if given else []

    def _text(self, pieces: Sequence[tuple[Piece, list[int]]]) -> Text:
        ids: list[int] = [] if self.chat else list(self.begin)
        learned: list[int] = []
        begin = 0
        for number, (piece, own) in enumerate(pieces, 1):
            if piece.answer and not ids:
                raise DataError("nothing before its answer becomes a token")
            begin, length, last = len(ids), self._length(own), number == len(pieces)
            if not piece.answer:
                ids += own
            elif length and own[length - 1] in self.ends:
                ids += own[:length] if last else own
                learned += range(begin, begin + length)
            else:
                ids += [*own, self.eos] if last or not self.chat else own
                learned += range(begin, len(ids))
        return Text(tuple(ids), tuple(learned), begin)

    def _length(self, ids: Sequence[int]) -> int:
        """How many tokens there are up to the last one that is not white space."""
        places = range(len(ids) - 1, -1, -1)
        return next((place + 1 for place in places if self.tokenizer.decode([ids[place]]).strip()), 0)

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """[bos], where the tokenizer puts it before texts by itself."""
        bos = self.tokenizer.bos_token_id
        around = self.tokenizer("")["input_ids"]
        return (bos,) if bos is not None and list(around[:1]) == [bos] else ()

    @cached_property
    def eos(self) -> int:
        """The end-of-text token. LorakitError if there is none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise LorakitError(
                "the tokenizer of this base has no end-of-text token, so no answer could ever end; name one as "
                "eos_token in its tokenizer_config.json"
            )
        return int(eos)


def cut(text: Text, max_length: int, bos: int | None = None) -> Text:
    """The text in at most `max_length` tokens: without the beginning of what stands before its last answer.

    That part keeps at least a quarter of the room, or all it has; beyond it the answer loses its end. A leading `bos`
    stays. A token whose predecessor was cut away is not learned.
    """
    if len(text.ids) <= max_length:
        return text
    room = max(max_length - (len(text.ids) - text.answer), min(text.answer, max(1, max_length // SHARE)))
    room = min(room, text.answer)
    kept = text.ids[:1] if text.ids[0] == bos and room > 1 else ()
    begin, end = text.answer - room + len(kept), text.answer + max_length - room
    moved = len(kept) - begin
    learned = tuple(place + moved for place in text.learned if begin < place < end)
    return Text(kept + text.ids[begin:end], learned, text.answer + moved)


def _plain_pieces(turns: Turns) -> list[Piece]:
    pieces: list[Piece] = []
    asked = ""
    for turn in turns:
        if turn.role != "assistant":
            asked += turn.content + "\n"
            continue
        pieces += [Piece(asked, False), Piece(turn.content, True)]
        asked = ""
    return pieces


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _each(data: Dialogues, given: Sequence[X], do: Callable[[X], Y]) -> list[Y]:
    """The result for every row; DataError that names the rows for which there is none."""
    found: list[Y] = []
    faults: list[tuple[int, str]] = []
    for line, one in zip(data.lines, given):
        try:
            found.append(do(one))
        except DataError as error:
            faults.append((line, str(error)))
    refuse_rows(data.source, faults)
    return found
