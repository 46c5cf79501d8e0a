"""Names and files to concept sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_dissect_cvn.concepts import CONCEPTS, ConceptSet, load_concepts, register_concepts
from clip_dissect_cvn.errors import ArgumentError, DataError, PluginError, UnknownNameError

LISTS = Path(__file__).parents[2] / "shared" / "concept_sets"


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names to take out of the registry again."""
    names: list[str] = []
    yield names
    for name in names:
        CONCEPTS._entries.pop(name)


def write(folder: Path, data: bytes | str, name: str = "words.txt") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Files


@pytest.mark.parametrize(
    "data",
    [
        "dog\nred cat\nstripes\n",
        "dog\nred cat\nstripes",
        "dog\r\nred cat\r\nstripes\r\n",
        "dog\rred cat\rstripes\r",
        "\ufeffdog\nred cat\nstripes\n",
        "  dog\t\n red cat \nstripes\n",
    ],
)
def test_line_ends_marks_and_white_space_do_not_matter(tmp_path: Path, data: str) -> None:
    assert load_concepts(write(tmp_path, data)) == ConceptSet("words", ("dog", "red cat", "stripes"))


def test_blank_lines_and_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    found = load_concepts(str(write(tmp_path, "\ndog\n\n  \ncat\ndog\nDog\ncat \n")))
    assert found == ConceptSet("words", ("dog", "cat", "Dog"), dropped_blank=3, dropped_duplicates=2)
    assert len(found) == 3


@given(st.lists(st.sampled_from(["", " ", "a", "b ", "c", "\t"]), min_size=1))
def test_nothing_is_lost_but_what_is_counted(lines: list[str]) -> None:
    lines = [*lines, "last"]
    found = load_concepts(lines)
    assert len(found) + found.dropped_blank + found.dropped_duplicates == len(lines)
    assert load_concepts(found.words) == ConceptSet("custom", found.words)
    assert [*found.words] == sorted(found.words, key=[line.strip() for line in lines].index)


def test_other_separators_of_unicode_do_not_split_a_concept(tmp_path: Path) -> None:
    assert len(load_concepts(write(tmp_path, "a\u2028b\nc\x0bd\ne\x85f"))) == 3


def test_the_digest_is_of_the_words_in_their_order(tmp_path: Path) -> None:
    digest = load_concepts(write(tmp_path, "a\n\nb\n")).digest
    assert digest == load_concepts(["a", "b", "a"]).digest
    assert digest != load_concepts(["b", "a"]).digest


@pytest.mark.parametrize("data", ["", "\n\n", "\ufeff", "  \r\n\t\r\n"])
def test_a_file_without_concepts_is_an_error(tmp_path: Path, data: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(
        DataError, match=f"^The concept file {re.escape(str(path))} has no concepts. Give it at least"
    ):
        load_concepts(path)


def test_what_is_not_utf8_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, b"dog\r\ncat\r\ncaf\xe9 au lait\r\n")
    message = (
        f"The concept file {path} is not UTF-8: line 3, 'café au lait', has the byte 0xe9 (byte 13 of the "
        "file). Save it as UTF-8, such as with: iconv -f ENCODING -t UTF-8 FILE"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_concepts(path)
    with pytest.raises(DataError, match="is not UTF-8: line 1, .*0xff"):
        load_concepts(write(tmp_path, "dog\ncat".encode("utf-16")))
    with pytest.raises(DataError, match="has a zero byte: it is no UTF-8 text. Save it as UTF-8"):
        load_concepts(write(tmp_path, "dog\ncat".encode("utf-16-le")))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none\.txt does not exist\. Check the path, or use one of 10k, 20k, "
    ):
        load_concepts(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        load_concepts("none.txt")
    with pytest.raises(DataError, match="is a folder. Name a text file with one concept a line"):
        load_concepts(str(tmp_path))


def test_a_path_need_not_look_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "dog\n", "mywords")
    assert load_concepts("mywords").words == ("dog",)


# Names


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown concept set 'imagnet'\. Did you mean 'imagenet'\?.* Or give"
    ):
        load_concepts("imagnet")
    with pytest.raises(UnknownNameError, match="Unknown concept set ''"):
        load_concepts("")


def test_the_classes_of_imagenet_and_cifar100() -> None:
    imagenet, cifar = load_concepts("imagenet").words, load_concepts("cifar100").words
    assert (len(imagenet), imagenet[0], imagenet[-1]) == (1000, "tench", "toilet tissue")
    assert len(cifar) == 100
    assert list(cifar) == sorted(cifar)
    assert {"aquarium fish", "sweet pepper", "worm"} <= {*cifar}


def test_the_lists_of_clip_dissect_need_its_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_DISSECT_HOME", raising=False)
    with pytest.raises(
        DataError, match=r"The concept list 20k\.txt comes with CLIP-Dissect\. Say .*CLIP_DISSECT_HOME"
    ):
        load_concepts("20k")
    monkeypatch.setenv("CLIP_DISSECT_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"data/20k\.txt does not exist"):
        load_concepts("20k")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "the\nof\n", "20k.txt")
    write(tmp_path / "data", "/a/airfield 0\n/a/apartment_building/outdoor 8\n", "categories_places365.txt")
    assert load_concepts("20k") == ConceptSet("20k", ("the", "of"))
    assert load_concepts("places365").words == ("airfield", "apartment building outdoor")


@pytest.mark.skipif(not LISTS.exists(), reason="CLIP-Dissect's lists are not here")
def test_the_real_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(LISTS)
    monkeypatch.setenv("CLIP_DISSECT_HOME", str(tmp_path))
    sizes = {name: len(load_concepts(name)) for name in ("3k", "10k", "20k", "broden", "places365")}
    assert sizes == {"3k": 3000, "10k": 9894, "20k": 20000, "broden": 1153, "places365": 365}


# Your own


def test_what_a_registered_function_may_return(tmp_path: Path, registered: list[str]) -> None:
    results = {"list": ["b", "", "a"], "tuple": ("b", "a"), "path": write(tmp_path, "b\na\n")}
    for name, value in results.items():
        registered.append(f"test_{name}")
        register_concepts(f"test_{name}")(lambda value=value: value)
        assert load_concepts(f"test_{name}").words == ("b", "a")
        assert load_concepts(f"test_{name}").name == f"test_{name}"
    with pytest.raises(ArgumentError, match="'test_list' is already registered"):
        register_concepts("test_list")(list)


def test_a_registration_that_does_not_work_is_named(registered: list[str]) -> None:
    registered += ["test_numbers", "test_fails", "test_empty"]
    register_concepts("test_numbers")(lambda: [1, 2])
    with pytest.raises(
        PluginError, match="'test_numbers' was given as a list. Expected a sequence of words, or"
    ):
        load_concepts("test_numbers")
    register_concepts("test_fails")(lambda: 1 / 0)
    with pytest.raises(PluginError, match="'test_fails' could not be made by .*ZeroDivisionError"):
        load_concepts("test_fails")
    register_concepts("test_empty")(list)
    with pytest.raises(DataError, match="The concept set 'test_empty' has no concepts"):
        load_concepts("test_empty")


def test_other_things_are_no_concepts() -> None:
    with pytest.raises(
        ArgumentError, match=r"concepts is \[1, 2\]\. Expected a name, a text file's path, or words"
    ):
        load_concepts([1, 2])
