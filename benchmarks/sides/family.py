"""Every method, start and prompt: what lorakit is told, and how peft makes the same, with as many numbers to train.

Where nothing else is said peft takes the configuration that lorakit writes for it: same layers, same sizes, same scale.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lorakit as lk
from lorakit.method import METHODS
from lorakit.prompt import PROMPTS, PromptPlan

N_PROMPT = 20
_NO_LAYERS = 2.0  # the pace of norms and biases


class Row(NamedTuple):
    """One line of the table. `peft`: fields of its configuration, None where it has no such thing, or a sentence that
    says why it is left out; `bits`: the format of a quantized base."""

    rules: dict[str, Any]
    peft: dict[str, Any] | str | None = {}
    bits: str = ""

    @property
    def pace(self) -> float:
        """The learning rate beside LoRA's, of both sides."""
        if "soft_prompt" in self.rules:
            return PROMPTS[PromptPlan.parse(self.rules["soft_prompt"]).method].pace
        return METHODS[self.rules.get("method", "lora")].pace if self.rules.get("layers") != "none" else _NO_LAYERS


_LORA = {"rank": 8, "scale": 2.0}
_QUANTIZED = "peft changes the base's weights by it, in floats"
FAMILY: dict[str, Row] = {
    "lora": Row(_LORA),
    "dora": Row({**_LORA, "method": "dora"}),
    "lora-fa": Row({"rank": 16, "scale": 2.0, "method": "lora-fa"}, peft={"frozen": "lora_A"}),
    "vera": Row({"rank": 256, "method": "vera"}),
    "loha": Row({"rank": 4, "scale": 2.0, "method": "loha"}),
    "lokr": Row({"rank": 8, "scale": 2.0, "method": "lokr"}),
    "hira": Row({"rank": 8, "method": "hira"}),
    "randlora": Row({"rank": 32, "method": "randlora"}),
    "fourier": Row({"rank": 2, "method": "fourier"}),
    "oft": Row({"rank": 24, "method": "oft"}),
    "boft": Row({"rank": 96, "method": "boft"}, peft="on a CPU it has one factor only, whatever it is told"),
    "delora": Row({"rank": 8, "method": "delora"}),
    "miss": Row({"rank": 16, "method": "miss"}),
    "bone": Row({"rank": 16, "method": "bone"}),
    "adalora": Row({"rank": 12, "scale": 2.0, "method": "adalora"}, peft={"schedule": True}),
    "ia3": Row({"method": "ia3"}),
    "ssf": Row({"method": "ssf"}, peft=None),
    "bottleneck": Row({"rank": 8, "method": "bottleneck"}, peft=None),
    "parallel": Row({"rank": 8, "method": "parallel"}, peft=None),
    "norms": Row({"layers": "none", "trained": ["norms"]}),
    "biases": Row({"layers": "none", "bias": "all"}, peft=None),
    "one a for all of a role": Row({**_LORA, "share": "a"}, peft=None),
    "start gaussian": Row({**_LORA, "start": "gaussian"}, peft={"init_lora_weights": "gaussian"}),
    "start orthogonal": Row({**_LORA, "start": "orthogonal"}, peft={"init_lora_weights": "orthogonal"}),
    "start pissa": Row({**_LORA, "start": "pissa"}, peft={"init_lora_weights": "pissa"}),
    "start olora": Row({**_LORA, "start": "olora"}, peft={"init_lora_weights": "olora"}),
    "start milora": Row({**_LORA, "start": "milora"}, peft=None),
    "start eva": Row({**_LORA, "start": "eva"}, peft={"init_lora_weights": "eva"}),
    "start corda": Row({**_LORA, "start": "corda"}, peft={"init_lora_weights": "corda"}),
    "start lora-ga": Row({**_LORA, "start": "lora-ga"}, peft={"init_lora_weights": "lora_ga"}),
    "lora on int8": Row(_LORA, bits="int8"),
    "lora on nf4": Row(_LORA, bits="nf4"),
    "loftq on nf4": Row({**_LORA, "start": "loftq"}, peft=_QUANTIZED, bits="nf4"),
    "eora on nf4": Row({**_LORA, "start": "eora"}, peft=None, bits="nf4"),
    "prompt soft": Row({"soft_prompt": f"soft:{N_PROMPT}"}, {"prompt": "PromptTuningConfig"}),
    "prompt p-tuning": Row({"soft_prompt": f"p-tuning:{N_PROMPT}"}, {"prompt": "PromptEncoderConfig"}),
    "prompt prefix": Row({"soft_prompt": f"prefix:{N_PROMPT}"}, {"prompt": "PrefixTuningConfig"}),
}


def peft_model(
    name: str, trunk: nn.Module, n_steps: int, batches: list[Any], run: Callable[[nn.Module, Any, bool], None]
) -> nn.Module:
    """peft's model of the row, around the trunk. `run` runs a batch through a model, backward too if asked."""
    row = FAMILY[name]
    assert isinstance(row.peft, dict)
    told = dict(row.peft)
    if "prompt" in told:
        return _prompted(trunk, told["prompt"])
    if told.pop("schedule", False):
        return _scheduled(trunk, n_steps)
    frozen, start = told.pop("frozen", ""), told.get("init_lora_weights", "")
    config = configuration(name, trunk)

    def every(back: bool, alone: bool = False) -> None:
        for batch in batches:
            size = 1 if alone else len(batch["labels"])
            for k in range(0, len(batch["labels"]), size):
                run(trunk, {key: value[k : k + size] for key, value in batch.items()}, back)

    for key, value in told.items():
        setattr(config, key, value)
    if start == "corda":
        config.corda_config = CordaConfig(verbose=False)
        preprocess_corda(trunk, config, run_model=lambda: every(False, alone=True))  # it takes batches of one
    elif start == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        preprocess_loraga(trunk, config, train_step=lambda: every(True))
    elif start == "eva":
        config.eva_config = peft.EvaConfig()
    model = get_peft_model(trunk, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=lambda model, batch: run(model, batch, False),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: _flat(x),
            show_progress_bar=False,
        )
    for key, parameter in model.named_parameters():
        if frozen and frozen in key:
            parameter.requires_grad_(False)
    return model


def configuration(name: str, trunk: nn.Module) -> PeftConfig:
    """What lorakit writes for peft, ready to be trained."""
    rules = {key: value for key, value in FAMILY[name].rules.items() if key != "start"}
    adapter = lk.init(trunk, lk.plan(trunk, **rules))
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        assert (Path(folder) / "adapter_config.json").exists(), name
        config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def _flat(x: Any) -> Tensor:
    found: Tensor = x[0] if isinstance(x, tuple) else x
    return found.reshape(-1, found.shape[-1]).float()


def _prompted(trunk: nn.Module, kind: str) -> PeftModel:
    more = {"encoder_hidden_size": int(trunk.config.hidden_size)} if kind == "PromptEncoderConfig" else {}  # type: ignore[union-attr,arg-type]
    return get_peft_model(
        trunk, getattr(peft, kind)(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N_PROMPT, **more)
    )


def _scheduled(trunk: nn.Module, n_steps: int) -> PeftModel:
    paths = [path for path, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    config = peft.AdaLoraConfig(
        init_r=12,
        target_r=8,
        lora_alpha=24,
        total_step=n_steps,
        tinit=n_steps // 10,
        tfinal=n_steps // 3,
        target_modules=paths,
    )
    return get_peft_model(trunk, config)
