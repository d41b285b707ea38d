"""A method of your own in one class, and the contract that every method passes.

`rank1`: the smallest update there is, `delta = scale * u v^T`. Registered by a decorator; a package would name its
module in the entry-point group `lorakit.methods` instead.
"""

import torch

from lorakit.method import METHODS, Method
from lorakit.testing import contract
from lorakit.update import Update


@METHODS.add
class Rank1(Method):
    """One direction in, one direction out."""

    name = "rank1"
    formula = "scale * u @ v.T"
    parameters = "o + i"
    use = "an example"
    source = "this file"
    takes_rank = False

    def shapes(self, spec, rank):
        o, i = spec.matrix
        return {"u": (*spec.batch, o), "v": (*spec.batch, i)}

    def init(self, spec, plan, weight, generator):
        o, i = spec.matrix
        return {
            "u": torch.zeros(*spec.batch, o),
            "v": torch.randn(*spec.batch, i, generator=generator) * i**-0.5,
        }

    def update(self, factors, scale, weight):
        return Update(a=factors["v"].unsqueeze(-2), b=factors["u"].unsqueeze(-1), scale=scale)


if __name__ == "__main__":
    contract("rank1", kinds=["linear", "conv2d"])
    print("rank1 passes the contract")
