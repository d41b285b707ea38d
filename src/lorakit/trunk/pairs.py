"""Pairs of texts through an encoder-decoder: the encoder over all sources end to end, the decoder over all targets.

Texts come two by two, a source and then what the decoder is given for it. A row of a target attends to those before it
in its target, and to all rows of its own source.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.trunk.front import laid, standing
from lorakit.trunk.prefix import Prefix
from lorakit.trunk.segments import Segments, inside
from lorakit.trunk.trunk import Trunk, filled

_TRIAL = (7, 4, 3, 6)  # tokens of the two short pairs that packing is proved on


class PairTrunk(Trunk):
    """A Trunk whose `hidden` gives the encoder's last states for the rows of sources, the decoder's for targets."""

    def __init__(self, model: nn.Module, *, dtype: str = "fp32", pad: int = 0, keep: bool = True) -> None:
        super().__init__(model, dtype=dtype, pad=pad, keep=keep)
        self._stacks = [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
        self.why_shallow = "sources and targets run through two stacks of blocks, whose states are not kept"

    def hidden(
        self,
        ids: Tensor,
        segments: Segments,
        reads: Tensor | None = None,
        prefix: Prefix | None = None,
        texts: Sequence[int] = (),
        types: Tensor | None = None,
    ) -> Tensor:
        """Last hidden state of every token, `ids (tokens,)` -> `(tokens, d)`; or only of those at `reads`."""
        state = self._padded(ids, segments) if self.why_padded else self._packed(ids, segments)
        return state if reads is None else state[reads.to(state.device)]

    def _packed(self, ids: Tensor, segments: Segments, types: Tensor | None = None) -> Tensor:
        parts = _apart(ids, segments)
        front, device = self._front(), self._device()
        asked, sources, _, kept = laid(front, *parts[0], None, self.pad)
        n, own = len(asked), sources
        (asked, sources), (given, targets) = (
            filled(*part, self.pad, least=1) for part in ((asked, sources), parts[1])
        )  # one text more in each
        with standing(self._prompts, front, own), inside(sources):
            encoded = self._run(0, input_ids=asked.to(device)[None])
        with inside(replace(targets, sources=sources)):
            decoded = self._run(1, input_ids=given.to(device)[None], encoder_hidden_states=encoded, use_cache=False)
        state = encoded[0, :n] if kept is None else encoded[0, kept.to(device)]
        return _together(state, decoded[0, : len(parts[1][0])], segments)

    def _padded(self, ids: Tensor, segments: Segments, types: Tensor | None = None) -> Tensor:
        both = [own.padded(part, self.pad) for part, own in _apart(ids, segments)]
        (asked, seen), (given, known) = ((rows.to(self._device()), mask.to(self._device())) for rows, mask in both)
        encoded = self._run(0, input_ids=asked, attention_mask=seen)
        v = encoded.shape[1] - asked.shape[1]  # rows of a prompt, which the decoder sees too
        states = {"encoder_hidden_states": encoded, "encoder_attention_mask": F.pad(seen, (v, 0), value=1)}
        decoded = self._run(1, input_ids=given, attention_mask=known, **states, use_cache=False)
        return _together(encoded[:, v:][seen.bool()], decoded[known.bool()], segments)

    def _run(self, k: int, **given: Any) -> Tensor:
        state: Tensor = self._stacks[k](**given).last_hidden_state
        return state

    def _trial(self) -> tuple[Segments, Tensor]:
        """Two short pairs of unlike lengths, without the padding token."""
        config: Any = self.model.config
        vocabulary = min(config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size)
        known = [token for token in range(vocabulary) if token != self.pad]
        return Segments.of(_TRIAL), torch.tensor([known[(2 + 5 * k) % len(known)] for k in range(sum(_TRIAL))])

    def _begin_blocks(self, stack: Any) -> None:
        """Every row of a target is read, so the last block runs for all."""


def _apart(ids: Tensor, segments: Segments) -> list[tuple[Tensor, Segments]]:
    """Tokens and segments of the sources, and of the targets."""
    mine = segments.owners() % 2
    return [
        (ids[mine == k], Segments(Segments.of(segments.lengths[k::2].tolist()).starts, segments.n_calls))
        for k in (0, 1)
    ]


def _together(encoded: Tensor, decoded: Tensor, segments: Segments) -> Tensor:
    """The rows of both in the order of their texts."""
    mine = segments.owners() % 2
    order = torch.where(mine == 0, (mine == 0).cumsum(0) - 1, len(encoded) + (mine == 1).cumsum(0) - 1)
    return torch.cat([encoded, decoded])[order.to(encoded.device)]
