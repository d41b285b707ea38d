"""transformers.Trainer trains an adapted model, saves it and goes on from the checkpoint as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import lorakit as lk
import tiny

pytestmark = pytest.mark.slow  # a Trainer takes seconds to set itself up


def rows(name: str, n: int = 4) -> list[dict[str, torch.Tensor]]:
    batch = tiny.batch(name, torch.Generator().manual_seed(1), n=n)
    return [{key: tensor[row] for key, tensor in batch.items()} for row in range(n)]


def model_of(name: str, **rules: object) -> nn.Module:
    torch.manual_seed(0)
    model = tiny.MODELS[name]()
    lk.attach(model, lk.plan(model, rank=2, **rules))  # type: ignore[arg-type]
    return model


def trainer(model: nn.Module, name: str, out: Path, **settings: object) -> Trainer:
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,  # type: ignore[arg-type]
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(name))


# No mixture of experts here: Trainer saves those under the names of the hub and reads them back under its own, so that
# a plain Mixtral does not resume either (huggingface/transformers#48805).
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", {}),
    "bert with a trained head": ("bert", {"trained": ["classifier"], "bias": "adapted"}),
    "bert by dora": ("bert", {"method": "dora"}),
    "tied gpt2 trained whole beside": ("gpt2", {"trained": ["*"]}),
    "llama trained whole beside": ("llama", {"trained": ["*"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(case: str, tmp_path: Path) -> None:
    name, rules = CASES[case]
    whole = model_of(name, **rules)
    fresh = lk.collect(whole)
    run = trainer(whole, name, tmp_path / "run")
    run.train()
    assert lk.collect(whole) != fresh
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = model_of(name, **rules)
    trainer(resumed, name, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert lk.collect(resumed) == lk.collect(whole)


def test_only_the_factors_are_trained_and_the_base_stays_bit_for_bit(tmp_path: Path) -> None:
    model = model_of("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer(model, "bert", tmp_path, weight_decay=0.1).train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_usual_settings_train(settings: dict[str, object], tmp_path: Path) -> None:
    model = model_of("gpt2")
    run = trainer(model, "gpt2", tmp_path, **settings)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_trainer_is_read_by_from_pretrained_as_the_base(tmp_path: Path) -> None:
    model = model_of("gpt2")
    trainer(model, "gpt2", tmp_path).train()
    build: Callable[..., nn.Module] = type(model).from_pretrained
    again = build(tmp_path / "checkpoint-6")
    adapter = lk.collect(model)
    lk.detach(model)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    lk.attach(again, adapter)


def test_experts_learn(tmp_path: Path) -> None:
    model = model_of("mixtral")
    run = trainer(model, "mixtral", tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
