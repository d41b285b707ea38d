"""Answer texts with a fitted adapter: label them, tag their words, find or write what they ask for, give their vectors.

example: lorakit predict runs/demo --say "Where is my parcel?" --say "I want my money back"
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

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
    parser.add_argument("--out", metavar="FILE", help="write the answers there, a JSON line for each row, as they come")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    device_argument(parser)
    data_arguments(parser)
    for name, (kind, what) in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=what)


def run(args: argparse.Namespace) -> Reply:
    """Loads, predicts, prints."""
    from lorakit.data.streamed import read_or_streamed
    from lorakit.errors import UsageError
    from lorakit.fit.use import load_base_of, open_run

    if bool(args.data) == bool(args.say):
        raise UsageError("give either a file with texts or --say TEXT")
    if args.say2 and len(args.say2) != len(args.say):
        raise UsageError(f"{len(args.say)} --say and {len(args.say2)} --say2; a pair needs one of each")
    if args.out:
        _refuse_there(Path(args.out))
    opened = open_run(args.run)
    task = opened[1]
    if args.say2 and "text2" not in task.columns:
        raise UsageError(f"task '{task.name}' takes no --say2: it knows no pairs of texts")
    options = flags_for(task, args, [name.replace("-", "_") for name in _OPTIONS], task.options)
    read = partial(task.read, answers=False, **columns_for(task, args))
    said = list(zip(args.say, args.say2)) if args.say2 else args.say
    if not args.data:
        rows = task.asked(said)
    else:
        rows = read_or_streamed(args.data, read, None) if args.out else read(args.data)
    base = load_base_of(opened[0], args.base, opened[1]) if args.base else None
    options |= {"base": base, "truncate": args.truncate, "device": args.device}
    found = _answers(opened, rows, options, bool(args.data))
    if args.out:
        return _written(args.out, found)
    answers = list(found)
    unfinished = _unfinished(answers)
    if unfinished:
        say(f"note: {unfinished} of {len(answers)} answers were cut at their bound; --max-new-tokens N moves it")
    return Reply(task.shown(answers), [asdict(one) for one in answers])


def _refuse_there(place: Path) -> None:
    """UsageError if the file is there, or what is left of it from a call that did not end."""
    from lorakit.errors import UsageError
    from lorakit.files import part_of

    for file, what in ((place, "is there already"), (part_of(place), "has the answers of a call that did not end")):
        if file.exists():
            raise UsageError(f"'{file}' {what}; name another file with --out, or remove it")


def _answers(opened: Any, rows: Any, options: dict[str, Any], shows: bool) -> Iterator[Any]:
    """The answers, each as it comes."""
    from lorakit.fit.use import predictions

    tell = bar(len(rows), "row") if shows else None
    done = size = 0  # rows of the parts before, and of this one

    def parts() -> Iterator[Any]:
        nonlocal done, size
        for part in rows.chunks():
            size = len(part)
            yield part
            done += size

    watch = None if tell is None else lambda now, of: tell(done + size * now // of, len(rows))
    yield from predictions(opened, parts(), watch=watch, **options)


def _written(place: str, found: Iterator[Any]) -> Reply:
    """Writes the answers, and tells how many; those before an error too, and where they are."""
    from lorakit.files import part_of, write_lines

    counts = {"rows": 0, "unfinished": 0}

    def lines() -> Iterator[str]:
        for one in found:
            yield json.dumps(asdict(one), ensure_ascii=False)
            counts["rows"] += 1
            counts["unfinished"] += _unfinished([one])

    try:
        write_lines(Path(place), lines())
    except BaseException:
        if counts["rows"]:
            say(f"note: the {counts['rows']:,} answers before that are in '{part_of(Path(place))}'")
        raise
    if counts["unfinished"]:
        say(f"note: {counts['unfinished']} answers were cut at their bound; --max-new-tokens N moves it")
    return Reply(f"{counts['rows']:,} answers written to '{place}'", {"out": place, **counts})


def _unfinished(answers: Sequence[Any]) -> int:
    """How many answers were cut at their bound."""
    return sum(getattr(one, "stopped", None) is False for one in answers)
