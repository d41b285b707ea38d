"""Directories that PEFT writes, read by lorakit: the same outputs, and written back tensor for tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig

import lorakit as lk
from lorakit.update import same_tensor
from peft_cases import base, close, meaning, output, read_by_peft, tensors_of, written_by_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),  # PEFT tells that it saves a targeted embedding whole
    pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module"),  # it overlooks target_parameters
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # it takes every one-dimensional lora_B.bias for a shard
    pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed"),  # in_proj has a bias, by another name
]

LINEAR = {"r": 4, "lora_alpha": 6}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "bert with a saved head": (
        "bert",
        {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama some layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    "llama by expression": ("llama", {"target_modules": r".*\.[02]\..*(q|up)_proj"}),
    "llama embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "llama head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    "cnn": ("cnn", {"target_modules": ["flat", "line", "deep", "point", "head"]}),
    "attention": ("attention", {"target_modules": ["attn", "tail.0"]}),
    "embedding": ("words", {"target_modules": ["words", "mix"]}),
    "mixtral one expert weight": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]}),
    "mixtral other expert weight": ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
    "mixtral both expert weights": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "mixtral router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "mixtral expert ranks": (
        "mixtral",
        {"target_parameters": EXPERTS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}},
    ),
    "gpt-oss, whose expert weights are turned": (
        "gptoss",
        {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "bare matrix": ("gate", {"target_modules": [], "target_parameters": ["core.kernel"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    "rank and alpha by pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers.1.self_attn.v_proj": 1, r"^model\.layers\.2\.mlp.*": 3},
            "alpha_pattern": {"v_proj": 12, "layers.[01].mlp.up_proj": 5},
        },
    ),
    "rslora with patterns": (
        "bert",
        {
            "target_modules": ["query", "key"],
            "use_rslora": True,
            "rank_pattern": {"key": 9},
            "alpha_pattern": {"key": 3},
        },
    ),
    "attention with patterns": (
        "attention",
        {"target_modules": ["attn", "tail.1.1"], "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5}},
    ),
    "bias of the factors": ("bert", {"target_modules": ["query", "output.dense"], "lora_bias": True}),
    "bias of the factors in convolutions": ("cnn", {"target_modules": ["flat", "deep", "head"], "lora_bias": True}),
    "bias of the factors in attention": ("attention", {"target_modules": ["attn", "tail.0"], "lora_bias": True}),
    "bias lora_only": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bias lora_only in attention": ("attention", {"target_modules": ["attn", "tail.0"], "bias": "lora_only"}),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "saved norm": ("words", {"target_modules": ["mix"], "modules_to_save": ["norm", "head"]}),
    "saved embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "gaussian start": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "init_lora_weights": "gaussian"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora with rslora": ("bert", {"target_modules": ["query", "value"], "use_dora": True, "use_rslora": True}),
    "dora gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "dora cnn": ("cnn", {"target_modules": ["flat", "line", "deep", "point", "head"], "use_dora": True}),
    "dora embedding": ("words", {"target_modules": ["words", "mix"], "use_dora": True}),
}
IA3: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3 bert": (
        "bert",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
        },
    ),
    "ia3 t5": ("t5", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
    "ia3 gpt2": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "ia3 llama": ("llama", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ".*down_proj"}),
    "ia3 convolutions": ("cnn", {"target_modules": ["flat", "deep", "head"], "feedforward_modules": ["head"]}),
}
CASES = {**LORA, **IA3}
NEVER_APPLIED = ("bias of the factors in attention",)  # PEFT writes a bias for in_proj that it never reads; we drop it


def config_of(case: str) -> tuple[str, PeftConfig]:
    name, options = CASES[case]
    return (name, IA3Config(**options)) if case in IA3 else (name, LoraConfig(**{**LINEAR, **options}))


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_gives_the_same_output_attached_and_merged(case: str, tmp_path: Path) -> None:
    name, config = config_of(case)
    folder, wanted = written_by_peft(name, config, tmp_path / "peft")
    model = base(name)
    plain = output(name, model)
    lk.attach(model, lk.load(folder))
    assert not close(plain, wanted)
    assert close(output(name, model), wanted)
    lk.merge(model)
    assert close(output(name, model), wanted)


@pytest.mark.parametrize("case", [case for case in CASES if case not in NEVER_APPLIED])
def test_what_peft_writes_is_written_back_tensor_for_tensor(case: str, tmp_path: Path) -> None:
    name, config = config_of(case)
    folder, wanted = written_by_peft(name, config, tmp_path / "peft")
    adapter = lk.load(folder)
    adapter.save(tmp_path / "own")
    assert lk.load(tmp_path / "own") == adapter
    before, after = tensors_of(folder), tensors_of(tmp_path / "own")
    before = {key: t for key, t in before.items() if ".modules_to_save." not in key and ".original_module." not in key}
    assert before.keys() == after.keys()
    assert all(same_tensor(before[key], after[key]) for key in before)
    model = read_by_peft(name, tmp_path / "own")
    assert close(output(name, model), wanted)
    assert meaning(model) == meaning(read_by_peft(name, folder))


def test_an_adapter_that_was_collected_from_a_model_is_the_one_that_was_read(tmp_path: Path) -> None:
    name, config = config_of("bert with a saved head")
    folder, _ = written_by_peft(name, config, tmp_path / "peft")
    model = base(name)
    adapter = lk.load(folder)
    lk.attach(model, adapter)
    assert lk.collect(model) == adapter


def test_half_precision_factors_keep_their_bits(tmp_path: Path) -> None:
    name, config = config_of("llama all-linear")
    folder, _ = written_by_peft(name, config, tmp_path / "peft")
    lk.load(folder).to(dtype=torch.bfloat16).save(tmp_path / "half")
    lk.load(tmp_path / "half").save(tmp_path / "again")
    before, after = tensors_of(tmp_path / "half"), tensors_of(tmp_path / "again")
    assert all(t.dtype == torch.bfloat16 and same_tensor(t, after[key]) for key, t in before.items())
