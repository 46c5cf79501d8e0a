"""A CLIP network as an encoder, whichever package built it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Integer
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from .digests import digest_of, digest_of_state
from .errors import DataError
from .recipes import recipe_of, recipe_of_module

SHOWN = 60


class ClipEncoder:
    """A network with `encode_image` and `encode_text`, and what turns images and words into its input.

    `tokenize` makes rows of `context_length` tokens of texts; `count_tokens` tells the tokens of a text of
    any length, start and end included.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        preprocess: Callable[[Image], Tensor],
        *,
        tokenize: Callable[[list[str]], Integer[Tensor, "concepts tokens"]],
        count_tokens: Callable[[str], int],
        context_length: int,
    ) -> None:
        self.name = name
        self.model: Any = model.float().eval().requires_grad_(False)
        self.preprocess = preprocess
        self.context_length = context_length
        self._tokenize = tokenize
        self._count_tokens = count_tokens

    @cached_property
    def digest(self) -> str:
        """Name the weights, the architecture, the preprocessing and the length of the context."""
        return digest_of(
            {
                "weights": digest_of_state(self.model),
                "architecture": recipe_of_module(self.model),
                "preprocess": recipe_of(self.preprocess),
                "context_length": self.context_length,
            }
        )

    @torch.inference_mode()
    def encode_images(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images embedding"]:
        """Embed preprocessed images."""
        return self.model.encode_image(images.to(self._device)).float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "concepts embedding"]:
        """Embed texts; DataError for one that is longer than the context."""
        self.check_texts(texts)
        tokens = self._tokenize(list(texts)).to(self._device)
        return self.model.encode_text(tokens).float()  # type: ignore[no-any-return]

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise DataError when there are texts longer than the context, naming the first."""
        long = [text for text in texts if self._is_long(text)]
        if long:
            first = long[0] if len(long[0]) <= SHOWN else f"{long[0][:SHOWN]}…"
            raise DataError(
                f"{len(long)} of {len(texts)} concepts are longer than the {self.context_length} tokens that "
                f"{self.name} reads (start and end included), the first {first!r} with "
                f"{self._count_tokens(long[0])}. Shorten them or leave them out."
            )

    def to_(self, device: torch.device | str) -> ClipEncoder:
        """Move the network to a device."""
        self.model.to(device)
        return self

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _is_long(self, text: str) -> bool:
        if text.isascii() and len(text) + 2 <= self.context_length:  # a token has at least one byte
            return False
        return self._count_tokens(text) > self.context_length


def clip_preprocess(side: int) -> Compose:
    """Make OpenAI's preprocessing: an RGB image of any size to (3, side, side), of CLIP's mean and scale."""
    return Compose(
        [
            Resize(side, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(side),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
