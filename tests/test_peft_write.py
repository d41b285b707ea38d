"""Directories that lorakit writes, read by PEFT: the same outputs, nothing missing, nothing left over."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_config
from torch import nn

import lorakit as lk
from lorakit.adapter import Adapter
from lorakit.peft_format import why_no_twin
from lorakit.update import AdaptedLayer
from peft_cases import base, close, output, read_by_peft, stir, tensors_of


class Made(NamedTuple):
    """A lorakit adapter with random factors, and the output of the model under it."""

    adapter: Adapter
    output: torch.Tensor


def made(name: str, plan: lk.Plan) -> Made:
    model = base(name)
    lk.attach(model, plan, seed=0)
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.2)
    return Made(lk.collect(model), output(name, model))


def planned(name: str, *args: Any, **options: Any) -> lk.Plan:
    return lk.plan(base(name), *args, **options)


CASES: dict[str, tuple[str, Callable[[], lk.Plan]]] = {
    "bert with a trained head": ("bert", lambda: planned("bert", 3, "attention", trained=["classifier"])),
    "bert with trained pooler and norm": (
        "bert",
        lambda: planned("bert", 3, "q", trained=["bert.pooler", "bert.embeddings.LayerNorm"]),
    ),
    "gpt2": ("gpt2", lambda: planned("gpt2", 3)),
    "llama": ("llama", lambda: planned("llama", 3)),
    "llama ranks by role": ("llama", lambda: planned("llama", layers={"attention": 2, "mlp": 5, "lm_head": 1})),
    "llama rank-stable scale": ("llama", lambda: planned("llama", 5, "mlp", scale="7/sqrt(r)")),
    "llama some blocks": ("llama", lambda: planned("llama", 2, "q", blocks="last 1")),
    "llama embedding": ("llama", lambda: planned("llama", 2, ["model.embed_tokens", "v"])),
    "llama trained embedding and adapted head": (
        "llama",
        lambda: planned("llama", 2, ["q", "head"], trained=["model.embed_tokens", "model.norm"]),
    ),
    "t5": ("t5", lambda: planned("t5", 3, trained=["lm_head"])),
    "cnn": ("cnn", lambda: planned("cnn", 2, ["all-conv", "head"])),
    "attention": ("attention", lambda: planned("attention", 2)),
    "attention with all biases": ("attention", lambda: planned("attention", 2, bias="all")),
    "short names that end others": ("attention", lambda: planned("attention", 2, ["re:tail.0"])),
    "embedding": ("words", lambda: planned("words", 2, ["words", "mix"], trained=["norm", "head"])),
    "mixtral one expert weight": ("mixtral", lambda: planned("mixtral", 2, ["q", "down"])),
    "mixtral both expert weights": ("mixtral", lambda: planned("mixtral", 2, ["q", "up", "down"])),
    "mixtral expert ranks": ("mixtral", lambda: planned("mixtral", layers={"up": 1, "down": 3}, scale="6/r")),
    "gpt-oss, whose expert weights are turned": ("gptoss", lambda: planned("gptoss", 2, ["q", "up", "down"])),
    "bare matrix": ("gate", lambda: planned("gate", 2, "inner.core.kernel")),
    "bias adapted": ("bert", lambda: planned("bert", 2, "q", bias="adapted")),
    "bias all": ("bert", lambda: planned("bert", 2, "q", bias="all")),
    "dora": ("llama", lambda: planned("llama", 3, method="dora")),
    "dora gpt2": ("gpt2", lambda: planned("gpt2", 3, method="dora", scale="5/sqrt(r)")),
    "dora cnn": ("cnn", lambda: planned("cnn", 2, ["all-conv", "head"], method="dora")),
    "dora embedding": ("words", lambda: planned("words", 2, ["words", "mix"], method="dora")),
    "ia3": ("bert", lambda: planned("bert", layers=["k", "v", "down"], method="ia3", trained=["classifier"])),
    "ia3 gpt2": ("gpt2", lambda: planned("gpt2", layers=["qkv", "down"], method="ia3")),
    "ia3 llama": ("llama", lambda: planned("llama", layers=["k", "v", "down"], method="ia3")),
    "ia3 convolutions": ("cnn", lambda: planned("cnn", layers=["flat", "deep", "point", "head"], method="ia3")),
    "pissa": ("llama", lambda: planned("llama", 3, start="pissa")),
    "pissa convolutions": ("cnn", lambda: planned("cnn", 2, ["all-conv", "head"], start="pissa")),
    "pissa experts": ("mixtral", lambda: planned("mixtral", 2, ["q", "up", "down"], start="pissa")),
    "pissa attention": ("attention", lambda: planned("attention", 2, start="pissa")),
    "pissa dora": ("gpt2", lambda: planned("gpt2", 2, start="pissa", method="dora")),
}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to")  # Conv1D and Linear in one model: PEFT has one switch
@pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module")  # PEFT overlooks target_parameters here
@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter")  # T5 shares its head with the embedding
@pytest.mark.parametrize("case", CASES)
def test_what_lorakit_writes_gives_the_same_output_in_peft(case: str, tmp_path: Path) -> None:
    name, plan = CASES[case]
    adapter, wanted = made(name, plan())
    adapter.save(tmp_path / "own")
    assert (tmp_path / "own" / "adapter_config.json").exists()
    assert not close(output(name, base(name)), wanted)
    assert close(output(name, read_by_peft(name, tmp_path / "own")), wanted)
    back = lk.load(tmp_path / "own")
    assert back == adapter
    assert back.meta == adapter.meta


@pytest.mark.parametrize(
    "case", ["bert with a trained head", "gpt2", "cnn", "attention", "mixtral both expert weights"]
)
def test_the_directory_reads_the_same_without_lorakit_json(case: str, tmp_path: Path) -> None:
    name, plan = CASES[case]
    adapter, wanted = made(name, plan())
    adapter.save(tmp_path / "own")
    (tmp_path / "own" / "lorakit.json").unlink()
    model = base(name)
    lk.attach(model, lk.load(tmp_path / "own"))
    assert close(output(name, model), wanted)


def test_a_pissa_start_is_written_as_one_wide_pair_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    adapter, wanted = made("llama", planned("llama", 3, "q", start="pissa"))
    adapter.save(tmp_path)
    tensors = tensors_of(tmp_path)
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {6}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 32, True)
    assert lk.load(tmp_path) == adapter
    assert all(set(layer.factors) == {"a", "b", "a0", "b0"} for layer in lk.load(tmp_path).layers.values())
    (tmp_path / "lorakit.json").unlink()
    plain = lk.load(tmp_path)
    assert all(layer.rank == 6 and set(layer.factors) == {"a", "b"} for layer in plain.layers.values())
    model = base("llama")
    lk.attach(model, plain)
    assert close(output("llama", model), wanted)


def test_a_bias_of_some_factors_is_a_zero_in_the_others(tmp_path: Path) -> None:
    adapter, _ = made("bert", planned("bert", 2, ["q", "v"]))
    first = next(iter(adapter.layers))
    layer = adapter.layers[first]
    factors = {**layer.factors, "bias": torch.arange(16.0) / 10}
    adapter = replace(adapter, layers={**adapter.layers, first: replace(layer, factors=factors)})
    adapter.save(tmp_path)
    assert sum("lora_B.bias" in key for key in tensors_of(tmp_path)) == len(adapter.layers)
    assert lk.load(tmp_path) == adapter
    model = base("bert")
    lk.attach(model, adapter)
    assert close(output("bert", read_by_peft("bert", tmp_path)), output("bert", model))


def test_the_order_of_the_layers_in_an_adapter_does_not_matter(tmp_path: Path) -> None:
    adapter, wanted = made("mixtral", planned("mixtral", 2, ["up", "down"]))
    turned = replace(adapter, layers=dict(reversed(adapter.layers.items())))
    turned.save(tmp_path)
    assert close(output("mixtral", read_by_peft("mixtral", tmp_path)), wanted)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def test_a_trained_norm_with_running_statistics_is_a_changed_base_weight_for_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    other, x = deepcopy(model), torch.rand(2, 3, 6, 6)
    lk.attach(model, lk.plan(model, 2, "all-conv", trained=["norm"]))
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.2)
    lk.collect(model).save(tmp_path)
    reference = PeftModel.from_pretrained(other, str(tmp_path)).eval()
    assert not reference.load_adapter(str(tmp_path), "default").unexpected_keys
    assert close(reference(x).detach(), model(x).detach())


# ---------------------------------------------------------------- the configuration


@pytest.mark.parametrize("case", ["llama", "dora", "ia3", "mixtral both expert weights", "bias all", "cnn"])
def test_peft_knows_every_key_of_the_configuration(case: str, tmp_path: Path) -> None:
    name, plan = CASES[case]
    made(name, plan()).adapter.save(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    config = get_peft_config(dict(written))  # raises TypeError for a key that it does not know
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is type(config)
    assert config.inference_mode
    for key in ("task_type", "modules_to_save", "base_model_name_or_path"):
        assert key in written
        assert getattr(config, key) == written[key]


def test_the_configuration_has_what_vllm_and_llama_cpp_ask_for(tmp_path: Path) -> None:
    adapter, _ = made("llama", planned("llama", 3))
    adapter.with_meta(base_name="meta/small").save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 3
    assert config["lora_alpha"] == 16
    assert config["base_model_name_or_path"] == "meta/small"
    assert isinstance(config["target_modules"], list)
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert config["bias"] == "none"  # vLLM refuses other values, and these two when they are true
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]  # llama.cpp computes alpha / rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    suffixes = (".lora_A.weight", ".lora_B.weight")
    assert all(key.startswith("base_model.model.") and key.endswith(suffixes) for key in tensors_of(tmp_path))


def test_only_the_planned_modules_are_targeted_although_their_names_end_others(tmp_path: Path) -> None:
    adapter, _ = made("attention", planned("attention", 2, ["re:tail.0"]))
    adapter = replace(adapter, layers={"0": next(iter(adapter.layers.values()))})
    adapter.save(tmp_path)
    nest = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))
    model = PeftModel.from_pretrained(nest, str(tmp_path))
    assert model.targeted_module_names == ["0"]


def test_the_configuration_of_an_earlier_peft_directory_is_carried_over(tmp_path: Path) -> None:
    adapter, _ = made("bert", planned("bert", 2, "q", trained=["classifier"]))
    kept = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], "lora_dropout": 0.1, "revision": "main"}
    adapter.with_meta(peft=kept).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: config[key] for key in kept} == kept
    replace(adapter, trained={}).with_meta(peft=kept).save(tmp_path)  # without a head PEFT could not load the task
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, None)


# ---------------------------------------------------------------- what PEFT cannot say


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).mean((-2, -1)))


def grouped() -> Grouped:
    torch.manual_seed(0)
    return Grouped().eval()


def test_a_grouped_convolution_is_written_under_our_names_and_peft_refuses_it(tmp_path: Path) -> None:
    model = grouped()
    lk.attach(model, lk.plan(model, 2, ["head"]))
    lk.collect(model).save(tmp_path)  # an older directory that peft reads
    assert (tmp_path / "adapter_config.json").exists()
    lk.detach(model)
    lk.attach(model, lk.plan(model, 2, ["all-conv", "head"]))
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.2)
    adapter, x = lk.collect(model), torch.ones(2, 4, 5, 5)
    adapter.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert not any(key.startswith("base_model") for key in tensors_of(tmp_path))
    assert "first" in json.loads((tmp_path / "lorakit.json").read_text())["why_native"]
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(grouped(), str(tmp_path))
    back = lk.load(tmp_path)
    assert back == adapter
    other = grouped()
    lk.attach(other, back)
    assert close(other(x).detach(), model(x).detach())


def lora(o: int, i: int, r: int, **options: Any) -> AdaptedLayer:
    kind = options.pop("kind", "linear")
    return AdaptedLayer("lora", kind, (o, i), {"a": torch.ones(r, i), "b": torch.ones(o, r)}, r, **options)


def test_what_peft_cannot_say_is_told_and_kept_under_our_names(tmp_path: Path) -> None:
    model = base("attention")
    in_proj, out_proj = lora(24, 8, 2, kind="parameter"), lora(8, 8, 2)
    dora = next(iter(lk.init(model, lk.plan(model, 2, ["re:tail.0"], method="dora")).layers.values()))
    biased = replace(in_proj, factors={**in_proj.factors, "bias": torch.ones(24)})
    experts = AdaptedLayer("lora", "parameter", (3, 4, 4), {"a": torch.ones(3, 1, 4), "b": torch.ones(3, 4, 1)}, 1)
    cases: dict[str, dict[str, AdaptedLayer]] = {
        "one method": {"tail.0": dora, "tail.1.1": lora(3, 6, 1)},
        "cannot reach alone": {"attn.in_proj_weight": in_proj},
        "one rank and one scale": {"attn.in_proj_weight": in_proj, "attn.out_proj": replace(out_proj, scale=3.0)},
        "does not apply the bias": {"attn.in_proj_weight": biased, "attn.out_proj": out_proj},
        "the whole model": {"": lora(3, 4, 1)},
        "apart": {"m.red": experts, "m.blue": experts},
        "together": {"m.down_proj": experts, "x.c_attn": lora(4, 4, 1, kind="hf_conv1d")},
        "no lora_bias": {"tail.0": replace(dora, factors={**dora.factors, "bias": torch.ones(6)})},
    }
    for number, (reason, layers) in enumerate(cases.items()):
        adapter = Adapter(layers)
        assert reason in why_no_twin(layers, {})
        adapter.save(tmp_path / str(number))
        assert not (tmp_path / str(number) / "adapter_config.json").exists()
        assert lk.load(tmp_path / str(number)) == adapter


@pytest.mark.parametrize("how", ["dilation", "padding"])
def test_a_convolution_that_peft_would_compute_otherwise_is_written_under_our_names(tmp_path, how):
    """PEFT's inner convolution copies stride and padding of the layer, and neither dilation nor padding mode."""
    own = {"dilation": 2} if how == "dilation" else {"padding_mode": "circular"}
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=2, **own))
    lk.attach(model, lk.plan(model, rank=2, layers="all-conv"))
    lk.collect(model).save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert lk.load(tmp_path / "a") == lk.collect(model)


def test_an_attention_output_adapted_alone_is_written_under_our_names(tmp_path):
    """PEFT wraps nn.MultiheadAttention whole; a wrapper around out_proj alone is never called, and says nothing."""
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    lk.attach(model, lk.plan(model, rank=2, layers=["out_proj"]))
    lk.collect(model).save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
