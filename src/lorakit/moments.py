"""What matters inside the pairs of an adapter: r x r numbers a layer, by which `truncate` keeps what counts.

Of a pair `scale * b @ a` every input row x gives `h = a x (r,)`, and the gradient g of its output row is asked of
`t = scale * b^T g (r,)`. Put a matrix Z between b and a: to second order, and with h and t independent (Martens and
Grosse, 2015, arXiv 1503.05671), the mean loss changes by `tr(asked (I - Z) seen (I - Z)^T) / 2`, in nats.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lorakit.adapter import Adapter
from lorakit.errors import AdapterError
from lorakit.files import read_tensors, write_tensors

FILE = "moments.safetensors"  # in a run directory
_SEEN, _ASKED = "seen", "asked"


class Moments(NamedTuple):
    """Of one layer: `seen (r, r)`, the mean of `h h^T` over rows; `asked (r, r)`, the sum of `t t^T` over the rows of a
    step, times its labels."""

    seen: Tensor
    asked: Tensor


def save_moments(path: str | Path, moments: Mapping[str, Moments], adapter: Adapter) -> None:
    """Writes those of an adapter's layers into a file, and whose they are."""
    tensors = {f"{layer}:{_SEEN}": found.seen for layer, found in moments.items()}
    tensors |= {f"{layer}:{_ASKED}": found.asked for layer, found in moments.items()}
    write_tensors(Path(path), tensors, {"adapter": adapter.digest})


def load_moments(path: str | Path, adapter: Adapter) -> dict[str, Moments]:
    """Reads them. AdapterError if they were measured with another adapter."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        whose = (stream.metadata() or {}).get("adapter")
    if whose != adapter.digest:
        raise AdapterError(f"'{path}' was measured with another adapter than this; measure again, or leave it out")
    tensors = read_tensors(Path(path))
    layers = {name.rpartition(":")[0] for name in tensors}
    return {layer: Moments(tensors[f"{layer}:{_SEEN}"], tensors[f"{layer}:{_ASKED}"]) for layer in sorted(layers)}
