"""Captions of embedded images, as the embedded CLIP learns them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from .world import ATTRIBUTES, NAMED_PAIRS, Truth, parse, phrase

MENTIONED = {"shape": 0.8, "colour": 0.5, "texture": 0.5, "background": 0.3, "size": 0.3, "place": 0.3}
BARE = 0.4
OPENINGS = ("", "a ", "a photo of a ")
SUBJECTS = (*((kind,) for kind in ATTRIBUTES), *NAMED_PAIRS, ("colour", "shape"), ("shape",))


def caption(truth: Truth, lots: np.random.Generator) -> str:
    """Say something true of an image: a bare concept, or a sentence with some of its attributes."""
    if lots.random() < BARE:
        kinds = SUBJECTS[lots.integers(len(SUBJECTS))]
        return phrase({kind: getattr(truth, kind) for kind in kinds})
    kinds = tuple(kind for kind, share in MENTIONED.items() if lots.random() < share) or ("shape",)
    return OPENINGS[lots.integers(len(OPENINGS))] + phrase({kind: getattr(truth, kind) for kind in kinds})


def matches(truths: Sequence[Truth], captions: Sequence[str]) -> Bool[Tensor, "images captions"]:
    """Tell which captions are true of which images."""
    asked = [parse(text) for text in captions]
    wanted = torch.tensor([[_number(kind, said.get(kind)) for kind in ATTRIBUTES] for said in asked])
    shown = torch.tensor([[_number(kind, getattr(truth, kind)) for kind in ATTRIBUTES] for truth in truths])
    return ((wanted[None] == UNSAID) | (wanted[None] == shown[:, None])).all(-1)


def _number(kind: str, word: str | None) -> int:
    return UNSAID if word is None else ATTRIBUTES[kind].index(word)


UNSAID = -1
