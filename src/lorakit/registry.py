"""Named entries found by themselves: one file, one entry, no list to edit.

A room such as `lorakit.methods` is scanned once, on the first look-up: importing each of its files runs the
`@METHODS.add` decorator there. Entries of other packages come through the entry-point group of the same name
(`lorakit.methods`): the entry point names a module or the entry itself.
"""

import importlib
import pkgutil
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from lorakit.errors import UsageError, nearest


class Named(Protocol):
    """What a registry holds: anything with a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)
_scanning = threading.RLock()  # of all registries: entries of one room may look up those of another


class Registry(Generic[T]):
    """Entries of one room, by name."""

    def __init__(self, noun: str, room: str) -> None:
        self.noun = noun
        self.room = room
        self._entries: dict[str, T] = {}
        self._scanned = False  # to the end
        self._begun = False

    def add(self, cls: type[T]) -> type[T]:
        """Class decorator: registers one instance of the class under its `name`."""
        entry = cls()
        if entry.name in self._entries:
            raise UsageError(f"two {self.noun}s are called '{entry.name}'; names must be unique")
        self._entries[entry.name] = entry
        return cls

    def add_class(self, cls: T) -> T:
        """Class decorator: registers the class itself under its `name`, where entries are made later."""
        if self._entries.setdefault(cls.name, cls) is not cls:
            raise UsageError(f"two {self.noun}s are called '{cls.name}'; names must be unique")
        return cls

    def _scan(self) -> None:
        if self._scanned:
            return
        with _scanning:  # another thread waits for the whole of it
            if self._begun:  # by this thread, or done meanwhile: an entry may look up another one
                return
            self._begun = True
            try:
                package = importlib.import_module(self.room)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self.room}.{module.name}")
                for point in entry_points(group=self.room):
                    self._load(point)
            except BaseException:
                self._begun = False  # half a registry would call known names unknown
                raise
            self._scanned = True

    def _load(self, point: EntryPoint) -> None:
        try:
            point.load()
        except Exception as error:
            raise UsageError(
                f"the {self.noun} plug-in '{point.name}' ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall its package"
            ) from error

    def __getitem__(self, name: str) -> T:
        self._scan()
        try:
            return self._entries[name]
        except KeyError:
            raise UsageError(f"unknown {self.noun} '{name}'{nearest(name, self._entries)}") from None

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        self._scan()
        return iter(self._entries.values())

    def __len__(self) -> int:
        self._scan()
        return len(self._entries)

    def names(self) -> list[str]:
        """All names, sorted."""
        self._scan()
        return sorted(self._entries)
