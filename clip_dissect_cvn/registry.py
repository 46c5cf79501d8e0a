"""Names and what they stand for: a read-only mapping with a decorator to add to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import ArgumentError, PluginError, UnknownNameError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Map names to entries, refusing duplicates and suggesting the nearest name for an unknown one.

    Third-party packages register through the entry-point group ``clip_dissect_cvn.<plural>``; they are
    listed without being imported, and imported when first used.

    >>> COLOURS: Registry[str] = Registry("colour", "colours")
    >>> COLOURS.add("red", "#f00")
    >>> COLOURS["rad"]
    Traceback (most recent call last):
    clip_dissect_cvn.errors.UnknownNameError: Unknown colour 'rad'. Did you mean 'red'? Known: red.
    """

    def __init__(self, kind: str, plural: str, make: Callable[[str, Any], Entry] | None = None) -> None:
        self.kind = kind
        self.group = f"clip_dissect_cvn.{plural}"
        self._make = make or (lambda name, value: value)
        self._entries: dict[str, Entry] = {}
        self._plugins: dict[str, EntryPoint] | None = None

    def add(self, name: str, entry: Entry) -> None:
        """Register `entry` under `name`; a name that is taken raises ArgumentError."""
        if name in self._entries:
            raise ArgumentError(
                f"The {self.kind} {name!r} is already registered, as {self._entries[name]!r}. "
                "Choose another name."
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            if name not in self.plugins:
                raise UnknownNameError(self.kind, name, self)
            self.add(name, self._make(name, self._load(self.plugins[name])))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._entries, *self.plugins}))

    def __len__(self) -> int:
        return len({*self._entries, *self.plugins})

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.plugins

    def __repr__(self) -> str:
        return f"{{{', '.join(map(repr, self))}}}"

    @property
    def plugins(self) -> dict[str, EntryPoint]:
        """Entry points of other packages, by name, not imported."""
        if self._plugins is None:
            found = entry_points(group=self.group)
            for name, count in Counter(point.name for point in found).items():
                if count > 1:
                    owners = ", ".join(point.value for point in found if point.name == name)
                    raise PluginError(
                        f"Two packages register the {self.kind} {name!r}: {owners}. Uninstall one of them."
                    )
            self._plugins = {point.name: point for point in found}
        return self._plugins

    def _load(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:
            raise PluginError(
                f"The {self.kind} {point.name!r} comes from {point.value!r}, which failed to import: "
                f"{error!r}. Mend or uninstall that package."
            ) from error
