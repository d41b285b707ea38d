"""Prompts in PEFT's files: read from PEFT and by PEFT, to the same output, and refused where they cannot be."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
import tiny
from lorakit.errors import AdapterError, AttachError
from lorakit.prompt import PROMPTS

FOLDER = "adapter"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TASKS = {
    "gpt2": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "distilbert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "soft": (peft.PromptTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix projected": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 12}),
}
CASES = [
    (name, case)
    for name in TASKS
    for case in CONFIGS
    if not (case.startswith("prefix") and name in ("t5", "distilbert"))  # PEFT's leaves half unread; it takes no cache
]
_TOLD = {"token_dim": 16, "num_attention_heads": 2, "num_layers": 2}  # PEFT cannot find these in DistilBERT's config


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(tiny, name)().eval()


def output(name: str, model: nn.Module) -> Tensor:
    ids = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    if name == "gpt2":
        mask[1, 4:] = 1
    extra = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, **extra).logits
    return found[:, -6:] if TASKS[name] == "CAUSAL_LM" else found


def written(name: str, case: str, folder: Path) -> Tensor:
    make, more = CONFIGS[case]
    own = _TOLD if name == "distilbert" else {}
    config = make(task_type=TASKS[name], num_virtual_tokens=5, **more, **own)
    model = peft.get_peft_model(base(name), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.2)
    model.save_pretrained(str(folder))
    return output(name, model)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_both_read_what_the_other_wrote(name, case, tmp_path):
    wanted = written(name, case, tmp_path / "peft")
    adapter = lk.load(tmp_path / "peft")
    assert adapter.prompt.length == 5
    model = base(name)
    lk.attach(model, adapter)
    torch.testing.assert_close(output(name, model), wanted, atol=1e-6, rtol=1e-5)
    adapter.save(tmp_path / "ours")
    assert lk.load(tmp_path / "ours") == adapter
    (tmp_path / "ours" / "lorakit.json").unlink()
    assert lk.load(tmp_path / "ours") == adapter
    again = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(name, again), wanted, atol=1e-6, rtol=1e-5)


def test_the_active_adapter_decides_what_a_classifier_reads(tmp_path):
    wanted = written("bert", "soft", tmp_path / FOLDER)
    model = base("bert")
    lk.attach(model, lk.plan(model, soft_prompt="soft:3"), name="ours", seed=1)
    lk.activate(model, "ours")
    own = output("bert", model)
    lk.attach(model, lk.load(tmp_path / FOLDER), name="theirs")
    lk.activate(model, "theirs")
    torch.testing.assert_close(output("bert", model), wanted, atol=1e-6, rtol=1e-5)
    lk.activate(model, ["theirs", "ours"])
    with pytest.raises(
        AttachError, match="of adapter 'theirs' reads the first row of its prompt.*of 'ours' the text's"
    ):
        output("bert", model)
    lk.activate(model, "ours")
    assert torch.equal(output("bert", model), own)


@pytest.mark.parametrize("method", PROMPTS.names())
def test_peft_reads_what_was_learned_here(method, tmp_path):
    model = base("llama")
    lk.attach(model, lk.plan(model, soft_prompt=f"{method}:4"), seed=1)
    adapter = lk.collect(model).with_meta(peft={"task_type": "CAUSAL_LM"})
    wanted = output("llama", model)
    adapter.save(tmp_path / "open")
    has_twin = (tmp_path / "open" / "adapter_config.json").exists()
    assert has_twin is (method in ("soft", "prefix"))  # the others come out of a network still
    done = lk.Adapter({}, {}, adapter.meta, adapter.prompt.finished())
    done.save(tmp_path / "done")
    again = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "done")).eval()
    torch.testing.assert_close(output("llama", again), wanted, atol=1e-6, rtol=1e-5)
    assert lk.load(tmp_path / "done") == done


def test_without_a_task_peft_would_ignore_it_so_it_is_written_under_our_names(tmp_path):
    model = base("llama")
    adapter = lk.init(model, lk.plan(model, soft_prompt="soft:4"))
    adapter.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert "without a task_type" in json.loads((tmp_path / "a" / "lorakit.json").read_text())["why_native"]


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("soft", {"num_virtual_tokens": 6}, "has 5 rows, and num_virtual_tokens is 6"),
        ("prefix", {"num_layers": None}, "num_layers must be told"),
        ("prefix", {"num_layers": 3}, "5 rows of 2 x 3 layers x 8 numbers in 1 heads are declared"),
        ("prefix", {"task_type": "SEQ_2_SEQ_LM"}, "leaves half unread"),
        ("soft", {"peft_type": "MULTITASK_PROMPT_TUNING"}, "lorakit reads"),
    ],
)
def test_files_that_contradict_themselves_are_refused(case, changes, words, tmp_path):
    written("llama", case, tmp_path / FOLDER)
    _config(tmp_path / FOLDER, **changes)
    with pytest.raises(AdapterError, match=words):
        lk.load(tmp_path / FOLDER)


def test_a_file_with_more_than_rows_is_refused(tmp_path):
    written("llama", "soft", tmp_path / FOLDER)
    file = tmp_path / FOLDER / "adapter_model.safetensors"
    save_file({**load_file(file), "prompt_more": torch.zeros(2)}, file)
    with pytest.raises(AdapterError, match="unknown tensor 'prompt_more'"):
        lk.load(tmp_path / FOLDER)
