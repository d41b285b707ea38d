"""Write an adapter in another form.

  --to lorakit   PEFT's files and lorakit.json (which says method, start and base)
  --to peft      only the files that PEFT writes
  --to portable  only those, and what every reader of PEFT's files understands: one alpha/r for all layers, the rest of
                 the scale in the factors, no fully trained modules (vLLM, llama.cpp)

example: lorakit convert runs/demo --to peft --dtype bf16 --out adapters/demo
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.cli import Reply
from lorakit.cli.common import size

_DTYPES = ("fp32", "bf16", "fp16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapter", help="adapter or run directory, of lorakit or of PEFT")
    parser.add_argument("--to", required=True, choices=("lorakit", "peft", "portable"))
    parser.add_argument("--dtype", choices=_DTYPES, help="precision of the written factors")
    parser.add_argument("--out", required=True, metavar="DIR")


def run(args: argparse.Namespace) -> Reply:
    """Loads, converts, saves."""
    import torch

    from lorakit import peft_format
    from lorakit.errors import AdapterError, UsageError
    from lorakit.fit.use import adapter_in
    from lorakit.notes import CONFIG, NOTES, WEIGHTS

    out = Path(args.out)
    adapter = adapter_in(args.adapter)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"'{out}' is {'not empty' if out.is_dir() else 'a file'}; name another directory")
    if args.dtype:
        adapter = adapter.to(dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype])
    left_out: list[str] = []
    if args.to == "portable":
        left_out = sorted(adapter.trained)
        adapter = _portable(adapter)
    reason = (
        peft_format.why_no_twin(adapter.layers, adapter.trained, adapter.meta.get("peft"), adapter.prompt)
        if args.to != "lorakit"
        else ""
    )
    if reason:
        raise AdapterError(f"{reason}; keep this adapter with --to lorakit")
    adapter.save(out)
    if args.to != "lorakit":
        (out / NOTES).unlink()
    files = sorted(name for name in (WEIGHTS, CONFIG, NOTES) if (out / name).exists())
    lost = f"; left out, because readers refuse them: {', '.join(left_out)}" if left_out else ""
    text = f"{', '.join(files)}: {size(sum((out / name).stat().st_size for name in files))}, written to {out}{lost}"
    return Reply(text, {"files": files, "left_out": left_out, "out": str(out)})


def _portable(adapter: Any) -> Any:
    """Scale 1 everywhere and one rank, by padding smaller pairs with zeros (which changes nothing)."""
    import torch.nn.functional as F

    from lorakit.errors import AdapterError
    from lorakit.method import METHODS, layer_update

    if adapter.prompt is not None:
        raise AdapterError("a prompt is not portable, only low-rank pairs are; keep this adapter with --to lorakit")
    odd = sorted({x.method for x in adapter.layers.values() if not METHODS[x.method].exact_pair or "bias" in x.factors})
    if odd:
        raise AdapterError(f"only plain pairs are portable, and this adapter has {', '.join(odd)}; merge it instead")
    updates = {path: layer_update(layer) for path, layer in adapter.layers.items()}
    pairs = {path: (x.a, x.b, x.scale) for path, x in updates.items() if x.a is not None and x.b is not None}
    if not pairs:
        raise AdapterError(
            "this adapter has no low-rank layers, so there is nothing to make portable; merge it instead"
        )
    rank = max(a.shape[-2] for a, _, _ in pairs.values())
    layers = {}
    for path, (a, b, scale) in pairs.items():
        layer, short = adapter.layers[path], rank - a.shape[-2]
        factors = {"a": F.pad(a, (0, 0, 0, short)), "b": F.pad(b * scale, (0, short))}
        layers[path] = replace(layer, method="lora", factors=factors, rank=rank, scale=1.0, start="converted")
    return replace(adapter, layers=layers, trained={})
