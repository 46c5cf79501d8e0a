"""Batches of images: composition, workers, errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from clip_dissect_cvn.errors import ArgumentError, DataError
from clip_dissect_cvn.probes import Batch, ProbeSet, load_probe, stream

COUNT = 11
UNREADABLE = (2, 9)


class Ramp:
    """Image i has value i; some are unreadable. It counts how often it decodes."""

    name = "ramp"
    classes = None
    digest = "ramp"

    def __init__(self, count: int = COUNT, unreadable: tuple[int, ...] = UNREADABLE) -> None:
        self.count, self.unreadable, self.decoded = count, unreadable, 0

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> Image.Image:
        self.decoded += 1
        if i in self.unreadable:
            raise DataError(f"The image {i} cannot be read: it is torn.")
        return Image.new("RGB", (2, 2), (i, 0, 0))

    def identifier(self, i: int) -> str:
        return f"ramp/{i}"

    def label(self, i: int) -> None:
        return None


def plus_one(image: Image.Image) -> Tensor:
    return pil_to_tensor(image) + 1


def kill_worker(image: Image.Image) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def own_size(image: Image.Image) -> Tensor:
    return torch.zeros(int(np.asarray(image)[0, 0, 0]) + 1)


def fail(image: Image.Image) -> Tensor:
    raise KeyError("size")


TRANSFORMS = {"clip": pil_to_tensor, "target": plus_one}


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.indices, other.indices)
        assert mine.stop == other.stop
        assert mine.unreadable == other.unreadable
        assert mine.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)


def test_batches_hold_neighbours_and_leave_out_the_unreadable() -> None:
    probe = Ramp()
    assert isinstance(probe, ProbeSet)
    batches = list(stream(probe, TRANSFORMS, batch_size=4))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 3], [4, 5, 6, 7], [8, 10]]
    assert [batch.stop for batch in batches] == [4, 8, 11]
    assert [[one.index for one in batch.unreadable] for batch in batches] == [[2], [], [9]]
    first = batches[0].unreadable[0]
    assert (first.identifier, first.reason) == ("ramp/2", "The image 2 cannot be read: it is torn.")
    for batch in batches:
        assert batch.indices.dtype == torch.int64
        assert torch.equal(batch.tensors["clip"][:, 0, 0, 0].long(), batch.indices)
        assert torch.equal(batch.tensors["target"], batch.tensors["clip"] + 1)


def test_every_image_is_decoded_once() -> None:
    probe = Ramp()
    list(stream(probe, TRANSFORMS, batch_size=3))
    assert probe.decoded == COUNT


@settings(deadline=None, max_examples=30)
@given(st.integers(0, COUNT), st.integers(1, COUNT + 2))
def test_any_start_and_size_give_the_same_rows(start: int, size: int) -> None:
    batches = list(stream(Ramp(), TRANSFORMS, start=start, batch_size=size))
    assert [i for batch in batches for i in batch.indices.tolist()] == [
        i for i in range(start, COUNT) if i not in UNREADABLE
    ]
    assert [batch.stop for batch in batches] == [
        *range(start + size, COUNT, size),
        *([COUNT] * (start < COUNT)),
    ]


def test_a_batch_of_which_nothing_can_be_read_has_no_rows() -> None:
    batches = list(stream(Ramp(4, (2, 3)), TRANSFORMS, batch_size=2))
    assert len(batches[1].indices) == len(batches[1].tensors["clip"]) == 0
    assert len(batches[1].unreadable) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batches(workers: int) -> None:
    alone = list(stream(Ramp(), TRANSFORMS, start=1, batch_size=2))
    assert_same(list(stream(Ramp(), TRANSFORMS, start=1, batch_size=2, workers=workers)), alone)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        list(stream(Ramp(), TRANSFORMS, batch_size=6, workers=workers))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_worker_is_left_when_the_iterator_is_closed_or_fails() -> None:
    batches = stream(Ramp(), TRANSFORMS, batch_size=1, workers=2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
    with pytest.raises(DataError) as kept:  # with its traceback
        list(stream(Ramp(), TRANSFORMS, batch_size=1, workers=2, strict=True))
    assert not multiprocessing.active_children()
    assert kept.value.__traceback__


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first_unreadable_image(workers: int) -> None:
    batches = stream(Ramp(), TRANSFORMS, batch_size=2, workers=workers, strict=True)
    assert next(batches).stop == 2
    with pytest.raises(
        DataError, match=r"^The image 2 .* it is torn\. Without strict it would be left out\.$"
    ):
        next(batches)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"start": -1}, "start is -1. Use 0 or more."),
        ({"batch_size": 0}, "batch_size is 0. Use 1 or more."),
        ({"workers": -2}, "workers is -2. Use 0 or more."),
    ],
)
def test_options_out_of_range_are_refused_at_once(option: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        stream(Ramp(), TRANSFORMS, **option)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_preprocessing_that_fails_is_named(workers: int) -> None:
    with pytest.raises(
        DataError, match=r"^The preprocessing of 'clip' failed on ramp/0, an RGB .* of 2 x 2 .*'size'"
    ):
        list(stream(Ramp(), {"clip": fail}, workers=workers))
    with pytest.raises(
        DataError, match=r"'clip' made \(1,\) of ramp/0 and \(2,\) of ramp/1\. Let it end in one size"
    ):
        list(stream(Ramp(), {"clip": own_size}, workers=workers))


def test_a_worker_that_dies_is_reported() -> None:
    with pytest.raises(
        DataError, match=r"workers is 1, and one of them died: .*use fewer workers or a smaller"
    ):
        list(stream(Ramp(), {"clip": kill_worker}, workers=1))


@pytest.fixture
def _spawning() -> Iterator[None]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("_spawning")
def test_what_cannot_be_sent_to_a_worker_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"workers is 1, but .*cannot be sent to another process.*use workers=0"
    ):
        list(stream(Ramp(), {"clip": lambda image: pil_to_tensor(image)}, workers=1))
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.usefixtures("_spawning")
def test_workers_may_be_spawned(tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / f"{i}.png")
    probe = load_probe(tmp_path)
    transforms = {"clip": pil_to_tensor}
    assert_same(
        list(stream(probe, transforms, batch_size=2, workers=1)),
        list(stream(probe, transforms, batch_size=2)),
    )
