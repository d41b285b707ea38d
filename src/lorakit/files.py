"""Files that are whole or absent: atomic writes, strict reads. No pickle is ever opened.

A write goes to a temporary file beside its target, is flushed to the disk and renamed over it; a crash leaves the old
file or the new one. Lines that take long to come gather in a file of another name, where they can be read before it is
whole. A directory of several files is written whole into a temporary directory and then changes places
with the old one. Where the system cannot do that in one step it takes two renames; a kill just between them leaves the
old directory beside its place, as `.name.old.*`.
"""

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import AdapterError, LorakitError

_PICKLE_NAMES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(path: Path, put: Callable[[Path], object]) -> None:
    handle = -1
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        put(Path(temporary))
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LorakitError(f"cannot write '{path}': {reason}; nothing was changed there") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes atomically."""
    _write(path, lambda temporary: Path.write_bytes(temporary, data))


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, atomically. The order of keys is kept: layers stay in the model's order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def part_of(path: Path) -> Path:
    """Where `write_lines` gathers the lines of this file."""
    return path.with_name(f"{path.name}.part")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines of text as UTF-8, each when it comes, into `part_of(path)`, which gets its name when the last one is
    there.

    Of what ends before, the lines up to there stay in that file. LorakitError if it is there already.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("x", encoding="utf-8", buffering=1) as stream:
            try:
                stream.writelines(f"{line}\n" for line in lines)
                os.fsync(stream.fileno())
            except BaseException:
                if not stream.tell():
                    part.unlink()
                raise
        os.replace(part, path)
    except OSError as error:
        raise LorakitError(f"cannot write '{part}': {error.strerror or error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically."""
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in ready.items():  # safetensors refuses shared memory: give every name its own
        if tensor.data_ptr() in seen:
            ready[name] = tensor.clone()
        seen.add(tensor.data_ptr())

    def put(temporary: Path) -> None:
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        _order_metadata(temporary)

    _write(path, put)


def _order_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in order, which its writer leaves to chance: same values, same bytes."""
    with path.open("rb+") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # it is padded with spaces
            stream.seek(8)
            stream.write(text.ljust(size))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _link_others(old: Path, new: Path, drop: Collection[str]) -> None:
    """Carries over what the new directory does not bring itself: files of others are never lost."""
    for entry in old.iterdir():
        target = new / entry.name
        if entry.name in drop or os.path.lexists(target):
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry), target)
        elif entry.is_dir():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(target))


def _exchange(new: Path, old: Path) -> bool:
    """Lets two directories change places in one step (Linux's renameat2); False where the system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0)


@contextmanager
def replaced_directory(path: Path, drop: Collection[str] = ()) -> Iterator[Path]:
    """Gives an empty directory to fill; on success it takes the place of `path`.

    Files of the old directory that the new one does not bring are carried over, but for those named in `drop`. A
    symbolic link goes on pointing where it did.
    """
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_dir():
            raise LorakitError(f"cannot write directory '{path}': a file of that name exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise LorakitError(f"cannot write '{path}': {error.strerror or error}; nothing was changed there") from None
    old: Path | None = None
    try:
        os.chmod(work, 0o777 & ~_umask())
        yield work
        if path.exists():
            _link_others(path, work, drop)
            if _exchange(work, path):
                return
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.rename(path, old / "content")
        os.rename(work, path)
    except BaseException as error:
        if old is not None and not path.exists():
            try:
                os.rename(old / "content", path)
            except OSError:
                raise LorakitError(f"cannot write '{path}'; what stood there is kept as '{old / 'content'}'") from error
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or str(error)
            raise LorakitError(f"cannot write '{path}': {reason}; nothing was changed there") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if old is not None and path.exists():  # else it is the only copy: better left over than lost
            shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Reads a JSON file; AdapterError names the file and the fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"cannot read '{path}': {error}") from None


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Reads a safetensors file; AdapterError where it is damaged, or is a pickle under whatever name."""
    if path.suffix in _PICKLE_NAMES:
        raise AdapterError(
            f"'{path}' is a pickle file, which can run code when it is opened; lorakit never opens one. "
            "Convert it to safetensors where you trust its source (safetensors.torch.save_file)"
        )
    if not path.is_file():
        raise AdapterError(f"'{path}' does not exist")
    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"'{path}' is not a readable safetensors file ({error}); it may be cut short or damaged"
        ) from None
