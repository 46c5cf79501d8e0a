"""Artifacts on disk, each named by a digest of everything that made it, so that a cache cannot be stale.

::

    ROOT/KIND/DIGEST/            complete: meta.json (what it is, and the size of every array), NAME.bin
    ROOT/KIND/DIGEST.partial/    begun: the same files, and the journal that says how far it got
    ROOT/KIND/DIGEST.lock        held by whoever writes
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .appender import JOURNAL, META, array_file, free_bytes, readable_size, storing
from .appender import Appender as Appender
from .digests import digest_of
from .errors import StoreError

FORMAT = 1
FOLDER = re.compile(r"([0-9a-f]{32})(\.partial)?")
SHOWN = 100
log = logging.getLogger(__name__)


class Store:
    """A folder of artifacts.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = Store(folder.name)
    >>> store.keep("numbers", {"count": 3}, lambda: {"square": torch.arange(3) ** 2})["square"]
    tensor([0, 1, 4])
    >>> [entry.description for entry in store.list()]
    ['count=3']
    >>> folder.cleanup()
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()

    def artifact(self, kind: str, parts: Mapping[str, Any]) -> Artifact:
        """Name the artifact of this `kind` that is made from `parts`: plain data, arrays or tensors."""
        digest = digest_of({"kind": kind, "parts": parts, "format": FORMAT})
        return Artifact(self.root / kind / digest, kind, parts, digest)

    def keep(
        self, kind: str, parts: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the arrays made from `parts`, computing and storing them unless they are there."""
        artifact = self.artifact(kind, parts)
        if not artifact.complete:
            with artifact.append() as appender:
                if not appender.complete:
                    appender.append(compute(), stop=1)
                    appender.finish()
        return artifact.load()

    def require_space(self, needed: int) -> None:
        """Raise StoreError unless `needed` more bytes fit on the disk."""
        free = free_bytes(self.root.absolute())
        if needed > free:
            raise StoreError(
                f"This run will store {readable_size(needed)} in {self.root}, where {readable_size(free)} "
                "are free. Free some space (clip-dissect-cvn cache prune), name another cache folder "
                "(activation_dir), or record fewer layers or images."
            )

    def list(self) -> tuple[Entry, ...]:
        """List all artifacts, complete or begun, the last used first."""
        folders = (path for path in self.root.glob("*/*") if FOLDER.fullmatch(path.name) and path.is_dir())
        entries = (entry for entry in map(_entry, folders) if entry is not None)
        return tuple(sorted(entries, key=lambda entry: entry.age))

    def prune(
        self,
        *,
        older_than: timedelta | None = None,
        partial_only: bool = False,
        kinds: Sequence[str] | None = None,
        dry_run: bool = False,
    ) -> tuple[Entry, ...]:
        """Remove artifacts and return what was removed; never one that a run is writing.

        `older_than` counts from the last use. With `dry_run` nothing is removed.
        """
        chosen = [
            entry
            for entry in self.list()
            if (older_than is None or entry.age > older_than)
            and not (partial_only and entry.complete)
            and (kinds is None or entry.kind in kinds)
        ]
        return tuple(entry for entry in chosen if _remove(entry, dry_run))


@dataclass(frozen=True, eq=False)
class Artifact:
    """Arrays in a folder, named by the digest of the `parts` they are made from."""

    path: Path
    kind: str
    parts: Mapping[str, Any]
    digest: str

    @property
    def complete(self) -> bool:
        """Whether it is all there: what its meta.json says, and every array as long as that says."""
        return _read_meta(self.path) is not None

    @property
    def meta(self) -> dict[str, Any]:
        """What `finish` was told."""
        meta: dict[str, Any] = self._content()["meta"]
        return meta

    @property
    def notes(self) -> list[Any]:
        """What came with the rows, such as the images that could not be read."""
        notes: list[Any] = self._content()["notes"]
        return notes

    def load(self) -> dict[str, Tensor]:
        """Return the arrays, memory-mapped: nothing is read until it is used, and writing reaches no file.

        Raises StoreError when the artifact is not complete.
        """
        arrays = self._content()["arrays"]
        with suppress(OSError):
            os.utime(self.path / META)
        try:
            return {name: _mapped(array_file(self.path, name), spec) for name, spec in arrays.items()}
        except RuntimeError as error:
            raise StoreError(
                f"{self.path} cannot be mapped into memory: {error}. "
                "Run the command again: it makes what another run has pruned."
            ) from error

    @contextmanager
    def append(self) -> Iterator[Appender]:
        """Hold the artifact's lock and go on where an earlier run stopped.

        Waits while another run holds the lock; the appender of an artifact that was completed meanwhile is
        `complete`. Rows appended before an exception are committed.
        """
        with _locked(self.path):
            header = {
                "format": FORMAT,
                "kind": self.kind,
                "digest": self.digest,
                "parts": _as_json(self.parts),
            }
            appender = Appender(_partial(self.path), self.path, header, complete=self.complete)
            try:
                yield appender
            except StoreError:
                raise
            except BaseException:
                with suppress(StoreError):
                    appender.commit()
                raise
            appender.commit()

    def _content(self) -> dict[str, Any]:
        content = _read_meta(self.path)
        if content is None:
            raise StoreError(
                f"{self.path} holds no complete artifact. Run the command again: it makes what is missing."
            )
        return content


@contextmanager
def appending(artifacts: Sequence[Artifact]) -> Iterator[list[Appender]]:
    """Append to several artifacts in one pass, whose locks two runs always take in the same order."""
    with ExitStack() as stack:
        order = sorted(range(len(artifacts)), key=lambda place: artifacts[place].path)
        appenders = {place: stack.enter_context(artifacts[place].append()) for place in order}
        yield [appenders[place] for place in range(len(artifacts))]


@dataclass(frozen=True)
class Entry:
    """One line of what a store holds: `size` in bytes, `age` since the last use."""

    kind: str
    digest: str
    size: int
    age: timedelta
    complete: bool
    description: str
    path: Path

    def __str__(self) -> str:
        state = "" if self.complete else " (unfinished)"
        size, days = readable_size(self.size), f"{self.age / timedelta(days=1):.1f} d"
        return f"{self.kind:<12} {self.digest[:12]} {size:>10} {days:>8}  {self.description}{state}"


def _entry(path: Path) -> Entry | None:
    """Look at one folder; None when it vanishes meanwhile, finished or pruned by another run."""
    try:
        files = [file.stat() for file in path.iterdir() if file.is_file()]
        used = max((stat.st_mtime for stat in files), default=path.stat().st_mtime)
    except FileNotFoundError:
        return None
    content = _read_meta(path)
    return Entry(
        kind=path.parent.name,
        digest=path.name[:32],
        size=sum(stat.st_size for stat in files),
        age=timedelta(seconds=max(0.0, time.time() - used)),
        complete=content is not None and not path.name.endswith(".partial"),
        description=_description(content or _read_header(path)),
        path=path,
    )


def _remove(entry: Entry, dry_run: bool) -> bool:
    """Remove one artifact, unless somebody writes it or it is gone; tell which."""
    final = entry.path.with_suffix("")
    with suppress(Timeout), _locked(final, wait=False), storing(entry.path):
        if not entry.path.exists():
            return False
        if not dry_run:
            shutil.rmtree(entry.path)
        return True
    return False


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of the artifact at `path`; without `wait`, raise Timeout when somebody else does."""
    lock = FileLock(path.with_suffix(".lock"))
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        log.warning("Another run is writing %s: waiting until it is done.", path)
        lock.acquire()
    except OSError:
        with storing(path):
            raise
    try:
        yield
    finally:
        lock.release()


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _read_meta(path: Path) -> dict[str, Any] | None:
    """Read an artifact's meta.json; None unless it is its own and the arrays are as long as it says."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        content: dict[str, Any] = json.loads((path / META).read_bytes())
        sizes = {array_file(path, name): array["bytes"] for name, array in content["arrays"].items()}
        ours = content["format"] == FORMAT and content["digest"] == path.name[:32]
        if ours and all(file.stat().st_size == size for file, size in sizes.items()):
            return {**content, "meta": content["meta"], "notes": content["notes"]}
    return None


def _read_header(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, LookupError, TypeError), (path / JOURNAL).open("rb") as journal:
        header: dict[str, Any] = json.loads(journal.readline())["header"]
        return header
    return {"parts": {}}


def _description(header: Mapping[str, Any]) -> str:
    """Say briefly what an artifact is made from, leaving out digests and long lists."""
    short = {
        name: value
        for name, value in header["parts"].items()
        if isinstance(value, str | int | float) and not re.fullmatch(r"[0-9a-f]{32,}", str(value))
    }
    text = ", ".join(f"{name}={value}" for name, value in short.items())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _mapped(path: Path, spec: Mapping[str, Any]) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec["dtype"])
    if not spec["bytes"]:
        return torch.empty(spec["shape"], dtype=dtype)
    size = spec["bytes"] // dtype.itemsize
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).reshape(spec["shape"])


def _as_json(parts: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(parts, default=lambda value: f"{type(value).__name__} {digest_of(value)}"))
