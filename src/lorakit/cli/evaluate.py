"""Measure a fitted adapter on rows with their right answers, with a 95 % interval.

For classify, image and image_text: accuracy, macro F1, and F1 of every label.
For generate: loss of each token, perplexity, token accuracy.
For recommend: NDCG, recall and hit rate of the first ten items, and the NDCG of the most popular ones.
For tag: F1, precision and recall of spans. For answer: exact match and F1 as SQuAD has them.
For translate: these too, and BLEU, chrF and ROUGE of what it writes (pip install 'lorakit[translate]').
For prefer: reward accuracy, margin. For embed: recall at 1, mean reciprocal rank.

example: lorakit evaluate runs/demo demo:support_test
"""

import argparse
from dataclasses import asdict

from lorakit.cli import Reply
from lorakit.cli.common import SKIP_HELP, bar, columns_for, data_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("run", help="run or adapter directory, or a merged model")
    parser.add_argument("data", help="file with texts and right answers, or demo:support_test")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    data_arguments(parser)
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help=SKIP_HELP)


def run(args: argparse.Namespace) -> Reply:
    """Loads, evaluates, prints."""
    from lorakit.data.faults import counted, skipping, told
    from lorakit.fit.use import evaluate, open_run

    opened = open_run(args.run)
    task = opened[1]
    with skipping(args.skip_bad) as skipped:
        rows = task.read(args.data, **columns_for(task, args))
        base = task.load_base(args.base) if args.base else None
        found = evaluate(opened, rows, base=base, truncate=args.truncate, watch=bar(len(rows), "row"))
    text = "\n\n".join([str(found), *(f"note: {line}" for line in told(skipped.bad))])
    return Reply(text, {**asdict(found), "skipped": counted(skipped.bad)})  # type: ignore[call-overload]
