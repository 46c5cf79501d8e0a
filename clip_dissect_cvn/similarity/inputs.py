"""The two inputs of a similarity, read a block at a time: concept activations P and unit activations q."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from ..errors import ArgumentError

BLOCK = 1 << 25
"""Numbers held at once by one step (134 MB as float32); results do not depend on it beyond rounding."""

TINY = torch.finfo(torch.float32).tiny

Device: TypeAlias = str | torch.device
Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """P itself, as CLIP-Dissect hands it over."""

    values: Float[Tensor, "images concepts"]
    device: Device

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def block(self, rows: Rows = slice(None), concepts: slice = slice(None)) -> Float[Tensor, "rows some"]:
        """Copy a part of P to the device; the caller may change it in place."""
        return self.values[:, concepts][rows].to(self.device, torch.float32, copy=True)

    def mean(self) -> Float[Tensor, " concepts"]:
        """Average every concept over the images."""
        return _mean(self.values).to(self.device, torch.float32)

    @property
    def basis(self) -> Float[Tensor, "images concepts"]:
        """What a sum over the images runs over."""
        return self.values

    def expand(self, sums: Float[Tensor, "units concepts"]) -> Float[Tensor, "units concepts"]:
        """Turn sums over the basis into sums over P."""
        return sums

    def norms(self) -> Float[Tensor, " concepts"]:
        """Compute |P_m|, the norm of every concept over the images, kept above 0."""
        return as_norms(_sum(squares(self.block(rows)) for rows in pieces(*self.shape)), self.device)


@dataclass(frozen=True, eq=False)
class FactoredMatrix:
    """P as the product of image and concept embeddings, formed only where it is needed."""

    images: Float[Tensor, "images width"]
    concepts: Float[Tensor, "concepts width"]
    device: Device

    @property
    def shape(self) -> tuple[int, int]:
        return self.images.shape[0], self.concepts.shape[0]

    def block(self, rows: Rows = slice(None), concepts: slice = slice(None)) -> Float[Tensor, "rows some"]:
        """Form a part of P on the device; the caller may change it in place."""
        left, right = self.images[rows], self.concepts[concepts]
        return left.to(self.device, torch.float32) @ right.to(self.device, torch.float32).T

    def mean(self) -> Float[Tensor, " concepts"]:
        """Average every concept over the images."""
        return (self.concepts.cpu().double() @ _mean(self.images)).to(self.device, torch.float32)

    @property
    def basis(self) -> Float[Tensor, "images width"]:
        """What a sum over the images runs over: q^T P = (q^T I) T^T."""
        return self.images

    def expand(self, sums: Float[Tensor, "units width"]) -> Float[Tensor, "units concepts"]:
        """Turn sums over the basis into sums over P."""
        return sums @ self.concepts.to(self.device, torch.float32).T

    def norms(self) -> Float[Tensor, " concepts"]:
        """Compute |P_m|, the norm of every concept over the images, kept above 0: sqrt(t_m^T (I^T I) t_m)."""
        blocks = (self.images[rows].to(self.device, torch.float32) for rows in pieces(*self.images.shape))
        gram = _sum(block.T @ block for block in blocks)
        concepts = self.concepts.to(self.device, torch.float32)
        return _quadratic_form(gram, concepts).clamp_min_(0).sqrt_().clamp_min_(TINY)


def _quadratic_form(
    symmetric: Float[Tensor, "width width"], vectors: Float[Tensor, "concepts width"]
) -> Float[Tensor, " concepts"]:
    """Compute t_m^T S t_m from the upper half of S, in four panels: most of the zeros below are skipped."""
    upper = 2 * symmetric.triu(1) + symmetric.diag().diag()
    width = len(symmetric)
    total = torch.zeros(len(vectors), device=vectors.device)
    for first, end in pairwise(width * quarter // 4 for quarter in range(5)):
        total += torch.linalg.vecdot(vectors[:, first:] @ upper[first:end, first:].T, vectors[:, first:end])
    return total


def squares(block: Float[Tensor, "rows some"]) -> Float64[Tensor, " some"]:
    """Sum the squares of every column, to be added up over blocks (on the CPU: some devices lack float64)."""
    norms: Tensor = torch.linalg.vector_norm(block, dim=0)
    return norms.cpu().double().square_()


def as_norms(sums: Float64[Tensor, " some"], device: Device) -> Float[Tensor, " some"]:
    """Take the root of sums of squares, kept above 0 so that one can divide by it."""
    return sums.sqrt().float().clamp_min_(TINY).to(device)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _mean(values: Float[Tensor, "images width"]) -> Float64[Tensor, " width"]:
    return _sum(values[rows].cpu().sum(0, dtype=torch.float64) for rows in pieces(*values.shape)) / len(
        values
    )


ConceptMatrix: TypeAlias = StoredMatrix | FactoredMatrix


def concept_matrix(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures, device: Device
) -> ConceptMatrix:
    """Read P from itself or from its factors."""
    if isinstance(clip_feats, ClipFeatures):
        return FactoredMatrix(clip_feats.images, clip_feats.concepts, device)
    return StoredMatrix(clip_feats, device)


def unit_activations(
    unit_acts: Float[Tensor, "images units"] | UnitActivations, matrix: ConceptMatrix
) -> UnitActivations:
    """Read q, and check that it is of the images of P."""
    units = unit_acts if isinstance(unit_acts, UnitActivations) else UnitActivations("unit_acts", unit_acts)
    check_same_images(matrix.shape[0], units)
    return units


def check_same_images(images: int, units: UnitActivations) -> None:
    """Raise ArgumentError unless `units` was recorded on that many images."""
    if len(units.response) != images:
        raise ArgumentError(
            f"{units.layer} was recorded on {len(units.response)} images, but CLIP embedded {images}. "
            "Use the same probe images for both."
        )


def pieces(length: int, cost: int) -> Iterator[slice]:
    """Cut `length` items of `cost` numbers each into slices of at most `BLOCK` numbers.

    >>> list(pieces(5, BLOCK // 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, BLOCK // max(1, cost))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def unit_columns(units: UnitActivations) -> Iterator[tuple[slice, Float[Tensor, "images some"]]]:
    """Yield slices of units with their float32 responses on all images."""
    for part, response in units.columns(max(1, BLOCK // max(1, len(units.response)))):
        yield part, response.float()


def top_images(
    units: UnitActivations, count: int
) -> tuple[Float[Tensor, "count units"], Int64[Tensor, "count units"]]:
    """Find every unit's `count` strongest images: their activations, descending, and their indices.

    Always chosen on the CPU, over all images of a unit at once: ties (the many exact zeros of an LWTA layer)
    then fall as in CLIP-Dissect, whatever the device.
    """
    tops = [torch.topk(response.cpu(), count, dim=0) for _, response in unit_columns(units)]
    return torch.cat([top.values for top in tops], dim=1), torch.cat([top.indices for top in tops], dim=1)


def moments(units: UnitActivations) -> tuple[Float64[Tensor, " units"], Float64[Tensor, " units"]]:
    """Average every unit over the images, and its standard deviation (divided by the number of images)."""
    parts = [
        torch.var_mean(response.cpu().double(), dim=0, correction=0) for _, response in unit_columns(units)
    ]
    return torch.cat([mean for _, mean in parts]), torch.cat([variance for variance, _ in parts]).sqrt()


def mask_dead(
    scores: Float[Tensor, "units concepts"], units: UnitActivations
) -> Float[Tensor, "units concepts"]:
    """Set the scores of units that never differ between images to NaN, in place."""
    scores[units.dead().to(scores.device)] = torch.nan
    return scores
