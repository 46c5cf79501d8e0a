"""What the stages hand each other: frozen, and each says where it came from.

Axes, always in this order and by these names: images concepts units tokens blocks competitors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float16, Integer
from torch import Tensor

from .errors import ArgumentError


@dataclass(frozen=True, eq=False)
class ClipFeatures:
    """CLIP's unit-norm embeddings of the probe images and of the concepts.

    The concept activation matrix ``P = I T^T`` (images concepts) is never stored: it is formed for the rows
    that are needed. Rows of `images` are float32 and may be memory-mapped.
    """

    images: Float[Tensor, "images width"]
    concepts: Float[Tensor, "concepts width"]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.shape[1:] != self.concepts.shape[1:]:
            raise ArgumentError(
                f"images have embeddings of width {tuple(self.images.shape[1:])} and concepts of "
                f"{tuple(self.concepts.shape[1:])}. Embed both with the same encoder."
            )

    def concept_activations(
        self, rows: Integer[Tensor, " rows"] | slice = slice(None)
    ) -> Float[Tensor, "rows concepts"]:
        """Form the rows of P that are asked for; values are cosines in [-1, 1]."""
        return self.images[rows] @ self.concepts.T


@dataclass(frozen=True, eq=False)
class UnitActivations:
    """What one layer's units did on every probe image.

    `response` is the unit summary q that is dissected. A layer of LWTA blocks also has the `winner` of every
    block (the competitor that won most often over the draws and positions pooled; over one draw at one token,
    the one that won) and each unit's `probability` of winning (its mean over the same).
    Unit ``block * competitors + competitor``.
    """

    layer: str
    response: Float[Tensor, "images units"]
    winner: Integer[Tensor, "images blocks"] | None = None
    probability: Float16[Tensor, "images units"] | Float[Tensor, "images units"] | None = None
    competitors: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> int:
        return self.response.shape[1]

    def columns(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "images some"]]]:
        """Yield slices of units with their responses, `size` units at a time, as contiguous tensors."""
        for start in range(0, self.units, size):
            part = slice(start, min(start + size, self.units))
            yield part, self.response[:, part].contiguous()

    def dead(self) -> Bool[Tensor, " units"]:
        """Tell which units never differ from one image to the next, and so cannot be described."""
        parts = [(part == part[:1]).all(dim=0) for _, part in self.columns(256)]
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Scores:
    """How well each concept describes each unit of one layer: higher is better, NaN for a dead unit."""

    layer: str
    values: Float[Tensor, "units concepts"]
    dead: Bool[Tensor, " units"]
    source: Mapping[str, Any] = field(default_factory=dict)
