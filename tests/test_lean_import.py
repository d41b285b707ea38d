"""What a person pays for who only imports, or only asks for help."""

import json
import subprocess
import sys

import pytest

import lorakit

HEAVY = (
    "transformers",
    "peft",
    "datasets",
    "matplotlib",
    "pyarrow",
    "onnx",
    "tensorflow",
    "accelerate",
    "scipy",
    "pandas",
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after this code."""
    program = f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "code",
    [
        "import lorakit",
        "import lorakit; lorakit.plan; lorakit.attach; lorakit.load; lorakit.merge; lorakit.Adapter",
        "import lorakit.testing",
    ],
)
def test_importing_leaves_the_heavy_libraries_alone(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


def test_importing_alone_does_not_even_load_torch() -> None:
    assert "torch" not in loaded_after("import lorakit")


def test_a_plan_is_made_and_attached_without_the_heavy_libraries() -> None:
    code = (
        "import torch, lorakit as lk\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "lk.attach(model, lk.plan(model, rank=2)); lk.collect(model); lk.merge(model)"
    )
    assert not loaded_after(code) & set(HEAVY)


@pytest.mark.parametrize("words", [["--help"], ["--version"]], ids=" ".join)
def test_asking_for_help_does_not_load_torch(words: list[str]) -> None:
    run = "runpy.run_module('lorakit', run_name='__main__')"
    code = f"import sys, runpy\nsys.argv = ['lorakit', *{words!r}]\ntry:\n    {run}"
    loaded = loaded_after(f"{code}\nexcept SystemExit as end:\n    assert not end.code, end.code")
    assert "torch" not in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_is_found_and_listed() -> None:
    for name in lorakit.__all__:
        assert getattr(lorakit, name) is not None, name
    assert dir(lorakit) == lorakit.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lorakit' has no attribute 'atach'"):
        lorakit.atach  # noqa: B018


def test_a_verb_stays_a_function_after_its_room_was_imported() -> None:
    from lorakit.attach import collect  # the import system puts a submodule under its name, were it not stopped

    assert callable(lorakit.attach)
    assert lorakit.collect is collect
    assert callable(lorakit.plan)
