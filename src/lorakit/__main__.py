"""`lorakit`, `python -m lorakit`, and `torchrun -m lorakit`."""

import os
import sys
from contextlib import suppress

from lorakit.cli import INTERRUPTED, main


def run() -> None:
    """Ends the process with the exit code of the command line."""
    code = main()
    if "WORLD_SIZE" in os.environ or code == INTERRUPTED:
        # not through Python's end: a thread of gloo that asks for the interpreter then aborts the process, and whoever
        # interrupts would wait for all memory to be given back
        with suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
