"""The model card: what the embedded networks reach, measured and put in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models import load_model
from ..recording import Readout
from .dissection import clip_features, judge
from .encoder import embedded_encoder
from .measures import DRAWS, class_accuracy, held_out, zero_shot_accuracies
from .probe import ShapesProbe

Figures = Mapping[str, Any]
HELD_OUT = 4_000
NETWORKS = ("cvn_embedded_vit", "embedded_vit")
READOUTS: tuple[tuple[str, Readout, int], ...] = (
    ("cvn_embedded_vit", "draw", 1),
    ("cvn_embedded_vit", "mean", DRAWS),
    ("cvn_embedded_vit", "expected", 1),
    ("embedded_vit", "draw", 1),
)


def write_card(folder: Path) -> None:
    """Measure the shipped networks and write ``figures.json`` and ``MODEL_CARD.md`` into `folder`."""
    figures = measured()
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "MODEL_CARD.md").write_text(card(figures))


def measured() -> Figures:
    """Measure the shipped networks on images that none was trained on; takes some minutes."""
    encoder, networks = embedded_encoder(), {name: load_model(name) for name in NETWORKS}
    test, probe = held_out(HELD_OUT), ShapesProbe()
    features = clip_features(encoder, probe)
    verdicts = {
        _row(name, readout): asdict(judge(networks[name], probe, features, readout=readout, draws=draws))
        for name, readout, draws in READOUTS
    }
    return {
        "zero_shot": zero_shot_accuracies(encoder, test),
        "accuracy": {name: class_accuracy(target.module, test) for name, target in networks.items()},
        "dissection": verdicts,
    }


def card(figures: Figures) -> str:
    """Put figures in words and tables: shares in percent, areas with three digits."""
    zero_shot = [f"| {kind} | {share:.2%} |" for kind, share in figures["zero_shot"].items()]
    accuracy = [f"| `{name}` | {share:.2%} |" for name, share in figures["accuracy"].items()]
    dissection = [
        f"| {row} | {told['head_exact']:.2%} | {told['accurate']:.1%} | {told['mean']:.3f} "
        f"| {told['random_accurate']:.1%} | {told['random_mean']:.3f} |"
        for row, told in figures["dissection"].items()
    ]
    return CARD.format(
        zero_shot="\n".join(zero_shot),
        accuracy="\n".join(accuracy),
        dissection="\n".join(dissection),
        held_out=HELD_OUT,
        draws=DRAWS,
    )


def _row(name: str, readout: str) -> str:
    return f"`{name}`, {readout}" if name.startswith("cvn") else f"`{name}`"


CARD = """\
# The networks of the embedded world

Written by `scripts/train_embedded.py evaluate`; the numbers are in `figures.json`. All images measured on
come from seeds that no network was trained on.

## What they are

* `clip.safetensors`: a CLIP of OpenAI's architecture. Image tower: ViT, 64 x 64 pixels, patch 8, width 128,
  4 layers. Text tower: width 128, 2 layers, OpenAI's tokenizer, 77 positions. Embeddings of width 128. The
  file holds the token rows and positions that were trained; all others are zero when it is loaded.
* `cvn.safetensors`: `cvn_embedded_vit`, a ViT (patch 16, width 96, 4 blocks, class token) that tells 80
  classes (10 colours x 8 shapes) apart, with LWTA of 8 competitors in place of every GELU.
* `gelu.safetensors`: `embedded_vit`, the same network with GELU; same recipe, same budget, same images.

All are stored in half precision and computed in single precision. Training is described in the script:
rendered images, one seed, AdamW and Muon; the CVN's loss is the cross-entropy alone, without the KL term.

## What they are for

Trying, teaching and testing: the truth of every image is known, so descriptions can be checked. They know
nothing of real images, nor of any word outside the concept set `shapes`.

## The CLIP: zero-shot accuracy

{held_out} held-out images; the prompts are the bare words, for `class` the 80 class words ("red circle").

| words | accuracy |
|---|---|
{zero_shot}

## The ViTs: accuracy over 80 classes

{held_out} held-out images; logits averaged over {draws} draws.

| network | accuracy |
|---|---|
{accuracy}

## Dissection

Probe set and concept set `shapes`, `soft_wpmi` with its defaults. Head: share of the 80 units that are
named by exactly their class. Last MLP block: share of units whose description has AUROC above 0.8 with the
known truth, and the mean AUROC; beside them the same for a concept taken at random. Of a CVN's units,
"draw" is the response in one draw (the paper's), "mean" that of {draws} draws, "expected" the win
probability times the linear response.

| network, readout | head exact | AUROC > 0.8 | mean AUROC | random > 0.8 | random mean |
|---|---|---|---|---|---|
{dissection}
"""
