"""`lorakit`, `python -m lorakit`, and `torchrun -m lorakit`."""

import os
import sys

from lorakit.cli import main


def run() -> None:
    """Ends the process with the exit code of the command line."""
    code = main()
    if "WORLD_SIZE" in os.environ:
        # not through Python's end: a thread of gloo that asks for the interpreter then aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
