"""The drive of prompts: their rows stand in front of every text of a model whose code knows nothing of them.

A hook in front of the body makes room: placeholder tokens among the inputs, ones in the mask, positions that count on.
A hook behind the table of input rows puts the prompt's rows there; one behind the body takes them away again, so that
whatever comes behind (heads, losses, `generate`) sees the text's rows alone. Keys and values go into the cache that
Transformers' models take. Behind the first call of a `generate` the rows are in its cache, and only mask and positions
are adapted.

PEFT's classifiers of encoders read the prompt's first row; for an adapter of theirs the rows therefore stay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach.slots import Switch
from lorakit.errors import AdapterError, AttachError
from lorakit.prompt import PROMPTS, Prompt, Sizes, rows_of
from lorakit.reading import body_of, is_pair, reader_of, table_of

CHILD = "prompts"
SEEN = "prompt"  # among the paths of what ran in a probe
_NOTE = "lorakit_prompts"  # on the modules that have hooks


class Front(NamedTuple):
    """What stands in front of every text: `inputs (v, width)`, `states (p, layers, 2, heads, head)`."""

    inputs: Tensor | None
    states: Tensor | None

    @property
    def n_inputs(self) -> int:
        """Rows among the inputs."""
        return 0 if self.inputs is None else len(self.inputs)

    @property
    def n_states(self) -> int:
        """Keys and values in front."""
        return 0 if self.states is None else len(self.states)


class PromptFactors(nn.Module):
    """The prompt of one adapter: what learns, or its rows. `shown`: the rows stay behind the body."""

    added_by_lorakit = True

    def __init__(self, prompt: Prompt, trainable: bool, shown: bool, device: torch.device) -> None:
        super().__init__()
        self.told, self.length, self.shown = replace(prompt, factors={}), prompt.length, shown  # all but the factors
        for name, factor in prompt.factors.items():
            own = factor.detach().to(device, copy=True).contiguous()
            self.register_parameter(name, nn.Parameter(own, requires_grad=trainable))

    def made(self) -> Tensor:
        """The rows as they are now."""
        return rows_of(PROMPTS[self.told.method], dict(self.named_parameters()), self.told.sizes)


class Prompts(nn.Module):
    """The prompts of all attached adapters, by name. Those of several active ones stand one behind the other.

    `packed`: a trunk has put them where they belong, and the hooks stand aside. `pair`: they stand before an encoder,
    whose mask its decoder needs too, and whose rows it reads.
    """

    switch: Switch
    pair: bool
    packed: bool
    standing: tuple[Tensor, Tensor] | None  # rows, and where they stand in the next call of the table
    n_cut: int  # rows to be taken away behind the body
    handles: list[Any]
    added_by_lorakit = True

    def __init__(self, switch: Switch, pair: bool) -> None:
        super().__init__()
        self.switch, self.pair = switch, pair
        self.packed, self.standing, self.n_cut, self.handles = False, None, 0, []

    def _held(self) -> list[Any]:
        return [self._modules[name] for name in self.switch.active if name in self._modules]

    @property
    def acts(self) -> bool:
        """Has an active adapter a prompt?"""
        return bool(self._held())

    @property
    def n_inputs(self) -> int:
        """Rows that the active adapters put among the inputs."""
        return sum(factors.length for factors in self._held() if factors.told.inputs)

    def cuts(self) -> bool:
        """Are the rows taken away behind the body? AttachError where the active adapters do not agree."""
        held = {name: self._modules[name] for name in self.switch.active if name in self._modules}
        rows = {name: factors.shown for name, factors in held.items() if factors.told.inputs}  # type: ignore[union-attr]
        shown = [name for name in rows if rows[name]]
        if shown and len(shown) < len(rows):
            other = next(name for name in rows if not rows[name])
            raise AttachError(
                f"the classifier of adapter '{shown[0]}' reads the first row of its prompt, as PEFT's do, and that of "
                f"'{other}' the text's; activate one of them at a time"
            )
        return not (shown or self.pair)

    def active(self) -> Front | None:
        """What the active adapters put in front; None if they do not."""
        held = self._held()
        if not held:
            return None
        if self.switch.seen is not None:
            self.switch.seen.add(SEEN)
        rows = {inputs: [p.made() for p in held if p.told.inputs is inputs] for inputs in (True, False)}
        return Front(*(torch.cat(rows[inputs]) if rows[inputs] else None for inputs in (True, False)))

    @contextmanager
    def placed(self, front: Front, at: Tensor) -> Iterator[None]:
        """Within the block, the next input rows at `at (texts * v,)` are the prompt's, and the hooks stand aside."""
        self.packed = True
        self.standing = None if front.inputs is None else (front.inputs, at)
        try:
            yield
            self.check_read()
        finally:
            self.packed, self.standing = False, None

    def check_read(self) -> None:
        """AttachError where rows still stand that the table should have taken."""
        if self.standing is not None:
            self.standing = None
            raise AttachError("the prompt was not read: the model did not call its table of input rows")


def put_prompt(model: nn.Module, switch: Switch, name: str, prompt: Prompt, trainable: bool) -> None:
    """Puts a prompt on a model that `check_prompt` found good."""
    reader, table = reader_of(model), table_of(model)
    if switch.prompts is None:
        switch.prompts = prompts = Prompts(switch, is_pair(model))
        reader.add_module(CHILD, prompts)
        prompts.handles = [
            reader.register_forward_pre_hook(make_room, with_kwargs=True),
            reader.register_forward_hook(take_away, with_kwargs=True),
            table.register_forward_hook(put_rows),
        ]
        if is_pair(model):
            prompts.handles.append(model.register_forward_pre_hook(widen_mask, with_kwargs=True))
        for module in (reader, table, model):
            module.__dict__[_NOTE] = prompts
    task = (switch.meta.get(name, {}).get("peft") or {}).get("task_type")
    shown = task == "SEQ_CLS" and body_of(model) is not model and not _looks_back(reader)
    device = next(table.parameters()).device
    switch.prompts.add_module(name, PromptFactors(prompt, trainable, shown, device))


def take_prompt(model: nn.Module, switch: Switch, name: str) -> None:
    """Takes the prompt of an adapter away; with the last one the hooks go."""
    prompts = switch.prompts
    if prompts is None or name not in prompts._modules:
        return
    del prompts._modules[name]
    if not prompts._modules:
        for handle in prompts.handles:
            handle.remove()
        reader = reader_of(model)
        del reader._modules[CHILD]
        for module in (reader, table_of(model), model):
            module.__dict__.pop(_NOTE, None)
        switch.prompts = None


def check_prompt(model: nn.Module, prompt: Prompt, found: Sizes) -> None:
    """AdapterError for a prompt that does not fit the model, whose sizes were found."""
    faults = prompt.faults()
    if prompt.sizes.rows(1) != found.rows(1):
        faults.append(f"its rows are {prompt.sizes.rows(prompt.length)}; here they must be {found.rows(prompt.length)}")
    child = reader_of(model)._modules.get(CHILD)
    if child is not None and not isinstance(child, Prompts):
        faults.append(f"the model has a child '{CHILD}' of its own, which the prompt would replace")
    if faults:
        raise AdapterError(f"the prompt does not fit this {type(model).__name__}: {'; '.join(faults)}")


def _looks_back(body: nn.Module) -> bool:
    """Does its attention look back only?"""
    return any(getattr(module, "is_causal", False) is True for module in body.modules())


def placeholder(pad: int | None) -> int:
    """A token that is no padding, since models count positions by that."""
    return 1 if pad == 0 else 0


# ---------------------------------------------------------------- hooks


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(forward).parameters)[1:]


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with."""
    return {**dict(zip(_parameters(type(module).forward), args)), **kwargs}


def make_room(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the body: room for the rows."""
    prompts: Prompts = module.__dict__[_NOTE]
    if prompts.packed:
        return None
    prompts.standing, prompts.n_cut = None, 0
    front = prompts.active()
    if front is None:
        return None
    given = _by_name(module, args, kwargs)
    ids, rows, past = (given.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
    inner = ids if ids is not None else rows
    if inner is None:
        raise AttachError(f"a prompt stands in front of input_ids, and {type(module).__name__} was called without them")
    first = past is None or past.get_seq_length() == 0
    v, p = front.n_inputs, front.n_states
    if first and v:
        if ids is not None:
            fill = placeholder(getattr(module.config, "pad_token_id", None))
            given["input_ids"] = torch.cat([ids.new_full((len(ids), v), fill), ids], 1)
            begins = torch.arange(len(ids), device=ids.device) * (v + ids.shape[1])
            at = begins[:, None] + torch.arange(v, device=ids.device)
            prompts.standing = (front.inputs, at.flatten())  # type: ignore[assignment]
        else:
            own = front.inputs.to(inner.dtype).expand(len(inner), -1, -1)  # type: ignore[union-attr]
            given["inputs_embeds"] = torch.cat([own, inner], 1)
        prompts.n_cut = v if prompts.cuts() else 0
    if first and p:
        given["past_key_values"] = _filled(module, past, front.states, inner)  # type: ignore[arg-type]
    _adapt(given, inner, v, p, first, prompts.pair)
    return (), given


def _filled(module: nn.Module, past: Any, states: Tensor, inner: Tensor) -> Any:
    """The cache with the prefix of every text in it."""
    from transformers import DynamicCache

    if module.training and any(getattr(inner, "gradient_checkpointing", False) for inner in module.modules()):
        raise AttachError("a prefix needs the cache, which gradient checkpointing switches off; switch off one of them")
    cache = DynamicCache() if past is None else past
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    for k, layer in enumerate(states.to(dtype).permute(1, 2, 3, 0, 4)):  # (2, heads, p, head)
        keys, values = (x.expand(len(inner), -1, -1, -1) for x in layer)
        cache.update(keys, values, k)
    return cache


def _adapt(given: dict[str, Any], inner: Tensor, v: int, p: int, first: bool, pair: bool) -> None:
    """Mask, positions and token types for the rows in front."""
    b, s = inner.shape[:2]
    mask, places, types = (given.get(name) for name in ("attention_mask", "position_ids", "token_type_ids"))
    if mask is not None:
        if mask.ndim != 2:
            raise AttachError(f"a prompt widens a mask of (texts, tokens), and this one is {tuple(mask.shape)}")
        if not (pair and mask.shape[1] == s + v):  # an encoder may get it as its model has widened it
            given["attention_mask"] = torch.cat([mask.new_ones(b, v + p), mask], 1)
    if places is not None:
        given["position_ids"] = places + v + p
        if first and v:
            own = torch.arange(p, p + v, device=places.device).expand(len(places), -1)
            given["position_ids"] = torch.cat([own, places + v + p], 1)
    if types is not None and first and v:
        given["token_type_ids"] = torch.cat([types.new_zeros(b, v), types], 1)


def put_rows(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Behind the table of input rows: the prompt's in the place of the placeholders'."""
    prompts: Prompts = module.__dict__[_NOTE]
    if prompts.standing is None:
        return None
    (rows, at), prompts.standing = prompts.standing, None
    flat = output.flatten(0, -2)
    own = rows.to(output.dtype).repeat(len(at) // len(rows), 1)
    return flat.index_copy(0, at.to(flat.device), own).view_as(output)


def take_away(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the body: the text's rows alone."""
    prompts: Prompts = module.__dict__[_NOTE]
    v, prompts.n_cut = prompts.n_cut, 0
    if not prompts.packed:
        prompts.check_read()
    if not v:
        return None
    if isinstance(output, tuple):
        return (output[0][:, v:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, v:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(state[:, v:] for state in output.hidden_states)
    return output


def widen_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before an encoder-decoder: the mask of what is encoded, which its decoder gets too."""
    prompts: Prompts = module.__dict__[_NOTE]
    given = _by_name(module, args, kwargs)
    mask = given.get("attention_mask")
    if prompts.packed or not prompts.acts or mask is None:
        return None
    given["attention_mask"] = torch.cat([mask.new_ones(len(mask), prompts.n_inputs), mask], 1)
    return (), given
