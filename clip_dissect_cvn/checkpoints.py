"""Weights files: safetensors and torch files of any common layout, read without running what is in them."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import CheckpointError

CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "net", "model_ema", "state_dict_ema")
"""Keys under which training scripts keep a network's weights, averaged copies last."""

PARALLEL = "module."
SHOWN = 10
SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".bin")

_NUMPY_SCALARS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_INERT: list[Any] = [argparse.Namespace, *_NUMPY_SCALARS]
"""Plain data that torch does not know as such: a training script's arguments and numpy's scalars."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a weights file by their names in the network.

    Understood: safetensors; torch files, zipped or old, of a bare state dict or one under `CONTAINERS`
    (DISCOVER, timm, torchvision, CLIP-Dissect's Places365; an averaged copy only where there is no other),
    with ``argparse.Namespace`` and numpy scalars beside it. ``module.`` and ``_orig_mod.`` are stripped.
    Only tensors and plain data are read: what a pickle would import or call is refused and named.

    Raises
    ------
    CheckpointError
        when the file is missing, empty, truncated, not a weights file, or would run code.
    """
    path = _existing_file(path)
    return _strip_wrappers(_find_state(_read(path), path))


def load_checkpoint_(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a weights file into `module`, all of it or, on an error, nothing.

    Raises
    ------
    CheckpointError
        when the file cannot be read, or listing the keys that are missing, unexpected or of another shape.
    """
    return load_state_(module, read_state_dict(path), origin=str(path))


def load_state_(module: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> nn.Module:
    """Load tensors that came from `origin` into `module`, all of them or, on an error, nothing."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    problem: Exception | None = None
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # tensors of another shape
        problem = error
        missing = [name for name in before if name not in state]
        unexpected = [name for name in state if name not in before]
    if problem or missing or unexpected:
        module.load_state_dict(before)
        found = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("of another shape", _other_shapes(before, state)),
        ]
        listing = "; ".join(filter(None, found)) or str(problem)
        raise CheckpointError(
            f"{origin} does not fit {type(module).__name__}: {listing}. The file has {len(state)} tensors, "
            f"the model {len(before)}: is it another architecture? Load it into the model it was saved from."
        ) from problem
    return module


def _other_shapes(model: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {tuple(file[name].shape)}, in the model {tuple(tensor.shape)}"
        for name, tensor in model.items()
        if name in file and file[name].shape != tensor.shape
    ]


def _listed(what: str, names: Sequence[str]) -> str:
    shown = [*names[:SHOWN], *(["…"] if len(names) > SHOWN else [])]
    return f"{len(names)} {what} ({', '.join(shown)})" if names else ""


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)[:SHOWN]
        found = f" ({', '.join(inside)})" if inside else ""
        raise CheckpointError(f"The checkpoint {path} is a folder. Name a weights file in it{found}.")
    if not path.exists():
        raise CheckpointError(f"The checkpoint {path} does not exist. Check the path.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"The checkpoint {path} is empty. Copy or download it again.")
    return path


def _read(path: Path) -> Any:
    start = _start_of(path)
    try:
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return load_file(path)
        with torch.serialization.safe_globals(_INERT):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise CheckpointError(f"The checkpoint {path} {_explain(start, error)}") from error


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be opened: {error}.") from error


def _explain(start: bytes, error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return (
            f"refers to {unsafe[1]}, and only tensors and plain data are read, because a pickle can run any "
            f"code. If you trust it, convert it once where its own code is installed: "
            f"torch.save(model.state_dict(), 'weights.pt')."
        )
    if not (start.startswith((b"PK", b"\x80")) or start[8:9] == b"{"):
        return f"is no weights file: it begins with {start!r}. Expected safetensors or a torch file."
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"is cut short, damaged or no file of weights ({first_line}). Copy, download or save it again."


def _find_state(loaded: Any, path: Path) -> dict[str, Tensor]:
    found = loaded
    while isinstance(found, Mapping):
        if found and all(isinstance(value, Tensor) for value in found.values()):
            return {str(name): tensor for name, tensor in found.items()}
        held = [found[key] for key in CONTAINERS if isinstance(found.get(key), Mapping) and found[key]]
        if not held:
            break
        found = held[0]
    raise CheckpointError(
        f"The checkpoint {path} holds no state dict: it has {_outline(found)}. "
        f"Expected tensors by name, bare or under one of {', '.join(CONTAINERS)}."
    )


def _outline(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    return f"the keys {', '.join(map(str, [*found][:SHOWN]))}" if found else "no keys"


def _strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the names that torch.compile and parallel training put before a network's own."""
    state = {re.sub(r"(?<![^.])_orig_mod\.", "", name): tensor for name, tensor in state.items()}
    while all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    return state
