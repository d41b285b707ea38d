"""combine: the sum is the sum, whatever the ranks; other rules are what their papers say, and what peft computes."""

import json

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
import tiny
from lorakit.adapter import Adapter
from lorakit.algebra.merges import RULES, How, elected, rule_of
from lorakit.cli import main
from lorakit.errors import BaseMismatchError, PlanError, UsageError
from lorakit.method import layer_update

ELEVEN = [
    *("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).double()


def adapter(rank: int, seed: int, model: nn.Module | None = None, **rules: object) -> Adapter:
    model = model or net()
    made = lk.init(model, lk.plan(model, rank=rank, **rules), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in made.layers.values():
        for factor in layer.factors.values():
            factor.add_(0.3 * torch.randn(factor.shape, generator=generator))
    return made.to(dtype=torch.float64)


def delta(one: Adapter, path: str) -> Tensor:
    if path not in one.layers:
        return torch.zeros((), dtype=torch.float64)
    update = layer_update(one.layers[path])
    return update.scale * (update.b @ update.a)


def same_delta(found: Adapter, path: str, wanted: Tensor, exact: float = 1e-10) -> None:
    assert float((delta(found, path) - wanted).abs().max()) <= exact * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (2.0, 0.0), (0.25, 0.75)])
def test_the_sum_is_the_sum_of_deltas_of_other_ranks_scales_and_starts(weights):
    one, two = adapter(4, 1, scale=2.0), adapter(3, 2, scale="16/sqrt(r)", start="pissa")
    for how in ("linear", "cat"):
        found = lk.combine({"one": (one, weights[0]), "two": (two, weights[1])}, how)
        for path in one.layers:
            same_delta(found, path, weights[0] * delta(one, path) + weights[1] * delta(two, path))
            assert found.layers[path].rank == (4 if weights[1] == 0 else min(4 + 6, *found.layers[path].matrix))


def test_it_commutes_associates_and_takes_away():
    one, two, three = adapter(2, 1), adapter(3, 2), adapter(1, 3)
    whole = lk.combine({"1": (one, 1.0), "2": (two, 2.0), "3": (three, -0.5)})
    other = lk.combine({"3": (three, -0.5), "2": (two, 2.0), "1": (one, 1.0)})
    nested = lk.combine({"x": (lk.combine({"1": (one, 1.0), "2": (two, 2.0)}), 1.0), "3": (three, -0.5)})
    back = lk.combine({"whole": (whole, 1.0), "2": (two, -2.0), "3": (three, 0.5)})
    for path in one.layers:
        same_delta(other, path, delta(whole, path))
        same_delta(nested, path, delta(whole, path))
        same_delta(back, path, delta(one, path))
        assert back.layers[path].rank == 2  # what was taken away costs no rank


def test_layers_that_only_one_has_and_those_that_a_model_lacks():
    one, two = adapter(2, 1, layers=["0"]), adapter(2, 2, layers=["2"])
    found = lk.combine({"one": (one, 0.5), "two": (two, 2.0)})
    same_delta(found, "0", 0.5 * delta(one, "0"))
    same_delta(found, "2", 2.0 * delta(two, "2"))
    model = net()
    lk.attach(model, found)
    with pytest.raises(BaseMismatchError):
        lk.attach(net(1), found)
    strange = nn.Sequential(nn.Linear(12, 9)).double()
    with pytest.raises(BaseMismatchError, match=r"'0' is \(20, 12\) in 'one' and \(9, 12\) in 'b'"):
        lk.combine({"one": (one, 1.0), "b": (adapter(2, 1, strange), 1.0)})
    with pytest.raises(BaseMismatchError, match="'one' and 'b' were made on different weights"):
        lk.combine({"one": (one, 1.0), "b": (adapter(2, 1, net(1), layers=["0"]), 1.0)})


def test_truncated_it_is_the_best_of_its_rank_and_the_error_is_told():
    one, two = adapter(4, 1), adapter(3, 2)
    pair = {"one": (one, 1.0), "two": (two, 1.0)}
    for found, rank in ((lk.combine(pair, "svd"), 4), (lk.combine(pair, rank=2), 2)):
        lost = total = 0.0
        for path in one.layers:
            u, s, vh = torch.linalg.svd(delta(one, path) + delta(two, path))
            same_delta(found, path, u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank])
            lost, total = lost + float(s[rank:].square().sum()), total + float(s.square().sum())
        assert found.meta["truncated"]["error"] == pytest.approx((lost / total) ** 0.5)
    assert lk.combine(pair, keep=0.4).n_parameters <= 0.4 * lk.combine(pair).n_parameters


@pytest.mark.parametrize("name", [name for name in RULES if name != "linear"])
def test_a_rule_on_whole_deltas_is_its_dense_reference(name):
    one, two = adapter(4, 1), adapter(3, 2)
    found = lk.combine({"one": (one, 0.6), "two": (two, 0.9)}, f"{name}_svd", rank=7, density=0.4, seed=5)
    by = How(0.4, "total", torch.Generator().manual_seed(5))
    for path in one.layers:
        stack = torch.stack([delta(one, path), delta(two, path)])
        dense = RULES[name](stack, torch.tensor([0.6, 0.9], dtype=torch.float64), by)
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        same_delta(found, path, u[:, :7] @ torch.diag(s[:7]) @ vh[:7])


@pytest.mark.parametrize("name", list(RULES))
def test_between_common_bases_nothing_is_lost_and_the_rank_is_bounded(name):
    one, two = adapter(2, 1), adapter(2, 2)
    found = lk.combine({"one": (one, 0.6), "two": (two, 0.9)}, name, density=1.0)
    for path in one.layers:
        assert found.layers[path].rank <= 4
        if name not in ("ties", "dare_ties"):  # with every number kept these are the sum
            same_delta(found, path, 0.6 * delta(one, path) + 0.9 * delta(two, path))
    alone = lk.combine({"one": (one, 1.0)}, name, density=1.0)
    for path in one.layers:
        same_delta(alone, path, delta(one, path))


def test_a_sign_is_elected_by_weight_or_by_heads():
    stack = torch.tensor([[3.0, -1.0], [-1.0, -1.0], [-1.0, 2.0]])
    even = torch.ones(3)
    total = elected(stack, even, How(1.0, "total", torch.Generator()))
    assert total.tolist() == [3.0, 2.0]  # 0 in all counts as positive
    heads = elected(stack, even, How(1.0, "frequency", torch.Generator()))
    assert heads.tolist() == [-1.0, -1.0]
    against = elected(stack[:2], torch.tensor([1.0, -1.0]), How(1.0, "total", torch.Generator()))
    assert against.tolist() == [2.0, 1.0]


def peft_sum(folder, adapters, how, **more) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = tiny.llama().eval()
    for name, (one, _) in adapters.items():
        one.save(folder / name)
    first, *others = adapters
    wrapped = peft.PeftModel.from_pretrained(model, str(folder / first), adapter_name=first)
    for name in others:
        wrapped.load_adapter(str(folder / name), name)
    weights = [weight for _, weight in adapters.values()]
    wrapped.add_weighted_adapter(list(adapters), weights, "sum", combination_type=how, **more)
    wrapped.set_adapter("sum")
    return model, wrapped


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("how", [name for name in ELEVEN if name.endswith("svd") and "dare" not in name])
def test_peft_computes_the_same_where_it_works_on_whole_deltas(how, tmp_path):
    torch.manual_seed(0)
    model = tiny.llama().eval()
    adapters = {}
    for k, weight in ((1, 0.7), (2, 0.5)):
        one = adapter(4, k, model, layers=["q_proj", "down_proj"], scale=2.0).to(dtype=torch.float32)
        adapters[f"a{k}"] = (one, weight)
    more = {} if how == "svd" else {"density": 0.3}
    _, theirs = peft_sum(tmp_path, adapters, how, svd_rank=4, **more)
    found = lk.combine(adapters, how, rank=4, **more)
    for path in found.layers:
        wanted = theirs.get_submodule(f"base_model.model.{path}").get_delta_weight("sum")
        torch.testing.assert_close(delta(found, path), wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("how", ELEVEN)
def test_pefts_eleven_names_are_known_and_their_results_are_read_by_peft(how, tmp_path):
    torch.manual_seed(0)
    model = tiny.llama().eval()
    adapters = {f"a{k}": (adapter(2, k, model).to(dtype=torch.float32), 0.5) for k in (1, 2)}
    found = lk.combine(adapters, how, density=0.5)
    found.save(tmp_path / "sum")
    assert lk.load(tmp_path / "sum") == found
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "sum"))
    path = next(iter(found.layers))
    wanted = theirs.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
    torch.testing.assert_close(delta(found, path), wanted, atol=1e-5, rtol=1e-4)
    assert rule_of(how)[0] in RULES


def test_convolutions_gpt2s_layers_embeddings_and_stacks_of_experts():
    torch.manual_seed(0)
    cases = [
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), ["0"]),
        (nn.Sequential(nn.Embedding(9, 6)), ["0"]),
        (tiny.gpt2(), None),
        (tiny.mixtral(), ["re:.*experts.*"]),
    ]
    for model, layers in cases:
        one, two = (adapter(2, k, model, layers=layers, clip_rank=True) for k in (1, 2))
        found = lk.combine({"one": (one, 0.5), "two": (two, -1.5)})
        assert found.layers.keys() == one.layers.keys()
        for path in one.layers:
            same_delta(found, path, 0.5 * delta(one, path) - 1.5 * delta(two, path))
        lk.attach(model, found.to(dtype=torch.float32))


def test_biases_add_up_and_heads_are_asked_for():
    model = net()
    one, two = (adapter(2, k, model, trained=["2.bias"]) for k in (1, 2))
    for k, made in enumerate((one, two)):
        made.trained["2.bias"].add_(k)  # type: ignore[index]
    pair = {"one": (one, 1.0), "two": (two, 3.0)}
    with pytest.raises(UsageError, match="was trained whole by one, two and differs"):
        lk.combine(pair)
    assert "2.bias" not in lk.combine(pair, trained="none").trained
    assert torch.equal(lk.combine(pair, trained="two").trained["2.bias"], two.trained["2.bias"])
    mean = lk.combine(pair, trained="mean").trained["2.bias"]
    torch.testing.assert_close(mean, 0.25 * one.trained["2.bias"] + 0.75 * two.trained["2.bias"])
    with pytest.raises(UsageError, match="add up to 0"):
        lk.combine({"one": (one, 1.0), "two": (two, -1.0)}, trained="mean")
    with pytest.raises(UsageError, match="did you mean 'two'"):
        lk.combine(pair, trained="twoo")
    same = {"one": (one, 1.0), "two": (one, 1.0)}
    assert torch.equal(lk.combine(same).trained["2.bias"], one.trained["2.bias"])


@pytest.mark.parametrize(
    ("how", "more", "words"),
    [
        ("tis", {}, "did you mean 'ties'"),
        ("linear_svd", {}, None),
        ("ties", {"density": 0.0}, "density is 0.0"),
        ("ties", {"sign": "sum"}, "elected by 'sum'"),
        ("linear", {"rank": 2, "keep": 0.5}, "rank and keep are given"),
    ],
)
def test_what_cannot_be_asked_for_is_said(how, more, words):
    pair = {"one": (adapter(2, 1), 1.0), "two": (adapter(2, 2), 1.0)}
    if words is None:
        assert lk.combine(pair, how, **more).layers["0"].rank == 2
        return
    with pytest.raises(UsageError, match=words):
        lk.combine(pair, how, **more)


def test_what_does_not_add_up_is_refused():
    one = adapter(2, 1)
    with pytest.raises(UsageError, match="nothing to combine"):
        lk.combine({})
    with pytest.raises(UsageError, match="the weight of 'one' is nan"):
        lk.combine({"one": (one, float("nan"))})
    with pytest.raises(PlanError, match="of 'two' 2 faults"):
        lk.combine({"one": (one, 1.0), "two": (adapter(2, 2, method="dora"), 1.0)})
    model = tiny.gpt2()
    prompted = lk.init(model, lk.plan(model, soft_prompt="soft:2"))
    with pytest.raises(PlanError, match="prompts do not add up"):
        lk.combine({"p": (prompted, 1.0)})


# ---------------------------------------------------------------- compare


def test_two_adapters_are_compared_as_their_dense_deltas_would_be():
    one, two = adapter(4, 1), adapter(3, 2)
    found = lk.compare(one, two)
    dense = [torch.cat([delta(x, path).flatten() for path in one.layers]) for x in (one, two)]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)))
    for layer in found.layers:
        d1, d2 = delta(one, layer.path), delta(two, layer.path)
        assert layer.norms == pytest.approx((float(d1.norm()), float(d2.norm())))
        assert layer.cosine == pytest.approx(float((d1 * d2).sum() / (d1.norm() * d2.norm())))
        (u1, _, v1), (u2, _, v2) = torch.linalg.svd(d1), torch.linalg.svd(d2)
        assert layer.outputs == pytest.approx(float((u1[:, :4].mT @ u2[:, :3]).square().sum()) / 3)
        assert layer.inputs == pytest.approx(float((v1[:4] @ v2[:3].mT).square().sum()) / 3)
        assert layer.chance_inputs == 4 / d1.shape[1]
    same = lk.compare(one, lk.combine({"x": (one, -3.0)}))
    assert same.cosine == pytest.approx(-1.0)
    assert all(layer.outputs == pytest.approx(1.0) and layer.conflict == pytest.approx(1.0) for layer in same.layers)
    assert "cosine -1.000" in str(same)


def test_experts_and_layers_of_one_alone_are_compared():
    torch.manual_seed(0)
    model = tiny.mixtral()
    one, two = (adapter(2, k, model, layers=["re:.*experts.*"], clip_rank=True) for k in (1, 2))
    assert all(-1 <= layer.cosine <= 1 and 0 <= layer.outputs <= 1 for layer in lk.compare(one, two).layers)
    assert lk.compare(one, one).cosine == pytest.approx(1.0)
    whole, part = adapter(2, 1), adapter(2, 2, layers=["0"])
    assert lk.compare(whole, part).alone == (1, 0)
    with pytest.raises(UsageError, match="no layer in common; the first changes '0', the second '2'"):
        lk.compare(part, adapter(2, 1, layers=["2"]))
    with pytest.raises(PlanError, match="'0' is dora"):
        lk.compare(part, adapter(2, 1, method="dora"))
    with pytest.raises(UsageError, match=r"'0' is \(20, 12\) and \(9, 12\)"):
        lk.compare(part, adapter(2, 1, nn.Sequential(nn.Linear(12, 9)).double()))


def test_the_command_line_combines_and_compares(tmp_path, capsys):
    def told(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    one, two = adapter(4, 1), adapter(3, 2)
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    code, out, err = told("combine", f"{tmp_path}/one:0.5", tmp_path / "two", "--out", tmp_path / "sum", "--json")
    assert code == 0, err
    assert json.loads(out)["cosines"][0][2] == pytest.approx(lk.compare(one, two).cosine)
    for path in one.layers:
        same_delta(lk.load(tmp_path / "sum"), path, 0.5 * delta(one, path) + delta(two, path))
    code, out, _ = told("combine", f"{tmp_path}/one:-1", tmp_path / "two", "--rank", "2", "--out", tmp_path / "s2")
    assert (code, "truncated: all deltas together changed by" in out) == (0, True)
    code, out, _ = told("compare", tmp_path / "one", tmp_path / "two")
    assert (code, "all deltas together: cosine" in out) == (0, True)
    for words, reason in (
        (["combine", f"{tmp_path}/one:much", "--out", "x"], "'much' behind"),
        (["combine", f"{tmp_path}/one", f"{tmp_path}/one", "--out", "x"], "is given twice"),
        (["combine", f"{tmp_path}/one", "--out", tmp_path / "sum"], "exists already"),
        (["combine", f"{tmp_path}/none:1", "--out", "x"], "not an adapter directory"),
    ):
        code, _, err = told(*words)
        assert (code > 0, reason in err) == (True, True), err
