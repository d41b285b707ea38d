"""What is found in real architectures, and what rules choose there."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lorakit as lk
import tiny
from lorakit.describe import describe, locate
from lorakit.errors import PlanError, UsageError
from lorakit.plan import LayerPlan, Plan
from lorakit.rules import plan
from lorakit.update import LayerSpec
from lorakit.whole import resolve_trained


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 2)
    )


def torch_transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


def specs_of(model: nn.Module) -> dict[str, LayerSpec]:
    return {spec.path: spec for spec in describe(model)}


# Roles by hand from each paper's own words: what projects into queries, keys, values, out of the attention, up, down.
ROLES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, str, int | None]]]] = {
    "bert": (
        tiny.bert,
        {
            "bert.embeddings.word_embeddings": ("embedding", "embedding", None),
            "bert.encoder.layer.1.attention.self.query": ("linear", "q", 1),
            "bert.encoder.layer.1.attention.self.key": ("linear", "k", 1),
            "bert.encoder.layer.1.attention.self.value": ("linear", "v", 1),
            "bert.encoder.layer.1.attention.output.dense": ("linear", "o", 1),
            "bert.encoder.layer.1.intermediate.dense": ("linear", "up", 1),
            "bert.encoder.layer.1.output.dense": ("linear", "down", 1),
            "bert.pooler.dense": ("linear", "pooler", None),
            "classifier": ("linear", "head", None),
        },
    ),
    "roberta": (
        tiny.roberta,
        {
            "roberta.encoder.layer.0.attention.self.query": ("linear", "q", 0),
            "roberta.encoder.layer.0.output.dense": ("linear", "down", 0),
            "classifier.dense": ("linear", "head", None),
            "classifier.out_proj": ("linear", "head", None),
        },
    ),
    "distilbert": (
        tiny.distilbert,
        {
            "distilbert.transformer.layer.1.attention.q_lin": ("linear", "q", 1),
            "distilbert.transformer.layer.1.attention.k_lin": ("linear", "k", 1),
            "distilbert.transformer.layer.1.attention.v_lin": ("linear", "v", 1),
            "distilbert.transformer.layer.1.attention.out_lin": ("linear", "o", 1),
            "distilbert.transformer.layer.1.ffn.lin1": ("linear", "up", 1),
            "distilbert.transformer.layer.1.ffn.lin2": ("linear", "down", 1),
            "pre_classifier": ("linear", "head", None),
            "classifier": ("linear", "head", None),
        },
    ),
    "gpt2": (
        tiny.gpt2,
        {
            "transformer.wte": ("embedding", "embedding", None),
            "transformer.h.1.attn.c_attn": ("hf_conv1d", "qkv", 1),
            "transformer.h.1.attn.c_proj": ("hf_conv1d", "o", 1),
            "transformer.h.1.mlp.c_fc": ("hf_conv1d", "up", 1),
            "transformer.h.1.mlp.c_proj": ("hf_conv1d", "down", 1),
            "lm_head": ("linear", "head", None),
        },
    ),
    "llama": (
        tiny.llama,
        {
            "model.layers.0.self_attn.q_proj": ("linear", "q", 0),
            "model.layers.0.self_attn.k_proj": ("linear", "k", 0),
            "model.layers.0.self_attn.v_proj": ("linear", "v", 0),
            "model.layers.0.self_attn.o_proj": ("linear", "o", 0),
            "model.layers.0.mlp.gate_proj": ("linear", "gate", 0),
            "model.layers.0.mlp.up_proj": ("linear", "up", 0),
            "model.layers.0.mlp.down_proj": ("linear", "down", 0),
            "lm_head": ("linear", "head", None),
        },
    ),
    "t5": (
        tiny.t5,
        {
            "encoder.block.1.layer.0.SelfAttention.q": ("linear", "q", 1),
            "decoder.block.1.layer.1.EncDecAttention.k": ("linear", "k", 1),
            "decoder.block.1.layer.1.EncDecAttention.v": ("linear", "v", 1),
            "decoder.block.1.layer.1.EncDecAttention.o": ("linear", "o", 1),
            "encoder.block.1.layer.1.DenseReluDense.wi": ("linear", "up", 1),
            "encoder.block.1.layer.1.DenseReluDense.wo": ("linear", "down", 1),
            "lm_head": ("linear", "head", None),
        },
    ),
    "mixtral": (
        tiny.mixtral,
        {
            "model.layers.1.self_attn.q_proj": ("linear", "q", 1),
            "model.layers.1.mlp.gate.weight": ("parameter", "other", 1),  # the router
            "model.layers.1.mlp.experts.gate_up_proj": ("parameter", "up", 1),
            "model.layers.1.mlp.experts.down_proj": ("parameter", "down", 1),
        },
    ),
    "vit": (
        tiny.vit,
        {
            "vit.embeddings.patch_embeddings.projection": ("conv2d", "conv", None),
            "vit.embeddings.cls_token": ("parameter", "other", None),
            "vit.layers.1.attention.q_proj": ("linear", "q", 1),
            "vit.layers.1.attention.o_proj": ("linear", "o", 1),
            "vit.layers.1.mlp.fc1": ("linear", "up", 1),
            "vit.layers.1.mlp.fc2": ("linear", "down", 1),
            "classifier": ("linear", "head", None),
        },
    ),
    "cnn": (
        cnn,
        {"0": ("conv2d", "conv", 0), "2": ("conv2d", "conv", 2), "4": ("linear", "other", 4)},
    ),
    "nn.Transformer": (
        torch_transformer,
        {
            "encoder.layers.0.self_attn.in_proj_weight": ("parameter", "qkv", 0),
            "encoder.layers.0.self_attn.out_proj": ("linear", "o", 0),
            "encoder.layers.0.linear1": ("linear", "up", 0),
            "encoder.layers.0.linear2": ("linear", "down", 0),
            "decoder.layers.0.multihead_attn.in_proj_weight": ("parameter", "qkv", 0),
            "decoder.layers.0.multihead_attn.out_proj": ("linear", "o", 0),
        },
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_kinds_roles_and_blocks_of_an_architecture(name: str) -> None:
    build, wanted = ROLES[name]
    specs = specs_of(build())
    assert {path: (specs[path].kind, specs[path].role, specs[path].block) for path in wanted} == wanted


@pytest.mark.parametrize("name", ROLES)
def test_every_described_layer_is_located_and_has_the_shapes_of_its_tensor(name: str) -> None:
    model = ROLES[name][0]()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    specs = describe(model)
    assert len({spec.path for spec in specs}) == len(specs)
    for spec in specs:
        place = locate(model, spec.path)
        assert place is not None
        tensor = parameters[spec.path if spec.kind == "parameter" else f"{spec.path}.weight"]
        assert place.weight is tensor
        assert spec.shape == tuple(tensor.shape)
        canonical = place.kind.canonical(place.module, tensor)
        assert (*spec.batch, *spec.matrix) == tuple(canonical.shape)
        assert spec.n_parameters == tensor.numel()


@pytest.mark.parametrize("name", ROLES)
def test_every_matrix_of_an_architecture_is_described(name: str) -> None:
    """Independently of how: each floating tensor of two or more dimensions has its layer."""
    model = ROLES[name][0]()
    described = {spec.path if spec.kind == "parameter" else f"{spec.path}.weight" for spec in describe(model)}
    matrices = {key for key, tensor in model.named_parameters(remove_duplicate=False) if tensor.ndim in (2, 3, 4, 5)}
    assert described == matrices


def test_experts_are_a_batch_of_matrices() -> None:
    spec = specs_of(tiny.mixtral())["model.layers.0.mlp.experts.gate_up_proj"]
    assert (spec.batch, spec.matrix, spec.called) == ((4,), (48, 16), False)
    assert [s.path for s in describe(tiny.mixtral()) if s.batch == (4,)] == list(
        plan(tiny.mixtral(), rank=2, layers="experts").layers
    )


def test_tied_weights_name_each_other() -> None:
    specs = specs_of(tiny.gpt2())
    assert specs["transformer.wte"].tied == ("lm_head.weight",)
    assert specs["lm_head"].tied == ("transformer.wte.weight",)
    assert specs["transformer.wpe"].tied == ()


def test_weights_that_are_read_without_a_call_are_not_called() -> None:
    specs = specs_of(torch_transformer())
    assert not specs["encoder.layers.0.self_attn.out_proj"].called
    assert not specs["encoder.layers.0.self_attn.in_proj_weight"].called
    assert specs["encoder.layers.0.linear1"].called
    assert specs["encoder.layers.0.self_attn.in_proj_weight"].has_bias


def test_separate_key_and_value_widths_give_three_matrices() -> None:
    specs = specs_of(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    found = {path: (spec.role, spec.matrix) for path, spec in specs.items()}
    assert found == {
        "q_proj_weight": ("q", (8, 8)),
        "k_proj_weight": ("k", (8, 6)),
        "v_proj_weight": ("v", (8, 4)),
        "out_proj": ("o", (8, 8)),
    }


def test_recurrent_weights_are_recurrent() -> None:
    specs = describe(nn.Sequential(nn.LSTM(4, 3, num_layers=2, bidirectional=True)))
    assert len(specs) == 8
    assert {spec.role for spec in specs} == {"recurrent"}
    assert specs[0].path == "0.weight_ih_l0"


def test_a_layer_used_twice_is_described_once() -> None:
    shared = nn.Linear(3, 3)
    assert [spec.path for spec in describe(nn.Sequential(shared, nn.ReLU(), shared))] == ["0"]


def test_the_model_itself_may_be_the_layer() -> None:
    (spec,) = describe(nn.Linear(3, 2))
    assert (spec.path, spec.matrix) == ("", (2, 3))


def test_a_weight_that_is_computed_from_others_is_not_offered() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    pruned = prune.l1_unstructured(nn.Linear(4, 3), "weight", 2)
    model = nn.Sequential(normed, pruned, nn.Linear(3, 3))
    assert [spec.path for spec in describe(model) if spec.kind == "linear"] == ["2"]
    assert list(plan(model, rank=2).layers) == ["2"]


def test_children_of_the_model_may_have_the_names_that_attach_uses() -> None:
    model = nn.ModuleDict({"adapters": nn.Linear(3, 3), "trained_encoder": nn.Linear(3, 3)})
    assert [spec.path for spec in describe(model)] == ["adapters", "trained_encoder"]


@pytest.mark.parametrize("name", ["bert", "mixtral", "nn.Transformer"])
def test_an_attached_model_is_described_like_the_plain_one(name: str) -> None:
    model = ROLES[name][0]()
    before = describe(model)
    lk.attach(model, plan(model, rank=1, trained=["*"]))
    assert describe(model) == before


# ---------------------------------------------------------------- rules


def chosen(model: nn.Module, **rules: object) -> dict[str, int]:
    return {path: layer.rank for path, layer in plan(model, **rules).layers.items()}  # type: ignore[arg-type]


def test_all_linear_is_every_matrix_but_heads_embeddings_and_loose_parameters() -> None:
    model = tiny.vit()
    found = chosen(model, rank=2)
    specs = specs_of(model)
    assert {specs[path].role for path in found} == {"q", "k", "v", "o", "up", "down"}
    assert len(found) == 12
    router = chosen(tiny.mixtral(), rank=2)
    assert "model.layers.0.mlp.experts.down_proj" in router
    assert "model.layers.0.mlp.gate.weight" not in router
    assert "lm_head" not in router


def test_all_adds_heads_embeddings_and_convolutions() -> None:
    assert set(chosen(cnn(), rank=2, layers="all")) == {"0", "2", "4", "5"}
    assert set(chosen(cnn(), rank=2, layers="all-conv")) == {"0", "2"}
    found = chosen(tiny.bert(), rank=2, layers="all")
    assert {"bert.embeddings.word_embeddings", "classifier"} <= set(found)


@pytest.mark.parametrize(
    ("layers", "endings"),
    [
        ("attention", {"query", "key", "value", "attention.output.dense"}),
        ("attn", {"query", "key", "value", "attention.output.dense"}),
        ("mlp", {"intermediate.dense", "1.output.dense"}),
        ("q", {"query"}),
        ("query", {"query"}),
        ("self.query", {"query"}),
        (["q", "v"], {"query", "value"}),
        ("re:.*(query|key)", {"query", "key"}),
        ("bert.encoder.layer.1.attention.self.query", {"query"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_rules_choose_by_group_role_ending_or_pattern(layers: object, endings: set[str]) -> None:
    found = chosen(tiny.bert(), rank=2, layers=layers, blocks=[1])
    assert len(found) == len(endings)
    assert all(any(path.endswith(ending) for path in found) for ending in endings)


def test_embeddings_are_a_group() -> None:
    found = chosen(tiny.bert(), rank=2, layers="embeddings")
    assert all(path.startswith("bert.embeddings.") for path in found)
    assert len(found) == 3


def test_a_mapping_gives_each_rule_its_rank_and_the_last_one_wins() -> None:
    found = chosen(tiny.bert(), layers={"all-linear": 2, "mlp": 4, "re:.*layer.0.*query": 8})
    assert found["bert.encoder.layer.1.attention.self.query"] == 2
    assert found["bert.encoder.layer.0.attention.self.query"] == 8
    assert found["bert.encoder.layer.0.output.dense"] == 4


def test_layers_come_in_the_order_of_the_model_whatever_the_order_of_the_rules() -> None:
    one, other = (list(chosen(tiny.bert(), rank=2, layers=rules)) for rules in (["q", "mlp"], ["mlp", "q"]))
    assert one == other == [spec.path for spec in describe(tiny.bert()) if spec.path in one]


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        ("last 1", {1}),
        ("last 2", {0, 1}),
        ("0-0", {0}),
        ("1-", {1}),
        ("-0", {0}),
        ("0,1", {0, 1}),
        ([1], {1}),
        (None, None),
    ],
    ids=str,
)
def test_blocks_keep_a_part_of_the_stack(blocks: object, wanted: set[int] | None) -> None:
    model = tiny.llama()
    specs = specs_of(model)
    found = {specs[path].block for path in chosen(model, rank=2, blocks=blocks)}
    assert found == ({0, 1} if wanted is None else wanted)


def test_methods_without_rank_get_rank_zero_and_no_start() -> None:
    assert set(plan(tiny.bert(), method="ia3", layers="q").layers.values()) == {LayerPlan("ia3", 0, 1.0)}


def test_clip_rank_lowers_the_rank_to_the_smaller_side() -> None:
    found = chosen(tiny.llama(), rank=12, clip_rank=True)
    assert found["model.layers.0.self_attn.k_proj"] == 8
    assert found["model.layers.0.self_attn.q_proj"] == 12


def test_bias_adds_the_biases_of_the_chosen_layers_or_all() -> None:
    model = tiny.bert()
    adapted = plan(model, rank=2, layers="q", bias="adapted").trained
    assert adapted == tuple(f"bert.encoder.layer.{n}.attention.self.query.bias" for n in range(2))
    everything = plan(model, rank=2, layers="q", bias="all").trained
    assert set(everything) == {name for name, _ in model.named_parameters() if name.endswith("bias")}


def test_bias_of_a_bare_matrix_is_the_one_that_is_added_to_it() -> None:
    assert plan(nn.MultiheadAttention(8, 2), rank=2, bias="adapted").trained == ("in_proj_bias", "out_proj.bias")
    lstm = nn.LSTM(4, 3)
    assert plan(lstm, rank=2, layers="weight_ih_l0", bias="adapted").trained == ("bias_ih_l0",)
    assert plan(nn.Linear(3, 3), rank=2, bias="adapted").trained == ("bias",)


def test_trained_modules_and_parameters_are_found_by_name() -> None:
    model = tiny.bert()
    names = set(resolve_trained(model, ["classifier", "bert.pooler.dense.bias"]))
    assert names == {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"}
    assert set(resolve_trained(model, ["*"])) == dict(model.named_parameters()).keys()
    assert resolve_trained(model, []) == {}
    assert plan(model, rank=2, trained=["classifier"]).trained == ("classifier",)


# ---------------------------------------------------------------- faults


def test_a_rule_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"'q_porj' matches none of the 16 layers; did you mean 'q_proj'\?"):
        plan(tiny.llama(), layers="q_porj")
    with pytest.raises(PlanError, match=r"'attenton' matches none of the .* did you mean 'attention'\?"):
        plan(tiny.llama(), layers="attenton")
    with pytest.raises(PlanError, match="the model has no layer that can be adapted"):
        plan(nn.Sequential(nn.ReLU()))


def test_all_faults_of_a_call_are_said_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan(tiny.llama(), layers={"q_porj": 4, "re:(": 4, "k": 9, "head": 4}, blocks="0-1")
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM: 4 faults:")
    for words in [
        "'q_porj' matches none",
        "'re:(' is not a regular expression",
        "rank 9 exceeds the smaller side of 'model.layers.0.self_attn.k_proj' (8 x 16); use rank <= 8 or clip_rank",
        "or clip_rank (--clip-rank) (and 1 more like it)",
        "'head' matches 1 layers, but none in blocks [0, 1]",
    ]:
        assert words in message


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8"])
def test_a_rank_is_a_whole_number_of_at_least_one(rank: object) -> None:
    with pytest.raises(PlanError, match="use a whole number, 1 or more"):
        plan(nn.Sequential(nn.Linear(3, 3)), rank=rank)  # type: ignore[arg-type]


def test_a_scale_that_means_nothing_is_refused_in_the_plan() -> None:
    with pytest.raises(PlanError, match="scale '16/x' is neither a number nor a rule"):
        plan(nn.Sequential(nn.Linear(3, 3)), rank=1, scale="16/x")


def test_unknown_methods_and_starts_are_said_once_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'dra'; did you mean 'dora'\?"):
        plan(tiny.bert(), method="dra")
    with pytest.raises(UsageError, match=r"unknown start 'pisa'; did you mean 'pissa'\?"):
        plan(tiny.bert(), start="pisa")


def test_a_start_says_which_ranks_it_cannot_do() -> None:
    with pytest.raises(PlanError, match="start 'orthogonal' needs an even rank, and '0' has 3; use 4"):
        plan(nn.Sequential(nn.Linear(8, 8)), rank=3, start="orthogonal")


@pytest.mark.parametrize("blocks", ["first", "1-x", "5-2", "7", "last 0", [9]], ids=str)
def test_blocks_that_mean_nothing_are_refused(blocks: object) -> None:
    with pytest.raises(PlanError, match=r"is not understood|the model has blocks 0 to 1"):
        plan(tiny.llama(), rank=2, blocks=blocks)  # type: ignore[arg-type]


def test_bias_must_be_one_of_three_and_must_exist() -> None:
    with pytest.raises(PlanError, match="bias is 'lora_only'; use 'none', 'adapted' or 'all'"):
        plan(tiny.bert(), rank=2, bias="lora_only")
    with pytest.raises(PlanError, match="bias is 'adapted', and the chosen layers have none"):
        plan(tiny.llama(), rank=2, bias="adapted")


def test_trained_names_must_exist_and_be_able_to_learn() -> None:
    with pytest.raises(
        PlanError, match=r"trained 'clasifier' is neither a module nor a parameter; did you mean 'classifier"
    ):
        plan(tiny.bert(), rank=2, trained=["clasifier"])
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("codes", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(PlanError, match="'codes' is not a floating-point parameter and cannot learn"):
        plan(model, rank=1, trained=["codes"])


def test_a_plan_for_another_model_is_refused_with_every_missing_layer() -> None:
    wanted = Plan({"encoder.x": LayerPlan(), "classifer": LayerPlan(), "classifier": LayerPlan(method="dra", rank=1)})
    with pytest.raises(PlanError) as caught:
        lk.attach(tiny.bert(), wanted)
    message = str(caught.value)
    assert "3 faults" in message
    assert "the model has no layer 'encoder.x'" in message
    assert "the model has no layer 'classifer'; did you mean 'classifier'?" in message
    assert "'classifier': unknown method 'dra'; did you mean 'dora'?" in message


def test_words_for_what_learns_whole() -> None:
    model = tiny.bert()
    everything = dict(model.named_parameters())
    norms = resolve_trained(model, ["norms"])
    assert set(norms) == {name for name in everything if "LayerNorm" in name}
    last = resolve_trained(model, ["blocks last 1"])
    assert set(last) == {name for name in everything if ".layer.1." in name}
    found = resolve_trained(model, ["re:.*query.bias", "classifier"])
    assert set(found) == {name for name in everything if name.endswith("query.bias") or name.startswith("classifier.")}
    assert plan(model, layers="none", bias="all").trained == tuple(name for name in everything if "bias" in name)
    assert not plan(model, layers=["none"], trained=["norms"]).layers
    assert not plan(model, layers={"none": 8}, trained=["norms"]).layers  # as the command line says it
    for wrong, words in [
        ("norm", "did you mean 'norms'"),
        ("blocks 7", "the model has blocks 0 to 1"),
        ("re:(", "is not a regular expression"),
        ("re:nothing", "is neither a module nor a parameter"),
    ]:
        with pytest.raises(PlanError, match=re.escape(words)):
            plan(model, 2, "q", trained=[wrong])
    with pytest.raises(UsageError, match="the plan is empty"):
        lk.attach(model, plan(model, layers="none"))
