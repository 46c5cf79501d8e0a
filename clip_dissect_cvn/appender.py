"""Grow an artifact row by row, so that it can be stopped at any point and goes on from there.

Every array is a raw file that is only ever appended to, and a line of the journal commits what was appended:
rows that the journal does not mention are overwritten by the next commit. The finished folder is renamed into
place, so an artifact is either complete or not there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from .errors import ArgumentError, StoreError

META = "meta.json"
JOURNAL = "journal.jsonl"
COMMIT_SECONDS = 5.0
COMMIT_BYTES = 64 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Appender:
    """Append rows to one artifact, whose lock the caller holds.

    `header` is what the artifact is made from; a folder that was begun from something else is begun anew.
    An artifact that is `complete` already takes no rows: whatever is appended is there.
    """

    def __init__(
        self, partial: Path, final: Path, header: Mapping[str, Any], *, complete: bool = False
    ) -> None:
        self.partial = partial
        self.final = final
        self.header = header
        self.complete = complete
        self._pending: list[_Rows] = []
        self._committed = _Committed() if complete else _resume(partial, header)
        self._last_commit = time.monotonic()

    @property
    def next_image(self) -> int:
        """The first probe index whose rows are still to be appended."""
        if self.complete:
            return sys.maxsize
        return self._pending[-1].stop if self._pending else self._committed.next_image

    def append(
        self,
        arrays: Mapping[str, Shaped[Tensor, ...]],
        stop: int,
        notes: Sequence[Any] = (),
        *,
        indices: Int64[Tensor, " rows"] | None = None,
    ) -> None:
        """Add the rows of the probe images up to, and without, image `stop`; commit now and then.

        Rows of images that are there already are left out, which needs the rows' probe `indices`. `notes` is
        plain data to keep, such as the images that could not be read; there may be notes and no arrays.

        Raises ArgumentError for rows unlike the earlier ones, StoreError when they cannot be written.
        """
        if stop <= self.next_image:
            return
        if indices is not None:
            new = indices.cpu() >= self.next_image
            arrays = {name: array[new.to(array.device)] for name, array in arrays.items()}
        specs = {name: _Spec.of(array) for name, array in arrays.items()}
        self._check(specs)
        data = {name: _to_bytes(array) for name, array in arrays.items()}
        counts = {name: len(array) for name, array in arrays.items()}
        texts = [json.dumps(note, default=str) for note in notes]
        self._pending.append(_Rows(stop, counts, specs, data, texts))
        if self._is_due():
            self.commit()

    def commit(self) -> None:
        """Make everything appended so far durable; interrupted, it can simply be called again."""
        fresh = [rows for rows in self._pending if rows.stop > self._committed.next_image]
        if fresh:
            self._write(fresh)

    def finish(self, meta: Mapping[str, Any] | None = None) -> None:
        """Commit what is left, and put the complete artifact in its place."""
        if self.complete:
            return
        self.commit()
        self._write([])
        done = self._committed
        arrays = {name: spec.as_json(done.rows[name]) for name, spec in done.specs.items()}
        notes = [json.loads(note) for note in done.notes]
        content = {**self.header, "arrays": arrays, "notes": notes, "meta": dict(meta or {})}
        with storing(self.partial):
            _write_from(self.partial / META, 0, [json.dumps(content, default=str).encode()])
            if self.final.exists():
                shutil.rmtree(self.final)
            self.partial.rename(self.final)
        self.complete = True

    def _write(self, fresh: Sequence[_Rows]) -> None:
        """Write rows after the committed ones, cutting off whatever lies there; then the journal's line."""
        before = self._committed
        after = before.extended(fresh)
        with storing(self.partial, sum(rows.size for rows in fresh)):
            self.partial.mkdir(parents=True, exist_ok=True)
            for name, spec in after.specs.items():
                offset = before.rows.get(name, 0) * spec.row_bytes
                _write_from(
                    array_file(self.partial, name), offset, (rows.data.get(name, b"") for rows in fresh)
                )
            line = after.as_line(before, self.header)
            _write_from(self.partial / JOURNAL, before.length, [line])
        self._committed = replace(after, length=before.length + len(line))
        self._pending = []
        self._last_commit = time.monotonic()

    def _check(self, specs: Mapping[str, _Spec]) -> None:
        known = next((rows.specs for rows in self._pending if rows.specs), self._committed.specs)
        if known and specs and known != specs:
            raise ArgumentError(
                f"arrays are {_shown(specs)}, but those appended to {self.partial.name} before were "
                f"{_shown(known)}. Append rows of the same arrays."
            )

    def _is_due(self) -> bool:
        waiting = sum(rows.size for rows in self._pending)
        return waiting >= COMMIT_BYTES or time.monotonic() - self._last_commit >= COMMIT_SECONDS


@contextmanager
def storing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the system's errors into StoreErrors that name the path and the repair."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise StoreError(
                f"{path} cannot take another {readable_size(needed)}: {error.strerror}, "
                f"{readable_size(free_bytes(path))} are free. Free some space or name another cache folder "
                "(activation_dir). What was committed is intact, and the same command goes on from there."
            ) from error
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Name a cache folder (activation_dir) that can."
        ) from error


def array_file(folder: Path, name: str) -> Path:
    """Return where the array called `name` lies in an artifact's folder."""
    return folder / f"{quote(name, safe='')}.bin"


def free_bytes(path: Path) -> int:
    """Return how much can still be written where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def readable_size(size: int | float) -> str:
    """Write a number of bytes for people.

    >>> readable_size(1_536), readable_size(2_500_000_000)
    ('1.5 kB', '2.5 GB')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass(frozen=True)
class _Spec:
    """An array's type, and its shape without the rows."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Tensor) -> _Spec:
        if not array.ndim:
            raise ArgumentError("An array without dimensions has no rows. Append one of shape (rows, ...).")
        return cls(str(array.dtype).removeprefix("torch."), tuple(array.shape[1:]))

    @property
    def row_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize

    def as_json(self, rows: int) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": [rows, *self.shape], "bytes": rows * self.row_bytes}


@dataclass(frozen=True)
class _Rows:
    """What one call of append brought."""

    stop: int
    rows: dict[str, int]
    specs: dict[str, _Spec]
    data: dict[str, bytes]
    notes: list[str]

    @property
    def size(self) -> int:
        return sum(map(len, self.data.values()))


@dataclass(frozen=True)
class _Committed:
    """What the journal says is there: rows, notes (as JSON, once each), and its own length in bytes."""

    specs: dict[str, _Spec] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    next_image: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    length: int = 0

    def extended(self, fresh: Sequence[_Rows]) -> _Committed:
        if not fresh:
            return self
        specs = self.specs or next((new.specs for new in fresh if new.specs), {})
        rows = {name: self.rows.get(name, 0) + sum(new.rows.get(name, 0) for new in fresh) for name in specs}
        notes = {**self.notes, **{note: None for new in fresh for note in new.notes}}
        return _Committed(specs, rows, fresh[-1].stop, notes)

    def as_line(self, before: _Committed, header: Mapping[str, Any]) -> bytes:
        """Write this state as the journal's next line, after `before`; the first line has the header."""
        line = {
            "arrays": {name: spec.as_json(self.rows[name]) for name, spec in self.specs.items()},
            "next_image": self.next_image,
            "notes": [note for note in self.notes if note not in before.notes],
        }
        return json.dumps(line if before.length else {"header": header, **line}).encode() + b"\n"

    def is_held_by(self, folder: Path) -> bool:
        """Tell whether the files have at least the rows that were committed."""
        sizes = {name: rows * self.specs[name].row_bytes for name, rows in self.rows.items()}
        with suppress(OSError):
            return all(array_file(folder, name).stat().st_size >= size for name, size in sizes.items())
        return False


def _resume(folder: Path, header: Mapping[str, Any]) -> _Committed:
    """Read what an earlier run committed; nothing if that was for something else, or is damaged."""
    with storing(folder):
        text = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).exists() else b""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        if json.loads(lines[0])["header"] == json.loads(json.dumps(header)):
            committed = _parsed([json.loads(line) for line in lines], sum(map(len, lines)))
            if committed.is_held_by(folder):
                return committed
    with storing(folder):
        if folder.exists():
            shutil.rmtree(folder)
    return _Committed()


def _parsed(lines: Sequence[Mapping[str, Any]], length: int) -> _Committed:
    arrays = lines[-1]["arrays"]
    return _Committed(
        specs={name: _Spec(array["dtype"], tuple(array["shape"][1:])) for name, array in arrays.items()},
        rows={name: array["shape"][0] for name, array in arrays.items()},
        next_image=lines[-1]["next_image"],
        notes={note: None for line in lines for note in line["notes"]},
        length=length,
    )


def _write_from(path: Path, offset: int, chunks: Iterable[bytes]) -> None:
    """Replace whatever a file holds from `offset` on, durably."""
    with path.open("ab", buffering=0) as file:
        file.truncate(offset)
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _to_bytes(array: Tensor) -> bytes:
    flat = array.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _shown(specs: Mapping[str, _Spec]) -> str:
    return ", ".join(f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in specs.items())
