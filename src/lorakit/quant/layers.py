"""The layers that hold quantized weights: in the place of `nn.Linear` and `nn.Embedding`, frozen.

`weight` reads as what it stands for, a float tensor that is made at every look; the parameter of that name holds the
codes. No pass keeps the float form: the backward makes it again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.products import Coded, frozen_linear
from lorakit.quant.format import Format, Parts


class Quantized(nn.Module):
    """A frozen weight `W (o, i)` in a format. `original` is the weight before, while somebody wants it."""

    scales: Tensor
    like: Tensor
    original: Tensor | None

    def __init__(self, form: Format, parts: Parts, i: int, like: Tensor) -> None:
        super().__init__()
        self.form, self.i = form, i
        self._parameters["weight"] = nn.Parameter(parts.codes, requires_grad=False)  # the name is taken, see `weight`
        self.register_buffer("scales", parts.scales)
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)  # in the dtype of the model
        self.__dict__["original"] = None

    @property
    def o(self) -> int:
        """Rows of W."""
        return len(self.codes)

    @property
    def codes(self) -> Tensor:
        """The weight as it is kept."""
        codes = self._parameters["weight"]
        assert codes is not None
        return codes

    @property
    def weight(self) -> Tensor:
        """`W (o, i)`, or what stands in for it while an adapter changes it from outside."""
        shadow: Tensor | None = self.__dict__.get("weight")
        return self.read(self.like.dtype) if shadow is None else shadow

    def read(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """`W (o, i)`, or some rows of it."""
        return self.form.unpack(Parts(self.codes, self.scales), self.i, dtype, rows)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Takes on a changed `W (o, i)`, rounded to the format."""
        parts = self.form.pack(weight)
        self.codes.copy_(parts.codes)
        self.scales.copy_(parts.scales)

    # Under a name of their own: who loads the file into a float layer is told that its weight is missing.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = destination.pop(f"{prefix}weight")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}codes" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}codes")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "original": None}

    def extra_repr(self) -> str:
        return f"{self.i}, {self.o}, {self.form.name}"


class QuantLinear(Quantized):
    """`y = W x + bias`."""

    bias: Tensor | None

    def __init__(self, form: Format, parts: Parts, i: int, like: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(form, parts, i, like)
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = i, self.o

    def coded(self) -> Coded:
        """The weight as products take it."""
        return Coded((self.o, self.i), self.read)

    def forward(self, x: Tensor) -> Tensor:
        changed = "weight" in self.__dict__ or (self.bias is not None and self.bias.requires_grad)
        if changed or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        return frozen_linear(x, self.coded(), self.bias, None)


class QuantEmbedding(Quantized):
    """`y = W[x]`, one row of W for each token."""

    def __init__(self, form: Format, parts: Parts, i: int, like: Tensor, padding: int | None = None) -> None:
        super().__init__(form, parts, i, like)
        self.num_embeddings, self.embedding_dim, self.padding_idx = self.o, i, padding

    def forward(self, x: Tensor) -> Tensor:
        if "weight" in self.__dict__:
            return F.embedding(x, self.weight, self.padding_idx)
        rows = x.reshape(-1).long()
        return self.read(self.like.dtype, rows).view(*x.shape, self.i)
