"""The door: attaching is all or nothing, switching is cheap, detaching leaves no trace."""

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter import Adapter
from lorakit.attach import active, attached, recorded, refuse_unseen, unfreeze
from lorakit.errors import (
    AdapterError,
    AttachError,
    BaseMismatchError,
    LorakitError,
    NoEffectError,
    PlanError,
    UsageError,
)
from lorakit.plan import LayerPlan, Plan
from lorakit.testing import perturb, snapshot
from lorakit.update import AdaptedLayer


class Net(nn.Module):
    """An embedding, a convolution, an attention, two linear layers and a head: every drive is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(self.down(F.gelu(self.up(x))).mean(1))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


IDS = torch.arange(20).reshape(4, 5) % 11
LAYERS = ("embed", "conv", "attn.in_proj_weight", "attn.out_proj", "up", "down")


def a_plan(model: nn.Module, rank: int = 2, **rules: object) -> Plan:
    return lk.plan(model, rank=rank, layers=["all-linear", "all-conv", "embeddings"], **rules)  # type: ignore[arg-type]


def adapted(seed: int = 0, **rules: object) -> Adapter:
    """An adapter for `Net` that does something."""
    model = net()
    lk.attach(model, a_plan(model, **rules), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return lk.collect(model)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert snapshot(model) == before


# ---------------------------------------------------------------- attaching


def test_attach_returns_the_paths_and_keeps_every_type_and_base_key() -> None:
    model, plain = net(), net()
    paths = lk.attach(model, a_plan(model))
    assert set(paths) == set(LAYERS)
    assert all(type(model.get_submodule(path)) is type(module) for path, module in plain.named_modules())
    assert plain.state_dict().keys() <= model.state_dict().keys()
    assert "up.adapters.default.a" in model.state_dict()
    assert "attn.adapters_in_proj_weight.default.b" in dict(model.named_parameters())


def test_attaching_a_plan_is_attaching_its_fresh_adapter() -> None:
    model = net()
    fresh = lk.init(model, a_plan(model), seed=5)
    lk.attach(model, a_plan(model), seed=5)
    assert lk.collect(model) == fresh
    assert fresh != lk.init(net(), a_plan(net()), seed=6)


def test_fresh_factors_depend_on_seed_and_path_alone() -> None:
    model = net()
    torch.manual_seed(123)
    one = lk.init(model, Plan({"up": LayerPlan(rank=2)}), seed=1)
    torch.manual_seed(456)
    among_others = lk.init(model, a_plan(model), seed=1)
    assert one.layers["up"].same_as(among_others.layers["up"])
    assert not torch.equal(
        among_others.layers["up"].factors["a"][:, :8], among_others.layers["attn.out_proj"].factors["a"]
    )
    before = torch.random.get_rng_state()
    lk.init(model, a_plan(model))
    assert torch.equal(torch.random.get_rng_state(), before), "a fresh adapter must not draw from the global generator"


def test_training_freezes_the_base_and_an_attached_adapter_does_not_learn() -> None:
    model = net()
    lk.attach(model, a_plan(model))
    assert all((".adapters" in name) == p.requires_grad for name, p in model.named_parameters())
    served = net()
    lk.attach(served, adapted())
    assert all((".adapters" not in name) == p.requires_grad for name, p in served.named_parameters())
    resumed = net()
    lk.attach(resumed, adapted(), trainable=True)
    assert all((".adapters" in name) == p.requires_grad for name, p in resumed.named_parameters())
    still = net()
    lk.attach(still, a_plan(still), trainable=False)
    assert all((".adapters" not in name) == p.requires_grad for name, p in still.named_parameters())


def test_an_attached_adapter_is_copied_so_that_training_leaves_the_value() -> None:
    adapter = adapted(trained=["head"])
    model = net()
    lk.attach(model, adapter, trainable=True)
    perturb(model)
    assert lk.collect(model) != adapter
    assert adapter == adapted(trained=["head"])
    collected = lk.collect(model)
    perturb(model)
    assert lk.collect(model) != collected, "a collected adapter must not share memory with the model"


def test_drives_are_chosen_by_layer() -> None:
    model = net()
    lk.attach(model, a_plan(model))
    drives = {m.path: m.drive for m in model.modules() if type(m).__name__ == "Slot"}
    assert drives == {
        "embed": "hook",
        "conv": "hook",
        "attn.in_proj_weight": "weight",
        "attn.out_proj": "weight",
        "up": "fused",
        "down": "fused",
    }


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_a_layer_with_a_forward_of_its_own_takes_the_weight_drive() -> None:
    model = nn.Sequential(Scaled(4, 3))
    x = torch.randn(2, 4)
    lk.attach(model, lk.plan(model, rank=2))
    perturb(model)
    y = model(x)
    lk.merge(model)
    assert torch.allclose(model(x), y, atol=1e-5)


def test_a_forward_on_the_instance_is_kept() -> None:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    model = nn.Sequential(layer)
    x = torch.randn(2, 4)
    y = model(x)
    with unchanged(model):
        lk.attach(model, lk.plan(model, rank=2))
        assert torch.allclose(model(x), y)
        lk.detach(model)
    assert torch.equal(model(x), y)


def test_an_empty_plan_is_refused_and_so_is_what_is_neither_plan_nor_adapter() -> None:
    model = net()
    with unchanged(model):
        with pytest.raises(UsageError, match="the plan is empty"):
            lk.attach(model, Plan({}))
        with pytest.raises(UsageError, match="attach takes a Plan or an Adapter, not dict"):
            lk.attach(model, {})  # type: ignore[arg-type]


# ---------------------------------------------------------------- all or nothing


def with_layer(adapter: Adapter, path: str, **changes: object) -> Adapter:
    layer = adapter.layers[path]
    values = {name: getattr(layer, name) for name in AdaptedLayer.__slots__}
    return Adapter({**adapter.layers, path: AdaptedLayer(**values | changes)}, adapter.trained, adapter.meta)  # type: ignore[arg-type]


def test_every_fault_of_an_adapter_is_said_before_anything_is_changed() -> None:
    adapter = adapted()
    a, b = adapter.layers["up"].factors["a"], adapter.layers["up"].factors["b"]
    wrong = with_layer(adapter, "up", factors={"a": a[:, :3], "b": b})
    wrong = with_layer(wrong, "down", factors={"a": adapter.layers["down"].factors["a"]})
    wrong = with_layer(wrong, "conv", kind="linear")
    wrong = with_layer(wrong, "attn.out_proj", factors={**adapter.layers["attn.out_proj"].factors, "c": torch.ones(1)})
    wrong = with_layer(wrong, "embed", factors={**adapter.layers["embed"].factors, "a0": torch.ones(2, 11)})
    wrong = Adapter({**wrong.layers, "gone": adapter.layers["up"]}, meta={"base_name": "my/net"})
    model = net()
    with unchanged(model), pytest.raises(AdapterError) as caught:
        lk.attach(model, wrong)
    message = str(caught.value)
    assert "the adapter (made on 'my/net') does not fit this Net: 6 faults" in message
    for words in [
        "'up' (12 x 8): factor 'a' is (2, 3); it must be (2, 8)",
        "'down' lacks factor 'b'",
        "'conv' is of kind conv1d; the adapter has linear there",
        "'attn.out_proj' has a factor 'c' that method 'lora' does not know",
        "'embed' has only one of the factors 'a0' and 'b0'",
        "the model has no layer 'gone' that can be adapted",
    ]:
        assert words in message


def test_a_frozen_start_and_a_bias_of_wrong_shape_are_faults() -> None:
    adapter = adapted()
    factors = adapter.layers["up"].factors
    for extra, words in [
        ({"a0": factors["a"][:1], "b0": factors["b"]}, r"factor 'a0' is \(1, 8\); it must be \(2, 8\)"),
        ({"bias": torch.ones(3)}, r"factor 'bias' is \(3,\); it must be \(12,\)"),
    ]:
        model = net()
        with unchanged(model), pytest.raises(AdapterError, match=words):
            lk.attach(model, with_layer(adapter, "up", factors={**factors, **extra}))


def test_trained_parameters_that_do_not_fit_are_faults() -> None:
    trained = {"head.weight": torch.ones(2, 2), "gone.weight": torch.ones(1), "head.scale": torch.ones(1)}
    model = net()
    with unchanged(model), pytest.raises(AdapterError) as caught:
        lk.attach(model, Adapter(adapted().layers, trained))
    message = str(caught.value)
    for words in [
        "3 faults",
        "'head.weight' is (3, 8) in the model and (2, 2) in the adapter",
        "the model has no module 'gone', and the adapter trains 'gone.weight' fully; add it first",
        "'head' has no parameter 'scale', and the adapter trains it fully",
    ]:
        assert words in message


def test_an_adapter_for_another_architecture_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with unchanged(model), pytest.raises(AdapterError, match="none of the adapter's 6 layers is in this Sequential"):
        lk.attach(model, adapted().with_meta(base_name="some/net"))


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    model = net()
    with unchanged(model), pytest.raises(PlanError, match="rank 9 exceeds the smaller side"):
        lk.attach(model, Plan({"up": LayerPlan(rank=9), "down": LayerPlan(rank=2)}))


@pytest.mark.parametrize("drive", ["hook", "fused"])
def test_a_drive_that_would_do_nothing_or_something_else_is_refused(drive: str) -> None:
    model = net()
    with unchanged(model), pytest.raises(AdapterError) as caught:
        lk.attach(model, a_plan(model), drive=drive)
    message = str(caught.value)
    assert f"'attn.in_proj_weight' is read without calling a layer, which drive='{drive}' would never see" in message
    assert f"'attn.out_proj' is read without calling a layer, which drive='{drive}' would never see" in message
    assert ("'conv' (Conv1d, kind conv1d) has no fused forward" in message) == (drive == "fused")
    with pytest.raises(UsageError, match=r"unknown drive 'hok'; did you mean 'hook'\?"):
        lk.attach(model, a_plan(model), drive="hok")


def test_a_hook_on_a_layer_with_its_own_forward_is_refused() -> None:
    model = nn.Sequential(Scaled(4, 3))
    for drive in ("hook", "fused"):
        with unchanged(model), pytest.raises(AdapterError, match="Scaled"):
            lk.attach(model, lk.plan(model, rank=2), drive=drive)


def test_a_layer_under_one_drive_does_not_take_another_beside_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    lk.attach(model, lk.plan(model, rank=2))
    with unchanged(model), pytest.raises(AdapterError, match="has an adapter under drive='fused' already"):
        lk.attach(model, lk.plan(model, rank=2), name="other", drive="hook")
    lk.attach(model, lk.plan(model, rank=2), name="other", drive="fused")


def test_a_child_that_the_layer_has_already_is_not_replaced() -> None:
    layer = nn.Linear(4, 3)
    layer.adapters = nn.Linear(1, 1)
    model = nn.Sequential(layer)
    with unchanged(model), pytest.raises(AdapterError, match="'0' has a child 'adapters' of its own"):
        lk.attach(model, Plan({"0": LayerPlan(rank=2)}))


# ---------------------------------------------------------------- names


BAD_NAMES = [
    "",
    "a.b",
    "forward",
    "training",
    "switch",
    "active",
    "path",
    "kind",
    "drive",
    "owner",
    "parameters",
    None,
    3,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_a_module_cannot_bear_are_refused(name: object) -> None:
    model = net()
    with unchanged(model), pytest.raises(UsageError, match="cannot be used; take a plain word without dots"):
        lk.attach(model, a_plan(model, trained=["head"]), name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["default", "law", "en-de", "v2", "a", "b", "rank", "my adapter", "日本"])
def test_other_names_work_for_factors_and_heads(name: str) -> None:
    model = net()
    with unchanged(model):
        lk.attach(model, a_plan(model, trained=["head"]), name=name)
        assert model.get_parameter(f"up.adapters.{name}.a") is not None
        assert model.get_parameter(f"head.trained_weight.{name}") is not None
        lk.detach(model, name)


def test_a_name_is_given_once() -> None:
    model = net()
    lk.attach(model, a_plan(model), name="law")
    with unchanged(model), pytest.raises(AttachError, match="an adapter named 'law' is attached already"):
        lk.attach(model, a_plan(model), name="law")


@pytest.mark.parametrize("verb", [lk.detach, lk.collect, lk.activate])
def test_an_unknown_name_is_met_with_the_nearest(verb: object) -> None:
    model = net()
    lk.attach(model, a_plan(model), name="default")
    with (
        unchanged(model),
        pytest.raises(AttachError, match=r"no adapter named 'defualt' is attached; did you mean 'default'"),
    ):
        verb(model, "defualt")  # type: ignore[operator]


@pytest.mark.parametrize("verb", [lk.detach, lk.collect, lk.merge, lk.unmerge, active, attached])
def test_verbs_on_a_plain_model_say_that_nothing_is_attached(verb: object) -> None:
    with pytest.raises(AttachError, match="no adapter is attached to this Net"):
        verb(net())  # type: ignore[operator]


# ---------------------------------------------------------------- several adapters


def test_several_adapters_are_switched_by_name() -> None:
    model = net()
    plain = model(IDS)
    outputs = {}
    for seed, name in enumerate(["en", "law"]):
        alone = net()
        lk.attach(alone, adapted(seed))
        outputs[name] = alone(IDS)
        lk.attach(model, adapted(seed), name=name)
    assert attached(model) == ("en", "law")
    assert active(model) == ("law",), "the newest one acts alone until `activate` says otherwise"
    for name, wanted in outputs.items():
        lk.activate(model, name)
        assert active(model) == (name,)
        assert torch.equal(model(IDS), wanted)
    lk.activate(model, [])
    assert torch.equal(model(IDS), plain)
    with pytest.raises(AttachError, match=r"several adapters are attached \(en, law\); say which one to collect"):
        lk.collect(model)
    assert lk.collect(model, "law") == adapted(1)


def test_a_fresh_adapter_becomes_the_only_active_one() -> None:
    model = net()
    lk.attach(model, adapted(), name="old")
    lk.attach(model, a_plan(model), name="new")
    assert active(model) == ("new",)


def test_switching_reads_one_list_however_many_layers_there_are() -> None:
    def seconds(n_layers: int) -> float:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(n_layers)))
        lk.attach(model, lk.plan(model, rank=1), name="a")
        lk.attach(model, lk.plan(model, rank=1), name="b")
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            lk.activate(model, "a")
            lk.activate(model, "b")
            best = min(best, time.perf_counter() - start)
        return best

    # a walk over the layers would cost 100 times as much; the best of 20 is within a few times on a shared machine
    assert seconds(2000) < 10 * seconds(20)


def test_an_adapter_named_twice_is_refused() -> None:
    model = net()
    lk.attach(model, adapted(), name="en")
    with pytest.raises(UsageError, match="named twice"):
        lk.activate(model, ["en", "en"])


def test_detaching_one_adapter_leaves_the_others() -> None:
    model = net()
    lk.attach(model, adapted(0), name="en")
    lk.activate(model, "en")
    with_one = model(IDS)
    with unchanged(model):
        lk.attach(model, adapted(1, trained=["head"]), name="law")
        lk.detach(model, "law")
    assert attached(model) == ("en",)
    lk.activate(model, "en")
    assert torch.equal(model(IDS), with_one)


def test_adapters_of_different_methods_add_up_on_one_layer() -> None:
    model = net(torch.float64)
    plain = model(IDS)
    for method in ("lora", "dora", "ia3"):
        lk.attach(model, lk.plan(model, rank=2, method=method, layers=["head"]), name=method)
    perturb(model)
    changes = []
    for method in ("lora", "dora", "ia3"):
        lk.activate(model, method)
        changes.append(model(IDS) - plain)  # the head is last, so its changes add up in the output
    lk.activate(model, ["lora", "dora", "ia3"])
    assert torch.allclose(model(IDS), plain + sum(changes), atol=1e-6)  # float32 factors on a float64 base


# ---------------------------------------------------------------- heads trained fully


def test_two_heads_cannot_act_together() -> None:
    model = net()
    lk.attach(model, adapted(0, trained=["head"]), name="en")
    lk.attach(model, adapted(1, trained=["head"]), name="law")
    with pytest.raises(
        AttachError, match=r"'en' and 'law' both train 'head\.weight' fully; only one of them can be active"
    ):
        lk.activate(model, ["en", "law"])
    assert active(model) == ("law",)
    lk.attach(model, adapted(2), name="plain")
    lk.activate(model, ["law", "plain"])
    assert active(model) == ("law", "plain")


def test_a_trained_head_stands_in_for_the_base_which_stays_as_it_is() -> None:
    model = net()
    base = model.head.weight.detach().clone()
    lk.attach(model, a_plan(model, trained=["head"]))
    perturb(model)
    model(IDS).sum().backward()
    assert torch.equal(model.head.weight, base)
    assert model.head.weight.grad is None
    assert model.get_parameter("head.trained_weight.default").grad is not None
    alone = net()
    collected = lk.collect(model)
    with torch.no_grad():
        alone.head.weight.copy_(collected.trained["head.weight"])
        alone.head.bias.copy_(collected.trained["head.bias"])
    lk.attach(alone, Adapter(collected.layers))
    assert torch.equal(alone(IDS), model(IDS))


@pytest.mark.parametrize("trained_first", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_an_update_builds_on_a_trained_weight_and_bias(method: str, trained_first: bool) -> None:
    """Both on one layer, in either order, by every drive: what is merged is what acted."""
    model = net(torch.float64)
    whole = Plan({}, ("conv", "down", "head", "embed"))
    layers = ["conv", "down", "head", "embed"] if method != "ia3" else ["conv", "down", "head"]
    low_rank = lk.plan(model, rank=2, layers=layers, method=method)
    for name, plan in sorted({"low": low_rank, "whole": whole}.items(), reverse=trained_first):
        lk.attach(model, plan, name=name)
        perturb(model)
    lk.activate(model, ["low", "whole"])
    y = model(IDS)
    lk.merge(model)
    assert torch.allclose(model(IDS), y, atol=1e-6)  # float32 factors on a float64 base


def test_parameters_of_a_list_act_where_the_list_is_read() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompts = nn.ParameterList([nn.Parameter(torch.randn(3, 4)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.prompts[0].T + x @ self.prompts[1].T

    model, x = Prompted().double(), torch.randn(2, 4, dtype=torch.float64)
    with unchanged(model):
        lk.attach(model, Plan({"prompts.0": LayerPlan(rank=2)}, ("prompts.1",)))
        assert lk.probe(model, x) == ()
        y = model(x)
        perturb(model)
        assert not torch.allclose(model(x), y)
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        lk.detach(model)


def test_unfreeze_adds_parameters_that_learn() -> None:
    model = net()
    with unchanged(model):
        lk.attach(model, a_plan(model))
        y = model(IDS)
        unfreeze(model, "default", ("head", "embed.weight"))
        assert torch.equal(model(IDS), y)
        model(IDS).square().sum().backward()
        assert model.get_parameter("embed.trained_weight.default").grad is not None
        assert set(lk.collect(model).trained) == {"head.weight", "head.bias", "embed.weight"}
        unfreeze(model, "default", ("head",))
        assert set(lk.collect(model).trained) == {"head.weight", "head.bias", "embed.weight"}
        lk.detach(model)


def test_unfreeze_takes_the_whole_base_and_refuses_what_is_not_there() -> None:
    model = net()
    names = {name for name, _ in model.named_parameters()}
    lk.attach(model, a_plan(model))
    with pytest.raises(PlanError, match=r"trained 'haed' is neither a module nor a parameter; did you mean 'head'"):
        unfreeze(model, "default", ("haed",))
    with pytest.raises(AttachError, match="no adapter named 'defualt'"):
        unfreeze(model, "defualt", ("head",))
    unfreeze(model, "default", ("*",))
    assert set(lk.collect(model).trained) == names
    model(IDS).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".trained_" in n)


# ---------------------------------------------------------------- disabled


def test_disabled_gives_the_base_and_leaves_every_requires_grad() -> None:
    model = net()
    plain = model(IDS)
    lk.attach(model, adapted(), trainable=True)
    model.up.weight.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    moved = model(IDS)
    with lk.disabled(model):
        assert torch.equal(model(IDS), plain)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model(IDS), moved)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_disabled_switches_heads_off_too_and_back_on_after_an_error() -> None:
    model = net()
    plain = model(IDS)
    lk.attach(model, adapted(trained=["head"]))
    with lk.disabled(model):
        assert torch.equal(model(IDS), plain)
    with pytest.raises(ZeroDivisionError), lk.disabled(model):
        raise ZeroDivisionError
    assert active(model) == ("default",)


# ---------------------------------------------------------------- detaching


def test_detaching_everything_restores_the_model_bit_for_bit() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    model.up.register_forward_hook(lambda module, args, output: None)
    with unchanged(model):
        lk.attach(model, a_plan(model, trained=["head", "attn.out_proj.bias", "attn.in_proj_bias"]), name="one")
        lk.attach(model, adapted(1, trained=["head"]), name="two")
        lk.attach(model, lk.plan(model, method="dora", rank=1), name="three")
        perturb(model)
        lk.activate(model, ["two", "three"])
        model(IDS).sum().backward()
        with torch.no_grad():
            model.eval()(IDS)
        model.train()
        lk.detach(model, "two")
        lk.detach(model)
    assert all(p.grad is None for p in model.parameters())


def test_detaching_gives_back_requires_grad_as_it_was_before_training() -> None:
    model = net()
    model.embed.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    lk.attach(model, a_plan(model), name="one")
    lk.attach(model, a_plan(model), name="two")
    lk.detach(model, "one")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    lk.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_no_changed_weight_behind(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Ctrl-C ends a forward pass without its hooks: the next one must not add the update a second time."""
    model = net().eval()
    plain = model(IDS)
    before = snapshot(model)
    lk.attach(model, adapted())
    wanted = model(IDS)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(F, "multi_head_attention_forward", interrupt)
        with pytest.raises(error):
            model(IDS)
    assert torch.equal(model(IDS), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(F, "multi_head_attention_forward", interrupt)
        with pytest.raises(error):
            model(IDS)
    lk.detach(model)
    assert torch.equal(model(IDS), plain)
    assert snapshot(model) == before


# ---------------------------------------------------------------- the base


def test_an_adapter_made_for_other_weights_is_refused() -> None:
    other = net()
    with torch.no_grad():
        other.down.weight += 0.1
    with (
        unchanged(other),
        pytest.raises(
            BaseMismatchError, match=r"\(made on 'my/net'\) was made for other weights than this Net has; .* check_base"
        ),
    ):
        lk.attach(other, adapted().with_meta(base_name="my/net"))
    with pytest.raises(BaseMismatchError, match=r"\(made on 'my/net'\) .* pass that base"):
        lk.inspect(adapted().with_meta(base_name="my/net"), other)
    lk.attach(other, adapted(), check_base=False)


def test_only_the_adapted_weights_count_for_the_base() -> None:
    other = net()
    with torch.no_grad():
        other.head.weight += 0.1
    lk.attach(other, adapted())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_base_may_come_in_another_precision(dtype: torch.dtype) -> None:
    model = net(dtype)
    lk.attach(model, adapted())
    assert model.eval().to(torch.float32)(IDS).isfinite().all()


# ---------------------------------------------------------------- merging


def test_while_merged_nothing_else_can_be_done() -> None:
    """Acting twice, or a base that is not the base, would be silent."""
    model = net()
    lk.attach(model, adapted())
    lk.merge(model, keep=True)
    for verb in (
        lambda: lk.activate(model, "default"),
        lambda: lk.merge(model),
        lambda: lk.detach(model),
        lambda: lk.attach(model, adapted(), name="other"),
        lambda: unfreeze(model, "default", ("head",)),
        lambda: lk.disabled(model).__enter__(),
    ):
        with pytest.raises((AttachError, BaseMismatchError)):
            verb()
    assert lk.collect(model) == adapted()
    lk.unmerge(model)
    with pytest.raises(AttachError, match="nothing is merged with keep=True"):
        lk.unmerge(model)


def test_merging_what_is_broken_or_inactive_is_refused_before_anything_changes() -> None:
    model = net()
    lk.attach(model, a_plan(model, trained=["head"]))
    with torch.no_grad():
        model.get_parameter("up.adapters.default.a")[0, 0] = torch.nan
        model.get_parameter("head.trained_bias.default")[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AttachError) as caught:
        lk.merge(model)
    assert "nothing was merged: 2 faults" in str(caught.value)
    assert "the update of 'up' has NaN or infinite numbers" in str(caught.value)
    assert "the trained 'head.bias' has NaN or infinite numbers" in str(caught.value)
    assert all(torch.equal(tensor.nan_to_num(), before[n].nan_to_num()) for n, tensor in model.state_dict().items())
    lk.activate(model, [])
    with pytest.raises(AttachError, match="no adapter is active, so there is nothing to merge"):
        lk.merge(model)


def test_merging_a_bias_into_a_layer_without_one_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    lk.attach(model, Plan({"0": LayerPlan(rank=2)}))
    layer = lk.collect(model).layers["0"]
    lk.detach(model)
    factors = {**layer.factors, "bias": torch.ones(3)}
    lk.attach(model, Adapter({"0": AdaptedLayer("lora", "linear", (3, 4), factors, 2, layer.scale)}))
    x = torch.randn(2, 4)
    with lk.disabled(model):
        plain = model(x)
    assert torch.allclose(model(x), plain + layer.scale, atol=1e-5)
    with pytest.raises(AttachError, match="the update of '0' has a bias and the layer has none to merge it into"):
        lk.merge(model)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_merging_keeps_the_memory_format(memory: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double().to(memory_format=memory)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    lk.attach(model, lk.plan(model, rank=2, layers="all-conv"))
    perturb(model)
    y = model(x)
    lk.merge(model)
    assert torch.allclose(model(x), y, atol=1e-6)  # float32 factors on a float64 base
    assert model[0].weight.is_contiguous(memory_format=memory)


class Tied(nn.Module):
    """Reads tokens and answers with tokens, by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("layers", [["head"], ["embed"], ["embed", "head"]], ids="+".join)
def test_a_tied_weight_is_merged_only_if_that_is_meant_and_unmerged_exactly(layers: list[str]) -> None:
    model = Tied()
    base = model.head.weight.detach().clone()
    lk.attach(model, Plan({path: LayerPlan(rank=2) for path in layers}))
    perturb(model)
    with pytest.raises(AttachError, match="shares its weight with .* untie them, or pass tied=True"):
        lk.merge(model)
    assert torch.equal(model.head.weight, base)
    lk.merge(model, tied=True, keep=True)
    wanted = base.double()
    for path, layer in lk.collect(model).layers.items():
        delta = layer.scale * layer.factors["b"].double() @ layer.factors["a"].double()
        wanted = wanted + (delta if path == "head" else delta.T)
    assert torch.allclose(model.head.weight.double(), wanted, atol=1e-5)
    lk.unmerge(model)
    assert torch.equal(model.head.weight, base)


def test_a_tied_weight_that_is_trained_whole_stays_tied() -> None:
    model = Tied()
    with unchanged(model):
        lk.attach(model, Plan({}, ("*",)))
        learning = [p for p in model.parameters() if p.requires_grad]
        assert len(learning) == 1
        perturb(model)
        ids = torch.tensor([[1, 2, 3]])
        y = model(ids)
        y.sum().backward()
        assert learning[0].grad is not None
        adapter = lk.collect(model)
        lk.detach(model)
    lk.attach(model, adapter)
    assert torch.equal(model(ids), y)
    assert [name for name, _ in model.named_parameters() if "trained_" in name] == ["embed.trained_weight.default"]
    lk.merge(model)
    assert torch.allclose(model(ids), y, atol=1e-6)
    assert model.head.weight is model.embed.weight


def test_one_end_of_a_tied_weight_trained_alone_is_merged_only_if_that_is_meant() -> None:
    model = Tied()
    lk.attach(model, Plan({}, ("head",)))
    perturb(model)
    with pytest.raises(AttachError, match=r"'head\.weight' shares its weight with 'embed\.weight'"):
        lk.merge(model)
    value = lk.collect(model).trained["head.weight"]
    lk.merge(model, tied=True)
    assert torch.equal(model.embed.weight, value)


# ---------------------------------------------------------------- probing


class Reader(nn.Module):
    """Reads a weight instead of calling its layer, has one layer that never runs, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(F.linear(self.called(x), self.read.weight, self.read.bias)))


def test_probe_names_every_layer_whose_update_never_ran() -> None:
    model, x = Reader(), torch.randn(6, 4)
    lk.attach(model, lk.plan(model, rank=2))
    assert lk.probe(model, x) == ("read", "idle")
    assert lk.probe(model, [x]) == ("read", "idle")
    assert lk.probe(model, {"x": x}) == ("read", "idle")
    with pytest.raises(
        NoEffectError, match=r"2 of 3 layers never ran in the probe batch: 'read', 'idle'; .*drive='weight'"
    ):
        refuse_unseen(model, lk.probe(model, x))
    refuse_unseen(model, ())


def test_the_weight_drive_reaches_a_weight_that_is_read_from_outside() -> None:
    model, x = Reader().double().eval(), torch.randn(6, 4, dtype=torch.float64)
    plain = model(x)
    with unchanged(model):
        lk.attach(model, lk.plan(model, rank=2, layers=["called", "read"]), drive="weight")
        assert lk.probe(model, x) == ()
        assert torch.allclose(model(x), plain)
        perturb(model)
        y = model(x)
        assert not torch.allclose(y, plain)
        with unchanged(model):
            lk.merge(model, keep=True)
            assert torch.allclose(model(x), y, atol=1e-6)  # float32 factors
            lk.unmerge(model)
        lk.detach(model)


def test_probe_leaves_mode_statistics_random_numbers_and_gradients() -> None:
    model, x = Reader(), torch.randn(6, 4)
    lk.attach(model, lk.plan(model, rank=2, layers="called"))
    random = torch.random.get_rng_state()
    with unchanged(model):
        assert lk.probe(model, x) == ()
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_probe_looks_at_active_adapters_only_and_ends_after_an_error() -> None:
    model, x = Reader(), torch.randn(6, 4)
    lk.attach(model, lk.plan(model, rank=2))
    lk.activate(model, [])
    assert lk.probe(model, x) == ()
    lk.activate(model, "default")
    with pytest.raises(RuntimeError), recorded(model):
        model(torch.randn(6, 5))
    assert lk.probe(model, x) == ("read", "idle")


# ---------------------------------------------------------------- what is kept between calls


def test_what_dora_keeps_between_calls_follows_every_change_of_the_factors() -> None:
    """The row lengths are kept while nothing changes: each way of changing a tensor has to be seen."""
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    lk.attach(model, lk.plan(model, rank=2, method="dora"))
    b = model.get_parameter("0.adapters.default.b")
    x = torch.randn(3, 6)

    def check() -> None:
        with torch.no_grad():
            kept = model(x.to(model[0].weight.dtype))
        fresh = model(x.to(model[0].weight.dtype))  # with gradients nothing is kept
        assert torch.allclose(kept, fresh, atol=1e-5)

    def look() -> None:
        with torch.no_grad():
            model(x.to(model[0].weight.dtype))

    look()
    with torch.no_grad():
        b.add_(1)  # as an optimizer does
    check()
    look()
    b.data = torch.randn_like(b)  # as vector_to_parameters does
    check()
    look()
    b.data.add_(1)  # as averaging of weights does; no version tells, but evaluation begins with eval()
    model.eval()
    check()
    look()
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})
    check()
    look()
    model.double()
    check()
    look()
    with torch.no_grad():
        model[0].weight.mul_(3)
    check()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_inference_mode_attaches_and_answers_the_same(method: str) -> None:
    model = net()
    with torch.inference_mode():
        lk.attach(model, a_plan(model, method=method) if method != "ia3" else lk.plan(model, method="ia3"))
        first, second = model(IDS), model(IDS)
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(model(IDS), first)


def test_autocast_computes_in_half_precision_like_the_base_does() -> None:
    model = net()
    lk.attach(model, adapted())
    exact = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(IDS)
    assert half.dtype == torch.bfloat16
    gap = float(((half.float() - exact).abs().max() / exact.abs().max()).detach())
    assert gap < 0.1  # bfloat16 rounds at 2^-8, some ten times in six layers


# ---------------------------------------------------------------- parts and wrappers


def test_a_part_of_an_attached_model_is_told_from_the_model() -> None:
    """Layer paths begin where the adapter was attached: a part has others, and answers would be wrong."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    lk.attach(model, lk.plan(model, rank=1))
    for verb in (
        lk.collect,
        lk.detach,
        lk.merge,
        active,
        lambda part: lk.attach(part, lk.plan(part, rank=1), name="x"),
    ):
        with unchanged(model), pytest.raises(AttachError, match="adapters were attached to another module"):
            verb(model[0])
    lk.detach(model)
    lk.attach(model[0], lk.plan(model[0], rank=1))
    with unchanged(model), pytest.raises(AttachError, match="adapters were attached to another module"):
        lk.attach(model, lk.plan(model, rank=1), name="x")


def test_verbs_see_through_wrappers() -> None:
    model = net()
    lk.attach(model, adapted(), trainable=True)
    wrapped = torch.compile(model, backend="eager")
    lk.activate(wrapped, [])
    assert active(model) == ()
    lk.activate(wrapped, "default")
    assert lk.collect(wrapped) == adapted()
    lk.detach(wrapped)
    assert [*model.state_dict()] == [*net().state_dict()]
    with pytest.raises(AttachError):
        active(model)


def test_distributed_data_parallel_trains_the_factors_and_is_seen_through(tmp_path: object) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, single = net(), net()
        for m in (model, single):
            lk.attach(m, a_plan(m, trained=["head"]))
            perturb(m)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(IDS).square().sum().backward()
        single(IDS).square().sum().backward()
        for (name, p), (_, q) in zip(model.named_parameters(), single.named_parameters()):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.allclose(p.grad, q.grad), name
        assert lk.collect(wrapped) == lk.collect(single)
        with lk.disabled(wrapped):
            assert torch.equal(wrapped(IDS), net()(IDS))
        lk.detach(wrapped)
        assert list(model.state_dict()) == list(net().state_dict())
    finally:
        dist.destroy_process_group()


def test_a_copy_of_the_model_has_adapters_of_its_own() -> None:
    model = net()
    lk.attach(model, adapted(), name="en")
    twin = copy.deepcopy(model)
    lk.activate(twin, [])
    assert active(model) == ("en",)
    lk.detach(twin)
    assert attached(model) == ("en",)
    assert [*twin.state_dict()] == [*net().state_dict()]


def test_a_model_with_adapters_prints_itself() -> None:
    model = net()
    lk.attach(model, adapted(method="dora"))
    assert "dora, rank=2, scale=8" in repr(model)
    assert "drive=weight" in repr(model)


def test_every_error_of_this_room_is_a_lorakit_error() -> None:
    errors = [AdapterError, AttachError, BaseMismatchError, NoEffectError, PlanError, UsageError]
    assert all(issubclass(error, LorakitError) for error in errors)
    assert sys.modules["lorakit.attach"] is not lk.attach, "the verb is the function, the room is the module"


def test_adapters_that_train_both_ends_and_one_end_of_a_tied_weight_do_not_mix() -> None:
    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    plain = model(ids)
    with unchanged(model):
        lk.attach(model, Plan({}, ("*",)), name="both")
        lk.attach(model, Plan({}, ("head",)), name="one")
        perturb(model)
        answers = {}
        for name in ("both", "one"):
            lk.activate(model, name)
            value = lk.collect(model, name).trained
            embed = value["embed.weight"] if name == "both" else model.embed.weight
            answers[name] = embed[ids] @ value["head.weight"].T
            assert torch.allclose(model(ids), answers[name], atol=1e-6)
        lk.detach(model, "both")
        lk.activate(model, "one")
        assert torch.allclose(model(ids), answers["one"], atol=1e-6)
        lk.detach(model)
    assert torch.equal(model(ids), plain)
