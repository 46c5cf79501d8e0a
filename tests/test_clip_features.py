"""Words and images to unit-norm embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_dissect_cvn.clip_encoder import ClipEncoder, clip_preprocess
from clip_dissect_cvn.clip_features import embed_concepts, embed_images
from clip_dissect_cvn.errors import ArgumentError, DataError

WORDS = ["dog", "red cat", "{}", "stripes", "x" * 30]


class Tiny(nn.Module):
    """A CLIP whose tokens are characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(128, 6, generator=torch.Generator().manual_seed(0)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return (self.embedding[tokens] * torch.arange(1, 41)[:, None]).sum(dim=1)

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6] @ self.embedding[:6]


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(text[i]) if i < len(text) else 0 for i in range(40)] for text in texts])


@pytest.fixture
def encoder() -> ClipEncoder:
    return ClipEncoder(
        "tiny", Tiny(), clip_preprocess(8), tokenize=tokenize, count_tokens=lambda text: len(text) + 2,
        context_length=40,
    )  # fmt: skip


def test_concepts_have_norm_one_and_are_the_encoders(encoder: ClipEncoder) -> None:
    embedded = embed_concepts(encoder, WORDS)
    assert embedded.dtype == torch.float32
    assert torch.allclose(embedded.norm(dim=1), torch.ones(len(WORDS)))
    assert torch.allclose(embedded, normalize(encoder.encode_texts(WORDS), dim=1))


@pytest.mark.parametrize("size", [1, 2, 100])
def test_the_batch_size_does_not_matter(encoder: ClipEncoder, size: int) -> None:
    assert torch.allclose(
        embed_concepts(encoder, WORDS, batch_size=size), embed_concepts(encoder, WORDS), atol=1e-6
    )


def test_templates_are_averaged_on_the_sphere(encoder: ClipEncoder) -> None:
    templates = ["a photo of {}", "{} {}"]
    single = [[template.replace("{}", word) for word in WORDS[:2]] for template in templates]
    unit = [normalize(encoder.encode_texts(texts), dim=1) for texts in single]
    expected = (unit[0] + unit[1]) / (unit[0] + unit[1]).norm(dim=1, keepdim=True)
    assert torch.allclose(embed_concepts(encoder, WORDS[:2], templates=templates), expected, atol=1e-6)
    assert torch.equal(embed_concepts(encoder, WORDS, templates=["{}"]), embed_concepts(encoder, WORDS))


def test_images_have_norm_one(encoder: ClipEncoder) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    embedded = embed_images(encoder, images)
    assert embedded.shape == (4, 6)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(4))
    assert torch.allclose(
        torch.cat([embed_images(encoder, image[None]) for image in images]), embedded, atol=1e-6
    )


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (
            ["{}", "a photo of"],
            "template is 'a photo of', without a place .* Add {} to it, as in 'a photo of {}'",
        ),
        ([], r"templates is \[\]. Expected one or more texts"),
        ("{}", r"templates is '\{\}'. Expected one or more texts, such as \['a photo of \{\}'\]"),
    ],
)
def test_templates_that_cannot_be_used(encoder: ClipEncoder, templates: Sequence[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        embed_concepts(encoder, WORDS, templates=templates)


def test_other_arguments_that_cannot_be_used(encoder: ClipEncoder) -> None:
    with pytest.raises(ArgumentError, match=r"words is \[\]. Expected one or more concepts"):
        embed_concepts(encoder, [])
    with pytest.raises(ArgumentError, match="batch_size is 0. Use 1 or more"):
        embed_concepts(encoder, WORDS, batch_size=0)


def test_long_concepts_are_counted_over_all_batches_before_any_work(encoder: ClipEncoder) -> None:
    words = ["dog", "y" * 70, "cat", "z" * 39]
    message = (
        r"^2 of 4 concepts are longer than the 40 tokens that tiny reads \(start and end included\), the "
        rf"first '{'y' * 60}…' with 72\. Shorten them or leave them out\.$"
    )
    with pytest.raises(DataError, match=message):
        embed_concepts(encoder, words, batch_size=1)
    with pytest.raises(DataError, match="1 of 1 concepts are longer"):  # the template counts, too
        embed_concepts(encoder, ["x" * 30], templates=["a photo of {}"])


def test_an_encoder_needs_no_check_of_its_texts() -> None:
    class Plain:
        name, digest, context_length, preprocess = "plain", "1", 77, clip_preprocess(8)

        def encode_texts(self, texts: Sequence[str]) -> Tensor:
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

        def encode_images(self, images: Tensor) -> Tensor:
            return images.flatten(1)

        def to_(self, device: Any) -> None: ...

    assert embed_concepts(Plain(), ["a", "bb"]).shape == (2, 2)
