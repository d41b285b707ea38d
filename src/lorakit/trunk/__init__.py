"""The trunk: how a frozen model with an adapter is run fast. Nothing padded, nothing frozen done twice."""

from lorakit.trunk.segments import Segments
from lorakit.trunk.trunk import DTYPES, Trunk, resolve_dtype

__all__ = ["DTYPES", "Segments", "Trunk", "resolve_dtype"]
