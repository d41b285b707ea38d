"""Measure a fitted adapter on rows with their right answers, with a 95 % interval.

For classify, image and image_text: accuracy, macro F1, and F1 of every label.
For labels: micro and macro F1, rows with all labels right. For regress: Pearson, Spearman, mean absolute error.
For generate: loss of each token, perplexity, token accuracy; --write: what it writes, as for translate.
For complete: loss of each token, perplexity, token accuracy, bits per byte.
For recommend: NDCG, recall and hit rate of the first ten items, and the NDCG of the most popular ones.
For tag: F1, precision and recall of spans. For answer: exact match and F1 as SQuAD has them.
For translate: as for generate, and BLEU, chrF and ROUGE of what it writes (pip install 'lorakit[translate]').
For prefer: reward accuracy, margin. For embed: recall at 1, mean reciprocal rank.

With --harness, causal language models are asked tasks of lm-eval (pip install 'lorakit[harness]'), with the adapter and
without; a task is a name that lm-eval knows, or the path of a YAML file of its form.

example: lorakit evaluate runs/demo demo:support_test
         lorakit evaluate runs/mine --harness hellaswag,tasks/ours.yaml --limit 100
"""

import argparse
from dataclasses import asdict
from typing import Any

from lorakit.cli import Reply
from lorakit.cli.common import COLUMNS, FORMS, SKIP_HELP, bar, columns_for, data_arguments, device_argument, flags_for


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("run", help="run or adapter directory, or a merged model")
    parser.add_argument("data", nargs="?", help="file with texts and right answers, or demo:support_test")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    device_argument(parser)
    parser.add_argument(
        "--write",
        action="store_true",
        default=None,
        help="generate: write an answer to each prompt, and measure it too",
    )
    group = parser.add_argument_group("lm-eval")
    group.add_argument("--harness", metavar="TASK[,TASK]", help="measure these tasks instead of a file")
    group.add_argument("--limit", type=int, metavar="N", help="only the first rows of each task")
    group.add_argument("--harness-chat", action="store_true", help="ask them by the base's chat template")
    data_arguments(parser)
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help=SKIP_HELP)


def run(args: argparse.Namespace) -> Reply:
    """Loads, evaluates, prints."""
    from lorakit.data.faults import counted, gathered, skipping, told
    from lorakit.errors import UsageError
    from lorakit.fit.use import evaluate, load_base_of, open_run

    if bool(args.data) == bool(args.harness):
        raise UsageError("give either a file with texts and right answers or --harness TASK")
    others = (*COLUMNS, *FORMS, "write", "truncate", "skip_bad") if args.harness else ("limit", "harness_chat")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]
    if given:
        whose = "a file with texts and right answers" if args.harness else "--harness TASK"
        raise UsageError(f"{', '.join(given)} goes with {whose}, which is not given; leave it out")
    opened = open_run(args.run)
    task = opened[1]
    if args.harness:
        return _harness(args, opened)
    options = flags_for(task, args, ("write",), task.asks)
    options |= {"truncate": args.truncate, "device": args.device}
    with skipping(args.skip_bad) as skipped:
        with gathered():
            rows = task.read(args.data, **columns_for(task, args))
        base = load_base_of(opened[0], args.base, opened[1]) if args.base else None
        found = evaluate(opened, rows, base=base, watch=bar(len(rows), "row"), **options)
    text = "\n\n".join([str(found), *(f"note: {line}" for line in told(skipped.bad))])
    return Reply(text, {**asdict(found), "skipped": counted(skipped.bad)})  # type: ignore[call-overload]


def _harness(args: argparse.Namespace, opened: Any) -> Reply:
    from lorakit.fit.harness import harness
    from lorakit.fit.use import load_base_of

    base = load_base_of(opened[0], args.base, opened[1]) if args.base else None
    tasks = [name for name in args.harness.split(",") if name]
    found = harness(opened, tasks, base=base, device=args.device, limit=args.limit, chat=args.harness_chat)
    return Reply(str(found), asdict(found))
