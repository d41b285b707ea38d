"""Write an adapter into its base: a plain Transformers directory, as large and as fast as the base itself.

The sums are formed in float32 and rounded once, to the precision that the base's files are in. A head that was trained
with the adapter goes with it (lorakit_head.safetensors, and lorakit_task.json says what it is for), so that lorakit
predict and evaluate take the merged directory like a run. An adapter of a quantized base is merged into the numbers
that the base stood for, in float.

example: lorakit merge runs/demo --out merged/demo
"""

import argparse
from pathlib import Path

from lorakit.cli import Reply
from lorakit.cli.common import size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapter", help="adapter or run directory")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the merged model goes; must not exist")
    parser.add_argument("--zeros", action="store_true", help="leave every 0 of the base's weights a 0: a pruned base")


def run(args: argparse.Namespace) -> Reply:
    """Loads, attaches, merges, saves."""
    from lorakit.attach import attach, detach, merge
    from lorakit.errors import UsageError
    from lorakit.files import replaced_directory, write_json, write_tensors
    from lorakit.fit.use import HEAD_FILE, TASK, adapter_in, load_base_of
    from lorakit.quantize import dequantize, quantized_as
    from lorakit.tasks.task import task_of

    out = Path(args.out)
    if out.exists():
        raise UsageError(f"'{out}' exists already; name another directory")
    adapter = adapter_in(args.adapter)
    base = load_base_of(adapter, args.base)
    note = adapter.meta.get("task")
    name = ""
    if note:
        task = task_of(note)
        task.prepare(base.model)
        name = task.head
    attach(base.model, adapter)
    if quantized_as(base.model):  # the sum is exact in float alone
        detach(base.model)
        dequantize(base.model)
        attach(base.model, adapter, check_base=False)
    merge(base.model, zeros=args.zeros)
    head = base.model.get_submodule(name).state_dict() if name else {}
    base.model._modules.pop(name, None)  # the plain model, as other programs know it
    base.model.to(base.dtype)
    with replaced_directory(out) as work:
        base.model.save_pretrained(work)  # type: ignore[operator]
        base.tokenizer.save_pretrained(work)
        if note:
            write_json(work / TASK, note)
        if head:
            write_tensors(work / HEAD_FILE, {f"{name}.{key}": t for key, t in head.items()})
    n_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    text = f"{len(adapter.layers)} layers merged into {base.name}, {size(n_bytes)}, written to {out}"
    return Reply(text, {"layers": len(adapter.layers), "base": base.name, "bytes": n_bytes, "out": str(out)})
