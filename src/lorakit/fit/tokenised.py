"""Rows, ready for the model: made by the task, or taken from the cache where the same rows were made ready before.

The same are: every text and label (by hash), the tokenizer, what the task remembers, and this version of lorakit.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakit._version import __version__
from lorakit.cache import cache_folder, keep_below
from lorakit.data.batches import Examples, Tokens
from lorakit.data.ragged import Ragged
from lorakit.data.rows import Part
from lorakit.data.streamed import Streamed
from lorakit.errors import LorakitError
from lorakit.files import read_tensors, write_tensors
from lorakit.fit.mapped import mapped
from lorakit.tasks.task import Task

_WORTH_S = 2.0  # what is made in less is not kept
_MOST = 4 << 30  # bytes of all that is kept


def tokenised(task: Task, rows: Part, tokenizer: Any, *, truncate: bool) -> Examples:
    """The examples of these rows, as `task.examples` makes them."""
    key = _key(task, rows, tokenizer, truncate)
    if isinstance(rows, Streamed):
        return mapped(task, rows, tokenizer, key, truncate=truncate)
    file = cache_folder() / "tokens" / f"{key}.safetensors" if key else None
    if file is not None and file.is_file():
        try:
            found = _read(file)
            os.utime(file)
            return found
        except (LorakitError, KeyError, OSError):  # damaged, or of another time
            file.unlink(missing_ok=True)
    began = time.perf_counter()
    examples = task.examples(rows, tokenizer, truncate=truncate)
    if file is not None and type(examples) is Tokens and time.perf_counter() - began > _WORTH_S:
        try:
            _write(file, examples)
            keep_below(file.parent, _MOST)
        except (LorakitError, OSError):  # no room: it is made anew the next time
            file.unlink(missing_ok=True)
    return examples


def _key(task: Task, rows: Part, tokenizer: Any, truncate: bool) -> str | None:
    """What names them; None if the tokenizer does not tell what it does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    names = ("chat_template", "model_max_length", "add_bos_token", "special_tokens_map")
    own = [getattr(tokenizer, name, None) for name in names]
    what = [__version__, backend.to_str(), str(own), task.note(), rows.digest(), truncate]
    lines = np.asarray(rows.lines, dtype=np.int64).tobytes()
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode() + lines).hexdigest()[:32]


def _write(file: Path, examples: Tokens) -> None:
    tensors = {"lines": torch.tensor(examples.lines), "rest": torch.tensor([examples.pad, examples.each])}
    for name, part in examples.parts.items():
        tensors |= {name: part.values, f"{name}_starts": part.starts}
    write_tensors(file, tensors)


def _read(file: Path) -> Tokens:
    tensors = read_tensors(file)
    parts = {name: Ragged(tensors[name], tensors[f"{name}_starts"]) for name in Tokens.PARTS if name in tensors}
    pad, each = tensors["rest"].tolist()
    return Tokens.of(parts, tensors["lines"].tolist(), pad, each)
