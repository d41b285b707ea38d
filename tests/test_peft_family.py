"""The methods beside lora, dora and ia3 in PEFT's files: each read from PEFT and by PEFT, to the same output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.method import Held, layer_update
from lorakit.peft_format import why_no_twin
from lorakit.update import AdaptedLayer
from peft_cases import base, close, output, read_by_peft, stir, tensors_of, written_by_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),  # as peft says of its own
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:Specified to not save"),
    pytest.mark.filterwarnings("ignore:.*CUDA extension"),  # without it peft's BOFT has one factor
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # as peft says of every norm
]
LLAMA = ["q_proj", "up_proj", "down_proj"]
CNN = ["flat", "line", "point", "head"]
FROM_PEFT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hira": ("llama", "HiraConfig", {"r": 3, "target_modules": LLAMA, "rank_pattern": {"up_proj": 2}}),
    "hira gpt2": ("gpt2", "HiraConfig", {"r": 3, "target_modules": ["c_attn", "c_fc"]}),
    "hira convolutions": ("cnn", "HiraConfig", {"r": 2, "target_modules": ["flat", "line", "deep", "point", "head"]}),
    "hira embedding": ("words", "HiraConfig", {"r": 2, "target_modules": ["words", "mix"]}),
    "loha": (
        "llama",
        "LoHaConfig",
        {"r": 3, "alpha": 5, "target_modules": LLAMA, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 7}},
    ),
    "loha with a saved head": ("bert", "LoHaConfig", {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "loha convolutions": ("cnn", "LoHaConfig", {"r": 2, "target_modules": CNN}),
    "loha cores": ("cnn", "LoHaConfig", {"r": 2, "target_modules": CNN, "use_effective_conv2d": True}),
    "lokr": ("llama", "LoKrConfig", {"r": 1, "alpha": 5, "target_modules": LLAMA, "rank_pattern": {"up_proj": 2}}),
    "lokr whole": ("llama", "LoKrConfig", {"r": 16, "target_modules": LLAMA}),
    "lokr both low": ("llama", "LoKrConfig", {"r": 1, "target_modules": LLAMA, "decompose_both": True}),
    "lokr by a factor": ("llama", "LoKrConfig", {"r": 1, "target_modules": LLAMA, "decompose_factor": 2}),
    "lokr convolutions": ("cnn", "LoKrConfig", {"r": 1, "target_modules": CNN}),
    "lokr convolution whole": ("cnn", "LoKrConfig", {"r": 16, "target_modules": ["flat", "point", "head"]}),
    "lokr cores": ("cnn", "LoKrConfig", {"r": 2, "target_modules": ["flat", "head"], "use_effective_conv2d": True}),
    "vera": ("llama", "VeraConfig", {"r": 5, "target_modules": LLAMA}),
    "vera gpt2": ("gpt2", "VeraConfig", {"r": 40, "target_modules": ["c_attn", "c_fc"]}),
    "randlora": ("llama", "RandLoraConfig", {"r": 3, "target_modules": LLAMA}),
    "randlora gpt2": ("gpt2", "RandLoraConfig", {"r": 5, "randlora_alpha": 7, "target_modules": ["c_attn", "c_fc"]}),
    "fourier": (
        "llama",
        "FourierFTConfig",
        {"n_frequency": 9, "target_modules": LLAMA, "n_frequency_pattern": {"up_proj": 4}, "scaling": 50.0},
    ),
    "fourier gpt2": ("gpt2", "FourierFTConfig", {"n_frequency": 9, "target_modules": ["c_fc"], "random_loc_seed": 5}),
    "delora": (
        "llama",
        "DeloraConfig",
        {"r": 3, "target_modules": LLAMA, "rank_pattern": {"up_proj": 2}, "lambda_pattern": {"q_proj": 3}},
    ),
    "miss": ("llama", "MissConfig", {"r": 5, "target_modules": LLAMA}),
    "miss mini": ("llama", "MissConfig", {"r": 4, "mini_r": 2, "target_modules": LLAMA, "init_weights": "mini"}),
    "bone": ("llama", "MissConfig", {"r": 4, "target_modules": LLAMA, "init_weights": "bat"}),
    "oft": ("llama", "OFTConfig", {"oft_block_size": 4, "target_modules": LLAMA}),
    "oft exact": (
        "llama",
        "OFTConfig",
        {"r": 2, "oft_block_size": 0, "target_modules": LLAMA, "use_cayley_neumann": False},
    ),
    "oft few terms": (
        "llama",
        "OFTConfig",
        {"oft_block_size": 8, "target_modules": LLAMA, "num_cayley_neumann_terms": 3},
    ),
    "oft shared": (
        "llama",
        "OFTConfig",
        {"r": 4, "oft_block_size": 0, "target_modules": LLAMA, "block_share": True, "use_cayley_neumann": False},
    ),
    "oft bounded": (
        "llama",
        "OFTConfig",
        {"oft_block_size": 4, "target_modules": LLAMA, "coft": True, "eps": 0.3, "use_cayley_neumann": False},
    ),
    "oft embedding": ("words", "OFTConfig", {"oft_block_size": 4, "target_modules": ["words", "mix"]}),
    "boft": ("llama", "BOFTConfig", {"boft_block_size": 4, "target_modules": LLAMA}),
    "boft by number": ("llama", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2, "target_modules": LLAMA}),
    "boft convolution": ("cnn", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 1, "target_modules": ["point"]}),
    "norms": ("llama", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "norms with biases": ("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "adalora": ("llama", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": LLAMA}),
    "adalora gpt2": ("gpt2", "AdaLoraConfig", {"init_r": 4, "total_step": 9, "target_modules": ["c_attn", "c_fc"]}),
    "adalora convolution": ("cnn", "AdaLoraConfig", {"init_r": 3, "total_step": 9, "target_modules": ["flat", "head"]}),
    "biases": ("bert", "VeraConfig", {"r": 2, "target_modules": ["query", "value"], "bias": "vera_only"}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_what_peft_writes_gives_the_same_output_and_comes_back_tensor_for_tensor(case: str, tmp_path: Path) -> None:
    name, config, fields = FROM_PEFT[case]
    written = written_by_peft(name, getattr(peft, config)(**fields), tmp_path / "theirs")
    adapter = lk.load(written.folder)
    assert adapter.methods == {"biases": ("vera",), "norms": ()}.get(case.split()[0], (case.split()[0],))
    model = base(name)
    lk.attach(model, adapter)
    assert not close(output(name, base(name)), written.output)
    assert close(output(name, model), written.output)
    adapter.save(tmp_path / "ours")
    theirs, ours = tensors_of(written.folder), tensors_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    if case != "oft bounded":  # of which PEFT writes what it has not bounded yet
        assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())
    assert close(output(name, read_by_peft(name, tmp_path / "ours")), written.output)
    lk.collect(model).save(tmp_path / "attached")  # now that kinds and shapes are known
    assert close(output(name, read_by_peft(name, tmp_path / "attached")), written.output)
    lk.merge(model)
    assert close(output(name, model), written.output)


TO_PEFT: dict[str, tuple[str, Callable[[Any], lk.Plan]]] = {
    "hira": ("llama", lambda model: lk.plan(model, 3, method="hira", trained=["model.norm"])),
    "hira convolutions": ("cnn", lambda model: lk.plan(model, 2, ["all-conv", "head"], method="hira")),
    "hira embedding": ("words", lambda model: lk.plan(model, 2, ["words", "mix"], method="hira")),
    "loha": ("llama", lambda model: lk.plan(model, layers={"attention": 2, "mlp": 3}, method="loha", scale="6/r")),
    "loha convolutions": ("cnn", lambda model: lk.plan(model, 2, ["flat", "line", "point"], method="loha")),
    "lokr": ("llama", lambda model: lk.plan(model, 1, method="lokr")),
    "lokr whole": ("llama", lambda model: lk.plan(model, 16, method="lokr")),
    "lokr convolutions": ("cnn", lambda model: lk.plan(model, 1, ["flat", "line", "point", "head"], method="lokr")),
    "vera": ("llama", lambda model: lk.plan(model, 32, method="vera")),
    "vera gpt2": ("gpt2", lambda model: lk.plan(model, 5, method="vera")),
    "randlora": ("llama", lambda model: lk.plan(model, 3, method="randlora")),
    "randlora gpt2": ("gpt2", lambda model: lk.plan(model, 3, method="randlora", scale=2.0)),
    "fourier": ("llama", lambda model: lk.plan(model, layers={"attention": 1, "mlp": 2}, method="fourier")),
    "fourier gpt2": ("gpt2", lambda model: lk.plan(model, 1, method="fourier", scale=30.0)),
    "delora": ("llama", lambda model: lk.plan(model, layers={"attention": 2, "mlp": 3}, method="delora")),
    "miss": ("llama", lambda model: lk.plan(model, 3, method="miss")),
    "bone": ("llama", lambda model: lk.plan(model, 4, method="bone")),
    "oft": ("llama", lambda model: lk.plan(model, 4, method="oft")),
    "oft embedding": ("words", lambda model: lk.plan(model, 4, ["words", "mix"], method="oft")),
    "boft": ("llama", lambda model: lk.plan(model, 1, method="boft")),
    "boft convolution": ("cnn", lambda model: lk.plan(model, 1, ["point", "head"], method="boft")),
    "norms": ("llama", lambda model: lk.plan(model, layers="none", trained=["norms"])),
    "norms with biases": ("bert", lambda model: lk.plan(model, layers="none", trained=["norms"])),
    "adalora": ("llama", lambda model: lk.plan(model, 3, method="adalora")),
    "adalora gpt2": ("gpt2", lambda model: lk.plan(model, 3, method="adalora")),
    "adalora convolution": ("cnn", lambda model: lk.plan(model, 2, ["flat", "head"], method="adalora")),
    "lora-fa": ("llama", lambda model: lk.plan(model, 3, method="lora-fa")),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_what_lorakit_writes_gives_the_same_output_in_peft(case: str, tmp_path: Path) -> None:
    name, plan = TO_PEFT[case]
    model = base(name)
    lk.attach(model, plan(model), seed=0)
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.2)
    wanted, adapter = output(name, model), lk.collect(model)
    adapter.save(tmp_path)
    assert why_no_twin(adapter.layers, adapter.trained) == ""
    assert not close(output(name, base(name)), wanted)
    assert close(output(name, read_by_peft(name, tmp_path)), wanted)
    assert lk.load(tmp_path) == adapter


def test_what_all_layers_share_is_one_tensor_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = base("llama")
    lk.attach(model, lk.plan(model, 4, method="vera", scale=2.0))  # a scale that PEFT has not: our own names
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.2)
    adapter = lk.collect(model)
    for held in (adapter, adapter.to(dtype=torch.float64)):
        assert len({id(layer.factors["a"]) for layer in held.layers.values()}) == 1
    alone = 2 * 4 * 24 + sum(len(x.factors["lambda_b"]) + 4 for x in adapter.layers.values())
    assert adapter.n_parameters == alone
    adapter.save(tmp_path)
    assert sum(tensor.numel() for tensor in tensors_of(tmp_path).values()) == alone
    back = lk.load(tmp_path)
    assert back == adapter
    assert len({id(layer.factors["a"]) for layer in back.layers.values()}) == 1
    twin = base("llama")
    lk.attach(twin, back)
    assert torch.equal(output("llama", twin), output("llama", model))
    assert len({layer.factors["a"].data_ptr() for layer in lk.collect(twin).layers.values()}) == 1


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        ("VeraConfig", {"r": 2, "save_projection": False}, "without its random pair"),
        ("RandLoraConfig", {"r": 2, "save_projection": False}, "without its random bases"),
    ],
)
def test_random_tensors_that_are_not_in_the_file_are_asked_for(
    config: str, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    written_by_peft("llama", getattr(peft, config)(target_modules=LLAMA, **fields), tmp_path)
    with pytest.raises(AdapterError, match=words):
        lk.load(tmp_path)


def test_a_kronecker_product_that_peft_scrambles_is_refused(tmp_path: Path) -> None:
    written_by_peft("cnn", peft.LoKrConfig(r=16, target_modules=["line"]), tmp_path)
    with pytest.raises(AdapterError, match="'line' is a Conv1d whose 'lokr_w2' is whole"):
        lk.load(tmp_path)


def test_a_convolution_turned_by_oft_is_what_peft_merges(tmp_path: Path) -> None:
    """peft 0.21.2 merges W R^T, and computes something else while it is not merged, even at its start."""
    config = peft.OFTConfig(r=3, oft_block_size=0, target_modules=["flat"], use_cayley_neumann=False)
    written_by_peft("cnn", config, tmp_path)
    merged = read_by_peft("cnn", tmp_path).merge_and_unload()
    model = base("cnn")
    lk.attach(model, lk.load(tmp_path))
    assert close(output("cnn", model), output("cnn", merged))


@pytest.mark.parametrize("n_factors", [1, 2, 3])
def test_butterfly_factors_are_those_of_the_paper(n_factors: int) -> None:
    """Each a permutation, blocks, and the permutation back, written out as matrices."""
    g, o, i, b = torch.Generator().manual_seed(1), 5, 16, 4
    weight = torch.randn(o, i, generator=g, dtype=torch.float64)
    turns = torch.randn(n_factors, i // b, b, b, generator=g, dtype=torch.float64)
    gain = torch.randn(o, generator=g, dtype=torch.float64)
    whole = torch.eye(i, dtype=torch.float64)
    for k in range(n_factors):
        halves = torch.arange(i).view(-1, 2**k, 2, b // 2) if k else torch.arange(i).view(1, -1)
        order = halves.reshape(halves.shape[0], -1, b // 2) if k else None
        places = torch.cat([order[:, 0::2], order[:, 1::2]], 1).flatten() if order is not None else halves.flatten()
        shuffle = torch.eye(i, dtype=torch.float64)[places]
        skew = (turns[k] - turns[k].mT) / 2
        eye = torch.eye(b, dtype=torch.float64)
        blocks = torch.block_diag(*((eye - s) @ torch.linalg.inv(eye + s) for s in skew))
        whole = shuffle @ blocks @ shuffle.T @ whole
    layer = AdaptedLayer("boft", "linear", (o, i), {"turns": turns, "gain": gain}, i // b, matrix=(o, i))
    found = layer_update(layer, Held(weight)).weight(weight)
    assert torch.allclose(found, gain[:, None] * (weight @ whole.T), atol=1e-12)
    assert torch.allclose(whole @ whole.T, torch.eye(i, dtype=torch.float64), atol=1e-12)
