"""The shipped figures are above the bars, the card says them, and measuring again gives them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import clip_dissect_cvn.embedded as embedded
from clip_dissect_cvn.embedded.card import Figures, card
from clip_dissect_cvn.embedded.dissection import clip_features, judge
from clip_dissect_cvn.embedded.encoder import embedded_encoder
from clip_dissect_cvn.embedded.probe import ShapesProbe
from clip_dissect_cvn.models import load_model

FOLDER = Path(embedded.__file__).parent


@pytest.fixture(scope="module")
def figures() -> Figures:
    loaded: Figures = json.loads((FOLDER / "figures.json").read_text())
    return loaded


def test_the_card_says_the_figures(figures: Figures) -> None:
    assert (FOLDER / "MODEL_CARD.md").read_text() == card(figures)


def test_the_figures_are_above_the_bars(figures: Figures) -> None:
    reached, accuracy = figures["zero_shot"], figures["accuracy"]
    assert reached["shape"] >= 0.95 and reached["colour"] >= 0.95 and reached["texture"] >= 0.90
    assert accuracy["cvn_embedded_vit"] >= accuracy["embedded_vit"] - 0.01
    for told in figures["dissection"].values():
        assert told["head_exact"] >= 0.95
        assert told["mean"] > told["random_mean"] + 0.1


@pytest.mark.slow
def test_describing_the_cvn_again_gives_the_figures(figures: Figures) -> None:
    probe = ShapesProbe()
    features = clip_features(embedded_encoder(), probe)
    verdict = asdict(judge(load_model("cvn_embedded_vit"), probe, features))
    assert verdict == pytest.approx(figures["dissection"]["`cvn_embedded_vit`, draw"], abs=0.02)
