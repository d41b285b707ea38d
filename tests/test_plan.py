"""Plans as text: what is written is read back, and what is wrong is said all at once."""

import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import PlanError
from lorakit.plan import LayerPlan, Plan, resolve_scale

numbers = st.floats(1e-6, 1e6) | st.integers(1, 10**6)
rules = st.builds("{}/{}".format, st.floats(1e-3, 1e4) | st.integers(1, 999), st.sampled_from(["r", "sqrt(r)"]))
layer_plans = st.builds(
    LayerPlan, method=st.text(), rank=st.integers(0, 10**4), scale=numbers | rules, start=st.text(max_size=9)
)
plans = st.builds(
    Plan,
    layers=st.dictionaries(st.text(), layer_plans, max_size=6),
    trained=st.lists(st.text(), max_size=3).map(tuple),
    note=st.text(),
)


@given(plans)
def test_a_plan_is_read_back_as_it_was_written(plan: Plan) -> None:
    text = plan.toml()
    assert Plan.parse(text) == plan
    assert list(Plan.parse(text).layers) == list(plan.layers), "the order of the layers is the order of the model"
    assert Plan.parse(text).toml() == Plan.parse(Plan.parse(text).toml()).toml()


@given(plans)
def test_the_file_is_utf_8_that_any_toml_reader_understands(plan: Plan) -> None:
    data = tomllib.loads(plan.toml().encode("utf-8").decode("utf-8"))
    assert data["version"] == 1
    assert list(data["layers"]) == list(plan.layers)


def test_a_plan_file_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = Plan(
        {"h.0.attn": LayerPlan(rank=4), "h.1.attn": LayerPlan("dora", 8, 2.0, "pissa")}, ("head",), note="by hand"
    )
    plan.save(tmp_path / "new" / "plan.toml")
    assert Plan.load(tmp_path / "new" / "plan.toml") == plan
    assert "# by hand" in (tmp_path / "new" / "plan.toml").read_text()


def test_a_layer_says_only_what_differs_from_the_commonest() -> None:
    plan = Plan({"a": LayerPlan(rank=4), "b": LayerPlan(rank=4), "c": LayerPlan(rank=2, start="pissa")})
    lines = plan.toml().splitlines()
    assert "rank = 4" in lines
    assert '"a" = {}' in lines
    assert '"c" = { rank = 2, start = "pissa" }' in lines


def test_layers_inherit_the_default_table_and_that_the_built_in_one() -> None:
    plan = Plan.parse('[default]\nrank = 3\n[layers]\n"x" = {}\n"y" = { rank = 5, scale = 2 }\n')
    assert plan.layers["x"] == LayerPlan(rank=3)
    assert plan.layers["y"] == LayerPlan(rank=5, scale=2)
    assert Plan.parse("") == Plan({})


# ---------------------------------------------------------------- scales


@given(st.floats(0.01, 100), st.integers(1, 512))
def test_scale_rules_are_alpha_over_r_and_alpha_over_its_root(alpha: float, rank: int) -> None:
    assert resolve_scale(f"{alpha}/r", rank) == pytest.approx(alpha / rank)
    assert resolve_scale(f" {alpha} / sqrt(r) ", rank) == pytest.approx(alpha / math.sqrt(rank))
    assert resolve_scale(-alpha, rank) == -alpha
    assert LayerPlan(rank=rank, scale=f"{alpha}/r").scale_value == pytest.approx(alpha / rank)


@pytest.mark.parametrize("rule", ["1e2/r", "1e+2/r", "100./r", "100/ r"])
def test_numbers_in_rules_are_written_in_any_usual_way(rule: str) -> None:
    assert resolve_scale(rule, 4) == 25.0


@pytest.mark.parametrize(
    "rule", ["", "r", "16", "16/q", "1.2.3/r", "./r", "16/r/2", "-16/r", "alpha/r", True, None, [1]]
)
def test_what_is_no_scale_is_refused_with_an_example(rule: object) -> None:
    with pytest.raises(PlanError, match=r'use 2\.0, "16/r" or "16/sqrt\(r\)"'):
        resolve_scale(rule, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [0, 0.0, math.inf, math.nan, "0/r", "1e999/r"])
def test_a_scale_must_be_finite_and_not_zero(rule: object) -> None:
    with pytest.raises(PlanError, match="must be finite and not 0"):
        resolve_scale(rule, 4)  # type: ignore[arg-type]


def test_a_rule_at_rank_zero_is_one() -> None:
    assert resolve_scale("16/r", 0) == 1.0


# ---------------------------------------------------------------- faults


def test_every_fault_of_a_file_is_said_at_once() -> None:
    text = """
        version = 2
        trained = [1]
        laeyrs = {}
        [default]
        rnak = 4
        [layers]
        "a" = { rank = -1 }
        "b" = { rank = 2.5 }
        "c" = { scale = "16/x" }
        "d" = 3
        "e" = { strat = "pissa" }
        "f" = { rank = true }
        "g" = { method = 1 }
    """
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "plan.toml")
    message = str(caught.value)
    assert message.startswith("plan.toml: 11 faults:")
    for words in [
        "version is 2; this lorakit reads version 1",
        "'trained' must be a list of module or parameter names",
        "unknown key 'laeyrs'; did you mean 'layers'?",
        "[default] has an unknown key 'rnak'; did you mean 'rank'?",
        "'a': rank is -1; it must be 0 or more",
        "'b': rank is 2.5; it must be int",
        "'c': scale '16/x' is neither a number nor a rule",
        "'d' must be a table such as { rank = 8 }, not 3",
        "'e' has an unknown key 'strat'; did you mean 'start'?",
        "'f': rank is True; it must be int",
        "'g': method is 1; it must be str",
    ]:
        assert words in message


def test_more_faults_than_fit_are_counted() -> None:
    text = "[layers]\n" + "\n".join(f'"{n}" = {{ rank = -1 }}' for n in range(30))
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert "30 faults" in str(caught.value)
    assert "and 18 more" in str(caught.value)


def test_a_fault_in_the_default_table_is_said_once() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse('[default]\nscale = "x"\n[layers]\n"a" = {}\n"b" = {}\n', "p")
    assert str(caught.value).count("scale 'x'") == 1


@pytest.mark.parametrize("text", ["[layers", 'a = "\x00"', '[layers]\n"a" = {}\n"a" = {}'])
def test_what_is_not_toml_is_said_to_be_so(text: str) -> None:
    with pytest.raises(PlanError, match="plan is not valid TOML"):
        Plan.parse(text)


@pytest.mark.parametrize("text", ["layers = 3", "default = 3"])
def test_a_table_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="must be a table"):
        Plan.parse(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read plan '.*missing\.toml'"):
        Plan.load(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'trained = ["\xe9"]')
    with pytest.raises(PlanError, match=r"cannot read plan '.*latin\.toml'"):
        Plan.load(tmp_path / "latin.toml")


# ---------------------------------------------------------------- values


def test_with_layer_changes_one_layer_and_leaves_the_plan() -> None:
    plan = Plan({"a": LayerPlan(), "b": LayerPlan()}, ("head",), note="n")
    changed = plan.with_layer("a", rank=2)
    assert changed.layers == {"a": LayerPlan(rank=2), "b": LayerPlan()}
    assert (changed.trained, changed.note) == (("head",), "n")
    assert plan.layers["a"] == LayerPlan()


def test_with_layer_names_the_nearest_layer() -> None:
    with pytest.raises(PlanError, match=r"'h\.0\.atn' is not in the plan; did you mean 'h\.0\.attn'\?"):
        Plan({"h.0.attn": LayerPlan()}).with_layer("h.0.atn", rank=2)


def test_repr_tells_how_many_layers_have_which_rank() -> None:
    plan = Plan({"a": LayerPlan(), "b": LayerPlan("dora", 4), "c": LayerPlan(rank=4)}, ("head",))
    assert repr(plan) == "Plan(3 layers, dora+lora, rank 4 x 2, 8 x 1, trained ['head'])"
    assert repr(Plan({})) == "Plan(0 layers, no method, rank none)"
