"""Turn rules into a plan: a TOML file that says which layer gets which method, rank, scale and start.

Edit the file freely and train by it: lorakit fit BASE DATA --plan plan.toml

example: lorakit plan minilm --rank 8 --layers attention --out plan.toml
"""

import argparse
from pathlib import Path

from lorakit.cli import Reply
from lorakit.cli.common import BASE_HELP, TASK_HELP, layer_arguments, rules_from, worded


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("base", help=BASE_HELP)
    parser.add_argument("--task", default="classify", help=TASK_HELP)
    layer_arguments(parser)
    parser.add_argument("--out", metavar="FILE", help="write the plan here instead of printing it")


def run(args: argparse.Namespace) -> Reply:
    """Describes, plans, prints."""
    from lorakit.describe import describe
    from lorakit.method import trainable
    from lorakit.prompt import PROMPTS
    from lorakit.reading import Reading
    from lorakit.tasks.task import TASKS
    from lorakit.whole import resolve_trained

    task, rules = TASKS[args.task], rules_from(args)
    base = task.base_for(args.base, None)
    plan = task.plan(base.model, **worded(rules, args.soft_prompt_words, base.tokenizer))
    specs = {spec.path: spec for spec in describe(base.model)}
    whole = {id(p): p.numel() for p in resolve_trained(base.model, plan.trained).values()}
    count = sum(whole.values()) + trainable(specs, plan)
    if plan.prompt is not None:
        method = PROMPTS[plan.prompt.method]
        count += method.size(Reading(base.model, method.inputs).sizes, plan.prompt.length)
    total = sum(parameter.numel() for parameter in base.model.parameters())
    values = {"layers": len(plan.layers), "parameters": count, "base_parameters": total, "plan": plan.toml()}
    front = f"a {plan.prompt.method} prompt of {plan.prompt.length} rows, " if plan.prompt is not None else ""
    line = f"{len(plan.layers)} layers, {front}{count:,} numbers to train: {count / total:.2%} of the base's {total:,}"
    if args.out:
        plan.save(Path(args.out))
        return Reply(f"{line}\nwritten to {args.out}", {**values, "out": args.out})
    return Reply(f"# {line}\n{plan.toml().rstrip()}", values)
