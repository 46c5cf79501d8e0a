"""Every similarity against CLIP-Dissect's own function, from the checkout that CLIP_DISSECT_HOME names."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_similarity import make_activations, make_features, make_lwta_activations
from torch import Tensor

from clip_dissect_cvn.artifacts import ClipFeatures, UnitActivations
from clip_dissect_cvn.similarity import SIMILARITIES, score

FEATURES = make_features(images=600, concepts=150, width=64)
ACTIVATIONS = {
    "dense": make_activations(images=600, units=40),
    "lwta": make_lwta_activations(images=600, units=40),
}


@pytest.fixture(scope="module")
def clip_dissect() -> ModuleType:
    home = os.environ.get("CLIP_DISSECT_HOME")
    if not home:
        pytest.skip("CLIP_DISSECT_HOME names no CLIP-Dissect checkout")
    for package in ("matplotlib", "scipy", "tqdm"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("clip_dissect_similarity", Path(home) / "similarity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["dense", "lwta"])
@pytest.mark.parametrize("name", ["cos_similarity", "cos_similarity_cubed", "wpmi", "soft_wpmi"])
def test_agrees_with_clip_dissect(clip_dissect: ModuleType, name: str, kind: str) -> None:
    """In float64, as its own rounding in float32 passes 1e-4 in soft_wpmi: 1 + p (C - 1) cancels."""
    units = ACTIVATIONS[kind]
    clip_feats = FEATURES.concept_activations()
    theirs = getattr(clip_dissect, name)(clip_feats.double(), units.response.double(), device="cpu")
    torch.testing.assert_close(score(name, FEATURES, units).values.double(), theirs, rtol=1e-4, atol=1e-4)
    ours = SIMILARITIES[name].function(clip_feats, units.response, device="cpu")
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    in_float32 = getattr(clip_dissect, name)(clip_feats, units.response, device="cpu")
    torch.testing.assert_close(ours, in_float32, rtol=1e-4, atol=5e-4)


def test_rank_reorder_agrees_with_clip_dissect_given_its_random_orders(
    clip_dissect: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP-Dissect draws new orders for every unit; ours are the five that `seed` gives, for all units."""
    units = ACTIVATIONS["dense"]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(30, generator=generator) for _ in range(5)] * units.units
    theirs = _with_orders(clip_dissect, monkeypatch, FEATURES, units, orders)
    torch.testing.assert_close(score("rank_reorder", FEATURES, units).values, theirs, rtol=1e-4, atol=1e-4)


def _with_orders(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    features: ClipFeatures,
    units: UnitActivations,
    orders: list[Tensor],
) -> Tensor:
    # It sorts from the weakest up, ours is the same mean over another order of the images.
    left = iter(29 - order.flip(0) for order in orders)
    monkeypatch.setattr(torch, "randperm", lambda count: next(left))
    result: Any = module.rank_reorder(features.concept_activations(), units.response, device="cpu")
    monkeypatch.undo()
    assert isinstance(result, Tensor)
    return result
