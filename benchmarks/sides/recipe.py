"""What all peers under Trainer share: its plain arguments, and a clock on its steps."""

import tempfile
import time
from typing import Any

from transformers import TrainerCallback


def arguments(batch: int, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """A rate that falls to 0 in a line, AdamW's small decay, nothing written and nothing shown."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }


class StepClock(TrainerCallback):
    """Wall and processor seconds of the steps after the first, for all of them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: Any = ()

    def step(self) -> None:
        """A step is done."""
        self.marks = (*self.marks[:1], (time.perf_counter(), time.process_time()))

    def watch(self, record: Any, _: int) -> None:
        """The same for a fit of ours."""
        if record.kind == "step":
            self.step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The same for Trainer."""
        self.step()

    def spent(self) -> dict[str, float]:
        """Of as many steps."""
        (wall, cpu), (wall_end, cpu_end) = self.marks
        share = self.steps / (self.steps - 1)
        return {"seconds": (wall_end - wall) * share, "cpu": (cpu_end - cpu) * share}
