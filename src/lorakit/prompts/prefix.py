"""prefix: keys and values that learn in every attention, in front of those of the text (prefix tuning)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.prompt import PROMPTS, ROWS, PromptMethod, PromptPlan, Reads, Sizes, tokens_of


@PROMPTS.add
class Prefix(PromptMethod):
    """The keys and values themselves learn; they begin as those of real words, which Li and Liang found to be best."""

    name = "prefix"
    rows_are = "V keys and values in every attention"
    parameters = "2 V d layers"
    use = "acts in every layer: more than a soft prompt for the same V, at the cost of attention alone"
    source = "Li and Liang, 2021, arXiv 2101.00190"
    inputs = False
    pace = 8.0
    peft_type = "PREFIX_TUNING"
    peft_config = {"prefix_projection": False}

    def shapes(self, sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
        return {ROWS: sizes.rows(length)}

    def init(self, plan: PromptPlan, base: Reads, generator: torch.Generator) -> dict[str, Tensor]:
        rows = base.states(tokens_of(plan, base.vocabulary, generator)).float()
        if plan.start == "normal":  # as wide as real keys and values are in each layer
            spread = rows.std((0, 3, 4), keepdim=True)
            rows = torch.randn(rows.shape, generator=generator) * spread
        return {ROWS: rows.clone()}

    def rows(self, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
        return factors[ROWS]
