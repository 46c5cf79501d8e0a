"""How well the embedded networks know the embedded world, on images that none of them was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from PIL.Image import Image
from torch import Tensor, nn

from ..clip_encoder import ClipEncoder
from .networks import vit_preprocess
from .probe import ShapesProbe
from .world import ATTRIBUTES, CLASSES

HELD_OUT_WORLD = 4
DRAWS = 4
BATCH = 250


def held_out(images: int) -> ShapesProbe:
    """Make a test set that is neither the probe set nor trained on."""
    return ShapesProbe(size=images, seed=HELD_OUT_WORLD)


@torch.inference_mode()
def zero_shot_accuracies(encoder: ClipEncoder, probe: ShapesProbe) -> dict[str, float]:
    """Give the share of images whose nearest word is right, for each attribute and for the 80 classes.

    The prompts are the bare words: "circle", …, for `shape`; "red circle", …, for `class`.
    """
    seen = torch.cat([encoder.encode_images(batch) for batch in _batches(probe, encoder.preprocess)])
    words = {**ATTRIBUTES, "class": CLASSES}
    return {kind: _nearest_is_true(encoder, seen, words[kind], probe) for kind in words}


def _nearest_is_true(
    encoder: ClipEncoder, seen: Float[Tensor, "images width"], words: Sequence[str], probe: ShapesProbe
) -> float:
    texts = nn.functional.normalize(encoder.encode_texts(words), dim=1)
    nearest = (seen @ texts.T).argmax(1).tolist()
    hits = [probe.truth(i).has(words[said]) for i, said in enumerate(nearest)]
    return sum(hits) / len(hits)


@torch.inference_mode()
def class_accuracy(model: nn.Module, probe: ShapesProbe, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Give the share of images whose class has the largest logit, averaged over `draws` passes."""
    labels = torch.tensor([probe.label(i) for i in range(len(probe))])
    prepare = vit_preprocess()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        logits = [sum(model(batch) for _ in range(draws)) for batch in _batches(probe, prepare)]
    return float((torch.cat(logits).argmax(1) == labels).float().mean())


def auroc(
    activations: Float[Tensor, "images units"], true: Bool[Tensor, "images units"]
) -> Float[Tensor, " units"]:
    """Give P(a(false) < a(true)) + P(=)/2 for each unit against its own column of truths."""
    return torch.stack([_auroc(a, t) for a, t in zip(activations.T, true.T, strict=True)])


def _auroc(activation: Float[Tensor, " images"], true: Bool[Tensor, " images"]) -> Float[Tensor, ""]:
    no = activation[~true].sort().values
    yes = activation[true].contiguous()
    below = torch.searchsorted(no, yes) + torch.searchsorted(no, yes, right=True)
    return below.double().mean().float() / (2 * len(no))


def _batches(
    probe: ShapesProbe, preprocess: Callable[[Image], Tensor]
) -> Iterator[Float[Tensor, "images 3 height width"]]:
    for start in range(0, len(probe), BATCH):
        numbers = range(start, min(start + BATCH, len(probe)))
        yield torch.stack([preprocess(probe.image(i)) for i in numbers])
