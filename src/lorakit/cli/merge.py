"""Write an adapter into its base: a plain Transformers directory, as fast as the base itself.

A head that was trained with the adapter goes with it (lorakit_head.safetensors, and lorakit_task.json says what it is
for), so that lorakit predict and evaluate take the merged directory like a run.

example: lorakit merge runs/demo --out merged/demo
"""

import argparse
from pathlib import Path

from lorakit.cli import Reply
from lorakit.cli.common import open_adapter, size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapter", help="adapter or run directory")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the merged model goes; must not exist")


def run(args: argparse.Namespace) -> Reply:
    """Loads, attaches, merges, saves."""
    from lorakit.attach import attach, merge
    from lorakit.errors import UsageError
    from lorakit.files import replaced_directory, write_json, write_tensors
    from lorakit.fit.use import HEAD_FILE, TASK
    from lorakit.tasks.base import load_base
    from lorakit.tasks.classify import HEAD, Classify

    out = Path(args.out)
    if out.exists():
        raise UsageError(f"'{out}' exists already; name another directory")
    adapter = open_adapter(args.adapter)
    if not (args.base or adapter.base_name):
        raise UsageError("the adapter does not say which base it was made on; name it with --base")
    base = load_base(args.base or adapter.base_name)
    note = adapter.meta.get("task")
    if note:
        Classify.from_note(note).prepare(base.model)
    attach(base.model, adapter)
    merge(base.model)
    head = base.model.get_submodule(HEAD).state_dict() if note else {}
    base.model._modules.pop(HEAD, None)  # the plain trunk, as other programs know it
    with replaced_directory(out) as work:
        base.model.save_pretrained(work)  # type: ignore[operator]
        base.tokenizer.save_pretrained(work)
        if note:
            write_json(work / TASK, note)
            write_tensors(work / HEAD_FILE, {f"{HEAD}.{key}": t for key, t in head.items()})
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    text = f"{len(adapter.layers)} layers merged into {base.name}, {size(n_bytes)}, written to {out}"
    return Reply(text, {"layers": len(adapter.layers), "base": base.name, "bytes": n_bytes, "out": str(out)})
