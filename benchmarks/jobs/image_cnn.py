"""image_cnn: ten digits by a small ResNet (convolutions and batch norms) that has learned five of them."""

from torch import nn
from transformers import ResNetConfig, ResNetModel

from sides import digits

PEER = "peft, Trainer"
METRIC = "accuracy"
STEPS = 120

_RATE = 5e-3


def _make() -> nn.Module:
    sizes = [32, 64, 128]
    return ResNetModel(
        ResNetConfig(num_channels=1, embedding_size=32, hidden_sizes=sizes, depths=[2, 2, 2], layer_type="basic")
    )


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    return digits.ours(digits.base_of(_make, "resnet", "own"), seed, steps, _RATE)


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    return digits.peer(digits.base_of(_make, "resnet", "own"), seed, steps, _RATE)
