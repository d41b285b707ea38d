"""Tiny models and PEFT configurations, for the tests that compare with the installed peft."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()

TOLERANCE = 1e-5  # float32 keeps 7 digits; sums of a few hundred products in another order lose about one of them


class Cnn(nn.Module):
    """Every convolution that PEFT adapts, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.line = nn.Conv1d(4, 5, 3, bias=False)
        self.deep = nn.Conv3d(1, 2, (2, 3, 3), padding=(0, 1, 1))
        self.point = nn.Conv2d(8, 3, 1)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.flat(x).relu()
        line = self.line(y.flatten(2)).mean(-1)
        deep = self.deep(y.unsqueeze(1)).flatten(1, 2)
        point = self.point(torch.cat([deep, deep[:, :2]], 1)).flatten(1)[:, :9]
        return self.head(torch.cat([line, point], -1))


class Attention(nn.Module):
    """A bare nn.MultiheadAttention, and layers whose names are ends of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tail = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.attn(x, x, x, need_weights=False)[0])


class Words(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.words(ids)).relu()))


class Gate(nn.Module):
    """A bare matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.core = _Core()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.core(x)


class _Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.mT


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,  # as wide as hidden: only their order tells the two expert weights apart
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return transformers.MixtralForCausalLM(config)


def _gptoss() -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.GptOssForCausalLM(config)


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "mixtral": _mixtral,
    "gptoss": _gptoss,
    "cnn": Cnn,
    "attention": Attention,
    "words": Words,
    "gate": Gate,
}


def base(name: str, seed: int = 0) -> nn.Module:
    """The same weights at every call, and none of them small."""
    torch.manual_seed(seed)
    model = _MAKERS[name]().eval()
    stir(model.parameters(), seed, 0.2)
    return model


def stir(parameters: Any, seed: int, size: float) -> None:
    """Adds noise from a fixed generator, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def output(name: str, model: nn.Module) -> Tensor:
    """What the model says of a fixed input."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if name in ("cnn", "attention", "gate"):
            shape = {"cnn": (2, 3, 6, 6), "attention": (2, 4, 8), "gate": (3, 8)}[name]
            return model(torch.randn(shape, generator=generator))
        ids = torch.randint(0, 20, (2, 7), generator=generator)
        if name == "words":
            return model(ids)
        extra = {"decoder_input_ids": ids.flip(1)} if name == "t5" else {}
        return model(input_ids=ids, **extra).logits


def close(x: Tensor, y: Tensor) -> bool:
    """Equal to rounding."""
    return bool((x - y).abs().max() <= TOLERANCE * max(1.0, float(y.abs().max())))


class Written(NamedTuple):
    """A directory, and the output of the model it was written from."""

    folder: Path
    output: Tensor


def written_by_peft(name: str, config: peft.PeftConfig, folder: Path) -> Written:
    """PEFT's directory of an adapter with random factors."""
    model = peft.get_peft_model(base(name), config).eval()
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.2)
    model.save_pretrained(str(folder))
    return Written(folder, output(name, model))


def read_by_peft(name: str, folder: Path) -> peft.PeftModel:
    """PEFT's model, after a check that no tensor was missing or left over."""
    model = peft.PeftModel.from_pretrained(base(name), str(folder)).eval()
    result = model.load_adapter(str(folder), "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


def meaning(model: peft.PeftModel) -> dict[str, Any]:
    """What a configuration makes of a model, whatever way it says it."""
    config = model.peft_config["default"]
    layers = {
        path: (module.r["default"], round(module.scaling["default"], 9))
        for path, module in model.named_modules()
        if hasattr(module, "scaling") and "default" in getattr(module, "r", {})
    }
    fields = ("peft_type", "task_type", "bias", "use_dora", "lora_bias", "fan_in_fan_out", "lora_dropout")
    saved = set(config.modules_to_save or ())
    return {"layers": layers, "saved": saved} | {field: getattr(config, field, None) for field in fields}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a directory."""
    return load_file(folder / "adapter_model.safetensors")
