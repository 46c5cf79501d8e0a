"""A small world that needs no network: images with known truth, a CLIP, a CVN and its GELU twin."""

from __future__ import annotations

from .encoder import embedded_encoder
from .probe import ShapesProbe
from .renderer import render
from .world import Truth, shapes_concepts

__all__ = ["ShapesProbe", "Truth", "embedded_encoder", "render", "shapes_concepts"]
