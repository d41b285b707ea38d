"""The adapter as a value and as a directory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.adapter import CONFIG, NOTES, WEIGHTS, Adapter
from lorakit.errors import AdapterError, LorakitError
from lorakit.testing import CASES, Trial, perturb
from lorakit.update import AdaptedLayer


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def made(method: str = "lora", **rules: object) -> Adapter:
    base = model()
    lk.attach(base, lk.plan(base, rank=2, method=method, **rules))  # type: ignore[arg-type]
    perturb(base)
    return lk.collect(base)


def mixed() -> Adapter:
    lora, dora = made(), made("dora")
    return Adapter({"0": lora.layers["0"], "2": dora.layers["2"]}, {}, {"base_name": "gpt2"})


VALUES: dict[str, Callable[[], Adapter]] = {
    "lora": made,
    "dora": lambda: made("dora"),
    "ia3": lambda: made("ia3"),
    "pissa": lambda: made(start="pissa"),
    "biases": lambda: made(bias="adapted"),
    "head": lambda: made(layers="0", trained=["2"]),
    "only trained": lambda: made(layers=[], trained=["2"]),
    "mixed": mixed,
    "bfloat16": lambda: made().to(dtype=torch.bfloat16),
    "float64": lambda: made().to(dtype=torch.float64),
    "rank-stable": lambda: made(scale="16/sqrt(r)"),
    "an odd scale": lambda: made(scale=1 / 3),
    "several ranks": lambda: made(layers={"0": 1, "2": 3}),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    adapter = VALUES[name]()
    adapter.save(tmp_path / "adapter")
    loaded = lk.load(tmp_path / "adapter")
    assert loaded == adapter
    assert dict(loaded.meta) == dict(adapter.meta)
    assert {p: layer.start for p, layer in loaded.layers.items()} == {
        p: layer.start for p, layer in adapter.layers.items()
    }
    loaded.save(tmp_path / "again")
    for file in (NOTES, CONFIG):  # not the weights: safetensors writes its metadata in any order
        if (tmp_path / "adapter" / file).exists():
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == load_file(tmp_path / "adapter" / WEIGHTS).keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_what_is_saved_is_loaded_for_every_kind(tmp_path: Path, case: object) -> None:
    adapter = lk.collect(Trial("lora", "kaiming", case, "weight").attached(torch.float32)[0])  # type: ignore[arg-type]
    adapter.save(tmp_path)
    assert lk.load(tmp_path) == adapter


def test_factors_keep_their_dtype_on_disk(tmp_path: Path) -> None:
    made().to(dtype=torch.bfloat16).save(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}


def test_saving_does_not_depend_on_where_the_tensors_lie_in_memory(tmp_path: Path) -> None:
    adapter = made()
    layer = adapter.layers["0"]
    strided = AdaptedLayer(
        "lora",
        "linear",
        layer.shape,
        {k: t.T.contiguous().T for k, t in layer.factors.items()},
        layer.rank,
        layer.scale,
    )
    same = Adapter({**adapter.layers, "0": strided})
    assert same == adapter
    same.save(tmp_path)
    assert lk.load(tmp_path) == adapter


# ---------------------------------------------------------------- names on disk


@pytest.mark.parametrize("name", ["mixed", "only trained"])
def test_without_a_peft_twin_names_are_our_own_and_nothing_misreads_them(tmp_path: Path, name: str) -> None:
    VALUES[name]().save(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert not any(key.startswith("base_model.") for key in load_file(tmp_path / WEIGHTS))


def test_the_model_itself_as_a_layer_has_no_peft_name(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    lk.attach(layer, lk.plan(layer, rank=2))
    lk.collect(layer).save(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert lk.load(tmp_path) == lk.collect(layer)


def test_saving_over_a_peft_adapter_takes_its_configuration_away(tmp_path: Path) -> None:
    made().save(tmp_path)
    assert (tmp_path / CONFIG).exists()
    (tmp_path / "README.md").write_text("by hand")
    mixed().save(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert (tmp_path / "README.md").read_text() == "by hand"
    assert lk.load(tmp_path) == mixed()


def test_a_failed_save_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path / "adapter")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorakit.files.save_file", fail)
    with pytest.raises(LorakitError, match="No space left on device"):
        made("dora").save(tmp_path / "adapter")
    monkeypatch.undo()
    assert lk.load(tmp_path / "adapter") == made()
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


# ---------------------------------------------------------------- refusals


def broken(value: float) -> Adapter:
    adapter = made()
    adapter.layers["2"].factors["a"][0, 0] = value
    return adapter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_neither_written_nor_read(tmp_path: Path, value: float) -> None:
    with pytest.raises(AdapterError, match="NaN or infinite numbers in '2' a"):
        broken(value).save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    made().save(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    next(iter(tensors.values()))[0] = value
    (tmp_path / "adapter" / NOTES).unlink()
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        lk.load(tmp_path / "adapter")


def test_a_broken_trained_parameter_or_scale_is_refused(tmp_path: Path) -> None:
    adapter = made(layers="0", trained=["2"])
    adapter.trained["2.bias"][0] = torch.nan
    with pytest.raises(AdapterError, match=r"NaN or infinite numbers in '2\.bias'"):
        adapter.save(tmp_path / "a")
    layer = made().layers["0"]
    scale = float("inf")
    unbounded = Adapter({"0": AdaptedLayer("lora", "linear", layer.shape, layer.factors, layer.rank, scale)})
    with pytest.raises(AdapterError, match="NaN or infinite numbers in '0' scale"):
        unbounded.save(tmp_path / "a")


def test_an_empty_adapter_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="without layers is not written"):
        Adapter({}).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_notes_and_weights_of_different_adapters_are_told_apart(tmp_path: Path) -> None:
    made().save(tmp_path / "one")
    made(scale=4.0).save(tmp_path / "two")
    (tmp_path / "one" / NOTES).write_bytes((tmp_path / "two" / NOTES).read_bytes())
    with pytest.raises(AdapterError, match=r"do not belong together .* delete lorakit\.json"):
        lk.load(tmp_path / "one")
    (tmp_path / "one" / NOTES).unlink()
    assert lk.load(tmp_path / "one").layers.keys() == made().layers.keys()


def test_notes_that_were_edited_are_refused(tmp_path: Path) -> None:
    made().save(tmp_path)
    notes = json.loads((tmp_path / NOTES).read_text())
    notes["layers"]["0"]["scale"] = 99.0
    (tmp_path / NOTES).write_text(json.dumps(notes))
    with pytest.raises(AdapterError, match="do not belong together"):
        lk.load(tmp_path)


def test_a_configuration_that_contradicts_the_notes_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["lora_alpha"] *= 2
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        AdapterError, match=r"2 faults:[\s\S]*'0' has scale 16 by adapter_config\.json and 8 by lorakit\.json"
    ):
        lk.load(tmp_path)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    made().save(tmp_path)
    (tmp_path / NOTES).write_text('{"format": 2}')
    with pytest.raises(AdapterError, match=r"has format 2; lorakit .* reads format 1"):
        lk.load(tmp_path)
    (tmp_path / NOTES).write_text("[]")
    with pytest.raises(AdapterError, match="has format None"):
        lk.load(tmp_path)


def test_missing_and_unknown_tensors_are_all_named(tmp_path: Path) -> None:
    mixed().save(tmp_path)
    seal = {"lorakit": __import__("hashlib").sha256((tmp_path / NOTES).read_bytes()).hexdigest()}
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["0:a"], tensors["2:magnitude"]
    save_file({**tensors, "0:c": torch.ones(1)}, tmp_path / WEIGHTS, metadata=seal)
    with pytest.raises(AdapterError) as caught:
        lk.load(tmp_path)
    for words in ["3 faults", "tensor '0:a' is missing", "tensor '2:magnitude' is missing", "unknown tensor '0:c'"]:
        assert words in str(caught.value)


def test_a_truncated_weight_file_is_an_error(tmp_path: Path) -> None:
    made().save(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-7])
    with pytest.raises(AdapterError, match="cut short or damaged"):
        lk.load(tmp_path)


def test_places_that_hold_no_adapter_are_said_to_hold_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        lk.load(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors"):
        lk.load(tmp_path)
    made().save(tmp_path / "run" / "adapter")
    with pytest.raises(AdapterError, match=r"did you mean '.*run/adapter'\?"):
        lk.load(tmp_path / "run")
    with pytest.raises(AdapterError, match="give the directory it stands in"):
        lk.load(tmp_path / "run" / "adapter" / WEIGHTS)
    (tmp_path / "run" / "adapter" / NOTES).unlink()
    (tmp_path / "run" / "adapter" / CONFIG).unlink()
    with pytest.raises(AdapterError, match="without one the scale is unknown"):
        lk.load(tmp_path / "run" / "adapter")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle file"):
        lk.load(tmp_path)


# ---------------------------------------------------------------- the value


def test_adapters_are_equal_by_layers_and_trained_parameters_not_by_meta() -> None:
    one = made(layers="0", trained=["2"])
    assert one == one.with_meta(note="x")
    assert one != made(layers="0")
    assert one != Adapter({}, one.trained)
    assert one != "adapter"
    moved = made(layers="0", trained=["2"])
    moved.trained["2.bias"][0] += 1e-7
    assert one != moved
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_counts_and_bytes_are_those_of_the_tensors() -> None:
    adapter = made("dora", layers="0", trained=["2"])
    # rank 2 on 16 x 8, a length per row, and the whole 4 x 16 layer with its bias
    assert adapter.n_parameters == 2 * (16 + 8) + 16 + 4 * 16 + 4
    assert adapter.n_bytes == 4 * adapter.n_parameters
    assert adapter.to(dtype=torch.bfloat16).n_bytes == 2 * adapter.n_parameters


def test_repr_says_what_it_is() -> None:
    assert repr(made()) == "Adapter(lora, 2 layers, rank 2, 88 numbers, 0.00 MB)"
    assert repr(mixed()).startswith("Adapter(dora+lora, 2 layers, rank 2, ")
    assert repr(mixed()).endswith(", base 'gpt2')")
    assert "2 parameters trained fully" in repr(made(layers="0", trained=["2"]))
    assert repr(Adapter({})) == "Adapter(empty, 0 layers, 0 numbers, 0.00 MB)"


def test_to_gives_a_copy_in_another_precision() -> None:
    adapter = made(layers="0", trained=["2"])
    small = adapter.to(dtype=torch.bfloat16)
    assert {f.dtype for layer in small.layers.values() for f in layer.factors.values()} == {torch.bfloat16}
    assert {t.dtype for t in small.trained.values()} == {torch.bfloat16}
    assert adapter == made(layers="0", trained=["2"])
    assert small.to(dtype=torch.float32) != adapter


def test_meta_tells_base_seed_and_version(tmp_path: Path) -> None:
    adapter = made()
    assert adapter.meta["base_class"] == "Sequential"
    assert adapter.meta["seed"] == 0
    assert adapter.meta["lorakit"] == lk.__version__
    assert adapter.base_fingerprint
    assert Adapter({}).base_fingerprint == ""
    assert adapter.with_meta(base_name="mine").base_name == "mine"
    adapter.with_meta(base_name="mine").save(tmp_path)
    assert lk.load(tmp_path).base_name == "mine"


def test_one_changed_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lk.attach(model, lk.plan(model, rank=2))
    lk.collect(model).save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterError, match="not those that were saved; the file is damaged"):
        lk.load(tmp_path / "a")
