"""Images and words to unit-norm embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .encoders import ENCODERS, Encoder, load_encoder, register_encoder
from .errors import ArgumentError

__all__ = ["ENCODERS", "Encoder", "embed_concepts", "embed_images", "load_encoder", "register_encoder"]

BARE = ("{}",)


def embed_concepts(
    encoder: Encoder, words: Sequence[str], *, templates: Sequence[str] = BARE, batch_size: int = 256
) -> Float[Tensor, "concepts embedding"]:
    """Embed concepts, each put into every template in place of ``{}``, as unit-norm float32 on the CPU.

    Of several templates, the unit-norm embeddings are averaged and scaled to norm 1 again: CLIP's prompt
    ensembling (Radford et al., ICML 2021, section 3.1.4). CLIP-Dissect uses the bare word.

    Raises
    ------
    ArgumentError
        when there are no words or templates, or a template has no ``{}``.
    DataError
        when a concept is longer than the encoder reads.
    """
    _check(words, templates, batch_size)
    prompts = [[template.replace("{}", word) for word in words] for template in templates]
    check = getattr(encoder, "check_texts", _accept)
    for texts in prompts:
        check(texts)
    embedded = [_embed_texts(encoder, texts, batch_size) for texts in prompts]
    return F.normalize(torch.stack(embedded).mean(dim=0), dim=-1)


def embed_images(
    encoder: Encoder, images: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images embedding"]:
    """Embed a batch of preprocessed images, as unit-norm float32 on the encoder's device."""
    return F.normalize(encoder.encode_images(images).float(), dim=-1)


def _embed_texts(encoder: Encoder, texts: list[str], size: int) -> Float[Tensor, "concepts embedding"]:
    parts = [texts[first : first + size] for first in range(0, len(texts), size)]
    return F.normalize(torch.cat([encoder.encode_texts(part).float().cpu() for part in parts]), dim=-1)


def _accept(texts: Sequence[str]) -> None:
    """Stand in for the check of an encoder that has none."""


def _check(words: Sequence[str], templates: Sequence[str], batch_size: int) -> None:
    if isinstance(templates, str) or not templates:
        raise ArgumentError(
            f"templates is {templates!r}. Expected one or more texts, such as ['a photo of {{}}']."
        )
    without = [template for template in templates if "{}" not in template]
    if without:
        raise ArgumentError(
            f"template is {without[0]!r}, without a place for the concept. "
            f"Add {{}} to it, as in {without[0] + ' {}'!r}."
        )
    if isinstance(words, str) or not words:
        raise ArgumentError(f"words is {words!r}. Expected one or more concepts.")
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}. Use 1 or more.")
