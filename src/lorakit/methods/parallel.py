"""Parallel adapters: a small network beside a layer (He et al., ICLR 2022), without its biases.

`y' = y + scale * b relu(a x)`: LoRA with a rectifier between its factors.
"""

from lorakit.method import METHODS
from lorakit.methods.bottleneck import Bottleneck


@METHODS.add
class Parallel(Bottleneck):
    """Two layers and a rectifier from input to output."""

    name = "parallel"
    formula = "none: y + scale * b @ relu(a @ x)"
    parameters = "r (o + i)"
    use = "as bottleneck; on the MLP it is the best of its kind in its paper"
    source = "He et al., ICLR 2022, arXiv 2110.04366"
    on_output = False
