"""The weights in a TorchScript archive, without TorchScript: none of the code in it is compiled or run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is an archive that ``torch.jit.save`` wrote."""
    if not (path.is_file() and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read every tensor that the modules in the archive hold, by its name.

    Raises
    ------
    CheckpointError
        when the archive is damaged, or refers to anything but tensors and modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(_tensors(_Reader(archive).load(), ""))
    except Exception as error:  # a damaged pickle fails in any way
        raise CheckpointError(
            f"The TorchScript archive {path} cannot be read: {error}. Copy or download it again."
        ) from error


class _Module:
    """A module of the archive, as the dictionary of what it holds."""

    held: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.held = state


class _Reader(pickle.Unpickler):
    """An unpickler that knows modules, tensors and lists of numbers, and refuses all else."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        name = min((name for name in archive.namelist() if name.endswith("/data.pkl")), key=len)
        self.folder = PurePosixPath(name).parent
        super().__init__(io.BytesIO(archive.read(name)))

    def find_class(self, module: str, name: str, /) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle":
            return _plain
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is neither a tensor nor a module")

    def persistent_load(self, reference: Any, /) -> Tensor:
        _, dtype, key, *_ = reference
        data = bytearray(self.archive.read(str(self.folder / "data" / key)))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _plain(value: Any, *rest: Any) -> Any:
    return value


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


_KNOWN = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.held.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
