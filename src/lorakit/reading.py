"""A base as a prompt looks at it to begin: how wide its rows are, and what they are for real tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import PlanError
from lorakit.kinds import kind_of
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


def table_numbers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What tells the input rows of this base from those of another: a name that no layer has, and their numbers."""
    table = table_of(model)
    weight = table._parameters["weight"]
    kind = kind_of(table)
    return [("input rows", weight if kind is None else kind.numbers(table, weight))]  # type: ignore[list-item,arg-type]


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
        modes = [(module, module.training) for module in body.modules()]
        try:
            body.eval()
            body(input_ids=tokens.to(self._device())[None], past_key_values=cache)
        except TypeError:
            pass  # it takes none
        finally:
            for module, mode in modes:
                module.training = mode
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
