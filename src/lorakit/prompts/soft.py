"""soft: rows that learn among the inputs, in front of the text's own (prompt tuning)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.prompt import PROMPTS, ROWS, PromptMethod, PromptPlan, Reads, Sizes, tokens_of


@PROMPTS.add
class Soft(PromptMethod):
    """The rows themselves learn."""

    name = "soft"
    rows_are = "V input rows"
    parameters = "V d"
    use = "the fewest numbers: one small table for each job of a large language model"
    source = "Lester et al., 2021, arXiv 2104.08691"
    inputs = True
    pace = 5.0
    peft_type = "PROMPT_TUNING"
    peft_config = {"prompt_tuning_init": "RANDOM"}  # what it began as does not matter any more

    def shapes(self, sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
        return {ROWS: sizes.rows(length)}

    def init(self, plan: PromptPlan, base: Reads, generator: torch.Generator) -> dict[str, Tensor]:
        tokens = tokens_of(plan, base.vocabulary, generator)
        rows = base.inputs(tokens).float()
        if plan.start == "normal":  # as wide as the base's own rows
            rows = torch.randn(rows.shape, generator=generator) * float(rows.std())
        return {ROWS: rows.clone()}

    def rows(self, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
        return factors[ROWS]
