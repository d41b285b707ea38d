"""Weights kept in 8 or 4 bits: the formats, one file each, and the layers that hold them.

A format turns a canonical weight `W (o, i)` into codes and scales and back. Its layers are frozen; what adapts them is
an adapter, as of any other layer (Dettmers et al., 2023, QLoRA).
"""

from lorakit.quant.format import FORMATS, Format, Parts
from lorakit.quant.layers import QuantEmbedding, Quantized, QuantLinear

__all__ = ["FORMATS", "Format", "Parts", "QuantEmbedding", "QuantLinear", "Quantized"]
