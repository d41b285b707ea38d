"""Entries are found by themselves, and every one is complete."""

import copy
import importlib
import inspect
import pickle
import pkgutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lorakit.registry
from lorakit.errors import UsageError
from lorakit.kinds import KINDS
from lorakit.method import METHODS, STARTS, Method
from lorakit.registry import Registry

ROOMS = {"lorakit.methods": METHODS, "lorakit.starts": STARTS, "lorakit.kinds": KINDS}


def files(room: str) -> list[str]:
    package = importlib.import_module(room)
    return [f"{room}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


@pytest.mark.parametrize(("room", "file"), [(room, file) for room in ROOMS for file in files(room)])
def test_every_file_of_a_room_registers_an_entry(room: str, file: str) -> None:
    assert any(type(entry).__module__ == file for entry in ROOMS[room])
    assert inspect.getdoc(importlib.import_module(file)), "the file does not say what it is"


@pytest.mark.parametrize("entry", [*METHODS, *STARTS, *KINDS], ids=lambda entry: f"{type(entry).__name__}")
def test_every_entry_says_what_it_is_for_the_docs(entry: object) -> None:
    wanted = {
        METHODS: ("name", "formula", "parameters", "use", "source"),
        STARTS: ("name", "use", "source"),
        KINDS: ("name", "layers"),
    }
    registry = next(registry for registry in ROOMS.values() if any(entry is other for other in registry))
    for attribute in wanted[registry]:
        text = getattr(entry, attribute)
        assert isinstance(text, str)
        assert text.strip(), f"{attribute} is empty"
    assert type(entry).__doc__, "the class has no docstring"


@pytest.mark.parametrize("method", [*METHODS], ids=lambda method: method.name)
def test_every_method_has_a_peft_twin_or_says_that_it_has_none(method: Method) -> None:
    declared = [cls for cls in type(method).__mro__ if cls is not Method and "peft_type" in vars(cls)]
    assert declared, "say peft_type = None where PEFT has no twin"
    has_twin = method.peft_type is not None
    assert has_twin == (type(method).to_peft is not Method.to_peft)
    reads = type(method).from_peft is not Method.from_peft or type(method).read_peft is not Method.read_peft
    assert has_twin == reads
    assert has_twin == bool(method.peft_leaves)


def test_classes_can_be_registered_whose_entries_are_made_later() -> None:
    registry: Registry[Any] = Registry("task", "lorakit.tasks")
    first, second = (type("Sing", (), {"name": "sing"}) for _ in range(2))
    assert registry.add_class(first) is registry.add_class(first) is first
    with pytest.raises(UsageError, match="two tasks are called 'sing'"):
        registry.add_class(second)


@pytest.mark.parametrize("registry", ROOMS.values(), ids=ROOMS)
def test_names_are_sorted_unique_and_looked_up(registry: Registry) -> None:  # type: ignore[type-arg]
    names = registry.names()
    assert names == sorted(set(names))
    assert len(names) == len(list(registry))
    for name in names:
        assert registry[name].name == name
        assert name in registry
    assert "no such name" not in registry


@pytest.mark.parametrize("entry", [*METHODS, *KINDS], ids=lambda entry: f"{type(entry).__name__}")
def test_pickle_and_deepcopy_give_the_registered_entry(entry: object) -> None:
    assert pickle.loads(pickle.dumps(entry)) is entry
    assert copy.deepcopy(entry) is entry


def test_an_unknown_name_is_met_with_the_nearest_or_with_all() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'lroa'; did you mean 'lora'\?"):
        METHODS["lroa"]
    with pytest.raises(UsageError, match="unknown start 'zzz'; known: corda, corda-kpm, eora, eva, gaussian, kaiming,"):
        STARTS["zzz"]


# ---------------------------------------------------------------- a registry of its own


class Entry:
    name = "one"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:  # type: ignore[type-arg]
    room = ModuleType("empty_room")
    room.__path__ = []  # a package without files
    monkeypatch.setitem(__import__("sys").modules, "empty_room", room)
    return Registry("thing", "empty_room")


def test_two_entries_of_one_name_are_refused(registry: Registry) -> None:  # type: ignore[type-arg]
    registry.add(Entry)
    with pytest.raises(UsageError, match="two things are called 'one'"):
        registry.add(Entry)


def points(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    point = SimpleNamespace(name="theirs", value="their.module:Thing", load=load)
    monkeypatch.setattr(lorakit.registry, "entry_points", lambda group: [point] if group == "empty_room" else [])


def test_an_entry_point_of_another_package_registers_its_entry(
    registry: Registry,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points(monkeypatch, lambda: registry.add(Entry))
    assert registry.names() == ["one"]
    assert registry["one"].name == "one"


def test_a_plug_in_that_fails_is_named_every_time(
    registry: Registry,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise ImportError("no module named their")

    points(monkeypatch, broken)
    for _ in range(2):  # not half a registry at the second call
        with pytest.raises(UsageError, match=r"the thing plug-in 'theirs' \(their\.module:Thing\) cannot be loaded"):
            registry.names()


def test_a_second_thread_waits_for_the_whole_registry(
    registry: Registry,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.2)
        registry.add(Entry)

    points(monkeypatch, slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(registry.names)
        begun.wait()
        assert registry.names() == ["one"]
        assert first.result() == ["one"]


def test_an_empty_registry_says_that_nothing_is_known(registry: Registry) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match="unknown thing 'x'; known: none"):
        registry["x"]
