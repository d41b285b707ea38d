"""What a run settles for itself where the settings leave it open: its learning rate, its passes, its threads.

All of it is settled once, before the first step, and kept in the checkpoint: a run that goes on after a kill goes on
with the very same.
"""

from typing import Any

import torch

from lorakit.data.batches import Tokens
from lorakit.fit.budget import Budget
from lorakit.fit.learner import Learner
from lorakit.fit.rate import default_rate, tried_rate
from lorakit.fit.threads import choose_threads
from lorakit.plan import Plan


def settle(learner: Learner, tokens: Tokens, plan: Plan, budget: Budget) -> dict[str, Any]:
    """Name -> value of the settings that are open, by trials on the training rows; what learns is left as it was.

    `notes` beside them says why, in words and numbers. Torch is left with the number of threads that was chosen.
    """
    wish, found = learner.settings, dict[str, Any]()
    if not wish.tokens_per_pass:
        found["tokens_per_pass"] = budget.tokens_per_pass()
    learner.settings = wish.filled(found)  # the trials run in passes of that size
    if not wish.threads:
        found["threads"] = choose_threads(learner, tokens)
    torch.set_num_threads(wish.threads or found["threads"])
    if isinstance(wish.learning_rate, str):
        rate = default_rate(learner, plan) if wish.learning_rate == "default" else tried_rate(learner, tokens, plan)
        found |= {"learning_rate": rate.value, "notes": {"learning_rate": rate.note()}}
    return found
