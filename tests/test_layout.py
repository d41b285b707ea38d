"""The order of the rooms: who may import whom, read off the source, imports inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit

ROOT = Path(lorakit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = {
    "errors": 0,
    "registry": 0,
    "_version": 0,
    "cache": 0,
    "linalg": 1,
    "device": 1,
    "kernels": 1.5,  # tensors in, tensors out
    "course": 2,
    "update": 2,
    "files": 2,
    "prompt": 2,
    "plan": 2,
    "method": 2,
    "notes": 2,
    "adapter": 2,
    "moments": 2,
    "quant": 2.5,  # formats and layers of quantized weights
    "methods": 3,
    "starts": 3,
    "prompts": 3,
    "kinds": 3,
    "algebra": 4,
    "describe": 5,
    "whole": 5.2,  # reads what describe says
    "mode": 5,  # eval mode for as long as it is needed
    "reading": 5.3,  # how a base reads its inputs
    "rules": 5.5,  # and what learns whole
    "measure": 5.6,
    "quantize": 5.7,
    "attach": 6,
    "trunk": 6.5,  # runs what attach has put on
    "tasks": 7,
    "data": 7,
    "fit": 8,
    "choose": 9,
    "inspect": 9,
    "compress": 9,
    "serve": 9,
    "export": 9,
    "interop": 9,
    "cli": 10,
    "__main__": 10,
    "": 11,  # lorakit itself
    "testing": 12,
}
VALUES = {
    "course",
    "update",
    "files",
    "prompt",
    "plan",
    "method",
    "notes",
    "adapter",
    "moments",
}  # one room of several files
LONGEST = 400


def room_of(module: str) -> str:
    """`lorakit.attach.slots` -> attach; the files of PEFT's format belong to the values."""
    first = module.removeprefix("lorakit").lstrip(".").partition(".")[0]
    return "adapter" if first.startswith("peft_") else first


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lorakit", *(part for part in parts if part != "__init__")))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of lorakit that a file imports, anywhere in it."""
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == "lorakit":
                    yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            host = node.module or ""
            if node.level:
                host = ".".join([*package[: len(package) - node.level + 1], *filter(None, [host])])
            if host.partition(".")[0] != "lorakit":
                continue
            for name in node.names:  # `from lorakit import peft_format` names a module, `... import Plan` does not
                inner = ROOT.joinpath(*host.split(".")[1:], name.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield node.lineno, f"{host}.{name.name}" if is_module else host


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or ROOMS[importer] > 10:
        return True
    if {importer, imported} <= VALUES or {importer, imported} == {"tasks", "data"}:
        return True
    if {importer, imported} == {"cli", "__main__"} or (importer == "registry" and imported == "errors"):
        return True
    if imported == "":  # `from lorakit import x` in a lower room goes by the front door and pulls everything in
        return ROOMS[importer] == 10
    return ROOMS[imported] < ROOMS[importer]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_imports_only_rooms_below_its_own(file: Path) -> None:
    importer = room_of(module_of(file))
    assert importer in ROOMS, f"'{importer}' has no place in the order of rooms; give it one here and in the design"
    wrong = [
        f"line {line}: {module}"
        for line, module in imports(file)
        if room_of(module) not in ROOMS or not allowed(importer, room_of(module))
    ]
    assert not wrong, f"{module_of(file)} reaches up: {', '.join(wrong)}"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_tells_one_story(file: Path) -> None:
    n_lines = len(file.read_text(encoding="utf-8").splitlines())
    assert n_lines <= LONGEST, f"{n_lines} lines: which second story has moved in?"


def test_the_order_is_the_one_that_was_meant() -> None:
    for importer, imported in [("methods", "kinds"), ("kinds", "methods"), ("starts", "methods"), ("errors", "update")]:
        assert not allowed(importer, imported)
    for importer, imported in [("serve", "export"), ("describe", "attach"), ("linalg", "update"), ("fit", "choose")]:
        assert not allowed(importer, imported)
    for importer, imported in [("cli", "fit"), ("attach", "describe"), ("adapter", "method"), ("methods", "linalg")]:
        assert allowed(importer, imported)


def test_imports_inside_functions_and_relative_ones_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "attach").mkdir()
    (tmp_path / "linalg.py").write_text("def f():\n    from lorakit.attach import attach\n    import lorakit.fit\n")
    (tmp_path / "attach" / "slots.py").write_text("from ..update import Update\nfrom . import drives\nimport torch\n")
    assert list(imports(tmp_path / "linalg.py")) == [(2, "lorakit.attach"), (3, "lorakit.fit")]
    assert [name for _, name in imports(tmp_path / "attach" / "slots.py")] == ["lorakit.update", "lorakit.attach"]
