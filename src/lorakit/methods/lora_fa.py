"""LoRA-FA: LoRA whose inner factor is frozen where it began (Zhang et al., 2023, arXiv 2308.03303).

Half of the numbers learn, and the backward needs the rank's `a x` alone, not the layer's input.
"""

from lorakit.method import METHODS
from lorakit.methods.lora import Lora


@METHODS.add
class LoraFa(Lora):
    """A low-rank pair of which `b` alone learns."""

    name = "lora-fa"
    parameters = "r o"
    use = "where memory for activations is short; wants a higher rank"
    source = "Zhang et al., 2023, arXiv 2308.03303"
    pace = 2.0
    frozen = frozenset({"a", "a0", "b0"})
