"""The trunk: how a frozen model with an adapter is run fast. Nothing padded, nothing frozen done twice."""

from lorakit.mode import eval_mode
from lorakit.trunk.direct import Direct
from lorakit.trunk.pairs import PairTrunk
from lorakit.trunk.place import dtype_of, place_of, placed
from lorakit.trunk.segments import Segments
from lorakit.trunk.trunk import DTYPES, Trunk, resolve_dtype

__all__ = [
    "DTYPES",
    "Direct",
    "PairTrunk",
    "Segments",
    "Trunk",
    "dtype_of",
    "eval_mode",
    "place_of",
    "placed",
    "resolve_dtype",
]
