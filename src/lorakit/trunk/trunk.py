"""A model with an adapter, run fast while it is trained or used: packed, in half precision, its layers in groups.

Nothing of the model's code is changed. What is done to it on entering is undone on leaving, bit for bit.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorakit.attach.groups import Groups, inputs_recorded, make_groups
from lorakit.attach.prompts import Front, Prompts
from lorakit.attach.slots import find_home, switch_of
from lorakit.device import fast_dtype
from lorakit.errors import UsageError, nearest
from lorakit.mode import eval_mode
from lorakit.reading import body_of
from lorakit.trunk.blocks import Blocks, Call, stack_of
from lorakit.trunk.front import behind, laid, standing
from lorakit.trunk.lean import Lean
from lorakit.trunk.memory import keep_few_kernels, keep_freed_memory
from lorakit.trunk.packing import CannotPackError, packed
from lorakit.trunk.place import dtype_of, place_of
from lorakit.trunk.prefix import Prefix
from lorakit.trunk.segments import Segments, inside, own_rows
from lorakit.trunk.shards import Peers, Shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TRIAL = (7, 3)  # tokens of the two short texts that packing is proved on
_GRAIN = 32
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


def resolve_dtype(name: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the device multiplies it faster than fp32, else "fp32"."""
    if name not in (*DTYPES, "auto"):
        raise UsageError(f"unknown dtype '{name}'{nearest(name, [*DTYPES, 'auto'])}")
    return fast_dtype(device) if name == "auto" else name


class Trunk:
    """Hidden states of texts or images from a Transformers trunk, with whatever adapter is active on it.

    Of images also from any other module, if `shape` (channels, height, width) says what it takes.

    `dtype` "bf16" or "fp32" is what frozen weights and activations are in meanwhile; what learns stays as it is, and so
    does the child module `head`, which is the caller's to run.
    With `keep` false the originals are let go as they are cast, and leaving does not bring them back: for a model that
    nobody else holds. `pad` fills rows where the model cannot be packed; `why_padded` then says why, else it is "";
    images are never padded. `home` is the module that adapters were attached to, where the model is a part of it.
    Meanwhile the model is in eval mode: no dropout, and batch norms keep their statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: str = "fp32",
        pad: int = 0,
        head: str = "",
        keep: bool = True,
        shape: Sequence[int] = (),
        home: nn.Module | None = None,
    ) -> None:
        self.model = model
        self._home = home or model
        self.head = head
        self._body = body_of(model)
        self._stacks = [self._body]
        self.precision, self.dtype = dtype, DTYPES[dtype]
        self.pad = pad
        self.why_padded = ""
        self.groups: Groups | None = None
        self.trims = False
        self.depth = 0  # blocks at the start in which nothing learns
        self.why_shallow = "something learns in the first block"
        self._takes_pixel_values = getattr(model, "main_input_name", "") == "pixel_values"
        self._reads_images = bool(shape) or self._takes_pixel_values
        self._shape = tuple(shape)
        self._width = 0
        self._pixel_dtype = dtype_of(model)
        self._blocks: Blocks | None = None
        self._offset = 0
        self._keep = keep
        self._peers: Peers | None = None
        self._prompts: Prompts | None = None
        self.shards: list[Shards] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Trunk":
        with ExitStack() as stack:
            if self._device().type == "cpu":
                keep_freed_memory()
                if not self._reads_images:
                    keep_few_kernels()
            stack.enter_context(eval_mode(self.model))
            self._prompts = switch_of(self._home).prompts if find_home(self._home) is not None else None
            self._begin_packing(stack)  # proved in the dtype that the model came in
            self._cast(stack)
            self._begin_shards(stack)
            self._begin_groups(stack)
            for part in self._stacks:
                stack.callback(Lean(part, self.head, packs=self._peers is None).release)
            self._begin_blocks(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def share_out(self, peers: Peers) -> None:
        """Lets each of these processes keep a part of the frozen blocks (`shards`) while it is entered. Call it before.

        Weights in oneDNN's order, which are a second copy, are then not made.
        """
        self._peers = peers

    def hidden(
        self,
        ids: Tensor,
        segments: Segments,
        reads: Tensor | None = None,
        prefix: Prefix | None = None,
        texts: Sequence[int] = (),
        types: Tensor | None = None,
    ) -> Tensor:
        """Last hidden state of every token, `ids (tokens,)` -> `(tokens, d)`; or only of those at `reads` (rising).

        `prefix` keeps what the frozen blocks give for these `texts`, and spares running them again. `types (tokens,)`
        are token types, for a model that has them.
        """
        if self.why_padded:
            state = self._padded(ids, segments, types)
        elif self._blocks is None:
            state = self._packed(ids, segments, types)
        else:
            v = 0 if self._prompts is None else self._prompts.n_inputs
            at = reads if reads is None or not v else own_rows(segments, v)[reads]
            call = Call(at if self.trims else None)
            if prefix is not None:
                call.depth, call.keep = self.depth, True
                if prefix.has(texts):
                    call.keep, rows = False, prefix.get(texts)
                    call.given = F.pad(rows, (0, 0, 0, -len(rows) % _GRAIN)).to(self._device())
            self._blocks.call = call
            try:
                state = self._packed(ids, segments, types)
            finally:
                self._blocks.call = Call()
            if prefix is not None and call.seen is not None:
                prefix.put(texts, call.seen.detach()[0])
        return state if reads is None else state[reads.to(state.device)]

    def seen(self, pixels: Tensor) -> Any:
        """What the model gives for images of one size, as it gives it: `pixels (b, channels, height, width)`."""
        return self._see(pixels, Segments.of([1] * len(pixels)))

    def prefix(self, lengths: Sequence[int], file: Path | None = None) -> Prefix:
        """Room for the frozen blocks' states of texts with these lengths; see `depth`."""
        return Prefix(lengths, self.width, self.dtype, file)

    @property
    def n_blocks(self) -> int:
        """Blocks in the stack; 0 where none was found."""
        return len(self._blocks.modules) if self._blocks else 0

    def prefix_size(self, lengths: Sequence[int]) -> int:
        """Bytes that `prefix` would take."""
        return Prefix.size(lengths, self.width, self.dtype)

    @property
    def width(self) -> int:
        """Numbers in the hidden state of a token."""
        return int(getattr(getattr(self.model, "config", None), "hidden_size", 0) or self._width)

    def gradients_in_place(self, on: bool) -> None:
        """Whether groups add their gradients into those that are there, unseen by autograd.

        A step then begins with `clear`, and ends with `settle`.
        """
        if self.groups is not None:
            self.groups.gradients_in_place(on)

    def clear(self) -> None:
        """Begins the gradients of a step."""
        if self.groups is not None:
            self.groups.clear()

    def settle(self) -> None:
        """Ends the gradients of a step: all of them are in the factors behind it."""
        if self.groups is not None:
            self.groups.settle()

    def refresh(self) -> None:
        """Takes over changed factors; to be called after every step."""
        if self.groups is not None:
            self.groups.refresh()

    def _device(self) -> torch.device:
        return place_of(self.model)

    def _packed(self, ids: Tensor, segments: Segments, types: Tensor | None = None) -> Tensor:
        if self._reads_images:
            return self._of_images(ids, segments)
        front, device = self._front(), self._device()
        ids, segments, types, kept = laid(front, ids, segments, types, self.pad)
        n = segments.n_tokens
        positions = segments.positions() + self._offset + (front.n_states if front is not None else 0)
        ids, padded = filled(ids, segments, self.pad)
        positions = F.pad(positions, (0, len(ids) - n)).to(device)[None]
        more = {} if types is None else {"token_type_ids": F.pad(types, (0, len(ids) - n)).to(device)[None]}
        with standing(self._prompts, front, segments), inside(behind(front, padded)):
            state: Tensor = self._body(input_ids=ids.to(device)[None], position_ids=positions, **more).last_hidden_state
        return state.squeeze(0)[:n] if kept is None else state.squeeze(0)[kept.to(device)]

    def _front(self) -> Front | None:
        """What an active prompt puts in front of every text."""
        return None if self._prompts is None else self._prompts.active()

    def _padded(self, ids: Tensor, segments: Segments, types: Tensor | None = None) -> Tensor:
        if self._reads_images:
            return self._of_images(ids, segments)
        rows, mask = (x.to(self._device()) for x in segments.padded(ids, self.pad))
        more = {} if types is None else {"token_type_ids": segments.padded(types, 0)[0].to(self._device())}
        state: Tensor = self._body(input_ids=rows, attention_mask=mask, **more).last_hidden_state
        return state[mask.bool()]

    def _of_images(self, pixels: Tensor, segments: Segments) -> Tensor:
        """The same for images, packed or not: each is one row of `segments`, and becomes several."""
        found = self._see(pixels, segments)
        state: Tensor = found if isinstance(found, Tensor) else found.last_hidden_state
        return (state.movedim(1, -1) if state.ndim == 4 else state).flatten(0, -2)

    def _see(self, pixels: Tensor, segments: Segments) -> Any:
        pixels = pixels.to(self._device(), self._pixel_dtype, memory_format=torch.channels_last)
        with inside(segments):
            return self._body(pixel_values=pixels) if self._takes_pixel_values else self._body(pixels)

    def _cast(self, stack: ExitStack) -> None:
        """Frozen weights and buffers in the dtype; the originals come back on leaving."""
        kept: list[tuple[Tensor, Tensor]] = []
        stack.callback(_put_back, kept)
        for path, module in self.model.named_modules():
            if self.head and (path == self.head or path.startswith(self.head + ".")):
                continue
            added = getattr(module, "added_by_lorakit", False) or isinstance(module, _BatchNorm)
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is None or added or not tensor.is_floating_point():
                    continue
                changes = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and tensor.dtype != self.dtype
                maps = self._reads_images and tensor.ndim == 4
                if changes or maps:
                    if self._keep or not changes:
                        kept.append((tensor, tensor.data))
                    form = torch.channels_last if maps else torch.preserve_format
                    tensor.data = tensor.data.to(self.dtype if changes else tensor.dtype, memory_format=form)
        if self._pixel_dtype in (torch.float32, torch.bfloat16, torch.float16):
            self._pixel_dtype = self.dtype

    def _begin_shards(self, stack: ExitStack) -> None:
        if self._peers is not None:
            blocks = [block for part in self._stacks for block in stack_of(part)]
            self.shards = [stack.enter_context(Shards(self.model, blocks, self._peers))]

    def _begin_packing(self, stack: ExitStack) -> None:
        """Packs the rows if packed equals padded on two short texts."""
        segments, ids = self._trial()
        with torch.no_grad():
            wanted = self._padded(ids, segments)
            self._width = wanted.shape[1]
            attempt = ExitStack()
            try:
                attempt.enter_context(packed(self.model))
                self._prove(ids, segments, wanted)
            except CannotPackError as error:
                attempt.close()
                self.why_padded = "" if self._reads_images else str(error)
                return
            except BaseException:
                attempt.close()
                raise
        stack.push(attempt.pop_all())

    def _trial(self) -> tuple[Segments, Tensor]:
        """Two short texts of unlike length, without the padding token; or two images."""
        if self._reads_images:
            noise = torch.Generator().manual_seed(0)
            return Segments.of([1, 1]), torch.randn(2, *(self._shape or _shape_of(self.model)), generator=noise)
        vocabulary = int(getattr(self.model.config, "vocab_size", 2))
        known = [token for token in range(vocabulary) if token != self.pad]
        return Segments.of(_TRIAL), torch.tensor([known[(2 + 5 * k) % len(known)] for k in range(sum(_TRIAL))])

    def _prove(self, ids: Tensor, segments: Segments, wanted: Tensor) -> None:
        padding = getattr(self.model.config, "pad_token_id", None)
        offsets = [0] if padding is None else [0, int(padding) + 1]  # RoBERTa counts from behind its padding
        error = float("inf")
        for offset in offsets:
            self._offset = offset
            try:
                found = self._packed(ids, segments)
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as fault:
                raise CannotPackError(f"it does not take packed rows ({str(fault).splitlines()[0]})") from None
            if not segments.n_calls[0]:
                raise CannotPackError("it has an attention of its own, which does not ask ours")
            size = float(wanted.float().abs().max())
            error = float((found.float() - wanted.float()).abs().max()) / max(size, 1e-6)
            if error <= _TOLERANCE[wanted.dtype]:
                return
        raise CannotPackError(f"packed rows differ from padded ones by {error:.1e} of the largest value")

    def _begin_groups(self, stack: ExitStack) -> None:
        if find_home(self._home) is None:
            return
        switch = switch_of(self._home)
        if len(switch.active) != 1:
            return
        segments, ids = self._trial()
        with torch.no_grad(), inputs_recorded(self._home) as calls:
            self.hidden(ids, segments)
        packs = self._peers is None
        self.groups = make_groups(self._home, switch.active[0], calls, self.dtype, packs, self.model)
        stack.callback(self.groups.release)
        if self._reads_images:
            with torch.no_grad():
                self.groups.fold_norms(self.model, lambda: self.hidden(ids, segments), _TOLERANCE[self.dtype])

    def _begin_blocks(self, stack: ExitStack) -> None:
        """Takes the blocks over, if the result at a few rows is proved to be that of the whole."""
        blocks = stack_of(self._body)
        if self.why_padded or self._reads_images or not blocks or any("forward" in block.__dict__ for block in blocks):
            return
        segments, ids = self._trial()
        reads = torch.tensor([0, _TRIAL[0] - 2, _TRIAL[0] + 1])
        with torch.no_grad():
            wanted = self.hidden(ids, segments)[reads]
            self._blocks = Blocks(self._body)
            stack.callback(self._blocks.release)
            self.depth = (
                0 if self._prompts is not None and self._prompts.acts else _frozen_depth(self._body, blocks, self.head)
            )
            self.trims = True
            try:
                found = self.hidden(ids, segments, reads)
                size = float(wanted.float().abs().max())
                self.trims = float((found.float() - wanted.float()).abs().max()) <= _TOLERANCE[self.dtype] * size
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, CannotPackError):
                self.trims = False


def _frozen_depth(body: nn.Module, blocks: Sequence[nn.Module], head: str) -> int:
    """How many blocks at the start, with all that comes before them, have nothing that learns."""
    inside = {id(module) for block in blocks for module in block.modules()}
    if head and hasattr(body, head):
        inside |= {id(module) for module in body.get_submodule(head).modules()}
    for module in body.modules():
        # an adapted or trained layer outside the blocks may stand before them (embeddings) or behind (the last norm)
        if id(module) not in inside and any(p.requires_grad for p in module._parameters.values() if p is not None):
            return 0
    for depth, block in enumerate(blocks):
        if any(p.requires_grad for p in block.parameters()):
            return depth
    return 0


def filled(ids: Tensor, segments: Segments, pad: int, least: int = 0) -> tuple[Tensor, Segments]:
    """One text of at least so many rows of padding more, so that the number of rows is a multiple of `_GRAIN`.

    oneDNN builds and keeps a kernel for every number of rows that it meets. Without this, batches of ever new sizes
    took 12 MB more at each step (MiniLM, 1,000 rows a step) and the time to build them.
    """
    short = least + -(segments.n_tokens + least) % _GRAIN
    if not short:
        return ids, segments
    end = segments.starts[-1:] + short
    starts = torch.cat([segments.starts, end])
    return torch.cat([ids, ids.new_full((short,), pad)]), Segments(starts, segments.n_calls)


def _shape_of(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a Transformers model takes."""
    side = model.config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return model.config.num_channels, height, width


def _put_back(kept: list[tuple[Any, Tensor]]) -> None:
    for tensor, original in kept:
        tensor.data = original
