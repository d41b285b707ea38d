"""How PEFT lays out the tensors of one layer on disk: canonical factors <-> PEFT's leaves, by kind of layer.

Read from peft 0.21.2 (tuners/lora/layer.py, tuners/ia3/layer.py), checked in tests/test_peft_write.py. Canonical:
`a (.., r, i)`, `b (.., o, r)`. Convolutions keep their kernel in `a`; embeddings have names of their own; expert
weights are stacked with the expert index slowest in A and fastest in B; a vector of a convolution is `(1, o, 1, ..)`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.update import AdaptedLayer

Number = TypeVar("Number", int, float)

# PEFT's MultiheadAttention.merge adds the delta of out_proj twice (peft pull 3774, open at 0.21.2), in every forward
# pass too, and gives both projections one rank and one alpha
OUT_PROJ_TIMES = 2.0
_KERNEL_SIDES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


def pair_to_peft(a: Tensor, b: Tensor, layer: AdaptedLayer) -> dict[str, Tensor] | None:
    """Leaves of a pair; None where PEFT means another thing by the same names (grouped convolutions)."""
    if layer.kind == "embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if layer.kind in _KERNEL_SIDES:
        if layer.groups > 1:
            return None
        o, i, *kernel = layer.shape
        return {
            "lora_A.weight": a.reshape(-1, i, *kernel),
            "lora_B.weight": b.reshape(o, -1, *([1] * len(kernel))),
        }
    if a.ndim == 3:
        e, r, i = a.shape
        return {
            "lora_A.weight": a.reshape(e * r, i),
            "lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], r * e),
        }
    return {"lora_A.weight": a, "lora_B.weight": b}


def pair_from_peft(leaves: Mapping[str, Tensor], experts: int = 0) -> dict[str, Tensor]:
    """Canonical `a` and `b` from PEFT's leaves; `experts` > 0 unstacks expert weights."""
    if "lora_embedding_A" in leaves:
        return {"a": leaves["lora_embedding_A"], "b": leaves["lora_embedding_B"]}
    a, b = leaves["lora_A.weight"], leaves["lora_B.weight"]
    if experts:
        return {
            "a": a.reshape(experts, -1, a.shape[-1]),
            "b": b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous(),
        }
    if b.ndim > 2 and any(side != 1 for side in b.shape[2:]):
        raise AdapterError(f"the outer convolution has a kernel of {tuple(b.shape[2:])}; only 1 x 1 is a low-rank pair")
    return {"a": a.reshape(a.shape[0], -1), "b": b.reshape(b.shape[0], -1)}


def kind_of_pair(leaves: Mapping[str, Tensor], config: Mapping[str, object]) -> str:
    """The kind of layer that a pair is for, by the shape of its leaves."""
    if "lora_embedding_A" in leaves:
        return "embedding"
    flat = "hf_conv1d" if config.get("fan_in_fan_out") else "linear"
    return next((kind for kind, n in _KERNEL_SIDES.items() if leaves["lora_A.weight"].ndim == 2 + n), flat)


def stored_shape(kind: str, leaves: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Shape of the weight that a pair is for, as its layer stores it."""
    a, b = factors["a"], factors["b"]
    if kind in ("embedding", "hf_conv1d"):
        return (a.shape[1], b.shape[0])
    if kind in _KERNEL_SIDES:
        return (b.shape[0], *leaves["lora_A.weight"].shape[1:])
    return (*b.shape[:-2], b.shape[-2], a.shape[-1])


def vector_to_peft(vector: Tensor, layer: AdaptedLayer) -> Tensor:
    """A vector over outputs, `(o,)`: `(1, o, 1, ..)` for convolutions."""
    sides = _KERNEL_SIDES.get(layer.kind)
    return vector if sides is None else vector.reshape(1, -1, *([1] * sides))


def out_proj_share(inner: AdaptedLayer, outer: AdaptedLayer) -> float | None:
    """What `b` of out_proj must be multiplied by, so that the scale PEFT gives it is right; None where that rounds.

    `inner` is in_proj. Only a power of two comes back bit for bit.
    """
    share = outer.scale / (OUT_PROJ_TIMES * inner.scale) if inner.scale else 0.0
    return share if abs(math.frexp(share)[0]) == 0.5 else None


def alpha_of(scale: float, rank: int) -> float | int:
    """`scale * rank` without the rounding of a division before: 16 / 3 * 3 is 16."""
    alpha = float(f"{scale * rank:.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def pattern(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The commonest of the layers' values, and a table with those that differ, by expressions for their whole paths."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": value for path, value in values.items() if value != common}
