"""Measure a fitted adapter on labelled rows: accuracy with its 95 % interval, macro F1, and F1 of every label.

example: lorakit evaluate runs/demo demo:support_test
"""

import argparse
from dataclasses import asdict

from lorakit.cli import Reply
from lorakit.cli.common import data_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("run", help="run or adapter directory")
    parser.add_argument("data", help="file with texts and labels, or demo:support_test")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    data_arguments(parser)


def run(args: argparse.Namespace) -> Reply:
    """Loads, evaluates, prints a table."""
    from lorakit.data import load_rows
    from lorakit.fit.use import evaluate, open_run
    from lorakit.tasks.base import load_base

    opened = open_run(args.run)
    rows = load_rows(args.data, text=args.text, label=args.label)
    base = load_base(args.base, pool=opened[1].pool, max_length=opened[1].max_length) if args.base else None
    found = evaluate(opened, rows, base=base, truncate=args.truncate)
    low, high = found.accuracy_interval
    width = max(len(label) for label in found.per_label)
    lines = [
        f"accuracy {found.metrics['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"macro F1 {found.metrics['macro_f1']:.3f}, loss {found.metrics['loss']:.3f}, {found.n_rows} rows",
        "",
        f"{'label':<{width}}  rows  predicted     F1",
    ]
    lines += [
        f"{label:<{width}}  {values['rows']:4d}  {values['predicted']:9d}  {values['f1']:.3f}"
        for label, values in found.per_label.items()
    ]
    return Reply("\n".join(lines), asdict(found))
