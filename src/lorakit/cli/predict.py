"""Label texts with a fitted adapter.

example: lorakit predict runs/demo --say "Where is my parcel?" --say "I want my money back"
"""

import argparse

from lorakit.cli import Reply
from lorakit.cli.common import data_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("run", help="run or adapter directory")
    parser.add_argument("data", nargs="?", help="file with texts; labels in it are not read")
    parser.add_argument(
        "--say", action="append", default=[], metavar="TEXT", help="a text to label; repeat it for more"
    )
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    data_arguments(parser)


def run(args: argparse.Namespace) -> Reply:
    """Loads, predicts, prints a line for each text."""
    from lorakit.data import load_rows
    from lorakit.errors import UsageError
    from lorakit.fit.use import open_run, predict
    from lorakit.tasks.base import load_base

    if bool(args.data) == bool(args.say):
        raise UsageError("give either a file with texts or --say TEXT")
    opened = open_run(args.run)
    rows = load_rows(args.data, text=args.text, label=args.label, labels=False) if args.data else list(args.say)
    base = load_base(args.base, pool=opened[1].pool, max_length=opened[1].max_length) if args.base else None
    found = predict(opened, rows, base=base, truncate=args.truncate)
    width = max(len(one.label) for one in found)
    text = "\n".join(f"{one.label:<{width}}  {one.probability:6.1%}  {one.text}" for one in found)
    return Reply(
        text,
        [
            {"text": p.text, "label": p.label, "probability": p.probability, "probabilities": p.probabilities}
            for p in found
        ],
    )
