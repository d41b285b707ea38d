"""What keeping a base in few bits saves and costs, format by format. Writes nothing.

To train on it: lorakit fit BASE DATA --quantize nf4; from Python lorakit.quantize(model, "nf4"). Matrices are kept in
the format, embeddings in int8, heads and norms as they are. The error is that of the weights, |W' - W| / |W|: what it
does to answers is told by a fit, whose metric before training is that of the quantized base.

example: lorakit quantize minilm
"""

import argparse

from lorakit.cli import Reply
from lorakit.cli.common import BASE_HELP, TASK_HELP


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("base", help=BASE_HELP)
    parser.add_argument("--task", default="classify", help=TASK_HELP)
    parser.add_argument("--layers", default="all-linear", help="which matrices, as for lorakit plan")


def run(args: argparse.Namespace) -> Reply:
    """Loads, tries every format, prints."""
    from lorakit.quant import FORMATS
    from lorakit.quantize import quantization_costs
    from lorakit.tasks.task import TASKS

    base = TASKS[args.task].base_for(args.base, None)
    found = {name: quantization_costs(base.model, name, layers=args.layers) for name in FORMATS.names()}
    width = max(map(len, found))
    text = "\n".join(f"{name:<{width}}  {costs}" for name, costs in found.items())
    values = {
        name: {
            "bytes_before": costs.before,
            "bytes_after": costs.after,
            "error": costs.error,
            "layers": {cost.path: {"format": cost.form, "error": cost.error} for cost in costs.layers},
        }
        for name, costs in found.items()
    }
    return Reply(text, values)
