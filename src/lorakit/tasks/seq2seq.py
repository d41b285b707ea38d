"""From hidden states of a decoder to losses of tokens, as the whole encoder-decoder would compute its logits.

Mostly a matrix gives logits of the decoder's last states: T5's multiplies them by d**-0.5 before where the head is
tied, BART's and Marian's adds a buffer. That is computed without ever holding all logits (kernels/labels.py); of
other models, and where the head is adapted, the rows go through the model's own code. Which it is, is proved, not
known.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.kernels.labels import label_losses, label_scores
from lorakit.tasks.causal import differ, each_by, losses_by, stand_for
from lorakit.trunk import eval_mode

_TRIAL = 10  # tokens


def head_of(model: nn.Module) -> nn.Module:
    """The module that makes logits; UsageError where the model is no encoder-decoder that writes."""
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(head, nn.Module):
        raise UsageError(
            f"this {type(model).__name__} is no encoder-decoder with a head that writes text; load one with "
            "load_base(name, head='seq2seq')"
        )
    return head


@torch.no_grad()
def logit_scale(model: Any) -> float:
    """What the decoder's last states are multiplied by before the head's matrix makes them logits; 0 if that is not
    all, beside a bias. UsageError where the model cannot write."""
    head = head_of(model)
    embeddings: Tensor = model.get_input_embeddings().weight
    ids = torch.arange(2, 2 + 5 * _TRIAL, 5, device=embeddings.device)[None]
    asked, given = ids % len(embeddings), (ids + 1) % min(len(embeddings), len(getattr(head, "weight", embeddings)))
    with eval_mode(model):
        encoded = model.get_encoder()(input_ids=asked).last_hidden_state
        hidden = model.get_decoder()(input_ids=given, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
        logits = model(input_ids=asked, decoder_input_ids=given, use_cache=False).logits[0].float()
    if not isinstance(head, nn.Linear) or head.weight.shape[1] != hidden.shape[-1]:
        return 0.0
    bias = _bias(model, head, torch.float32)
    for scale in (1.0, hidden.shape[-1] ** -0.5):
        if not differ(F.linear(hidden[0].float() * scale, head.weight.float(), bias), logits):
            return scale
    return 0.0


def _bias(model: Any, head: Any, dtype: torch.dtype) -> Tensor | None:
    """What is added to all logits."""
    parts = [x for x in (head.bias, getattr(model, "final_logits_bias", None)) if x is not None]
    return None if not parts else sum(x.flatten().to(dtype) for x in parts)  # type: ignore[return-value]


def summed_loss(model: nn.Module, hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The summed cross-entropy of `labels (n,)` by `hidden (n, d)`, in nats. `scale` is that of `logit_scale`."""
    head: Any = head_of(model)
    labels = labels.to(hidden.device)
    if scale and not head._modules:
        return label_losses(hidden * scale, head.weight, labels, _bias(model, head, hidden.dtype)).sum()
    return losses_by(partial(own_logits, model), hidden, labels).sum()


@torch.no_grad()
def each_loss(model: nn.Module, hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
    """`(n, 2)`: the loss of each label, and 1 where it is the most probable one."""
    head: Any = head_of(model)
    labels = labels.to(hidden.device)
    if scale and not head._modules:
        return label_scores(hidden * scale, head.weight, labels, _bias(model, head, hidden.dtype))
    return each_by(partial(own_logits, model), hidden, labels)


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """`hidden (n, d)` -> `(n, o)` by the model's own forward, in which these stand for what its decoder gives."""
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with stand_for(model.get_decoder(), hidden):
        logits: Tensor = model(encoder_outputs=(hidden[None],), decoder_input_ids=ids, use_cache=False).logits
    return logits[0]
