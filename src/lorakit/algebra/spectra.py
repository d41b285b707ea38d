"""The directions of one layer's pair in the order of what they are worth, and the pair made of the first of them.

By the weights alone the worth of a direction is its squared singular value (Eckart and Young, 1936). With moments it is
what the mean loss would rise by without it: the best matrix of rank k between b and a, in the norm that inputs and
gradients give, is a truncated SVD of r x r.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.linalg import product_svd
from lorakit.method import layer_update
from lorakit.moments import Moments
from lorakit.update import AdaptedLayer

_FLOOR = 1e-6  # of the largest eigenvalue of a moment: nothing is divided by less
_MIXED = 0.3  # of the delta's own size is added to what was seen and asked: a few batches do not tell everything


class Spectrum(NamedTuple):
    """`each (.., k)`, the worth of every direction, falling, in squared Frobenius norm of the delta or in nats; a
    product `b @ a` that the layer's scale goes to, whose first columns and rows are the best of every rank."""

    layer: AdaptedLayer
    each: Tensor
    b: Tensor
    a: Tensor

    @property
    def worth(self) -> Tensor:
        """`(k,)`, of all experts together."""
        return self.each.reshape(-1, self.each.shape[-1]).sum(0)

    @property
    def least(self) -> int:
        """Directions that must stay, so that there is a layer to hold what it has beside them."""
        return int("bias" in self.layer.factors)

    @property
    def cost(self) -> int:
        """Numbers that a direction takes."""
        return (self.a.shape[-1] + self.b.shape[-2]) * self.a[..., 0, 0].numel()

    def truncated(self, rank: int) -> AdaptedLayer:
        """The layer as plain LoRA of this rank, singular values shared evenly; itself, where it is none smaller."""
        update = layer_update(self.layer)
        if rank >= update.rank:
            return self.layer
        assert update.a is not None
        b, a = product_svd(self.b[..., :rank], self.a[..., :rank, :]).balanced()
        dtype = update.a.dtype
        factors = {"a": a.to(dtype).contiguous(), "b": b.to(dtype).contiguous()}
        if "bias" in self.layer.factors:
            factors["bias"] = self.layer.factors["bias"]
        return replace(self.layer, method="lora", factors=factors, rank=rank, start="truncated")


def spectrum(layer: AdaptedLayer, moments: Moments | None = None) -> Spectrum:
    """That of a layer whose update is a pair."""
    update = layer_update(layer)
    assert update.a is not None and update.b is not None
    svd = product_svd(update.b, update.a)
    b, a = svd.balanced()
    if moments is None:
        return Spectrum(layer, (update.scale * svd.s).square(), b, a)
    into_a, into_b = _change(a, update.a), _change(b.mT, update.b.mT)
    root_seen, back_seen = _roots(into_a @ moments.seen.double() @ into_a.mT, svd.s)
    root_asked, back_asked = _roots(into_b @ moments.asked.double() @ into_b.mT, svd.s)
    u, s, vh = torch.linalg.svd(root_asked @ root_seen)
    new_b = b.double() @ back_asked @ (u * s.sqrt())
    new_a = (s.sqrt().unsqueeze(-1) * vh) @ back_seen @ a.double()
    return Spectrum(layer, s.square() / 2, new_b.to(b.dtype), new_a.to(a.dtype))


def _change(new: Tensor, old: Tensor) -> Tensor:
    """The matrix that makes the rows of `new` of the rows of `old`, which span them."""
    solved: Tensor = torch.linalg.lstsq(old.double().mT, new.double().mT, driver="gelsd").solution
    return solved.mT


def _roots(moment: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a moment, and that of its inverse, small eigenvalues held. `s` are the delta's singular values."""
    own = torch.diag(s.double())
    moment = moment + _MIXED * own * (moment.trace() / own.trace().clamp(min=1e-30))
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    values = values.clamp(min=max(_FLOOR * float(values.max()), 1e-30)).sqrt()
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT
