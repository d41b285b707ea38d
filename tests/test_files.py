"""Files are whole or absent, whatever happens in the middle; what is read is what was written or an error."""

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lorakit.errors import AdapterError, LorakitError
from lorakit.files import (
    read_json,
    read_tensors,
    replaced_directory,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)


def tree(path: Path) -> dict[str, bytes]:
    """Every file under a directory, hidden ones included."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@contextmanager
def as_a_nobody() -> Iterator[None]:
    """Root may write everywhere; a nobody may not."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with an old version in it."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "weights").write_text("old")
    (directory / "notes").write_text("old notes")
    return directory


def replace_it(place: Path) -> None:
    with replaced_directory(place) as work:
        (work / "weights").write_text("new")
        (work / "notes").write_text("new notes")


# ---------------------------------------------------------------- single files


def test_a_file_is_written_over_an_old_one_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "eins")
    write_text(tmp_path / "deep" / "a.txt", "zwölf")
    assert tree(tmp_path) == {"deep/a.txt": "zwölf".encode()}
    write_json(tmp_path / "b.json", {"ü": [1, 2], "a": None})
    assert read_json(tmp_path / "b.json") == {"ü": [1, 2], "a": None}


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "by_open").write_bytes(b"")
    write_bytes(tmp_path / "by_us", b"")
    assert (tmp_path / "by_us").stat().st_mode == (tmp_path / "by_open").stat().st_mode


@pytest.mark.parametrize("failing", ["replace", "fsync", "chmod"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(LorakitError, match=r"cannot write '.*a\.txt': No space left on device; nothing was changed"):
        write_text(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_a_directory_that_may_not_be_written_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    with as_a_nobody():
        with pytest.raises(LorakitError, match=r"cannot write '.*a\.txt': Permission denied"):
            write_text(tmp_path / "mine" / "a.txt", "new")
        with pytest.raises(LorakitError, match=r"cannot write '.*adapter': Permission denied"):
            replace_it(tmp_path / "mine" / "adapter")
    assert tree(tmp_path) == {}


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(LorakitError, match=r"cannot write directory '.*adapter': a file of that name exists"):
        replace_it(tmp_path / "adapter")
    with pytest.raises(LorakitError, match=r"cannot write '.*inner': (Not a directory|File exists)"):
        replace_it(tmp_path / "adapter" / "inner")
    with pytest.raises(LorakitError, match=r"cannot write '.*inner\.txt': (Not a directory|File exists)"):
        write_text(tmp_path / "adapter" / "inner.txt", "new")
    assert tree(tmp_path) == {"adapter": b"a file"}


# ---------------------------------------------------------------- tensors


def test_tensors_come_back_bit_for_bit_whatever_their_memory(tmp_path: Path) -> None:
    wide = torch.randn(4, 6)
    shared = torch.randn(3)
    tensors = {
        "transposed": wide.T,
        "part": wide[1:3, ::2],
        "once": shared,
        "twice": shared,
        "learning": torch.nn.Parameter(torch.randn(2)),
        "half": torch.randn(5).bfloat16(),
        "double": torch.randn(2).double(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "empty too": torch.zeros(0, 4),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_file_cut_short_is_an_error(tmp_path: Path, cut: int) -> None:
    write_tensors(tmp_path / "t.safetensors", {"x": torch.randn(8)})
    data = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(data[:cut])
    with pytest.raises(AdapterError, match="is not a readable safetensors file .* cut short or damaged"):
        read_tensors(tmp_path / "t.safetensors")


class Trap:
    """Says so when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[object, ...]:
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("name", ["adapter_model.bin", "a.pt", "a.pth", "a.pkl", "a.ckpt", "disguised.safetensors"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(AdapterError, match="pickle file, which can run code|not a readable safetensors file"):
        read_tensors(tmp_path / name)
    assert not Trap.sprung


def test_what_is_not_there_or_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"'.*t\.safetensors' does not exist"):
        read_tensors(tmp_path / "t.safetensors")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    for name in ("bad.json", "latin.json", "missing.json"):
        with pytest.raises(AdapterError, match=f"cannot read '.*{name}'"):
            read_json(tmp_path / name)


# ---------------------------------------------------------------- directories


def test_a_directory_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path, place: Path) -> None:
    replace_it(place)
    assert tree(tmp_path) == {"adapter/weights": b"new", "adapter/notes": b"new notes"}


def test_a_new_directory_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "by_mkdir").mkdir()
    replace_it(tmp_path / "by_us")
    assert (tmp_path / "by_us").stat().st_mode == (tmp_path / "by_mkdir").stat().st_mode


def test_files_of_others_are_kept(place: Path) -> None:
    (place / "README.md").write_text("by hand")
    (place / "logs").mkdir()
    (place / "logs" / "run.txt").write_text("log")
    (place / "link").symlink_to("README.md")
    (place / "broken").symlink_to("nowhere")
    replace_it(place)
    assert (place / "README.md").read_text() == "by hand"
    assert (place / "logs" / "run.txt").read_text() == "log"
    assert os.readlink(place / "link") == "README.md"
    assert os.readlink(place / "broken") == "nowhere"
    assert (place / "weights").read_text() == "new"


def test_files_that_would_lie_beside_the_new_ones_are_dropped(place: Path) -> None:
    with replaced_directory(place, drop=("notes",)) as work:
        (work / "weights").write_text("new")
    assert tree(place) == {"weights": b"new"}


def test_a_link_to_a_directory_goes_on_pointing_there(tmp_path: Path, place: Path) -> None:
    (tmp_path / "latest").symlink_to("adapter")
    replace_it(tmp_path / "latest")
    assert os.readlink(tmp_path / "latest") == "adapter"
    assert (place / "weights").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("shapes"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_in_the_middle_leaves_the_old_directory(tmp_path: Path, place: Path, error: BaseException) -> None:
    before = tree(tmp_path)
    wanted = LorakitError if isinstance(error, OSError) else type(error)

    def half() -> None:
        with replaced_directory(place) as work:
            (work / "weights").write_text("new")
            raise error

    with pytest.raises(wanted):
        half()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("nth", [1, 2])
def test_a_rename_that_fails_leaves_the_old_directory(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    before, rename, calls = tree(tmp_path), os.rename, iter(range(1, 99))

    def fail_once(source: object, target: object) -> None:
        if next(calls) == nth:
            raise OSError(5, "Input/output error")
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(import_module("lorakit.files"), "_exchange", lambda new, old: False)  # as on another system
    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(LorakitError, match=r"cannot write '.*adapter': Input/output error; nothing was changed there"):
        replace_it(place)
    assert tree(tmp_path) == before


def test_when_even_putting_back_fails_the_old_directory_is_kept_and_named(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, iter(range(1, 99))

    def fail_from_the_second_on(source: object, target: object) -> None:
        if next(calls) >= 2:
            raise OSError(5, "Input/output error")
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(import_module("lorakit.files"), "_exchange", lambda new, old: False)
    monkeypatch.setattr(os, "rename", fail_from_the_second_on)
    with pytest.raises(LorakitError, match=r"what stood there is kept as '.*content'") as caught:
        replace_it(place)
    kept = Path(str(caught.value).split("kept as '")[1].rstrip("'"))
    assert tree(kept) == {"weights": b"old", "notes": b"old notes"}


def test_two_directories_change_places_in_one_step_where_the_system_can(tmp_path: Path) -> None:
    """Linux has renameat2; elsewhere two renames do it, and the tests above simulate that."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    done = import_module("lorakit.files")._exchange(new, old)
    assert done == (sys.platform == "linux")
    assert (old / "name").read_text() == ("new" if done else "old")
    assert not import_module("lorakit.files")._exchange(tmp_path / "absent", old)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(3, 2), "a": torch.zeros(5), "ö": torch.arange(4)}
    notes = {f"note {k}": 'a "word" \n ö' * k for k in range(6)}
    found = set()
    for k in range(8):
        write_tensors(tmp_path / f"{k}.safetensors", tensors, notes)
        found.add((tmp_path / f"{k}.safetensors").read_bytes())
    assert len(found) == 1
    assert all(torch.equal(read, tensors[name]) for name, read in read_tensors(tmp_path / "0.safetensors").items())
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **notes}
