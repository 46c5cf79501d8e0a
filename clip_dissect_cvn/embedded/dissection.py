"""How true the descriptions of the embedded networks' units are: the truth of every image is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from ..clip_features import embed_concepts, embed_images
from ..descriptions import describe_layer
from ..encoders import Encoder
from ..models import TargetModel, default_layers
from ..probes import stream
from ..recording import Readout, Recorder
from ..similarity import score
from .captions import matches
from .measures import auroc
from .probe import ShapesProbe
from .world import CLASSES, shapes_concepts

ACCURATE = 0.8


@dataclass(frozen=True)
class Verdict:
    """How true a network's descriptions are.

    `head_exact` is the share of the head's units that are named by exactly their class; the others are of the
    last hidden layer: share of units whose description has AUROC above 0.8 with the known truth, the mean
    AUROC, and the same for a concept taken at random.
    """

    head_exact: float
    accurate: float
    mean: float
    random_accurate: float
    random_mean: float


def clip_features(encoder: Encoder, probe: ShapesProbe) -> ClipFeatures:
    """Embed the probe images and the concept set "shapes"."""
    batches = stream(probe, {"clip": encoder.preprocess})
    images = torch.cat([embed_images(encoder, batch.tensors["clip"]) for batch in batches])
    return ClipFeatures(images, embed_concepts(encoder, shapes_concepts()))


def judge(
    target: TargetModel,
    probe: ShapesProbe,
    features: ClipFeatures,
    *,
    readout: Readout = "draw",
    draws: int = 1,
    seed: int = 0,
) -> Verdict:
    """Describe the last hidden layer and the head by soft_wpmi; hold the descriptions against the truth."""
    hidden, head = _recorded(target, probe, readout=readout, draws=draws, seed=seed)
    words = shapes_concepts()
    truths = matches([probe.truth(i) for i in range(len(probe))], words)
    named = _described(features, head, words)
    exact = sum(word == own for word, own in zip(named, CLASSES, strict=True)) / len(CLASSES)
    areas = _areas(hidden, truths, [words.index(word) for word in _described(features, hidden, words)])
    lots = torch.Generator().manual_seed(seed)
    chance = _areas(hidden, truths, torch.randint(len(words), (hidden.units,), generator=lots).tolist())
    return Verdict(exact, _share(areas), float(areas.mean()), _share(chance), float(chance.mean()))


def _recorded(
    target: TargetModel, probe: ShapesProbe, *, readout: Readout, draws: int, seed: int
) -> list[UnitActivations]:
    recorder = Recorder(target.module, default_layers(target.module), readout=readout, draws=draws, seed=seed)
    with recorder:
        parts = [
            recorder.record(batch.tensors["model"], batch.indices)
            for batch in stream(probe, {"model": target.preprocess})
        ]
    return [
        UnitActivations(name, torch.cat([part[name].response for part in parts])) for name in recorder.layers
    ]


def _described(features: ClipFeatures, layer: UnitActivations, words: Sequence[str]) -> list[str]:
    units, _ = describe_layer(score("soft_wpmi", features, layer), layer, words, top=1)
    return [str(word) for word in units["description"]]


def _areas(
    layer: UnitActivations, truths: Bool[Tensor, "images concepts"], columns: list[int]
) -> Float[Tensor, " units"]:
    live = ~layer.dead()
    return auroc(layer.response, truths[:, columns])[live]


def _share(areas: Float[Tensor, " units"]) -> float:
    return float((areas > ACCURATE).float().mean())
