"""What training steps take: wall seconds, and processor seconds."""

import time
from typing import Any


class Clock:
    """The sum of what passes between `begin` and `end`. As the `watch` of a fit, that of its steps alone."""

    def __init__(self) -> None:
        self.spent = {"seconds": 0.0, "cpu": 0.0}
        self.begin()

    def begin(self) -> None:
        """From here on."""
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Up to here."""
        for name, now, began in zip(self.spent, (time.perf_counter(), time.process_time()), self._began):
            self.spent[name] += now - began

    def __call__(self, record: Any, total: int) -> None:
        if record.kind == "step":
            self.end()
        self.begin()
