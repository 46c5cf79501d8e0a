"""Names and files to encoders: CLIPs, which put images and words into one space."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from . import open_clip_weights, openai_clip
from .errors import ArgumentError, PluginError, UnknownNameError
from .plugins import make_registered
from .registry import Registry

Maker = Callable[[], Any]
MakerT = TypeVar("MakerT", bound=Maker)
OPEN_CLIP = "open_clip:"


@runtime_checkable
class Encoder(Protocol):
    """A CLIP, in eval mode; embeddings are float32 and need not have unit norm.

    `preprocess` is picklable and needs nothing of the network. `digest` changes with the weights, the
    architecture and the preprocessing. `context_length` is the number of tokens of the longest text.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def preprocess(self) -> Callable[[Image], Tensor]: ...
    @property
    def context_length(self) -> int: ...
    def encode_images(
        self, images: Float[Tensor, "images 3 height width"], /
    ) -> Float[Tensor, "images embedding"]:
        """Embed preprocessed images."""

    def encode_texts(self, texts: Sequence[str], /) -> Float[Tensor, "concepts embedding"]:
        """Embed texts; DataError for one that is longer than the context."""

    def to_(self, device: torch.device | str, /) -> Any:
        """Move the network to a device."""


ENCODERS: Registry[Maker] = Registry("encoder", "encoders")
for _name in openai_clip.NAMES:
    ENCODERS.add(_name, partial(openai_clip.load_named, _name))


def register_encoder(name: str) -> Callable[[MakerT], MakerT]:
    """Register a function without arguments that returns an `Encoder`, under a name.

    Raises
    ------
    ArgumentError
        when the name is taken.
    """

    def add(make: MakerT) -> MakerT:
        ENCODERS.add(name, make)
        return make

    return add


def load_encoder(encoder: object) -> Encoder:
    """Load a CLIP by OpenAI's name, from a checkpoint, or from open_clip's (``open_clip:NAME/TAG``).

    A checkpoint is in OpenAI's format: the TorchScript archive, or a state dict in a torch or safetensors
    file. In ``open_clip:NAME/TAG``, TAG may be the path of a weights file.

    Raises
    ------
    UnknownNameError
        for what is neither a name nor a file.
    CheckpointError
        when weights cannot be fetched, read or fitted.
    MissingExtraError
        when open_clip is needed and not installed.
    PluginError
        when somebody's registration does not work.
    """
    if isinstance(encoder, str) and encoder in ENCODERS:
        return _made(encoder)
    if isinstance(encoder, str) and encoder.startswith(OPEN_CLIP):
        return open_clip_weights.load(encoder.removeprefix(OPEN_CLIP))
    if not isinstance(encoder, str | os.PathLike):
        missing = ", ".join(_missing(encoder))
        raise ArgumentError(
            f"encoder is a {type(encoder).__name__}, without {missing}. "
            "Expected a name, a CLIP checkpoint's path, or an object with the attributes of cvn.Encoder."
        )
    path = Path(encoder).expanduser()
    if isinstance(encoder, str) and not _is_path(encoder, path):
        repair = f"Or give the path of a CLIP checkpoint, or {OPEN_CLIP}NAME/TAG."
        raise UnknownNameError("encoder", encoder, ENCODERS, repair=repair)
    return openai_clip.load_file(path)


def _is_path(text: str, path: Path) -> bool:
    """Tell a path from a name, some of which have slashes (ViT-B/16)."""
    beside = len(path.parts) > 1 and path.parent.exists()
    return bool(text) and (beside or path.is_absolute() or bool(path.suffix) or path.exists())


def _made(name: str) -> Encoder:
    value = make_registered(ENCODERS, name)
    missing = _missing(value)
    if missing:
        raise PluginError(
            f"The encoder {name!r} was given as a {type(value).__name__}, without {', '.join(missing)}. "
            "Expected an object with the attributes of cvn.Encoder."
        )
    return value  # type: ignore[no-any-return]


def _missing(value: object) -> list[str]:
    wanted = ("name", "digest", "preprocess", "context_length", "encode_images", "encode_texts", "to_")
    return [attribute for attribute in wanted if not hasattr(value, attribute)]
