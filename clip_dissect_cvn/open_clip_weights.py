"""open_clip's networks and weights, where that package is installed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .clip_encoder import ClipEncoder
from .errors import ArgumentError, CheckpointError, MissingExtraError, UnknownNameError

HUB = "hf-hub:"


def load(name: str) -> ClipEncoder:
    """Load ``NAME/TAG``, TAG being one of open_clip's or a weights file, or ``hf-hub:OWNER/NAME``.

    Raises
    ------
    MissingExtraError
        when open_clip is not installed.
    UnknownNameError
        for a NAME or TAG that it does not have.
    CheckpointError
        when weights cannot be fetched, read or fitted.
    """
    open_clip = _import_open_clip(name)
    architecture, tag = (name, None) if name.startswith(HUB) else _parsed(open_clip, name)
    tuned = tag is not None and open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            model, preprocess = open_clip.create_model_from_pretrained(
                architecture, pretrained=tag, force_quick_gelu=tuned
            )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:
        raise CheckpointError(
            f"The weights of open_clip:{name} cannot be had ({error!r}). "
            "Give a file of that architecture as open_clip:NAME/FILE, or use the encoder 'embedded'."
        ) from error
    context = getattr(model, "context_length", None) or tokenizer.context_length
    return ClipEncoder(
        f"open_clip:{name}",
        model,
        preprocess,
        tokenize=lambda texts: tokenizer(texts, context_length=context),
        count_tokens=lambda text: _count(tokenizer, text),
        context_length=context,
    )


def _import_open_clip(name: str) -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "open-clip", f"The encoder 'open_clip:{name}'") from error
    return open_clip  # type: ignore[no-any-return]


def _parsed(open_clip: ModuleType, name: str) -> tuple[str, str]:
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownNameError("open_clip model", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tag:
        known = ", ".join(tags) or "none: give a file"
        raise ArgumentError(
            f"encoder is 'open_clip:{name}', without weights. Add /TAG or /FILE; its tags: {known}."
        )
    if tag not in tags and not Path(tag).expanduser().is_file():
        repair = "Or give the path of a weights file."
        raise UnknownNameError(f"open_clip tag of {architecture}", tag, tags, repair=repair)
    return architecture, tag if tag in tags else str(Path(tag).expanduser())


def _count(tokenizer: Any, text: str) -> int:
    """Count a text's tokens, start and end included; open_clip itself cuts what is too long."""
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(text)) + 2
    return len(tokenizer.tokenizer(tokenizer.clean_fn(text)).input_ids)
