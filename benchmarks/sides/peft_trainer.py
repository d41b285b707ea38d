"""peft with transformers.Trainer, the way its documentation shows it."""

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sides.jobs import JOBS, Row, base, package_model, tokenizer
from sides.worker import Steps, serve


class Losses(TrainerCallback):
    """Keeps what Trainer logs."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


def model_of(setting: dict[str, Any]) -> nn.Module:
    """The base with its head; with adapters on every linear layer, or all of it trained (`full`)."""
    import transformers as tf

    name, dtype = setting["job"], {"fp32": torch.float32, "bf16": torch.bfloat16}[setting["dtype"]]
    if JOBS[name]["task"] == "classify":
        tf.utils.logging.disable_progress_bar()
        tf.utils.logging.set_verbosity_error()
        torch.manual_seed(setting["seed"])
        model = tf.AutoModelForSequenceClassification.from_pretrained(package_model(), num_labels=2, dtype=dtype)
    else:
        model = base(name, dtype)
    if setting.get("full"):
        return model
    torch.manual_seed(setting["seed"])
    kind = {"classify": "SEQ_CLS", "generate": "CAUSAL_LM"}[JOBS[name]["task"]]
    rank = JOBS[name]["rank"]
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type=kind, lora_dropout=0.0)
    )


class Counting:
    """A collator that remembers the real tokens of every batch."""

    def __init__(self, pad: Any) -> None:
        self.pad = pad
        self.n_tokens: list[int] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self.pad(features)
        self.n_tokens.append(int(batch["attention_mask"].sum()))
        return batch


def make(setting: dict[str, Any], train: list[Row]) -> Steps:
    """The trainer of one job."""
    job = JOBS[setting["job"]]
    classify = job["task"] == "classify"
    data = [{"input_ids": ids, "labels": labels[0] if classify else labels} for ids, labels in train]
    for entry in data:
        entry["attention_mask"] = [1] * len(entry["input_ids"])
    tok = tokenizer()
    pad = DataCollatorWithPadding(tok) if classify else DataCollatorForTokenClassification(tok)
    model = model_of(setting)
    turn = 0

    def steps(n: int) -> tuple[int, list[float]]:
        nonlocal turn
        count = 50 * job["batch"]  # what Trainer groups by length at a time
        begin = (turn * count) % max(1, len(data) - count)
        part = data[begin : begin + count]
        collate = Counting(pad)
        turn += 1
        args = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=job["batch"],
            max_steps=n,
            learning_rate=job["rate"],
            lr_scheduler_type="constant",
            weight_decay=0.01,
            logging_steps=1 if setting.get("log") else 10**9,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=setting["seed"] + turn,
            train_sampling_strategy="group_by_length" if setting["order"] == "grouped" else "random",
        )
        losses = Losses()
        trainer = Trainer(model=model, args=args, train_dataset=part, data_collator=collate, callbacks=[losses])
        trainer.train()
        return sum(collate.n_tokens[:n]), losses.values  # the loader is a batch ahead

    return steps


if __name__ == "__main__":
    serve(make)
