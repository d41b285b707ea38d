"""What a run settles for itself where the settings leave it open: its learning rate, its passes, its threads.

All of it is settled once, before the first step, and kept in the checkpoint: a run that goes on after a kill goes on
with the very same.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lorakit.data.batches import Examples
from lorakit.fit.budget import Budget
from lorakit.fit.learner import Learner
from lorakit.fit.rate import default_rate, tried_rate
from lorakit.fit.threads import choose_threads
from lorakit.plan import Plan


def settle(
    learner: Learner, examples: Examples, plan: Plan, budget: Budget, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Name -> value of the settings that are open, by trials on the training rows; what learns is left as it was.

    `before` is what the run settled before it was interrupted, and stays. `notes` beside the values says why, in words
    and numbers. The learner gets its settings filled, torch the number of threads.
    """
    wish, found = learner.settings, dict(before or {})
    open_now = [name for name in wish.left_open if name not in found]
    if "tokens_per_pass" in open_now:
        found["tokens_per_pass"] = budget.tokens_per_pass()
    learner.settings = wish.filled(found)  # the trials run in passes of that size
    if "threads" in open_now:
        found["threads"] = choose_threads(learner, examples)
    torch.set_num_threads(wish.filled(found).threads)
    if "learning_rate" in open_now:
        rate = default_rate(learner, plan) if wish.learning_rate == "default" else tried_rate(learner, examples, plan)
        found |= {"learning_rate": rate.value, "notes": {"learning_rate": rate.note()}}
    found = learner.workers.agreed(found)
    learner.settings = wish.filled(found)
    torch.set_num_threads(learner.settings.threads)
    return found
