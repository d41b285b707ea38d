"""What a run settles for itself where the settings leave it open: its learning rate, its passes, its threads.

All of it is settled once, before the first step, and kept in the checkpoint: a run that goes on after a kill goes on
with the very same.
"""

from typing import Any

import torch

from lorakit.data.batches import Tokens
from lorakit.fit.learner import Learner
from lorakit.fit.settings import TOKENS_PER_PASS

RATE = 1e-3


def settle(learner: Learner, tokens: Tokens) -> dict[str, Any]:
    """Name -> value of the settings that are open, by trials on the training rows; what learns is left as it was."""
    wish, found = learner.settings, dict[str, Any]()
    if not wish.tokens_per_pass:
        found["tokens_per_pass"] = TOKENS_PER_PASS
    if not wish.threads:
        found["threads"] = torch.get_num_threads()
    if isinstance(wish.learning_rate, str):
        found["learning_rate"] = RATE
    return found
