"""Compare two adapters: do they change the same, in the same directions, with the same signs? Without the model.

example: lorakit compare runs/first runs/second
"""

import argparse

from lorakit.cli import Reply


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("one", help="adapter or run directory")
    parser.add_argument("two", help="another")


def run(args: argparse.Namespace) -> Reply:
    """Loads, compares, prints a table."""
    from lorakit.algebra.compare import compare
    from lorakit.fit.use import adapter_in

    found = compare(adapter_in(args.one), adapter_in(args.two))
    return Reply(str(found), found.values())
