from __future__ import annotations

import errno
import logging
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clip_dissect_cvn import appender as appending_module
from clip_dissect_cvn.errors import ArgumentError, StoreError
from clip_dissect_cvn.store import Appender, Artifact, Store, appending

IMAGES, BATCH = 40, 4
WRITES = 5 * (IMAGES // BATCH) + 5 + 1  # four arrays and the journal at each commit and the end; meta.json
PARTS = {"model": "cvn_deit_t16", "layer": "head", "weights": "0" * 32}
UNREADABLE = (5, 17)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit at every append."""
    monkeypatch.setattr(appending_module, "COMMIT_SECONDS", 0.0)


def rows(indices: Tensor) -> dict[str, Tensor]:
    """What a stage would compute for these images."""
    i = indices.double()
    return {
        "layer4.0/response": torch.stack([i.sin(), i.cos(), i], 1).float(),
        "winner": (indices % 7).to(torch.uint8)[:, None],
        "probability": torch.stack([i / 100, 1 - i / 100], 1).half(),
        "odd": (indices % 2).bool(),
    }


def batches(start: int, size: int = BATCH) -> Iterator[tuple[Tensor, int, list[dict[str, int]]]]:
    for begin in range(start, IMAGES, size):
        stop = min(begin + size, IMAGES)
        kept = [i for i in range(begin, stop) if i not in UNREADABLE]
        yield (
            torch.tensor(kept, dtype=torch.int64),
            stop,
            [{"index": i} for i in UNREADABLE if begin <= i < stop],
        )


def work(appender: Appender) -> None:
    for indices, stop, notes in batches(min(appender.next_image, IMAGES)):
        appender.append(rows(indices), stop, notes, indices=indices)
    appender.finish({"images": IMAGES})


def complete(artifact: Artifact) -> None:
    with artifact.append() as appender:
        work(appender)


def content(artifact: Artifact) -> dict[str, bytes]:
    """Every byte of a complete artifact but the journal, which says when it was committed."""
    return {path.name: path.read_bytes() for path in artifact.path.iterdir() if path.name != "journal.jsonl"}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    artifact = Store(tmp_path / "uninterrupted").artifact("units", PARTS)
    complete(artifact)
    return content(artifact)


def assert_right(loaded: Mapping[str, Tensor]) -> None:
    wanted = rows(torch.tensor([i for i in range(IMAGES) if i not in UNREADABLE]))
    assert list(loaded) == list(wanted)
    for name, array in wanted.items():
        assert loaded[name].dtype == array.dtype
        assert torch.equal(loaded[name], array)


def test_what_is_appended_is_loaded(store: Store) -> None:
    artifact = store.artifact("units", PARTS)
    assert not artifact.complete
    complete(artifact)
    assert artifact.complete
    assert_right(artifact.load())
    assert artifact.meta == {"images": IMAGES}
    assert artifact.notes == [{"index": i} for i in UNREADABLE]


def test_writing_to_a_loaded_array_reaches_no_file(store: Store) -> None:
    artifact = store.artifact("units", PARTS)
    complete(artifact)
    artifact.load()["winner"].fill_(9)
    assert_right(artifact.load())


def test_arrays_without_rows_or_columns_are_kept(store: Store) -> None:
    empty = {"rows": torch.zeros(0, 3), "columns": torch.zeros(0, 0, dtype=torch.int64)}
    loaded = store.keep("empty", {}, lambda: empty)
    assert [(array.shape, array.dtype) for array in loaded.values()] == [
        ((0, 3), torch.float32),
        ((0, 0), torch.int64),
    ]


def test_the_name_follows_from_kind_and_parts(store: Store) -> None:
    name = store.artifact("units", PARTS).path
    assert store.artifact("units", dict(reversed(PARTS.items()))).path == name
    assert store.artifact("images", PARTS).digest != name.name
    assert store.artifact("units", {**PARTS, "layer": "norm"}).path != name
    assert name.parent == store.root / "units"


def test_keep_computes_once(store: Store) -> None:
    calls = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"squares": torch.arange(5) ** 2, "names": torch.eye(3)}

    first, second = (store.keep("words", {"a": 1}, compute) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first["squares"], second["squares"])
    assert second["names"].shape == (3, 3)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_division_into_runs_and_batches_gives_the_same(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    artifact = Store(tmp_path_factory.mktemp("store")).artifact("units", PARTS)
    for _ in range(data.draw(st.integers(0, 3))):
        with artifact.append() as appender:
            size = data.draw(st.integers(1, 13))
            some = data.draw(st.integers(0, 5))
            for (indices, stop, notes), _ in zip(batches(0, size), range(some), strict=False):
                appender.append(rows(indices), stop, notes, indices=indices)
    with artifact.append() as appender:
        for indices, stop, notes in batches(0, 7):
            appender.append(rows(indices), stop, notes, indices=indices)
        appender.finish()
    assert_right(artifact.load())
    assert artifact.notes == [{"index": i} for i in UNREADABLE]


def test_a_run_goes_on_where_the_last_one_stopped(store: Store, expected: dict[str, bytes]) -> None:
    artifact = store.artifact("units", PARTS)
    with pytest.raises(KeyboardInterrupt), artifact.append() as appender:
        for (indices, stop, notes), _ in zip(batches(0), range(3), strict=False):
            appender.append(rows(indices), stop, notes)
        raise KeyboardInterrupt
    assert not artifact.complete
    with artifact.append() as appender:
        assert appender.next_image == 3 * BATCH
        work(appender)
    assert content(artifact) == expected


Write = Callable[[Path, int, Iterable[bytes]], None]


def failing_at(number: int, fail: Write) -> Write:
    """Return the store's own function for writing, but for the `number`-th write."""
    write, calls = appending_module._write_from, count(1)

    def written(path: Path, offset: int, chunks: Iterable[bytes]) -> None:
        (fail if next(calls) == number else write)(path, offset, chunks)

    return written


def before_writing(*_: object) -> None:
    raise KeyboardInterrupt


def after_writing(
    path: Path, offset: int, chunks: Iterable[bytes], write: Write = appending_module._write_from
) -> None:
    write(path, offset, chunks)
    raise KeyboardInterrupt


def on_a_full_disk(path: Path, offset: int, chunks: Iterable[bytes]) -> None:
    with path.open("ab") as file:
        file.truncate(offset)
        file.write(b"half a ")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("number", range(1, WRITES, 9))
@pytest.mark.parametrize("fail", [before_writing, after_writing, on_a_full_disk])
def test_failing_at_any_write_loses_nothing(
    store: Store, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, fail: Write, number: int
) -> None:
    artifact = store.artifact("units", PARTS)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, StoreError)):
        patch.setattr(appending_module, "_write_from", failing_at(number, fail))
        complete(artifact)
    assert not artifact.complete
    with artifact.append() as appender:
        assert appender.next_image >= BATCH * (number // 5 - 1)
        work(appender)
    assert content(artifact) == expected


def test_a_full_disk_says_what_to_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending_module, "_write_from", on_a_full_disk)
    message = (
        r"units.* cannot take another 4.0 kB: No space left on device, .* are free. Free some space or name "
        r"another cache folder \(activation_dir\). What was committed is intact, and the same command goes on"
    )
    with pytest.raises(StoreError, match=message):
        store.keep("units", PARTS, lambda: {"a": torch.zeros(1000)})


# processes -------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["clip_dissect_cvn.store", "hypothesis", "pytest"])


def telling_run(root: Path, told: Any) -> None:
    """Commit every batch, telling of each write that begins."""
    write = appending_module._write_from

    def telling(path: Path, offset: int, chunks: Iterable[bytes]) -> None:
        told.send(path.name)
        write(path, offset, chunks)

    appending_module._write_from = telling
    appending_module.COMMIT_SECONDS = 0.0
    with Store(root).artifact("units", PARTS).append() as appender:
        told.send(appender.next_image)
        work(appender)


def start_telling(root: Path) -> tuple[Any, Any]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=telling_run, args=(root, theirs))
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_writes_it_ends_bit_identical(
    tmp_path: Path, expected: dict[str, bytes], seed: int
) -> None:
    artifact = Store(tmp_path / "killed").artifact("units", PARTS)
    chance, starts = random.Random(seed), []
    while not artifact.complete:
        process, told = start_telling(tmp_path / "killed")
        starts.append(told.recv())
        with suppress(EOFError):
            for _ in range(chance.randint(6, 20)):
                told.recv()
        process.kill()
        process.join()
    assert starts[0] == 0
    assert len(set(starts)) > 2, "no run was killed half way"
    assert content(artifact) == expected


def hold(root: Path, held: Any) -> None:
    with Store(root).artifact("units", PARTS).append():
        held.send(True)
        time.sleep(60)


def test_what_another_process_writes_is_not_pruned_and_is_free_when_it_is_killed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begun = store.artifact("units", PARTS)
    with begun.append() as appender:
        appender.append(rows(torch.arange(4)), 4)
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    ours.recv()
    assert store.prune() == ()
    process.kill()
    process.join()
    with begun.append() as appender:
        assert appender.next_image == 4
    assert [entry.digest for entry in store.prune()] == [begun.digest]


def keep_slowly(root: Path, log: Path) -> None:
    def compute() -> dict[str, Tensor]:
        with log.open("a") as file:
            file.write("computed\n")
        time.sleep(0.2)
        return {"numbers": torch.arange(3)}

    assert Store(root).keep("words", PARTS, compute)["numbers"].tolist() == [0, 1, 2]


def test_two_runs_at_once_compute_once(tmp_path: Path) -> None:
    runs = [FORK.Process(target=keep_slowly, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "computed\n"


def fill_up(root: Path, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = Store(root)
    store.keep("words", {"size": "small"}, lambda: {"a": torch.zeros(10)})
    try:
        store.keep("words", {"size": "large"}, lambda: {"a": torch.zeros(100_000)})
    except StoreError as error:
        answer.send(str(error))
    assert store.artifact("words", {"size": "small"}).complete
    assert not store.artifact("words", {"size": "large"}).complete


def test_a_file_that_the_system_cuts_short_is_a_store_error(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=fill_up, args=(tmp_path, theirs))
    process.start()
    assert "cannot take another 400.0 kB: File too large" in ours.recv()
    process.join()
    assert process.exitcode == 0
    assert (
        len(Store(tmp_path).keep("words", {"size": "large"}, lambda: {"a": torch.zeros(100_000)})["a"])
        == 100_000
    )


def test_a_run_says_that_it_waits_and_goes_on_when_the_other_dies(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    ours.recv()
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            process.kill()

    log, listener = logging.getLogger("clip_dissect_cvn.store"), Listener()
    log.addHandler(listener)
    complete(Store(tmp_path).artifact("units", PARTS))
    log.removeHandler(listener)
    process.join()
    assert len(said) == 1 and said[0].startswith("Another run is writing")


# damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "winner.bin").write_bytes(b"1"),
        lambda path: (path / "winner.bin").unlink(),
        lambda path: (path / "meta.json").write_text("{"),
        lambda path: (path / "meta.json").write_text("[]"),
        lambda path: (path / "meta.json").write_text('{"format": 1, "arrays": {}, "digest": "another"}'),
        lambda path: (path / "meta.json").unlink(),
    ],
)
def test_a_damaged_artifact_counts_as_absent_and_is_made_again(store: Store, damage: Any) -> None:
    artifact = store.artifact("units", PARTS)
    complete(artifact)
    damage(artifact.path)
    assert not artifact.complete
    with pytest.raises(
        StoreError, match="holds no complete artifact. Run the command again: it makes what is"
    ):
        artifact.load()
    complete(artifact)
    assert_right(artifact.load())


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda path: (path / "winner.bin").write_bytes(b"1"), 0),
        (lambda path: (path / "winner.bin").unlink(), 0),
        (lambda path: (path / "journal.jsonl").write_text("{}\n"), 0),
        (lambda path: (path / "journal.jsonl").write_text("\x00\n"), 0),
        (lambda path: (path / "journal.jsonl").unlink(), 0),
        (lambda path: append_to(path / "journal.jsonl", b'{"arrays": {"winner"'), 8),
        (lambda path: append_to(path / "winner.bin", b"rows that no journal mentions"), 8),
    ],
)
@pytest.mark.usefixtures("eager")
def test_a_damaged_beginning_is_dropped_and_a_torn_end_cut_off(store: Store, damage: Any, kept: int) -> None:
    artifact = store.artifact("units", PARTS)
    with artifact.append() as appender:
        for (indices, stop, notes), _ in zip(batches(0), range(2), strict=False):
            appender.append(rows(indices), stop, notes)
    damage(store.root / "units" / f"{artifact.digest}.partial")
    with artifact.append() as appender:
        assert appender.next_image == kept
        work(appender)
    assert_right(artifact.load())


def append_to(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# appending -------------------------------------------------------------------------------------------------


def test_artifacts_that_got_differently_far_go_on_together(store: Store) -> None:
    artifacts = [store.artifact("units", {"layer": name}) for name in "abc"]
    complete(artifacts[0])
    with artifacts[1].append() as appender:
        indices, stop, notes = next(batches(0, 10))
        appender.append(rows(indices), stop, notes)
    with appending(artifacts) as appenders:
        assert [appender.next_image > IMAGES for appender in appenders] == [True, False, False]
        assert [appender.complete for appender in appenders] == [True, False, False]
        for indices, stop, notes in batches(min(appender.next_image for appender in appenders)):
            for appender in appenders:
                appender.append(rows(indices), stop, notes, indices=indices)
        for appender in appenders:
            appender.finish()
    for artifact in artifacts:
        assert_right(artifact.load())


@pytest.mark.parametrize("first", [0, 4])
def test_there_may_be_notes_and_no_arrays(store: Store, first: int) -> None:
    artifact = store.artifact("units", PARTS)
    for start in (0, 4, 8):
        with artifact.append() as appender:
            arrays = {} if start == first else {"a": torch.full((4,), start)}
            appender.append(arrays, start + 4, [{"start": start}])
    with artifact.append() as appender:
        appender.finish()
    assert artifact.load()["a"].tolist() == [start for start in (0, 4, 8) if start != first for _ in range(4)]
    assert artifact.notes == [{"start": start} for start in (0, 4, 8)]


def test_nothing_but_notes_is_an_artifact_without_arrays(store: Store) -> None:
    with store.artifact("units", PARTS).append() as appender:
        appender.append({}, 4, ["unreadable"], indices=torch.empty(0, dtype=torch.int64))
        appender.finish()
    assert store.artifact("units", PARTS).load() == {}


def test_rows_unlike_the_earlier_ones_are_refused(store: Store) -> None:
    with store.artifact("units", PARTS).append() as appender:
        appender.append({"a": torch.zeros(2, 3)}, 2)
        with pytest.raises(
            ArgumentError, match=r"arrays are a float32\[4\], but those appended .* a float32\[3\]"
        ):
            appender.append({"a": torch.zeros(2, 4)}, 4)
        with pytest.raises(ArgumentError, match="without dimensions has no rows"):
            appender.append({"a": torch.tensor(1.0)}, 4)


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: .*Name a cache folder"):
        Store(tmp_path / "file").keep("words", {}, lambda: {"a": torch.zeros(1)})


def test_space_is_required_before_the_start(store: Store) -> None:
    store.require_space(10)
    with pytest.raises(
        StoreError, match="This run will store 1000.0 TB in .*, where .* are free. Free some space"
    ):
        store.require_space(10**15)


# list and prune --------------------------------------------------------------------------------------------


def test_list_tells_what_there_is(store: Store) -> None:
    complete(store.artifact("units", PARTS))
    with store.artifact("images", {"probe": "shapes", "words": ["x"] * 9}).append() as appender:
        appender.append(rows(torch.arange(4)), 4)
    (store.root / "units" / "notes").mkdir()
    entries = {entry.kind: entry for entry in store.list()}
    assert entries["units"].complete and not entries["images"].complete
    assert entries["units"].description == "model=cvn_deit_t16, layer=head"
    assert entries["images"].description == "probe=shapes"
    assert entries["units"].size > IMAGES * 15
    assert entries["units"].age < timedelta(minutes=5)
    assert "model=cvn_deit_t16, layer=head" in str(entries["units"])
    assert str(entries["images"]).endswith("probe=shapes (unfinished)")
    assert Store(store.root / "absent").list() == ()


def test_prune_removes_what_it_is_asked_to(store: Store) -> None:
    complete(store.artifact("units", PARTS))
    with store.artifact("images", {}).append() as appender:
        appender.append(rows(torch.arange(4)), 4)
    assert store.prune(older_than=timedelta(days=1)) == ()
    assert [entry.kind for entry in store.prune(kinds=["units"], dry_run=True)] == ["units"]
    assert len(store.list()) == 2
    assert [entry.kind for entry in store.prune(partial_only=True)] == ["images"]
    assert [entry.kind for entry in store.prune()] == ["units"]
    assert store.list() == ()
    assert not store.artifact("units", PARTS).complete
