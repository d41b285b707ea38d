"""Writing: what a causal language model says after given tokens, and what an encoder-decoder makes of them.

Both through Transformers' own `generate`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.trunk import Segments
from lorakit.trunk.blocks import stack_of

Answers = Iterator[tuple[list[int], bool]]  # new tokens, and did they end by themselves? In order, as they come

_TOGETHER = 16  # texts that are continued in one batch
_SORTED = 8 * _TOGETHER  # texts of which those of like length come together: all of them are answered before the next


def continued(
    model: nn.Module,
    questions: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    most: int,
    max_length: int,
    temperature: float = 0.0,
    seed: int = 0,
    heard: Callable[[int], object] | None = None,
    watch: Callable[[int, int], object] | None = None,
) -> Answers:
    """New tokens after each question, without the one that ends them; and did one of `ends` end them?

    At most `most` tokens, and no more than `max_length` with the question. `temperature` 0 takes the most probable
    token, above 0 draws by `seed`. Questions are continued in batches of like length, padded on the left. `heard` is
    called with every new token of a single question, as it comes; `watch` with how many questions are done, of all.
    """
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    for begin in range(0, len(questions), _SORTED):
        some = questions[begin : begin + _SORTED]
        found: list[tuple[list[int], bool]] = [([], False)] * len(some)
        done = begin
        with torch.no_grad(), _blank_wishes(model), torch.random.fork_rng(devices):
            torch.manual_seed(seed + begin)
            for part, n_new in _batches([len(question) for question in some], most, max_length):
                rows = _continue(model, [some[i] for i in part], ends, n_new, temperature, heard)
                for i, row in zip(part, rows):
                    found[i] = _ended(row, ends)
                done += len(part)
                if watch is not None:
                    watch(done, len(questions))
        yield from found


def _ended(row: list[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """What stands before the first of `ends`; and is there one?"""
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    return row[:stop], stop is not None


def _batches(lengths: Sequence[int], most: int, max_length: int) -> Iterator[tuple[list[int], int]]:
    """Places of the questions of each batch, and how many tokens they may get. One with less room goes alone."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        room = max_length - lengths[i]
        if room < most:
            yield [i], max(room, 0)
            continue
        part.append(i)
        if len(part) == _TOGETHER:
            yield part, most
            part = []
    if part:
        yield part, most


def _continue(
    model: Any,
    questions: Sequence[Sequence[int]],
    ends: Collection[int],
    n_new: int,
    temperature: float,
    heard: Callable[[int], object] | None,
) -> list[list[int]]:
    from transformers import GenerationConfig

    if n_new < 1:
        return [[] for _ in questions]
    longest = max(map(len, questions))
    pad = min(ends)  # hidden by the mask on the left; on the right it stands behind an end
    device = next(model.parameters()).device
    ids = torch.full((len(questions), longest), pad, device=device)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = torch.tensor(question, device=device)
        mask[row, longest - len(question) :] = 1
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(max_new_tokens=n_new, eos_token_id=sorted(ends), pad_token_id=pad, **draw)
    more = {} if heard is None else {"streamer": _Stream(heard)}
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
    rows: list[list[int]] = out[:, longest:].tolist()
    return rows


class Spoken:
    """Tokens as they come -> text as it can be told: a character of several tokens waits for the last of them."""

    def __init__(self, tokenizer: Any, ends: Collection[int], told: Callable[[str], object]) -> None:
        self._tokenizer, self._ends, self._told = tokenizer, ends, told
        self._ids: list[int] = []
        self._text = ""

    def hear(self, token: int) -> None:
        """One more."""
        if token in self._ends:
            return
        self._ids.append(token)
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self._text):
            self._told(text[len(self._text) :])
            self._text = text


class _Stream:
    """What `generate` tells of a single question: first its tokens, then each new one."""

    def __init__(self, heard: Callable[[int], object]) -> None:
        self._heard, self._began = heard, False

    def put(self, tokens: Tensor) -> None:
        if self._began:
            self._heard(int(tokens.flatten()[-1]))
        self._began = True

    def end(self) -> None:
        pass


def rewritten(
    model: Any,
    sources: Sequence[Sequence[int]],
    *,
    start: int,
    ends: Sequence[int],
    pad: int,
    most: int,
    beams: int = 1,
    watch: Callable[[int, int], object] | None = None,
) -> Answers:
    """What an encoder-decoder makes of each source, without the token that ends it; and did one of `ends` end it?

    At most `most` tokens. One beam takes the most probable token each time; more search. `watch` is called with how
    many sources are done, of all. Of the base's own wishes those are kept that say what may be written (the language
    that it must begin with, tokens that never stand in a text).
    """
    from transformers import GenerationConfig

    own = {name: getattr(model.generation_config, name, None) for name in ("forced_bos_token_id", "bad_words_ids")}
    kept = {name: value for name, value in own.items() if value is not None}
    marks = {"decoder_start_token_id": start, "eos_token_id": list(ends), "pad_token_id": pad}
    deep = len(stack_of(model.get_decoder())) > model.config.num_hidden_layers  # Transformers' cache has not so many
    config = GenerationConfig(max_new_tokens=most, num_beams=beams, use_cache=not deep, **marks, **kept)
    device = next(model.parameters()).device
    for begin in range(0, len(sources), _SORTED):
        some = sources[begin : begin + _SORTED]
        found: list[tuple[list[int], bool]] = [([], False)] * len(some)
        order = sorted(range(len(some)), key=lambda i: (len(some[i]), i))
        with torch.no_grad(), _blank_wishes(model):
            for first in range(0, len(order), _TOGETHER):
                part = order[first : first + _TOGETHER]
                flat = torch.tensor([token for i in part for token in some[i]])
                ids, mask = (x.to(device) for x in Segments.of([len(some[i]) for i in part]).padded(flat, pad))
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                for i, row in zip(part, out[:, 1:].tolist()):
                    found[i] = _ended(row, ends)
                if watch is not None:
                    watch(begin + first + len(part), len(sources))
        yield from found


@contextmanager
def _blank_wishes(model: Any) -> Iterator[None]:
    """Within the block, the sampling that a base brings along (penalties, top-k ...) does not mix in."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
