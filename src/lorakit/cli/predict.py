"""Answer texts with a fitted adapter: label them, tag their words, find or write what they ask for, give their vectors.

example: lorakit predict runs/demo --say "Where is my parcel?" --say "I want my money back"
"""

import argparse
from dataclasses import asdict

from lorakit.cli import Reply
from lorakit.cli.common import bar, columns_for, data_arguments, device_argument, flags_for, say

_OPTIONS = {
    "max-new-tokens": (int, "generate, complete, prefer, translate: most new tokens (default 256)"),
    "beams": (int, "translate: beams of the search, 1 (default) for none"),
    "temperature": (
        float,
        "generate, complete, prefer: 0 (default) for the most probable answer, above it one is drawn",
    ),
    "k": (int, "recommend: most items for each user (default 10)"),
    "seed": (int, "generate, complete, prefer: of what is drawn (default 0)"),
    "threshold": (float, "labels: least probability of a label (default: as chosen in training)"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("run", help="run or adapter directory, or a merged model")
    parser.add_argument("data", nargs="?", help="file with texts; labels or answers in it are not read")
    parser.add_argument("--say", action="append", default=[], metavar="TEXT", help="a text; repeat it for more")
    parser.add_argument("--say2", action="append", default=[], metavar="TEXT", help="its second text, for pairs")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    device_argument(parser)
    data_arguments(parser)
    for name, (kind, what) in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=what)


def run(args: argparse.Namespace) -> Reply:
    """Loads, predicts, prints."""
    from lorakit.errors import UsageError
    from lorakit.fit.use import open_run, predict

    if bool(args.data) == bool(args.say):
        raise UsageError("give either a file with texts or --say TEXT")
    if args.say2 and len(args.say2) != len(args.say):
        raise UsageError(f"{len(args.say)} --say and {len(args.say2)} --say2; a pair needs one of each")
    opened = open_run(args.run)
    task = opened[1]
    if args.say2 and "text2" not in task.columns:
        raise UsageError(f"task '{task.name}' takes no --say2: it knows no pairs of texts")
    options = flags_for(task, args, [name.replace("-", "_") for name in _OPTIONS], task.options)
    columns = columns_for(task, args)
    said = list(zip(args.say, args.say2)) if args.say2 else args.say
    rows = task.read(args.data, answers=False, **columns) if args.data else task.asked(said)
    base = task.load_base(args.base) if args.base else None
    watch = bar(len(rows), "row") if args.data else None
    found = predict(opened, rows, base=base, truncate=args.truncate, device=args.device, watch=watch, **options)
    unfinished = sum(getattr(one, "stopped", None) is False for one in found)
    if unfinished:
        say(f"note: {unfinished} of {len(found)} answers were cut at their bound; --max-new-tokens N moves it")
    return Reply(task.shown(found), [asdict(one) for one in found])
