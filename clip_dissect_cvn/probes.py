"""Names and folders to probe sets: the published ones, any folder of images, your own."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL.Image import Image
from torchvision.datasets import CIFAR100

from .errors import ArgumentError, DataError, PluginError, UnknownNameError
from .plugins import make_registered
from .probe_sets import DatasetProbe, FolderProbe, JoinedProbe, ProbeSet
from .registry import Registry
from .streaming import Batch, Unreadable, stream

__all__ = ["PROBES", "Batch", "ProbeSet", "Unreadable", "as_probe", "load_probe", "register_probe", "stream"]

Roots = Mapping[str, str | os.PathLike[str]]
Maker = Callable[..., Any]
MakerT = TypeVar("MakerT", bound=Maker)

PROBES: Registry[Maker] = Registry("probe set", "probes")


def register_probe(name: str) -> Callable[[MakerT], MakerT]:
    """Register a function that returns a probe set, under a name for `load_probe` and the command line.

    It returns a folder's path, a torch-style data set of PIL images or (PIL image, label) pairs, a list of
    PIL images, or a `ProbeSet`. It is passed those of these arguments that it names: ``root``, the folder
    that the user gave for this name (None without one), and ``roots``, all that were given, by name.

    Raises
    ------
    ArgumentError
        when the name is taken.
    """

    def add(make: MakerT) -> MakerT:
        PROBES.add(name, make)
        return make

    return add


def load_probe(probe: object, *, roots: Roots | None = None) -> ProbeSet:
    """Load the probe set of a name, the images of a folder, or whatever `register_probe` takes as a result.

    A named set lies where `roots` says, or else where the environment variable CVN_<NAME>_ROOT does. A name
    comes before a folder of the same name: write ``./NAME`` for that one.

    Raises
    ------
    UnknownNameError
        for what is neither a name nor a folder.
    DataError
        when the images are not where they should be.
    PluginError
        when somebody's registration does not work.
    """
    roots = roots or {}
    for name in roots:
        PROBES[name]  # an unknown name is an error
    if isinstance(probe, str) and probe in PROBES:
        return _made(probe, roots)
    if isinstance(probe, str) and not _is_path(probe):
        raise UnknownNameError("probe set", probe, PROBES, repair="Or give the path of a folder of images.")
    adapted = _adapted("custom", probe)
    if adapted is None:
        raise ArgumentError(f"probe is a {type(probe).__name__}. Expected a name, {ACCEPTED}.")
    return adapted


def as_probe(name: str, value: object) -> ProbeSet:
    """Take what a registered function returned as a probe set; PluginError when it cannot be one."""
    adapted = _adapted(name, value)
    if adapted is None:
        raise PluginError(
            f"The probe set {name!r} was made as a {type(value).__name__}. Expected {ACCEPTED}."
        )
    return adapted


def _made(name: str, roots: Roots) -> ProbeSet:
    wanted = inspect.signature(PROBES[name]).parameters
    if name in roots and "root" not in wanted:
        raise ArgumentError(f"The probe set {name!r} has no folder of its own. Leave its root out.")
    given = {"root": _root(name, roots), "roots": roots}
    arguments = {key: value for key, value in given.items() if key in wanted}
    return as_probe(name, make_registered(PROBES, name, **arguments))


def _root(name: str, roots: Roots) -> Path | None:
    given = roots.get(name) or os.environ.get(_variable(name))
    return Path(given).expanduser() if given else None


def _variable(name: str) -> str:
    """Name the environment variable that says where a probe set lies.

    >>> _variable("imagenet_val")
    'CVN_IMAGENET_VAL_ROOT'
    """
    return f"CVN_{re.sub(r'[^A-Z0-9]', '_', name.upper())}_ROOT"


def _is_path(text: str) -> bool:
    return bool(text) and (text[0] in "~." or "/" in text or os.sep in text or Path(text).exists())


def _adapted(name: str, value: object) -> ProbeSet | None:
    if isinstance(value, ProbeSet):
        return value
    if isinstance(value, str | os.PathLike):
        folder = Path(value).expanduser()
        return FolderProbe(folder.resolve().name if name == "custom" else name, folder)
    if isinstance(value, list | tuple):
        return DatasetProbe(name, value) if all(isinstance(image, Image) for image in value) else None
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, Mapping | bytes):
        return DatasetProbe(name, value)
    return None


ACCEPTED = (
    "a folder's path, a torch-style data set (__len__, and __getitem__ giving a PIL image or (PIL image, "
    "label)), a list of PIL images, or a ProbeSet"
)


# The published ones ----------------------------------------------------------------------------------------


@register_probe("imagenet_val")
def _imagenet_val(root: Path | None) -> ProbeSet:
    folder = _known("imagenet_val", root, "ImageNet's validation images, in a folder a class")
    return FolderProbe("imagenet_val", folder)


@register_probe("broden")
def _broden(root: Path | None) -> ProbeSet:
    folder = _known("broden", root, "Broden's images: broden1_224/images of its archive")
    return FolderProbe("broden", folder, suffixes=frozenset({".jpg"}))  # its .png are masks


@register_probe("imagenet_broden")
def _imagenet_broden(roots: Roots) -> ProbeSet:
    return JoinedProbe("imagenet_broden", [_made(part, roots) for part in ("imagenet_val", "broden")])


@register_probe("places365_val")
def _places365_val(root: Path | None) -> ProbeSet:
    folder = _known("places365_val", root, "Places365's validation images, flat or in a folder a class")
    return FolderProbe("places365_val", folder)


@register_probe("cifar100_train")
def _cifar100_train(root: Path | None) -> ProbeSet:
    return _cifar100("cifar100_train", root, train=True)


@register_probe("cifar100_val")
def _cifar100_val(root: Path | None) -> ProbeSet:
    return _cifar100("cifar100_val", root, train=False)


def _cifar100(name: str, root: Path | None, *, train: bool) -> ProbeSet:
    folder = root or Path("~/.cache").expanduser()  # CLIP-Dissect's place
    try:
        data = CIFAR100(str(folder), train=train, download=False)
    except RuntimeError as error:
        download = f"from torchvision.datasets import CIFAR100; CIFAR100({str(folder)!r}, download=True)"
        raise DataError(
            f"The probe set {name!r} is not in {folder}, or is damaged: a folder cifar-100-python should be "
            f'there. Download it (170 MB) with: python -c "{download}"; or {_say_where(name)}.'
        ) from error
    return DatasetProbe(name, data, classes=[known.replace("_", " ") for known in data.classes])


def _known(name: str, root: Path | None, content: str) -> Path:
    if root is None:
        raise DataError(
            f"The probe set {name!r} needs a folder, of {content}, and none was given: {_say_where(name)}."
        )
    return root


def _say_where(name: str) -> str:
    return f"name it by --probe_root {name}=DIR, roots={{{name!r}: DIR}}, or the variable {_variable(name)}"
