"""The stack of blocks of a model, run with less: the first ones from a cache, the last one for the rows that are read.

**Few rows.** Everything in a block but its attention looks at each row by itself. So the last block is begun with all
rows and stopped when its attention has the queries, keys and values; then it is run again with the wanted rows only,
and its attention answers those from what was caught. The result is that of the whole block at these rows, for any
block that does so; the trunk proves it on two short texts before it relies on it.

**Cache.** What enters block `depth` does not change while nothing before it learns. Where it is known, the blocks
before give back what they are given, and block `depth` gets the rows from the cache.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.trunk.packing import CaughtError, Few, only
from lorakit.trunk.segments import current

_FEWER = 0.75  # share of the rows above which a whole last block is cheaper than one and a part


@dataclass
class Call:
    """How the blocks run in one pass. `given` rows enter block `depth` instead of its own, or `seen` are kept there."""

    reads: Tensor | None = None
    depth: int = 0
    given: Tensor | None = None
    keep: bool = False
    seen: Tensor | None = None


class Blocks:
    """The blocks of a model under our forwards, until `release`."""

    def __init__(self, body: nn.Module) -> None:
        self.modules = stack_of(body)
        self.call = Call()
        self._as_tuple = [False] * len(self.modules)
        for i, block in enumerate(self.modules):
            block.__dict__["forward"] = partial(_forward, self, i)

    def release(self) -> None:
        """Gives every block its own forward again."""
        for block in self.modules:
            block.__dict__.pop("forward", None)

    def run(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One block, as the current call wants it."""
        call, block = self.call, self.modules[i]
        plain: Callable[..., Any] = partial(type(block).forward, block)
        state: Tensor = args[0] if args else kwargs["hidden_states"]
        if call.given is not None and i < call.depth:
            return _skipped(plain, args, kwargs, state) if self._as_tuple[i] else state
        if i == call.depth:
            if call.keep:
                call.seen = state
            if call.given is not None:
                state = call.given.to(state.dtype)[None]
                args, kwargs = _with_state(args, kwargs, state)
        if i == len(self.modules) - 1 and call.reads is not None and len(call.reads) < _FEWER * state.shape[1]:
            return _few_rows(plain, args, kwargs, state, call.reads)
        found = plain(*args, **kwargs)
        self._as_tuple[i] = isinstance(found, tuple)
        return found


def _forward(blocks: Blocks, i: int, *args: Any, **kwargs: Any) -> Any:
    return blocks.run(i, args, kwargs)


def stack_of(body: nn.Module) -> list[nn.Module]:
    """The longest list of modules of one class in a model: its blocks. Empty if there is none."""
    lists = [list(m) for m in body.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    return max(lists, key=len, default=[])


def _with_state(args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})


def _few_rows(
    plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor, reads: Tensor
) -> Any:
    """The block's output at `reads`, zeros elsewhere."""
    segments = current()
    assert segments is not None
    few = Few(reads, segments)
    n = state.shape[1]
    with only(few):
        with suppress(CaughtError):
            plain(*args, **kwargs)
        found = plain(*_rows(args, reads, n), **_rows(kwargs, reads, n))
    part = found[0] if isinstance(found, tuple) else found
    whole = torch.zeros_like(state).index_copy(1, reads.to(state.device), part)
    return (whole, *found[1:]) if isinstance(found, tuple) else whole


def _skipped(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> Any:
    """The state as it came, and what the block hands on besides, as T5's does its bias: run for that with one row."""
    segments, first, n = current(), torch.zeros(1, dtype=torch.int64), state.shape[1]
    assert segments is not None
    with only(Few(first[:0], segments)):
        return (state, *plain(*_rows(args, first, n), **_rows(kwargs, first, n))[1:])


def _rows(value: Any, reads: Tensor, n: int) -> Any:
    """The wanted rows of whatever has one entry for each row: (1, n, ..)."""
    if isinstance(value, Tensor):
        return value[:, reads.to(value.device)] if value.ndim >= 2 and value.shape[:2] == (1, n) else value
    if isinstance(value, dict):
        return {name: _rows(entry, reads, n) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_rows(entry, reads, n) for entry in value)
    return value
