"""Names and files to concept sets: the words that units may be called by."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from torchvision.models import ResNet18_Weights

from .digests import digest_of
from .errors import ArgumentError, DataError, PluginError, UnknownNameError
from .plugins import make_registered
from .registry import Registry

Maker = Callable[[], Any]
MakerT = TypeVar("MakerT", bound=Maker)

CONCEPTS: Registry[Maker] = Registry("concept set", "concepts")
HOME = "CLIP_DISSECT_HOME"


@dataclass(frozen=True)
class ConceptSet:
    """Concepts, each once and none blank, without white space around; and how many lines that dropped."""

    name: str
    words: tuple[str, ...]
    dropped_blank: int = 0
    dropped_duplicates: int = 0

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def digest(self) -> str:
        """Name the words, in their order."""
        return digest_of(self.words)


def register_concepts(name: str) -> Callable[[MakerT], MakerT]:
    """Register a function that returns words, or the path of a text file, under a name.

    Raises
    ------
    ArgumentError
        when the name is taken.
    """

    def add(make: MakerT) -> MakerT:
        CONCEPTS.add(name, make)
        return make

    return add


def load_concepts(concepts: object) -> ConceptSet:
    """Load the concept set of a name, of a text file with one concept a line, or of a sequence of words.

    Blank lines and white space around concepts are dropped, and so is what came before.

    Raises
    ------
    UnknownNameError
        for what is neither a name nor a file.
    DataError
        when the file is missing, empty, or not UTF-8.
    PluginError
        when somebody's registration does not work.

    >>> load_concepts(["stripes ", "", "dog", "stripes"])
    ConceptSet(name='custom', words=('stripes', 'dog'), dropped_blank=1, dropped_duplicates=1)
    """
    if isinstance(concepts, str) and concepts in CONCEPTS:
        return _made(concepts)
    if isinstance(concepts, str) and not _is_path(concepts):
        repair = "Or give the path of a text file with one concept a line."
        raise UnknownNameError("concept set", concepts, CONCEPTS, repair=repair)
    if isinstance(concepts, str | os.PathLike):
        return _of_file(Path(concepts).expanduser())
    words = _words(concepts)
    if words is None:
        raise ArgumentError(f"concepts is {concepts!r}. Expected a name, a text file's path, or words.")
    return _cleaned("custom", words, "concepts")


def _made(name: str) -> ConceptSet:
    value = make_registered(CONCEPTS, name)
    if isinstance(value, str | os.PathLike):
        value = _read_lines(Path(value).expanduser())
    words = _words(value)
    if words is None:
        raise PluginError(
            f"The concept set {name!r} was given as a {type(value).__name__}. "
            "Expected a sequence of words, or the path of a text file."
        )
    return _cleaned(name, words, f"The concept set {name!r}")


def _is_path(text: str) -> bool:
    path = Path(text)
    return bool(text) and (text[0] == "~" or len(path.parts) > 1 or bool(path.suffix) or path.exists())


def _words(value: object) -> list[str] | None:
    return (
        list(value) if isinstance(value, Sequence) and all(isinstance(word, str) for word in value) else None
    )


def _cleaned(name: str, lines: list[str], origin: str) -> ConceptSet:
    stripped = [line.strip() for line in lines]
    filled = [word for word in stripped if word]
    words = tuple(dict.fromkeys(filled))
    if not words:
        raise DataError(f"{origin} has no concepts. Give it at least one, one a line.")
    return ConceptSet(name, words, len(stripped) - len(filled), len(filled) - len(words))


# Files -----------------------------------------------------------------------------------------------------


def _of_file(path: Path) -> ConceptSet:
    return _cleaned(path.stem, _read_lines(path), f"The concept file {path}")


def _read_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"The concept file {path} {_trouble(path, error)}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, data, error.start)) from error
    if "\0" in text:
        raise DataError(f"The concept file {path} has a zero byte: it is no UTF-8 text. {SAVE_AS_UTF8}")
    lines = re.split("\r\n|\r|\n", text)
    return lines if lines[-1] else lines[:-1]


def _trouble(path: Path, error: OSError) -> str:
    if path.is_dir():
        return "is a folder. Name a text file with one concept a line."
    if isinstance(error, FileNotFoundError):
        return f"does not exist. Check the path, or use one of {', '.join(CONCEPTS)}."
    return f"cannot be read: {error}."


def _not_utf8(path: Path, data: bytes, position: int) -> str:
    before = data[:position]
    line = len(re.findall(b"\r\n|\r|\n", before)) + 1
    shown = re.split(b"\r|\n", before)[-1] + re.split(b"\r|\n", data[position:])[0]
    return (
        f"The concept file {path} is not UTF-8: line {line}, {shown.decode('latin-1')!r}, has the byte "
        f"0x{data[position]:02x} (byte {position} of the file). {SAVE_AS_UTF8}"
    )


SAVE_AS_UTF8 = "Save it as UTF-8, such as with: iconv -f ENCODING -t UTF-8 FILE"


# The published ones ----------------------------------------------------------------------------------------


@register_concepts("imagenet")
def _imagenet() -> Sequence[str]:
    return list(ResNet18_Weights.DEFAULT.meta["categories"])


@register_concepts("cifar100")
def _cifar100() -> Sequence[str]:
    return [name.replace("_", " ") for name in CIFAR100_CLASSES.split()]


@register_concepts("places365")
def _places365() -> Sequence[str]:
    lines = _read_lines(_in_checkout("categories_places365.txt"))  # such as "/a/apartment_building/outdoor 8"
    return [re.sub(r"[_/]", " ", line.split(" ")[0][3:]) for line in lines]


def _in_checkout(file: str) -> Path:
    home = os.environ.get(HOME)
    if not home:
        raise DataError(
            f"The concept list {file} comes with CLIP-Dissect. Say where a checkout of it is by the variable "
            f"{HOME}, or give the path of a text file with one concept a line."
        )
    return Path(home).expanduser() / "data" / file


CLIP_DISSECT_LISTS = {
    "3k": "3k.txt",
    "10k": "10k.txt",
    "20k": "20k.txt",
    "broden": "broden_labels_clean.txt",
    "imagenet_labels": "imagenet_labels.txt",
}
for _name, _file in CLIP_DISSECT_LISTS.items():
    CONCEPTS.add(_name, partial(_in_checkout, _file))

CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
