"""Show what each layer of an adapter does: rank, how much of it is used, its share of the change, its size beside W.

example: lorakit inspect runs/demo --base minilm
"""

import argparse

from lorakit.cli import Reply


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapter", help="adapter or run directory")
    parser.add_argument("--base", help="base model, to compare the change with its weights")


def run(args: argparse.Namespace) -> Reply:
    """Loads, looks, prints a table."""
    from lorakit.fit.use import adapter_in, load_base_of
    from lorakit.inspect import inspect

    adapter = adapter_in(args.adapter)
    view = inspect(adapter, load_base_of(adapter, args.base).model if args.base else None)
    return Reply(str(view), view.values())
