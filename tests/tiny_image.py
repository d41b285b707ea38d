"""Tiny bases for images, as Transformers directories and as plain modules; and images to learn from."""

from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image
from torch import nn

from lorakit.tasks.vision import image_base

KINDS = ("flat", "tall", "square")
SIZE = 16


def tiny_vit(path: Path, seed: int = 0, processor: bool = True) -> Path:
    """Two layers, width 32, patches of 4 x 4; made so wide that an untrained one tells images apart."""
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tf.ViTModel(tf.ViTConfig(**small, image_size=SIZE, patch_size=4, initializer_range=0.3)).save_pretrained(path)
    if processor:
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
        size = {"height": SIZE, "width": SIZE}
        tf.ViTImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(path)
    return path


def tiny_resnet(path: Path) -> Path:
    """Two stages; its batch norms have seen something."""
    torch.manual_seed(0)
    model = tf.ResNetModel(tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"))
    settle(model)
    model.save_pretrained(path)
    return path


def tiny_convnext(path: Path) -> Path:
    """Two stages."""
    torch.manual_seed(0)
    config = tf.ConvNextConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2, image_size=SIZE, layer_scale_init_value=0.5
    )
    tf.ConvNextModel(config).save_pretrained(path)
    return path


def cnn(channels: int = 3) -> nn.Sequential:
    """Maps of 32 channels, after two convolutions and batch norms that have seen something."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    )
    settle(model)
    return model.eval()


def cnn_base(channels: int = 3):
    """The same as a base."""
    return image_base(cnn(channels), "cnn")


def settle(model: nn.Module) -> None:
    """Lets batch norms gather statistics."""
    channels = next(p for p in model.parameters() if p.ndim == 4).shape[1]
    with torch.no_grad():
        model.train()(torch.rand(8, channels, SIZE, SIZE) * 2 - 1)
    model.eval()


def drawn(kind: str, generator: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Pixels of a bright shape somewhere on noise."""
    pixels = generator.integers(0, 60, (size, size, 3), dtype=np.uint8)
    height, width = {"flat": (2, 10), "tall": (10, 2), "square": (6, 6)}[kind]
    top, left = generator.integers(0, size - height), generator.integers(0, size - width)
    pixels[top : top + height, left : left + width] = generator.integers(180, 255)
    return pixels


def arrays(n: int, seed: int = 0, size: int = SIZE) -> tuple[np.ndarray, list[str]]:
    """Images and labels."""
    generator = np.random.default_rng(seed)
    labels = [KINDS[k % 3] for k in range(n)]
    return np.stack([drawn(label, generator, size) for label in labels]), labels


def folder(path: Path, n: int = 90, size: int = SIZE) -> Path:
    """One folder of PNG files for each kind."""
    for k, (pixels, label) in enumerate(zip(*arrays(n, size=size))):
        (path / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / label / f"{k:03}.png")
    return path
