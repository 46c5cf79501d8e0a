"""Probe sets: images by number, from a folder, a torch-style data set, a list, or several of these."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL.Image import Image

from .digests import digest_of
from .errors import ArgumentError, CVNError, DataError
from .images import IMAGE_SUFFIXES, list_images, read_rgb, to_rgb
from .recipes import recipe_of

SAMPLED = 32
"""Images of a data set whose pixels count in its digest."""


@runtime_checkable
class ProbeSet(Protocol):
    """Images to show a network: picklable, and image `i` is always the same.

    `classes` names the labels, where there are any. `digest` changes when any image might have changed.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str] | None: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def image(self, i: int, /) -> Image:
        """Decode image `i` to RGB; DataError when it cannot be read."""

    def identifier(self, i: int, /) -> str:
        """Name image `i`, by its path or a similar text."""

    def label(self, i: int, /) -> int | None:
        """Give the class of image `i`, an index into `classes`."""


class FolderProbe:
    """The images of a folder; those of a first-level folder are a class, as in torchvision's ImageFolder.

    The order is ImageFolder's, too. In a flat folder there are no classes, and an image that lies beside
    class folders has no label. The digest is of every file's path, size and time of change.

    Raises
    ------
    DataError
        when there are no images.
    """

    def __init__(self, name: str, folder: Path, *, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> None:
        self.name = name
        self.folder = folder
        self._paths = list_images(folder, suffixes)
        tops = dict.fromkeys(path.partition("/")[0] for path in self._paths if "/" in path)
        self._labels = {top: label for label, top in enumerate(tops)}
        self.classes = tuple(map(_printable, tops)) or None

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, i: int) -> Image:
        """Decode image `i` to RGB; DataError when it cannot be read."""
        return read_rgb(self.folder / self._paths[i])

    def identifier(self, i: int) -> str:
        """Give the path of image `i` below the folder, with slashes on any platform."""
        return _printable(self._paths[i])

    def label(self, i: int) -> int | None:
        """Give the class of image `i`, an index into `classes`."""
        top, slash, _ = self._paths[i].partition("/")
        return self._labels[top] if slash else None

    @cached_property
    def digest(self) -> str:
        """Name the listing: path, size and time of change of every image."""
        changes = np.array([_change(self.folder / path) for path in self._paths], dtype=np.int64)
        return digest_of({"paths": "\0".join(self._paths), "changes": changes})


class DatasetProbe:
    """A torch-style data set of PIL images or (PIL image, label) pairs, or a list of PIL images.

    The digest is of all that the data set holds (type, settings, lists, arrays) and of the pixels of some
    images (of all, in a list). A data set of files that may change should have a `digest`, used instead.
    """

    def __init__(self, name: str, source: Any, *, classes: Sequence[str] | None = None) -> None:
        self.name = name
        self.source = source
        known = classes or getattr(source, "classes", None)
        self.classes = tuple(known) if isinstance(known, list | tuple) and known else None
        if not len(source):
            raise DataError(f"The probe set {name!r} has no images. Give it at least one.")

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int) -> Image:
        """Convert image `i` to RGB; DataError when it cannot be read."""
        try:
            item = self.source[i]
        except Exception as error:
            raise DataError(f"The image {self.identifier(i)} cannot be read: {error!r}.") from error
        image = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(image, Image):
            raise ArgumentError(
                f"The probe set {self.name!r} has a {type(image).__name__} as image {i}. Expected a PIL "
                "image or (PIL image, label): leave the data set's own transform out."
            )
        return to_rgb(image)

    def identifier(self, i: int) -> str:
        """Name image `i`: ``NAME/i``."""
        return f"{self.name}/{i}"

    def label(self, i: int) -> int | None:
        """Give the class of image `i`, from the data set's `targets` if it has them."""
        targets = getattr(self.source, "targets", None)
        if targets is not None:
            return int(targets[i])
        item = self.source[i]
        return int(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None

    @cached_property
    def digest(self) -> str:
        """Name what the data set holds, as far as can be told without decoding all of it."""
        own = getattr(self.source, "digest", None)
        if isinstance(own, str):
            return own
        if isinstance(self.source, list | tuple):
            return digest_of([self._pixels(i) for i in range(len(self))])
        some = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).round().astype(int)
        pixels = [self._pixels(int(i)) for i in some]
        return digest_of({"held": recipe_of(self.source), "length": len(self), "pixels": pixels})

    def _pixels(self, i: int) -> Any:
        try:
            image = self.image(i)
        except CVNError as error:
            return str(error)
        return [image.size, image.tobytes()]


class JoinedProbe:
    """Several probe sets one after the other, with the classes of all of them."""

    def __init__(self, name: str, parts: Iterable[ProbeSet]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self.classes = tuple(known for part in self.parts for known in part.classes or ()) or None
        self._starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def image(self, i: int) -> Image:
        """Decode image `i` to RGB; DataError when it cannot be read."""
        part, j = self._find(i)
        return self.parts[part].image(j)

    def identifier(self, i: int) -> str:
        """Name image `i` by its probe set and its name there."""
        part, j = self._find(i)
        return f"{self.parts[part].name}/{self.parts[part].identifier(j)}"

    def label(self, i: int) -> int | None:
        """Give the class of image `i`, an index into the `classes` of all."""
        part, j = self._find(i)
        label = self.parts[part].label(j)
        before = sum(len(earlier.classes or ()) for earlier in self.parts[:part])
        return None if label is None else before + label

    @cached_property
    def digest(self) -> str:
        """Name the parts, in their order."""
        return digest_of([part.digest for part in self.parts])

    def _find(self, i: int) -> tuple[int, int]:
        """Tell which part image `i` is in, and its number there."""
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return part, i - self._starts[part]


def _printable(path: str) -> str:
    """Make a file name of any bytes a text that can be written as UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _change(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # a broken link: reported when it comes to be read
        return -1, -1
    return status.st_size, status.st_mtime_ns
