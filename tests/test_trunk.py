"""The trunk against the plain model: packed equals padded, on every architecture; what it changes it puts back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorakit as lk
from lorakit.trunk import Segments, Trunk
from lorakit.trunk import trunk as trunk_module
from lorakit.trunk.flat import Flat
from lorakit.trunk.prefix import Prefix
from tiny import MODELS, distilbert, roberta

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def qwen2() -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES))


def qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=8))


def gemma() -> nn.Module:
    return tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=8))


def gemma2() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    config = tf.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=4, layer_types=layers, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    )
    return tf.Gemma2ForCausalLM(config)


def mistral() -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**SIZES, sliding_window=3))


def gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=layers))


def gpt_neo() -> nn.Module:
    config = tf.GPTNeoConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
    )
    return tf.GPTNeoForCausalLM(config)


T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 40,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 7,
}


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def t5() -> nn.Module:
    return frozen(tf.T5EncoderModel(tf.T5Config(**T5)))


def t5_gated() -> nn.Module:
    return frozen(tf.T5Model(tf.T5Config(**T5, feed_forward_proj="gated-gelu")).encoder)


def t5_decoder() -> nn.Module:
    return frozen(tf.T5Model(tf.T5Config(**T5)).decoder)


def mt5() -> nn.Module:
    return frozen(tf.MT5EncoderModel(tf.MT5Config(**T5)))


def umt5() -> nn.Module:
    return frozen(tf.UMT5EncoderModel(tf.UMT5Config(**T5)))


PACKED: dict[str, Callable[[], nn.Module]] = {
    "bert": MODELS["bert"],
    "roberta": roberta,
    "distilbert": distilbert,
    "gpt2": MODELS["gpt2"],
    "llama": MODELS["llama"],
    "mixtral": MODELS["mixtral"],
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "mistral": mistral,
    "t5": t5,
    "t5_gated": t5_gated,
    "t5_decoder": t5_decoder,
    "mt5": mt5,
    "umt5": umt5,
}
PADDED: dict[str, Callable[[], nn.Module]] = {"gpt_neo": gpt_neo}
LENGTHS = (5, 1, 9, 3)


def model_of(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    body: nn.Module = getattr(model, "base_model", model)
    more = 2 if "T5" in type(body).__name__ else 8  # T5's scores are large already: they are not scaled
    for name, parameter in body.named_parameters():  # attention that depends on what it sees
        if parameter.ndim == 2 and "embed" not in name and "position" not in name:
            parameter.data.mul_(more)
    return body


def texts(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Segments]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(3, 40, (sum(lengths),), generator=g), Segments.of(lengths)


def alone(model: nn.Module, ids: Tensor, segments: Segments) -> Tensor:
    """Every text by itself, through the model as Transformers runs it."""
    states = [model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(segments.lengths.tolist())]
    return torch.cat(states)


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_hidden_states_are_those_of_every_text_alone(name: str) -> None:
    model = model_of({**PACKED, **PADDED}[name])
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    perturb(model)
    ids, segments = texts()
    with torch.no_grad():
        expected = alone(model, ids, segments)
        with Trunk(model) as trunk:
            assert bool(trunk.why_padded) == (name in PADDED), trunk.why_padded
            found = trunk.hidden(ids, segments)
            some = trunk.hidden(ids, segments, torch.tensor([0, 7]))
        again = alone(model, ids, segments)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert torch.allclose(some, found[[0, 7]], atol=1e-4 * float(found.abs().max()))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", PACKED)
def test_gradients_are_those_of_every_text_alone(name: str) -> None:
    model = model_of(PACKED[name])
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    perturb(model)
    ids, segments = texts()
    weights = torch.randn(int(segments.n_tokens), 16, generator=torch.Generator().manual_seed(2))
    expected = gradients(model, (alone(model, ids, segments) * weights).sum())
    with Trunk(model) as trunk:
        found = gradients(model, (trunk.hidden(ids, segments) * weights).sum())
    size = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) < 1e-4 * size, key


@pytest.mark.parametrize("name", PACKED)
def test_the_last_block_runs_for_the_rows_that_are_read(name: str) -> None:
    model = model_of(PACKED[name])
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    perturb(model)
    ids, segments = texts()
    reads = torch.tensor([0, 3, 5, 12, 17])
    weights = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    rows: list[int] = []
    with Trunk(model) as trunk:
        assert trunk.trims
        expected = gradients(model, (trunk.hidden(ids, segments)[reads] * weights).sum())
        block = trunk_module.stack_of(model)[-1]
        down = [m for m in block.modules() if getattr(m, "nf", getattr(m, "out_features", 0)) == 16][-1]
        handle = down.register_forward_hook(lambda module, args, y: rows.append(y.numel() // 16))
        found = gradients(model, (trunk.hidden(ids, segments, reads) * weights).sum())
        handle.remove()
    if name != "mixtral":  # its experts are no modules that are called
        assert rows == [5]
    size = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) < 1e-4 * size, key


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "umt5"])
def test_the_frozen_prefix_is_computed_once_and_changes_nothing(name: str, where: str, tmp_path: Path) -> None:
    model = model_of(PACKED[name])
    lk.attach(model, lk.plan(model, rank=2, blocks="last 1"), seed=0)
    perturb(model)
    ids, segments = texts()
    rows: list[int] = []
    with Trunk(model) as trunk:
        assert trunk.depth == 1
        wanted = trunk.hidden(ids, segments)
        expected = gradients(model, wanted.square().sum())
        prefix = trunk.prefix(segments.lengths.tolist(), tmp_path / "states" if where == "file" else None)
        first = trunk_module.stack_of(model)[0]
        inner = next(m for m in first.modules() if m is not first and "Attention" in type(m).__name__)
        handle = inner.register_forward_hook(lambda module, args, y: rows.append(y[0].numel() // 16))
        for _ in range(3):
            found = trunk.hidden(ids, segments, None, prefix, (0, 1, 2, 3))
            assert torch.allclose(found, wanted, atol=1e-5)
            for key, gradient in gradients(model, found.square().sum()).items():
                assert torch.allclose(gradient, expected[key], rtol=1e-4, atol=1e-4), key
        handle.remove()
        some = trunk.hidden(ids[:5], Segments.of([5]), None, prefix, (0,))  # other texts of it, in another order
        assert torch.allclose(some, wanted[:5], atol=1e-5)
        prefix.close()
    assert rows in ([32], [32, 1, 1])  # T5's blocks are asked for their bias, with one row
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_an_error_before_anything_is_mapped(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno \d+\]"):
        Prefix([1 << 50], 1 << 10, torch.float32, tmp_path / "states")
    assert not list(tmp_path.iterdir())


def test_a_position_bias_is_made_for_distances_once_in_each_pass() -> None:
    model = model_of(t5)
    made: list[int] = []
    bias: nn.Module = next(m for m in model.modules() if hasattr(m, "compute_bias")).relative_attention_bias  # type: ignore[assignment]
    ids, segments = texts((70,) + 30 * (2,))
    with torch.no_grad():
        expected = alone(model, ids, segments)
        with Trunk(model) as trunk:
            bias.register_forward_hook(lambda module, args, y: made.append(args[0].numel()))
            found = trunk.hidden(ids, segments)
    assert made == [139]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("how", ["unfrozen", "adapted"])
def test_a_position_bias_that_learns_is_padded_and_gets_its_gradient(how: str) -> None:
    model = model_of(t5)
    if how == "adapted":
        lk.attach(model, lk.plan(model, rank=2, layers=["relative_attention_bias"]), seed=0)
        perturb(model)
    else:
        model.requires_grad_(True)
    ids, segments = texts()
    weights = torch.randn(int(segments.n_tokens), 16, generator=torch.Generator().manual_seed(2))
    expected = gradients(model, (alone(model, ids, segments) * weights).sum())
    with Trunk(model) as trunk:
        assert trunk.why_padded == "its position bias learns, and packed rows take it as a constant"
        found = gradients(model, (trunk.hidden(ids, segments) * weights).sum())
    learnt = [name for name in found if "relative_attention_bias" in name]
    assert learnt
    for name in learnt:
        assert float(expected[name].abs().max()) > 0
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max()))


IMAGES = {**SIZES, "image_size": 12, "patch_size": 4}


@pytest.mark.parametrize(
    ("make", "height"),
    [
        (lambda: tf.ViTModel(tf.ViTConfig(**{**IMAGES, "image_size": [8, 12]})), 8),
        (lambda: tf.Dinov2Model(tf.Dinov2Config(**IMAGES)), 12),
        (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGES)), 12),
    ],
    ids=["vit", "dinov2", "clip"],
)
def test_images_of_one_size_are_segments_of_one_length(make: Callable[[], nn.Module], height: int) -> None:
    model = model_of(make)
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    perturb(model)
    pixels = torch.randn(3, 3, height, 12)
    wanted = model(pixel_values=pixels).last_hidden_state
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    expected = gradients(model, (wanted * weights).sum())
    with Trunk(model) as trunk:
        assert not trunk.why_padded
        states = trunk.seen(pixels).last_hidden_state
        found = gradients(model, (states * weights).sum())
    assert torch.allclose(states, wanted, atol=1e-5 * float(wanted.detach().abs().max()))
    size = max(float(g.abs().max()) for g in expected.values())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) < 1e-4 * size, key
    again = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(again, wanted)


def perturb(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)  # BERT's pooler is not asked
    return {name: g for name, g in zip(learning, found) if g is not None}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_everything_is_put_back(name: str, dtype: str) -> None:
    model = model_of(PACKED[name])
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    state = {name: set(module.__dict__) for name, module in model.named_modules()}
    config: Any = model.config
    settings = config.to_dict()
    with Trunk(model, dtype=dtype) as trunk:
        assert trunk.hidden(*texts()).dtype == trunk.dtype
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.data_ptr() == before[name][0], name
        assert torch.equal(tensor, before[name][1]), name
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == state
    assert config.to_dict() == settings
    assert all(slot.group is None for slot in model.modules() if hasattr(slot, "group"))


def test_half_precision_stays_near_the_full_one() -> None:
    model = model_of(MODELS["bert"])
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    perturb(model)
    with torch.no_grad():
        with Trunk(model) as trunk:
            exact = trunk.hidden(*texts())
        with Trunk(model, dtype="bf16") as trunk:
            near = trunk.hidden(*texts()).float()
    assert 0 < float((near - exact).abs().max()) < 0.1  # layer norm: values of size 1 to 3, eight bits each


def test_a_model_whose_packed_rows_differ_is_padded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(MODELS["bert"])
    monkeypatch.setattr(trunk_module.Segments, "positions", lambda self: torch.arange(self.n_tokens) % 13)
    with torch.no_grad(), Trunk(model) as trunk:
        assert "differ" in trunk.why_padded
        ids, segments = texts()
        assert torch.allclose(trunk.hidden(ids, segments), alone(model, ids, segments), atol=1e-5)


def test_queries_keys_and_values_are_found_to_read_one_input() -> None:
    model = model_of(MODELS["llama"])
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    with Trunk(model) as trunk:
        assert trunk.groups is not None
        named = [[slot.path.rpartition(".")[2] for _, slot, _ in group.members] for group in trunk.groups.groups]
    assert named == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_parameters_in_one_buffer_are_the_same_parameters() -> None:
    one, two = nn.Parameter(torch.arange(6.0).view(2, 3)), nn.Parameter(torch.ones(4))
    flat = Flat([{"one": one}, {"two": two}])
    (one.square().sum() + 3 * two.sum()).backward()
    assert torch.equal(flat.gradients, torch.tensor([0.0, 2, 4, 6, 8, 10, 3, 3, 3, 3]))
    norm = flat.clip(1.0)
    assert norm == torch.linalg.vector_norm(torch.tensor([0.0, 2, 4, 6, 8, 10, 3, 3, 3, 3]))
    assert torch.allclose(torch.linalg.vector_norm(flat.gradients), torch.tensor(1.0), atol=1e-6)
    with torch.no_grad():
        flat.parameters[1].add_(1)
    assert torch.equal(two, torch.full((4,), 2.0))
    flat.release()
    assert one.grad is None
    assert one.untyped_storage().nbytes() == 24


@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("llama", {"LlamaRMSNorm"}),
        ("gemma", {"GemmaRMSNorm", "GELUTanh"}),
        ("gpt2", {"NewGELUActivation"}),
        ("bert", set()),
    ],
)
def test_norms_and_activations_are_recognised_by_what_they_answer(name: str, swapped: set[str]) -> None:
    model = model_of(PACKED[name])
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data.add_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(4)))  # type: ignore[operator,union-attr]
    lk.attach(model, lk.plan(model, rank=2), seed=0)
    with Trunk(model):
        found = {type(m).__name__ for m in model.modules() if not m._modules and "forward" in m.__dict__}
    assert found - {"Linear"} == swapped
