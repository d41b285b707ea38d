"""prefer: restaurants described (E2E); of two descriptions the one whose words stand in order. A Llama of 8 x 512.

The peer is TRL's DPOTrainer: pip install trl datasets.
"""

import random
import tempfile
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing

from lorakit.data import Splits
from lorakit.data.dialogues import make_dialogues
from lorakit.data.preferences import Preferences
from lorakit.fit import fit
from lorakit.rules import plan
from lorakit.tasks.base import Base
from lorakit.tasks.prefer import Prefer
from sides.clock import Clock
from sides.jobs import SCALE, _references, base, tokenizer

PEER = "peft, trl DPOTrainer"
METRIC = "reward accuracy"
STEPS = 20

_JOB, _BATCH, _RANK, _RATE, _BETA, _LONGEST = "llama 8x512 instructions", 8, 16, 1e-3, 0.1, 512
_HELD_OUT = 104  # whole batches: the peer takes the mean over them


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit. The time in which the base is asked of the training rows is part of it."""
    train, test = _rows(steps)
    model = base(_JOB, torch.float32)
    own = Base(model, _tokenizer(), _JOB, "last", _LONGEST)
    clock = Clock()
    informed = Prefer.informed

    def timed(self: Prefer, net: Any, examples: Any, scores: Any) -> Any:
        clock.begin()
        found = informed(self, net, examples, scores)
        if len(examples) == len(train):
            clock.end()
        return found

    Prefer.informed = timed  # type: ignore[method-assign]
    data = Splits(_preferences(train), _preferences(test[:8]), _preferences(test))
    fitted = fit(
        own,
        data,
        "prefer",
        plan=plan(model, rank=_RANK, scale=SCALE),
        beta=_BETA,
        batch_size=_BATCH,
        learning_rate=_RATE,
        schedule="linear",
        warmup=0.0,
        max_steps=steps,
        seed=seed,
        consume=True,
        watch=clock,
    )
    return {"metric": fitted.metrics["reward_accuracy"], **clock.spent}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft and TRL."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    train, test = _rows(steps)
    torch.manual_seed(seed)
    args = DPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=_BATCH,
        max_steps=steps,
        learning_rate=_RATE,
        lr_scheduler_type="linear",
        weight_decay=0.01,
        beta=_BETA,
        max_length=_LONGEST,
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    rank = {"r": _RANK, "lora_alpha": int(SCALE * _RANK)}
    trainer = DPOTrainer(
        model=base(_JOB, torch.float32),
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **rank),
    )
    clock = Clock()
    clock.begin()
    trainer.train()
    clock.end()
    return {"metric": trainer.evaluate()["eval_rewards/accuracies"], **clock.spent}


def _rows(steps: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Each description, and the same words in a drawn order: as many as are seen, and some held out."""
    rows, draw = _references(), random.Random(0)
    draw.shuffle(rows)
    found = []
    for meaning, reference in rows:
        words = reference.split()
        draw.shuffle(words)
        found.append({"prompt": meaning + "\n", "chosen": reference, "rejected": " ".join(words)})
    return found[_HELD_OUT : _HELD_OUT + steps * _BATCH], found[:_HELD_OUT]


def _preferences(rows: list[dict[str, str]]) -> Preferences:
    asked = make_dialogues([row["prompt"].removesuffix("\n") for row in rows])
    sides = (tuple(row[side] for row in rows) for side in ("chosen", "rejected"))
    return Preferences(asked.turns, *sides, "E2E", asked.lines)


def _tokenizer() -> Any:
    """MiniLM's, with one mark for the begin and one for the end, as language models have them."""
    found = tokenizer()
    found.bos_token, found.eos_token = found.cls_token, found.sep_token
    marks = [(found.bos_token, found.bos_token_id)]
    found.backend_tokenizer.post_processor = TemplateProcessing(single=f"{found.bos_token} $A", special_tokens=marks)
    return found
