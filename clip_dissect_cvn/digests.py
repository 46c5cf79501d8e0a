"""Short names for what things are made of: equal parts give equal digests in any process, on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ArgumentError

DIGEST_BYTES = 16


def digest_of(parts: Any) -> str:
    """Digest plain data, tensors and arrays, whatever the order of mapping keys, into 32 hex characters.

    Understood: None, bool, int, float, str, bytes, paths, sequences (a tuple equals a list), mappings with
    keys of one plain type, sets, dataclasses, numpy arrays and scalars, tensors (a tensor differs from an
    array of the same values, and a float from an int).

    Raises
    ------
    ArgumentError
        for anything else, because its digest would not be stable.

    >>> digest_of({"a": 1, "b": (2, 3)}) == digest_of({"b": [2, 3], "a": 1})
    True
    >>> digest_of({"a": 1.0}) == digest_of({"a": 1})
    False
    """
    text = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"))
    return _hash(text.encode()).hexdigest()


def digest_of_state(state: nn.Module | Mapping[str, Any]) -> str:
    """Digest the names, types, shapes and bytes of a module's parameters and buffers, or of a state dict's.

    A module's non-persistent buffers count too, although its state dict leaves them out.
    """
    if isinstance(state, nn.Module):
        state = {**dict(state.named_buffers(remove_duplicate=False)), **state.state_dict()}
    return digest_of(state)


def digest_of_file(path: str | Path) -> str:
    """Digest the content of a file, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, _hash).hexdigest()


def _hash(data: bytes | memoryview = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES)


def _plain(value: Any) -> Any:
    """Rewrite `value` as JSON in which different types cannot look the same."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": value.as_posix()}
    if isinstance(value, Mapping):
        return {"mapping": sorted(([_plain(key), _plain(held)] for key, held in value.items()), key=_order)}
    if isinstance(value, set | frozenset):
        return {"set": sorted(map(_plain, value), key=_order)}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"dataclass": type(value).__qualname__, "fields": _plain(held)}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(held) for held in value]
    return _bulk(value)


def _order(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _bulk(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": _hash(bytes(value)).hexdigest()}
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype), list(value.shape), _hash(_tensor_bytes(value)).hexdigest()]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind != "O":
        array = np.ascontiguousarray(value)
        data = array.reshape(-1).view(np.uint8).data
        return {"array": [array.dtype.str, list(value.shape), _hash(data).hexdigest()]}
    raise ArgumentError(
        f"A {type(value).__module__}.{type(value).__qualname__} ({value!r}) has no stable digest. "
        f"Pass plain data, arrays or tensors that say the same."
    )


def _tensor_bytes(value: Tensor) -> memoryview:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
