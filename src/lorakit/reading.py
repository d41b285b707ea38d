"""A base as a prompt looks at it to begin: how wide its rows are, and what they are for real tokens."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import fingerprint
from lorakit.errors import PlanError
from lorakit.kinds import kind_of
from lorakit.mode import eval_mode
from lorakit.prompt import Sizes


def body_of(model: nn.Module) -> nn.Module:
    """The part of a Transformers model that makes hidden states of tokens; other models are that themselves."""
    body: nn.Module = getattr(model, "base_model", model) if hasattr(model, "base_model_prefix") else model
    return body


def is_pair(model: nn.Module) -> bool:
    """Is it an encoder with a decoder?"""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def reader_of(model: nn.Module) -> nn.Module:
    """What reads the tokens behind a prompt: the body, or the encoder of two. PlanError if nothing does."""
    body = body_of(model)
    config: Any = getattr(model, "config", None)
    reads = getattr(model, "main_input_name", "") == "input_ids" and hasattr(config, "get_text_config")
    if not reads or config.get_text_config() is not config:
        raise PlanError(f"a prompt stands in front of tokens; this {type(model).__name__} is no model of texts alone")
    return model.get_encoder() if is_pair(model) else body  # type: ignore[operator,no-any-return]


def table_of(model: nn.Module) -> nn.Module:
    """The module that makes input rows of the tokens that are read."""
    return reader_of(model).get_input_embeddings()  # type: ignore[operator,no-any-return]


def known_by(model: nn.Module, weights: Iterable[tuple[str, Tensor]], prompt: bool) -> str:
    """Fingerprint of these base weights; of an adapter with a prompt, of the input rows too, under a name that no layer
    has."""
    if not prompt:
        return fingerprint(weights)
    table = table_of(model)
    weight, kind = table._parameters["weight"], kind_of(table)
    rows = weight if kind is None else kind.numbers(table, weight)  # type: ignore[arg-type]
    return fingerprint([*weights, ("input rows", rows)])  # type: ignore[list-item]


class Reading:
    """`inputs`: whether the prompt stands among the input rows, and not among keys and values. PlanError where the
    model has no place for it."""

    def __init__(self, model: nn.Module, inputs: bool) -> None:
        self._body, self._table = reader_of(model), table_of(model)
        config: Any = model.config
        self.vocabulary = int(config.vocab_size)
        token = torch.zeros(1, dtype=torch.int64)
        self.sizes = Sizes(self.inputs(token).shape[1])
        if inputs:
            return
        if is_pair(model):
            raise PlanError(f"a prefix has no place in this {type(model).__name__} of two stacks; use a soft prompt")
        states = self.states(token)
        _, layers, _, heads, head = states.shape
        self.sizes = Sizes(heads * head, layers, heads, head)

    @torch.no_grad()
    def inputs(self, tokens: Tensor) -> Tensor:
        """The input rows of `tokens (n,)`: `(n, width)`, on the CPU."""
        rows: Tensor = self._table(tokens.to(self._device()))
        return rows.detach().cpu()

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """The keys and values of one text, in every layer: `(n, layers, 2, heads, head)`, on the CPU."""
        from transformers import DynamicCache

        cache, body = DynamicCache(), self._body
        with eval_mode(body), suppress(TypeError):  # of those that take none
            body(input_ids=tokens.to(self._device())[None], past_key_values=cache)
        shapes = {tuple(x.shape) for layer in cache.layers for x in (layer.keys, layer.values)}
        if len(shapes) != 1:
            raise PlanError(
                f"a prefix has no place in this {type(body).__name__}, which takes no keys and values of one shape "
                "from outside; use a soft prompt"
            )
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (2, heads, n, head)
        return torch.stack(pairs).permute(3, 0, 1, 2, 4).cpu()

    def _device(self) -> torch.device:
        return next(self._table.parameters()).device
