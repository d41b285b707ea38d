"""image_vit: ten digits by a small Vision Transformer (16 patches) that has learned five of them."""

from torch import nn
from transformers import ViTConfig, ViTModel

from sides import digits

PEER = "peft, Trainer"
METRIC = "accuracy"
STEPS = 120

_RATE = 2e-3


def _make() -> nn.Module:
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        image_size=32, patch_size=8, num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    return digits.ours(digits.base_of(_make, "vit", "cls"), seed, steps, _RATE)


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    return digits.peer(digits.base_of(_make, "vit", "cls"), seed, steps, _RATE)
