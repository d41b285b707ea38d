"""image_vit: ten digits by a small Vision Transformer (16 patches) that has learned five of them."""

from sides import digits

PEER = "peft, Trainer"
METRIC = "accuracy"
STEPS = 120

_RATE = 2e-3


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    return digits.ours(digits.vit(), seed, steps, _RATE)


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    return digits.peer(digits.vit(), seed, steps, _RATE)
