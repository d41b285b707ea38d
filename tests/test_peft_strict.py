"""PEFT directories that are broken, or do not fit: one AdapterError that names every fault, and nothing is done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterError, BaseMismatchError
from peft_cases import base, output, tensors_of, written_by_peft

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good directory of PEFT's."""
    written_by_peft("llama", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]), tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A good directory of ours."""
    model = base("llama")
    lk.attach(model, lk.plan(model, 4, "q"))
    lk.collect(model).save(tmp_path / "own")
    return tmp_path / "own"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "adapter_model.safetensors")


def fault(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        lk.load(folder)
    return str(caught.value)


def test_all_faults_of_the_tensors_are_listed_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q0}.lora_B.weight"]
        tensors[f"{Q1}.lora_A.weight"] = torch.ones(3, 16)
        tensors[f"{Q1.replace('q_proj', 'v_proj')}.lora_A.weight"] = torch.ones(2, 16)
        tensors[f"{Q1.replace('q_proj', 'v_proj')}.lora_B.weight"] = torch.ones(8, 2)
        tensors[f"{Q0.replace('0', '2')}.lora_magnitude_vector"] = torch.ones(16)

    change_tensors(folder, spoil)
    text = fault(folder)
    assert "4 faults" in text
    assert "'model.layers.0.self_attn.q_proj' lacks lora_B.weight" in text
    assert "'model.layers.1.self_attn.q_proj': lora_A has rank 3 and lora_B rank 4" in text
    assert "'model.layers.1.self_attn.v_proj' has rank 2, adapter_config.json says 4" in text
    assert "lora_magnitude_vector, which adapter_config.json does not announce" in text


def test_all_unknown_tensors_and_unreadable_options_are_listed_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 16)
        tensors["base_model.model.model.norm.weight"] = torch.ones(16)
        tensors[f"{Q0}.lora_E"] = torch.ones(4, 1)
        del tensors[f"{Q1}.lora_B.weight"]

    change_tensors(folder, spoil)
    change_config(folder, layer_replication=[[0, 2]], alora_invocation_tokens=[1, 2], trainable_token_indices=[3])
    text = fault(folder)
    assert "7 faults" in text
    for part in (
        "does not begin with",
        "model.norm.weight' (16,)",
        "has lora_E, which adapter_config.json does not",
        "lacks lora_B.weight",
    ):
        assert part in text
    for option in ("layer_replication", "alora_invocation_tokens", "trainable_token_indices"):
        assert f"'{option}' is set" in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("velora_config", {"num_groups": 2}),
        ("monteclora_config", {"num_samples": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("use_of_tomorrow", True),
        ("tomorrow_config", {"x": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_an_option_that_changes_the_meaning_and_that_lorakit_lacks_is_refused(
    folder: Path, option: str, value: Any
) -> None:
    change_config(folder, **{option: value})
    assert option in fault(folder)


def test_options_that_change_nothing_at_inference_are_read(folder: Path) -> None:
    before = lk.load(folder)
    options = {
        "lora_dropout": 0.3,
        "eva_config": {"rho": 2.0},
        "inference_mode": False,
        "peft_version": "9",
        "note": "x",
    }
    change_config(folder, init_lora_weights="eva", **options)
    assert lk.load(folder) == before


def test_every_value_of_the_wrong_type_is_listed(folder: Path) -> None:
    change_config(
        folder, r="4", lora_alpha=None, rank_pattern={"q(": 2}, alpha_pattern=[1], modules_to_save="head", bias="some"
    )
    text = fault(folder)
    assert "6 faults" in text
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"):
        assert f"'{key}' is " in text


@pytest.mark.parametrize("value", ["VBLORA", "MULTITASK_PROMPT_TUNING", "", None, 3])
def test_an_unknown_peft_type_is_refused(folder: Path, value: Any) -> None:
    change_config(folder, peft_type=value)
    assert fault(folder).startswith(f"{folder}: peft_type is {value!r}; lorakit reads ADALORA, BOFT, DELORA")


def test_a_missing_or_damaged_configuration_is_refused(folder: Path, own: Path) -> None:
    for place in (folder, own):
        for text in ("{", "[]", "\xff"):
            (place / "adapter_config.json").write_text(text, encoding="latin-1")
            assert "adapter_config.json" in fault(place)
        (place / "adapter_config.json").unlink()
        assert "adapter_config.json" in fault(place)


def test_a_truncated_tensor_file_is_refused(folder: Path, own: Path) -> None:
    for place in (folder, own):
        file = place / "adapter_model.safetensors"
        data = file.read_bytes()
        for size in (0, 5, 200, len(data) - 3):
            file.write_bytes(data[:size])
            assert "it may be cut short or damaged" in fault(place)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/never'\ntR.")
    assert "lorakit never opens one" in fault(folder)
    assert not Path("/tmp/never").exists()


def test_nan_in_a_tensor_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.full((4, 16), float("nan"))}))
    assert "NaN or infinite numbers in 'model.layers.0.self_attn.q_proj' a" in fault(folder)


def test_tensors_of_the_wrong_form_are_refused(folder: Path, tmp_path: Path) -> None:
    odd = {
        f"{Q0}.lora_A.weight": (torch.ones(4), "they are no pair"),
        f"{Q0}.lora_B.weight": (torch.ones(16, 4, 1), "they are no pair"),
        f"{Q0}.lora_B.bias": (torch.ones(3), "lora_B.bias is (3,); it must be (16,)"),
        f"{Q1}.lora_A.weight": (torch.ones(4, 16, dtype=torch.int32), "factors are floating-point numbers"),
        f"{Q1}.lora_embedding_A": (torch.ones(4, 16), "lacks lora_embedding_B"),
    }
    good = tensors_of(folder)
    for key, (tensor, part) in odd.items():
        save_file({**good, key: tensor}, folder / "adapter_model.safetensors")
        assert part in fault(folder)
    gains = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    other = written_by_peft("llama", gains, tmp_path / "gains").folder
    for shape in ((), (8,), (4, 2), (0, 1)):
        key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
        save_file({**tensors_of(other), key: torch.ones(shape)}, other / "adapter_model.safetensors")
        assert f"ia3_l is {tuple(shape)}; it must be a vector" in fault(other)


# ---------------------------------------------------------------- lorakit.json and PEFT's files must say the same


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lora_alpha": 99}, "has scale 24.75 by adapter_config.json and 4 by lorakit.json"),
        ({"use_rslora": True}, "has scale 8 by adapter_config.json and 4 by lorakit.json"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1}}, "has scale 0.25 by adapter_config.json"),
        ({"r": 8}, "has rank 4, adapter_config.json says 8"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"peft_type": "IA3"}, "in an IA3 adapter"),
    ],
)
def test_a_configuration_that_was_edited_by_hand_is_refused(own: Path, changes: dict[str, Any], part: str) -> None:
    change_config(own, **changes)
    assert part in fault(own)


def test_the_name_of_the_base_and_the_task_may_be_edited(own: Path) -> None:
    before = lk.load(own)
    change_config(own, base_model_name_or_path="/elsewhere", task_type="CAUSAL_LM")
    assert lk.load(own) == before


def test_notes_or_tensors_of_another_adapter_are_refused(own: Path) -> None:
    notes = json.loads((own / "lorakit.json").read_text())
    notes["layers"]["model.layers.0.self_attn.q_proj"]["scale"] = 1.0
    (own / "lorakit.json").write_text(json.dumps(notes))
    assert "do not belong together" in fault(own)


def test_layers_that_only_one_of_the_files_knows_are_listed(own: Path) -> None:
    file = own / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    tensors = tensors_of(own)
    for half in ("A", "B"):
        tensors[f"{Q0.replace('q_proj', 'k_proj')}.lora_{half}.weight"] = tensors.pop(f"{Q0}.lora_{half}.weight")
    save_file(tensors, file, metadata)
    text = fault(own)
    assert "layer 'model.layers.0.self_attn.q_proj' is missing" in text
    assert "layer 'model.layers.0.self_attn.k_proj' is not in lorakit.json" in text


# ---------------------------------------------------------------- which parameter is which


def test_expert_weights_whose_order_the_names_do_not_tell_are_refused(tmp_path: Path) -> None:
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    folder = written_by_peft("mixtral", config, tmp_path / "peft").folder
    change_config(folder, target_parameters=["experts.red", "experts.blue"])
    text = fault(folder)
    assert "'model.layers.0.mlp.experts' has 2 wrapped parameters, and target_parameters names blue, red there" in text
    change_config(folder, target_parameters=targets[:1])
    assert "does not say which is which" in fault(folder)
    change_config(folder, target_parameters=None)
    assert "target_parameters names none there" in fault(folder)


def test_attention_of_a_newer_peft_is_refused_because_out_proj_may_mean_another_thing_there(tmp_path: Path) -> None:
    folder = written_by_peft("attention", LoraConfig(r=2, target_modules=["attn"]), tmp_path / "peft").folder
    for version in ("0.21.2", "0.20.1.dev0@abc", None):
        change_config(folder, peft_version=version)
        assert lk.load(folder).layers["attn.out_proj"].scale == 2 * lk.load(folder).layers["attn.in_proj_weight"].scale
    change_config(folder, peft_version="0.22.0")
    assert "'attn' is an nn.MultiheadAttention of peft 0.22.0" in fault(folder)


# ---------------------------------------------------------------- against a model


def refused(model: nn.Module, folder: Path) -> str:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        lk.attach(model, lk.load(folder))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()
    return str(caught.value)


def test_wrong_shapes_against_the_model_are_all_listed(folder: Path) -> None:
    model = base("llama")
    model.model.layers[0].self_attn.q_proj = nn.Linear(16, 24)
    model.model.layers[1].self_attn.v_proj = nn.Linear(12, 8)
    text = refused(model, folder)
    assert "'model.layers.0.self_attn.q_proj' (24 x 16): factor 'b' is (16, 4); it must be (24, 4)" in text
    assert "'model.layers.1.self_attn.v_proj' (8 x 12): factor 'a' is (4, 16); it must be (4, 12)" in text


def test_layers_that_the_model_lacks_are_all_listed(folder: Path) -> None:
    model = base("llama")
    del model.model.layers[2]
    text = refused(model, folder)
    assert "no layer 'model.layers.2.self_attn.q_proj'" in text
    assert "no layer 'model.layers.2.self_attn.v_proj'" in text


def test_an_adapter_that_matches_no_module_is_refused(folder: Path) -> None:
    assert "none of the adapter's 6 layers is in this BertForSequenceClassification" in refused(base("bert"), folder)


def test_an_adapter_for_another_base_is_refused(own: Path) -> None:
    with pytest.raises(BaseMismatchError, match="made for other weights"):
        lk.attach(base("llama", seed=7), lk.load(own))
    model = base("llama", seed=7)
    lk.attach(model, lk.load(own), check_base=False)
    assert output("llama", model).isfinite().all()


class Grouped(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=groups)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((-2, -1)))


@pytest.mark.filterwarnings("ignore:.*groups > 1")
@pytest.mark.parametrize("groups", [2, 4])
def test_what_peft_writes_for_a_grouped_convolution_is_refused_with_the_reason(tmp_path: Path, groups: int) -> None:
    get_peft_model(Grouped(groups), LoraConfig(r=4, target_modules=["conv", "head"])).save_pretrained(str(tmp_path))
    assert f"'conv' is a convolution with {groups} groups, where PEFT's pair is no low-rank change" in fault(tmp_path)


def test_what_peft_writes_for_a_plain_convolution_does_not_go_onto_a_grouped_one(tmp_path: Path) -> None:
    get_peft_model(Grouped(1), LoraConfig(r=4, target_modules=["conv", "head"])).save_pretrained(str(tmp_path))
    assert "'conv' (8 x 18): factor 'a' is (4, 36); it must be (4, 18)" in refused(Grouped(2), tmp_path)


def test_the_input_gains_of_a_convolution_are_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["conv", "head"], feedforward_modules=["conv"])
    get_peft_model(Grouped(1), config).save_pretrained(str(tmp_path))
    assert "'conv' scales the input channels of a convolution" in fault(tmp_path)
    change_config(tmp_path, feedforward_modules=["conv", "head"])
    assert "'head': ia3_l is (3, 1), which contradicts feedforward_modules" in fault(tmp_path)
