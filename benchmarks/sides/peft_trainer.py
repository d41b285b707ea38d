"""peft with transformers.Trainer, the way its documentation shows it."""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sides.jobs import JOBS, SCALE, Row, base, tokenizer
from sides.worker import Score, Steps, Told, n_learning, serve


class Losses(TrainerCallback):
    """Keeps what Trainer logs."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


class MeanPooled(nn.Module):
    """The trunk, the mean of its states, and a head that begins at zero: the very model that lorakit trains."""

    def __init__(self, trunk: nn.Module, n_labels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.config = trunk.config
        self.classifier = nn.Linear(int(trunk.config.hidden_size), n_labels)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(self.classifier.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = states[:, states.shape[1] - input_ids.shape[1] :]  # of a prompt peft leaves the rows there
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        logits = self.classifier(((states * weights).sum(1) / weights.sum(1)).to(self.classifier.weight.dtype))
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits, labels), **found}


def model_of(setting: dict[str, Any]) -> nn.Module:
    """The base with its head; with adapters on every linear layer of the trunk, or all of it trained (`full`)."""
    name, dtype = setting["job"], {"fp32": torch.float32, "bf16": torch.bfloat16}[setting["dtype"]]
    model = base(name, dtype)
    if setting.get("bits"):
        quantized(model, setting["bits"])
    if JOBS[name]["task"] == "classify":
        model = MeanPooled(model, JOBS[name].get("labels", 2))
    if setting.get("full"):
        return model.train()
    torch.manual_seed(setting["seed"])
    if setting.get("family"):
        return of_family(setting, model)
    own: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    if JOBS[name]["task"] == "classify":
        matrices = [path for path, module in model.trunk.named_modules() if isinstance(module, nn.Linear)]  # type: ignore[union-attr,operator]
        own = {"target_modules": [f"trunk.{path}" for path in matrices], "modules_to_save": ["classifier"]}
    return get_peft_model(model, LoraConfig(r=JOBS[name]["rank"], lora_alpha=SCALE * JOBS[name]["rank"], **own))


def of_family(setting: dict[str, Any], model: Any) -> nn.Module:
    """A row of the family on the trunk."""
    from sides.family import peft_model
    from sides.jobs import rows

    job, pad = JOBS[setting["job"]], DataCollatorWithPadding(tokenizer())
    few = rows(setting["job"])[0][: 16 * job["batch"]]  # batches that starts are measured on
    data = [{"input_ids": ids, "labels": labels[0]} for ids, labels in few]
    batches = [pad(data[k : k + job["batch"]]) for k in range(0, len(data), job["batch"])]
    head = nn.Linear(int(model.config.hidden_size), job.get("labels", 2))

    def run(trunk: nn.Module, batch: Any, back: bool) -> None:
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        states = trunk(**given).last_hidden_state
        if back:
            F.cross_entropy(head(states.mean(1).float()), batch["labels"]).backward()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.trunk = peft_model(setting["family"], model.trunk, setting["steps"], batches, run)
    model.classifier.requires_grad_(True)
    return model.train()  # type: ignore[no-any-return]


class Allocating(TrainerCallback):
    """Lets AdaLoRA move its ranks, as its documentation says."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        moved = getattr(getattr(model.trunk, "base_model", None), "update_and_allocate", None)
        if moved is not None:
            moved(state.global_step)


def quantized(model: nn.Module, bits: str) -> None:
    """Its matrices but the head as bitsandbytes keeps them, as Transformers puts them there."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for path, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or "head" in path:
            continue
        size = {"input_features": old.in_features, "output_features": old.out_features, "bias": old.bias is not None}
        new = Linear8bitLt(**size, has_fp16_weights=False) if bits == "int8" else Linear4bit(**size, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        host, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(host), leaf, new.to("cpu"))


class Counting:
    """A collator that remembers the real tokens of every batch."""

    def __init__(self, pad: Any) -> None:
        self.pad = pad
        self.n_tokens: list[int] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self.pad(features)
        self.n_tokens.append(int(batch["attention_mask"].sum()))
        return batch


def make(setting: dict[str, Any], train: list[Row], test: list[Row]) -> tuple[Steps, Score, Told]:
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
        count = setting.get("span", 50) * job["batch"]  # 50 batches are what Trainer groups by length at a time
        begin = (turn * count) % max(1, len(data) - count)
        part = data[begin : begin + count]
        collate = Counting(pad)
        turn += 1
        args = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=job["batch"],
            max_steps=n,
            learning_rate=setting.get("rate", job["rate"]),
            lr_scheduler_type="linear" if setting.get("falling") else "constant",
            weight_decay=0.01,
            logging_strategy="steps" if setting.get("log") else "no",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=setting["seed"] + turn,
            train_sampling_strategy="group_by_length" if setting["order"] == "grouped" else "random",
        )
        losses = Losses()
        extra = [Allocating()] if setting.get("family") == "adalora" else []
        trainer = Trainer(model=model, args=args, train_dataset=part, data_collator=collate, callbacks=[losses, *extra])
        trainer.train()
        return sum(collate.n_tokens[:n]), losses.values  # the loader is a batch ahead

    def score() -> dict[str, float]:
        """Accuracy and mean loss, of texts of one length at a time: no padding can disturb them."""
        model.eval()
        losses, right = [], []
        by_length: dict[int, list[Row]] = {}
        for row in test:
            by_length.setdefault(len(row[0]) if classify else len(by_length), []).append(row)
        with torch.no_grad():
            for alike in by_length.values():
                rows, labels = torch.tensor([ids for ids, _ in alike]), [one for _, own in alike for one in own]
                if classify:
                    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows))["logits"].float()
                    wanted = torch.tensor(labels)
                else:
                    logits, wanted = model(input_ids=rows).logits[0, :-1].float(), torch.tensor(labels[1:])
                    logits, wanted = logits[wanted != -100], wanted[wanted != -100]
                losses += F.cross_entropy(logits, wanted, reduction="none").tolist()
                right += (logits.argmax(-1) == wanted).tolist()
        found = {"loss": sum(losses) / len(losses)}
        return found | {"accuracy" if classify else "token_accuracy": sum(right) / len(right)}

    def told() -> dict[str, float]:
        return {"learning": n_learning(model, "classifier")}

    return steps, score, told


if __name__ == "__main__":
    serve(make)
