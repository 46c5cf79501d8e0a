"""What a callable or a network does, as plain data for a digest: all but weights, and no memory addresses."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

LEAVES = (type(None), bool, int, float, str, bytes, Path, Tensor, np.ndarray, np.generic)
SETTINGS = (*LEAVES, Enum, type, FunctionType, BuiltinFunctionType, functools.partial)
NO_SETTINGS = {"training", "pretrained_cfg", "default_cfg", "pretrained_model_args"}
"""Attributes of a module that do not change what it computes in eval mode."""


def recipe_of(value: Any) -> Any:
    """Describe a callable, with all that it holds, by data that `digest_of` takes.

    Objects count by their type and attributes; functions by their source, defaults and closure; installed
    code by the version of its package, your own by its source. What has none of these counts by its type.
    """
    return _recipe(value, ())


def recipe_of_module(module: nn.Module) -> dict[str, Any]:
    """Describe what a network's weights do not say: the types of its parts, their settings and their code."""
    return {
        path: {**_origin(type(part)), "settings": _settings(part)} for path, part in module.named_modules()
    }


def _settings(part: nn.Module) -> dict[str, Any]:
    held = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    return {name: _recipe(held[name], ()) for name in held.keys() - NO_SETTINGS if _is_setting(held[name])}


def _is_setting(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_setting, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_is_setting, value))
    return isinstance(value, SETTINGS) or is_dataclass(value)


def _recipe(value: Any, within: tuple[int, ...]) -> Any:
    if isinstance(value, LEAVES):
        return value
    if id(value) in within:
        return "itself"
    go = functools.partial(_recipe, within=(*within, id(value)))
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, Mapping):
        return [[go(key), go(held)] for key, held in value.items()]
    if isinstance(value, set | frozenset):
        return [go(held) for held in sorted(value, key=repr)]
    if isinstance(value, Sequence):
        return [go(held) for held in value]
    return _code(value, go)


def _code(value: Any, go: Callable[[Any], Any]) -> Any:
    if isinstance(value, type | BuiltinFunctionType):
        return _origin(value)
    if isinstance(value, functools.partial):
        return {"partial": go(value.func), "arguments": go([value.args, value.keywords])}
    if isinstance(value, MethodType):
        return {"method": value.__name__, "of": go(value.__self__)}
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return {**_origin(value), "holds": go([value.__defaults__, value.__kwdefaults__, held])}
    return {**_origin(type(value)), "attributes": go(getattr(value, "__dict__", {}))}


def _origin(thing: type | FunctionType | BuiltinFunctionType) -> dict[str, str]:
    """Name some code and pin what it does: by its package's version, or else by its source."""
    home = str(thing.__module__)
    version = getattr(sys.modules.get(home.partition(".")[0]), "__version__", None)
    return {"code": f"{home}.{thing.__qualname__}", "pinned by": version or _source(thing)}


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed at a prompt, or built in
        return _bytecode(getattr(thing, "__code__", None))


def _bytecode(code: CodeType | None) -> str:
    if code is None:
        return ""
    constants = [_bytecode(held) if isinstance(held, CodeType) else repr(held) for held in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, constants))
