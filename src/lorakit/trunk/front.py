"""Packed texts with a prompt in front of each: room among the rows, or keys and values before them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.attach.prompts import Front, Prompts, placeholder
from lorakit.trunk.segments import Before, Segments, in_front, own_rows


class Laid(NamedTuple):
    """Texts with room in front of each; `kept` are the rows of the texts themselves, None where these are all."""

    ids: Tensor
    segments: Segments
    types: Tensor | None
    kept: Tensor | None


def laid(front: Front | None, ids: Tensor, segments: Segments, types: Tensor | None, pad: int) -> Laid:
    """`ids` and token `types (n,)` with room for the prompt's input rows: tokens that are no padding, of type 0."""
    if front is None or not front.n_inputs:
        return Laid(ids, segments, types, None)
    v = front.n_inputs
    own = torch.full((len(segments) * v,), placeholder(pad))
    if types is not None:
        types = in_front(types, segments, torch.zeros_like(own))
    return Laid(in_front(ids, segments, own), segments.wider(v), types, own_rows(segments, v))


@contextmanager
def standing(prompts: Prompts | None, front: Front | None, segments: Segments) -> Iterator[None]:
    """Within the block, the first input rows of each of these segments are the prompt's."""
    if prompts is None or front is None:
        yield
        return
    with prompts.placed(front, segments.firsts(front.n_inputs)):
        yield


def behind(front: Front | None, segments: Segments) -> Segments:
    """The segments with the prompt's keys and values in front."""
    if front is None or front.states is None:
        return segments
    return replace(segments, before=Before.of(front.states, segments))
