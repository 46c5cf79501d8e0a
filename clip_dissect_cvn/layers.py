"""Names of layers: which call of which module, in order of execution."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

from torch import nn

from .errors import ArgumentError, LayerError, UnknownNameError


@runtime_checkable
class Call(Protocol):
    """One call of a module in a forward pass, as `trace` tells: the `index`-th of the module at `path`.

    `shape` is the output's, `axis` its channel axis counted from the end, if known. A `function` was called
    inside the module's forward.
    """

    @property
    def path(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def function(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def axis(self) -> int | None: ...


@dataclass(frozen=True)
class Layer:
    """A layer's name and the call that it is."""

    name: str
    call: Call


def find_layers(calls: Sequence[Call]) -> dict[str, Layer]:
    """Name every module call of a forward pass, in order of execution.

    A module called once goes by its path, one called k times by ``path.0`` to ``path.k-1``; where a module of
    that path exists, the name is that module's.
    """
    calls = [call for call in calls if call.path and not call.function]
    times = Counter(call.path for call in calls)
    alone = {call.path for call in calls if times[call.path] == 1}
    layers = {}
    for call in calls:
        name = call.path if call.path in alone else f"{call.path}.{call.index}"
        if call.path in alone or name not in alone:
            layers[name] = Layer(name, call)
    return layers


def resolve_layers(model: nn.Module, patterns: Sequence[str], calls: Sequence[Call]) -> list[str]:
    """Return the names of the layers that any of the patterns matches, in order of execution.

    A pattern is a path, ``blocks.11.mlp.act`` or ``blocks[11].mlp.act``, or a glob, ``blocks.*.mlp.act`` or
    ``layer?``, in which ``*`` matches dots, too. The path of a module called several times stands for all its
    calls.

    Raises UnknownNameError for a pattern that matches nothing, LayerError for a module that never runs.
    """
    if not patterns:
        raise ArgumentError("layers is empty. Name at least one layer, or a glob such as 'blocks.*.mlp.act'.")
    layers = find_layers(calls)
    groups = _names_by_path(layers, calls)
    chosen = {name for pattern in patterns for name in _matching(model, pattern, layers, groups)}
    return [name for name in layers if name in chosen]


def _names_by_path(layers: Mapping[str, Layer], calls: Sequence[Call]) -> dict[str, list[str]]:
    """Map every path, and every layer's name, to the layers that it stands for."""
    times = Counter(call.path for call in calls if call.path and not call.function)
    paths = {path: [path] if k == 1 else [f"{path}.{i}" for i in range(k)] for path, k in times.items()}
    return {**{name: [name] for name in layers}, **paths}


def _matching(
    model: nn.Module, pattern: str, layers: Mapping[str, Layer], groups: Mapping[str, list[str]]
) -> list[str]:
    path = re.sub(r"\[(\d+)\]", r".\1", pattern.strip())
    if path in groups:
        return groups[path]
    found = [name for group, names in groups.items() if fnmatchcase(group, path) for name in names]
    if not found and path in dict(model.named_modules()):
        raise LayerError(
            f"Layer {path!r} is never called in a forward pass, so it has no activations. "
            f"Choose one that is, such as {list(layers)[-1]!r}."
        )
    if not found:
        raise UnknownNameError("layer", pattern, layers)
    return found
