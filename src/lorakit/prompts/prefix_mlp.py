"""prefix-mlp: the keys and values of a prefix come out of a small network while they learn; what is kept are these."""

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.prompt import PROMPTS, PromptMethod, PromptPlan, Reads, Sizes
from lorakit.prompts.p_tuning import network


@PROMPTS.add
class PrefixMlp(PromptMethod):
    """Two layers with a tanh between them, as in the paper and in PEFT (`prefix_projection`)."""

    name = "prefix-mlp"
    rows_are = "V keys and values in every attention, made by an MLP until they are learned"
    parameters = "V d + d (d + 1) + 2 d (d + 1) layers"
    use = "a prefix from nothing, as in the paper; `prefix` begins at real words instead and needs no network"
    source = "Li and Liang, 2021, arXiv 2101.00190, section 4.3"
    inputs = False
    starts = ()
    peft_type = "PREFIX_TUNING"
    peft_config = {"prefix_projection": False}  # PEFT, too, keeps what comes out of it

    def shapes(self, sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
        d, all_rows = sizes.width, prod(sizes.rows(1))
        made = {"w1": (d, d), "c1": (d,), "w2": (all_rows, d), "c2": (all_rows,)}
        return {"seeds": (length, d), **made}

    def init(self, plan: PromptPlan, base: Reads, generator: torch.Generator) -> dict[str, Tensor]:
        return network(self.shapes(base.sizes, plan.length), generator)

    def rows(self, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
        x = F.linear(factors["seeds"], factors["w1"], factors["c1"]).tanh()
        return F.linear(x, factors["w2"], factors["c2"]).view(sizes.rows(len(x)))
