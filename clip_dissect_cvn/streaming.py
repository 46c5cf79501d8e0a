"""Batches of prepared images: decoded once for all networks, in order, whatever the number of workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any

import torch
from jaxtyping import Int64
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .errors import ArgumentError, CVNError, DataError
from .probe_sets import ProbeSet

Transform = Callable[[Image], Tensor]


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out, and why."""

    index: int
    identifier: str
    reason: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Neighbouring images, prepared for every network; the next batch begins at image `stop`.

    `indices` are the numbers in the probe set of the rows of each of `tensors`: the unreadable have no row.
    A batch of which nothing could be read has empty tensors of one dimension.
    """

    indices: Int64[Tensor, " images"]
    tensors: dict[str, Tensor]
    unreadable: tuple[Unreadable, ...]
    stop: int


def stream(
    probe: ProbeSet,
    transforms: Mapping[str, Transform],
    *,
    start: int = 0,
    batch_size: int = 200,
    workers: int = 0,
    strict: bool = False,
) -> Iterator[Batch]:
    """Yield the images of a probe set from number `start` on, each decoded once for all the transforms.

    Batches hold the images ``[start + k * batch_size, start + (k + 1) * batch_size)``, whatever the number of
    `workers`: processes that decode, none of which is left when the iterator is closed. Up to two batches a
    worker are in memory.

    Raises
    ------
    ArgumentError
        when an option is out of range, or something cannot be sent to the workers.
    DataError
        when a transform fails, its results cannot be stacked or, with `strict`, an image cannot be read.
    """
    for option, value, least in (("start", start, 0), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ArgumentError(f"{option} is {value}. Use {least} or more.")
    return _stream(_Preparer(probe, dict(transforms)), start, batch_size, workers, strict)


def _stream(prepare: _Preparer, start: int, size: int, workers: int, strict: bool) -> Iterator[Batch]:
    length = len(prepare.probe)
    parts = [range(first, min(first + size, length)) for first in range(start, length, size)]
    with _running(_started(prepare, parts, workers), workers) as batches:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            if strict and batch.unreadable:
                raise DataError(f"{batch.unreadable[0].reason} Without strict it would be left out.")
            yield batch


@dataclass(frozen=True)
class _Preparer:
    """What a worker does: numbers in, a batch out; an error is handed over whole, instead of raised."""

    probe: ProbeSet
    transforms: Mapping[str, Transform]

    def __call__(self, numbers: Any) -> Batch | Exception:
        try:
            return self._batch(numbers)
        except CVNError as error:
            return error.with_traceback(None)

    def _batch(self, numbers: range) -> Batch:
        rows: dict[int, dict[str, Tensor]] = {}
        unreadable = []
        for i in numbers:
            try:
                image = self.probe.image(i)
            except DataError as error:
                unreadable.append(Unreadable(i, self.probe.identifier(i), str(error)))
            else:
                rows[i] = {name: self._transformed(name, image, i) for name in self.transforms}
        columns = {name: {i: row[name] for i, row in rows.items()} for name in self.transforms}
        tensors = {name: self._stacked(name, column) for name, column in columns.items()}
        return Batch(torch.tensor([*rows], dtype=torch.int64), tensors, tuple(unreadable), numbers.stop)

    def _transformed(self, name: str, image: Image, i: int) -> Tensor:
        try:
            return self.transforms[name](image)
        except Exception as error:
            raise DataError(
                f"The preprocessing of {name!r} failed on {self.probe.identifier(i)}, an RGB image of "
                f"{image.width} x {image.height} pixels: {error!r}. Make it take any PIL image in RGB."
            ) from error

    def _stacked(self, name: str, rows: Mapping[int, Tensor]) -> Tensor:
        for i, row in rows.items():
            first = next(iter(rows))
            if row.shape != rows[first].shape:
                raise DataError(
                    f"The preprocessing of {name!r} made {tuple(rows[first].shape)} of "
                    f"{self.probe.identifier(first)} and {tuple(row.shape)} of {self.probe.identifier(i)}. "
                    "Let it end in one size for all, as by Resize and CenterCrop."
                )
        return torch.stack([*rows.values()]) if rows else torch.empty(0)


def _started(prepare: _Preparer, parts: list[range], workers: int) -> Iterator[Batch | Exception]:
    """Start the workers, without the advice of torch and Python on their number and kind."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            warnings.filterwarnings("ignore", "Got pickle error", UserWarning)
            return iter(_loader(prepare, parts, workers))
    except (PicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"workers is {workers}, but the probe set or a preprocessing cannot be sent to another process: "
            f"{error}. Define it at the top of a module, or use workers=0."
        ) from error


def _loader(prepare: _Preparer, parts: list[range], workers: int) -> DataLoader[Any]:
    return DataLoader(
        parts,  # type: ignore[arg-type]  # its items are what `prepare` gets
        batch_size=None,
        collate_fn=prepare,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        generator=torch.Generator(),  # or it would draw from torch's global one
    )


@contextmanager
def _running(batches: Iterator[Batch | Exception], workers: int) -> Iterator[Iterator[Batch | Exception]]:
    """End the workers whatever happens: a traceback that is kept must not keep them alive."""
    try:
        yield batches
    except RuntimeError as error:
        if isinstance(error, CVNError) or "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"workers is {workers}, and one of them died: {error}. Memory, or shared memory (/dev/shm), may "
            "have run out: use fewer workers or a smaller batch_size."
        ) from error
    finally:
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
