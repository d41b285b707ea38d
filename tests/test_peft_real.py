"""Real adapters that others trained and published, on models of their shape with random weights."""

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.update import same_tensor
from peft_cases import close, stir, tensors_of

DATA = Path(os.environ.get("LORAKIT_DATA") or Path(__file__).parents[2] / "shared" / "data") / "adapters"
SMALL = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # no adapter touches the vocabulary


def _neo() -> nn.Module:
    config = transformers.GPTNeoConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
        intermediate_size=32,
        max_position_embeddings=32,
        **SMALL,
    )
    return transformers.GPTNeoForCausalLM(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_inner=32, n_positions=32, **SMALL))


def _privacy_filter() -> nn.Module:
    config = transformers.OpenAIPrivacyFilterConfig(num_local_experts=4, intermediate_size=32, **SMALL)
    return transformers.OpenAIPrivacyFilterForTokenClassification(config)


FILES: dict[str, tuple[Any, int]] = {
    "SARAELSAFTY+Movies-_with_lora": (_neo, 24),
    "shibbir24_smart_review_gpt2": (_gpt2, 12),
    "branbot6_privacy_filter_zh": (_privacy_filter, 32),
}


def base(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    stir(model.parameters(), 0, 0.02)
    return model


def output(model: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 3
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_published_adapter_gives_the_same_output_as_in_peft(name: str, tmp_path: Path) -> None:
    make, n_layers = FILES[name]
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; LORAKIT_DATA names the folder with the shared data")
    adapter = lk.load(DATA / name)
    assert len(adapter.layers) == n_layers
    model = base(make)
    plain = output(model)
    reference = peft.PeftModel.from_pretrained(base(make), str(DATA / name)).eval()
    wanted = output(reference)
    lk.attach(model, adapter)
    assert not close(plain, wanted)
    assert close(output(model), wanted)
    assert set(lk.collect(model).trained) == set(adapter.trained)
    lk.collect(model).save(tmp_path)
    lk.merge(model)
    assert close(output(model), wanted)
    before, after = tensors_of(DATA / name), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(same_tensor(t, after[key]) for key, t in before.items())
    again = peft.PeftModel.from_pretrained(base(make), str(tmp_path)).eval()
    assert close(output(again), wanted)
    assert again.peft_config["default"].task_type == reference.peft_config["default"].task_type
    assert sorted(again.peft_config["default"].modules_to_save or ()) == sorted(
        reference.peft_config["default"].modules_to_save or ()
    )
