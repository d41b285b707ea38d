"""translate: meaning representations of restaurants become sentences (E2E challenge: 4,200 rows to learn from).

A T5 of 4 + 4 blocks of width 256 with MiniLM's vocabulary. Its weights are random, the same for both sides: what
low-rank factors alone can teach it, and what a step costs. No text of the held-out rows is learned from.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import lorakit as lk
from lorakit.data import Splits, Translations, load_translations
from lorakit.data.batches import Tokens
from lorakit.tasks.base import Base
from lorakit.tasks.translate import Translate
from sides.jobs import DATA, SCALE, package_model
from sides.recipe import StepClock, arguments

PEER = "peft, Seq2SeqTrainer"
METRIC = "token accuracy"
STEPS = 120

_BATCH, _RANK, _RATE = 16, 8, 3e-3
_HELD_OUT = 400


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    base, clock = _base(), StepClock(steps)

    settings = {"epochs": 1, "batch_size": _BATCH, "max_steps": steps, "learning_rate": _RATE, "seed": seed}
    settings |= {"schedule": "linear", "warmup": 0.0, "threads": torch.get_num_threads()}
    plan = lk.plan(base.model, _RANK, scale=SCALE)
    result = lk.fit(base, _splits(), "translate", plan=plan, watch=clock.watch, **settings)
    return {"metric": result.metrics["token_accuracy"], **clock.spent()}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    base, clock, data = _base(), StepClock(steps), _splits()
    goal = Translate.of(data, base)
    train, test = (goal.examples(rows, base.tokenizer, truncate=False) for rows in (data.train, data.test))
    rows = [
        {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": list(labels)}
        for ids, labels in zip(train.ids[::2], train.labels[1::2])
    ]
    torch.manual_seed(seed)
    matrices = ["q", "k", "v", "o", "wi", "wo"]
    lora = LoraConfig(
        r=_RANK, lora_alpha=int(SCALE * _RANK), target_modules=matrices, task_type="SEQ_2_SEQ_LM", lora_dropout=0.0
    )
    model: Any = get_peft_model(base.model, lora)  # type: ignore[arg-type]
    args = Seq2SeqTrainingArguments(**arguments(_BATCH, steps, _RATE, seed))
    collator = DataCollatorForSeq2Seq(base.tokenizer, model=base.model)
    Seq2SeqTrainer(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()  # type: ignore[arg-type]
    return {"metric": _accuracy(model.eval(), test), **clock.spent()}


@torch.no_grad()
def _accuracy(model: Any, test: Tokens) -> float:
    """Of every pair by itself, by Transformers' own forward."""
    right = total = 0
    for source, given, labels in zip(test.ids[::2], test.ids[1::2], test.labels[1::2]):
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([given])).logits[0]
        right += int((logits.argmax(-1) == torch.tensor(labels)).sum())
        total += len(labels)
    return right / total


def _base() -> Base:
    tokenizer = AutoTokenizer.from_pretrained(package_model())
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    torch.manual_seed(0)
    return Base(T5ForConditionalGeneration(config).eval(), tokenizer, "t5 4+4 x 256", "mean", 256)


def _splits() -> Splits[Translations]:
    folder = DATA / "e2e_official"
    train, test = (load_translations(folder / f"{name}.csv.gz") for name in ("devset", "testset_w_refs"))
    chosen = set(sorted(set(train.texts))[::10])
    rows = {held: [i for i, text in enumerate(train.texts) if (text in chosen) is held] for held in (True, False)}
    return Splits(
        train.take(rows[False]), train.take(rows[True]), test.take(range(0, len(test), len(test) // _HELD_OUT))
    ).checked()
