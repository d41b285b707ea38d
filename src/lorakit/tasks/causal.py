"""From hidden states of a causal language model to losses of tokens, as the model itself would compute its logits.

Most models multiply the last hidden state by one matrix; that is computed without ever holding all logits
(kernels/labels.py). Others scale or squash the logits too (Cohere, Granite, Gemma 2), and a head may itself be
adapted or trained: then the rows go through the model's own code behind its body. Which it is, is proved, not known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.kernels.labels import label_losses, label_scores
from lorakit.trunk import eval_mode

Logits = Callable[[Tensor], Tensor]  # hidden states (n, d) -> (n, o)
_ROWS = 1024  # of logits at once, where the model computes them itself
_TRIAL = 10  # tokens
_TOLERANCE = 1e-4  # of the largest value, in float32: the same sums in another order


@torch.no_grad()
def has_plain_logits(model: nn.Module) -> bool:
    """Are the logits of this model its last hidden states times the weight of its head?

    UsageError where the model cannot write at all: it has no head, or its tokens see those that come after them.
    """
    body: Any = getattr(model, "base_model", None)
    head = head_of(model)
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.arange(2, 2 + 5 * _TRIAL, 5, device=embeddings.device) % len(embeddings)
    other = ids.clone()
    other[-1] = (other[-1] + 1) % len(embeddings)
    with eval_mode(model):
        hidden, changed = (body(input_ids=x[None]).last_hidden_state[0].float() for x in (ids, other))
        logits = model(input_ids=ids[None]).logits[0].float()
    if differ(hidden[:-1], changed[:-1]):
        raise UsageError(
            f"this {type(model).__name__} is no decoder: a token in it sees those that come after it, so it would "
            "learn to copy and not to write; take a base that was made to write text"
        )
    if not isinstance(head, nn.Linear) or head.weight.shape[1] != hidden.shape[1]:
        return False
    bias = None if head.bias is None else head.bias.float()
    return not differ(F.linear(hidden, head.weight.float(), bias), logits)


def differ(x: Tensor, y: Tensor) -> bool:
    """Whether they are more apart than the order of sums makes them."""
    return float((x - y).abs().max()) > _TOLERANCE * max(1.0, float(y.abs().max()))


def head_of(model: nn.Module) -> nn.Module:
    """The module that makes logits; UsageError where there is none."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if not isinstance(head, nn.Module) or getattr(model, "base_model", model) is model:
        raise UsageError(
            f"this {type(model).__name__} has no head that writes text; load it with load_base(name, head='causal')"
        )
    return head


def losses(model: nn.Module, hidden: Tensor, labels: Tensor, plain: bool) -> Tensor:
    """The cross-entropy of each of `labels (n,)` by `hidden (n, d)`, in nats: `(n,)`, float32."""
    head: Any = head_of(model)
    labels = labels.to(hidden.device)
    if plain and not head._modules:
        return label_losses(hidden, head.weight, labels, head.bias)
    return losses_by(partial(own_logits, model), hidden, labels)


def losses_by(logits_of: Logits, hidden: Tensor, labels: Tensor) -> Tensor:
    """The same by a function that makes logits of hidden states."""
    parts = zip(torch.split(hidden, _ROWS), torch.split(labels, _ROWS))
    return torch.cat([F.cross_entropy(logits_of(part).float(), wanted, reduction="none") for part, wanted in parts])


def summed_loss(model: nn.Module, hidden: Tensor, labels: Tensor, plain: bool) -> Tensor:
    """Their sum."""
    return losses(model, hidden, labels, plain).sum()


@torch.no_grad()
def each_loss(model: nn.Module, hidden: Tensor, labels: Tensor, plain: bool) -> Tensor:
    """`(n, 2)`: the loss of each label, and 1 where it is the most probable one."""
    head: Any = head_of(model)
    labels = labels.to(hidden.device)
    if plain and not head._modules:
        return label_scores(hidden, head.weight, labels, head.bias)
    return each_by(partial(own_logits, model), hidden, labels)


@torch.no_grad()
def each_by(logits_of: Logits, hidden: Tensor, labels: Tensor) -> Tensor:
    """The same by a function that makes logits of hidden states."""
    found = []
    for part, wanted in zip(torch.split(hidden, _ROWS), torch.split(labels, _ROWS)):
        logits = logits_of(part).float()
        loss = F.cross_entropy(logits, wanted, reduction="none")
        found.append(torch.stack([loss, (logits.argmax(-1) == wanted).float()], -1))
    return torch.cat(found)


def own_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """`hidden (n, d)` -> `(n, o)` by the model's own forward, in which these stand for what its body gives."""
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with stand_for(model.base_model, hidden):  # type: ignore[arg-type]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0]


@contextmanager
def stand_for(body: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within the block, these hidden states `(n, d)` are what the module gives, whatever it is called with."""
    before = body.__dict__.get("forward")
    body.__dict__["forward"] = lambda *_, **__: _Given(hidden[None])
    try:
        yield
    finally:
        del body.__dict__["forward"]
        if before is not None:
            body.__dict__["forward"] = before


class _Given:
    """Looks like the output of a body: last hidden states, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
