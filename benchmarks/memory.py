"""The memory estimate that a fit tells before it starts, against the peak that is measured: each fit in a new process.

Texts of 20 to 300 random tokens in steps of 48, so that passes of 4,096 tokens happen; and the demo data. The ratio is
the estimate over the peak: 1 is exact.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Bench

HERE = Path(__file__).parent
MODELS = ("minilm", "llama 8x512", "gpt2 12x768")
CASES = [("minilm demo:support", "fp32"), *((model, dtype) for model in MODELS for dtype in ("fp32", "bf16"))]


def fitted(model: str, dtype: str, steps: int) -> dict[str, Any]:
    """A fit of so many steps; its summary."""
    import lorakit as lk
    from lorakit.tasks.base import load_base

    if model == "minilm demo:support":
        return lk.fit("minilm", "demo:support", epochs=2, dtype=dtype, learning_rate=1e-3).summary
    base = load_base("minilm") if model == "minilm" else language_model(model)
    words = [word for word in base.tokenizer.get_vocab() if word.isalpha()]
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(20, 300) // (1 if model == "minilm" else 2)))

    n = 48 * steps + 96
    settings: dict[str, Any] = {"batch_size": 48, "epochs": 1, "learning_rate": 1e-3, "dtype": dtype, "consume": True}
    if model == "minilm":
        from lorakit.data.rows import Rows, split

        rows = Rows(tuple(text() for _ in range(n)), tuple(str(k % 2) for k in range(n)), "texts", tuple(range(n)))
        return lk.fit(base, split(rows), **settings, truncate=True).summary
    from lorakit.data.dialogues import make_dialogues
    from lorakit.data.rows import split

    talks = make_dialogues(
        [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(n)]
    )
    return lk.fit(base, split(talks), "generate", **settings).summary


def language_model(name: str) -> Any:
    """One of the jobs' models with random weights, and MiniLM's tokenizer."""
    import torch

    from lorakit.tasks.base import Base
    from sides.jobs import base, tokenizer

    model = base(name, torch.float32)
    tok = tokenizer()
    tok.eos_token = tok.sep_token
    return Base(model, tok, name, "last", 512)


def main() -> None:
    """Every case in a process of its own."""
    bench = Bench(__doc__ or "")
    steps = bench.rounds(16, 6)
    for model, dtype in CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--case", model, dtype, str(steps)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        memory, name = found["memory"], f"{model} {dtype}"
        bench.ratio(f"{name}, estimated over measured", [memory["estimated_bytes"] / memory["peak_bytes"]])
        for word in ("estimated", "peak", "start"):
            bench.fact(f"{name} {word} MiB", round(memory[f"{word}_bytes"] / 2**20))
        bench.fact(f"{name} tokens/s", found["tokens_per_s"])
    bench.done()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(fitted(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
