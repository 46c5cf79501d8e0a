"""Image files: which there are in a folder, and how one becomes an RGB image."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
FULL_SCALE = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
"""What is white in the modes with more than 8 bits a channel."""

File = tuple[str, str]
"""A folder relative to the root, with slashes, and a name in it."""


def read_rgb(path: Path) -> Image.Image:
    """Decode an image file to RGB, as torchvision's ImageFolder does but for deep grey: see `to_rgb`.

    Raises
    ------
    DataError
        naming the file and the cause, when it is missing, damaged, or no image.
    """
    try:
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file, Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise DataError(f"The image {path} cannot be read: {_cause(error)}.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: as Pillow does, but scale deep grey that Pillow would clip at 255.

    Grey of 16 bits, 32 bits or float goes from its mode's black and white (0 and 65535, of float 0 and 1) to
    8 bits, or from its darkest and lightest value when one of them lies outside.

    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    if image.mode not in FULL_SCALE:
        return image.convert("RGB")
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = 0.0, float(FULL_SCALE[image.mode])
    if grey.min() < low or grey.max() > high:
        low, high = grey.min(), grey.max()
    scaled = (grey - low) * 255 / ((high - low) or 1)
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def _cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a format that this Pillow does not know"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


def list_images(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[str]:
    """List the images under a folder, as paths relative to it with slashes, in the order of ImageFolder.

    That is by first-level folder, then by folder, then by file name, each in the order of code points.
    Hidden files and folders are left out, links are followed, and the case of a suffix does not matter.

    Raises
    ------
    DataError
        when the folder is missing, is a file, or has no images: then it says what was found instead.
    """
    files = _all_files(folder)
    images = [file for file in files if _suffix(file) in suffixes]
    if not images:
        raise DataError(
            f"The probe folder {folder} {_found_instead(files)} "
            f"Expected images ({', '.join(sorted(suffixes))}), at any depth."
        )
    images.sort(key=lambda file: (file[0].partition("/")[0], *file))
    return [f"{parent}/{name}" if parent else name for parent, name in images]


def _all_files(folder: Path) -> list[File]:
    try:
        return list(_files(folder, "", ()))
    except FileNotFoundError as error:
        raise DataError(f"The probe folder {folder} does not exist. Check the path.") from error
    except NotADirectoryError as error:
        raise DataError(f"The probe folder {folder} is a file. Name the folder that it is in.") from error
    except OSError as error:
        raise DataError(f"The probe folder {folder} cannot be listed: {error}.") from error


def _files(root: Path, parent: str, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
    """Walk a tree; a link back to a folder that it lies in is not followed."""
    here = (root / parent).stat()
    if (here.st_dev, here.st_ino) in above:
        return
    above = (*above, (here.st_dev, here.st_ino))
    with os.scandir(root / parent) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(root, f"{parent}/{entry.name}" if parent else entry.name, above)
            else:
                yield parent, entry.name


def _suffix(file: File) -> str:
    return PurePath(file[1]).suffix.lower()


def _found_instead(files: list[File]) -> str:
    if not files:
        return "is empty."
    kinds = Counter(_suffix(file) or "without a suffix" for file in files)
    listing = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f"has no images: it holds {len(files)} other files ({listing})."
