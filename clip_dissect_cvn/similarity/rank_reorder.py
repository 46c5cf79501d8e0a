"""How well a concept puts a unit's strongest images in order (CLIP-Dissect's rank_reorder)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from .entry import Progress, register_similarity
from .inputs import BLOCK, TINY, Device, concept_matrix, mask_dead, pieces, top_images, unit_activations
from .options import Number, check_count, check_not_negative, check_positive, check_share
from .threads import in_threads

FEWEST_IMAGES = 2
SMALLEST_MEAN = 1e-4
CONCEPTS_AT_ONCE = 256
"""So many that one unit's sort keys stay in the processor's cache."""


@torch.no_grad()
def rank_reorder(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures,
    unit_acts: Float[Tensor, "images units"] | UnitActivations,
    *,
    p: Number = 3,
    top_fraction: Number = 0.05,
    scale_p: Number = 0.5,
    permutations: int = 5,
    seed: int = 0,
    device: Device = "cpu",
    progress: Progress | None = None,
) -> Float[Tensor, "units concepts"]:
    """Rate how little a unit's activations change when its strongest images are reordered by a concept.

    Over the unit's n = top_fraction * images strongest images: the mean |difference|^p between the
    activations and the same put in the concept's order, over the mean for `permutations` random orders,
    divided by the concept's mean value on those images to the power `scale_p`, and negated.

    Shapes (images concepts), (images units) -> (units concepts), at most 0; NaN for a dead unit. All units
    share the random orders, which depend on `seed` and n only. At least two images are compared; a unit whose
    strongest images are all alike counts as ordered at random by every concept; a mean value below 1e-4
    counts as 1e-4. Raises ArgumentError for an option out of range.
    Source: CLIP-Dissect (Oikarinen and Weng, 2023), rank reorder.
    """
    check_positive("p", p)
    check_not_negative("scale_p", scale_p)
    check_share("top_fraction", top_fraction)
    check_count("permutations", permutations)
    matrix = concept_matrix(clip_feats, device)
    units = unit_activations(unit_acts, matrix)
    top = _strongest(units, _count(matrix.shape[0], top_fraction), device)
    chance = _chance(top.values, p, permutations, seed)
    scores = torch.empty(units.units, matrix.shape[1], device=device)

    def fill(part: slice) -> None:
        block = matrix.block(top.images, part)
        error = torch.where(chance > 0, _errors(block, top, p) / chance, 1.0)
        mean = torch.nn.functional.embedding_bag(top.row, block, mode="mean")
        scores[:, part] = error / mean.clamp_min_(SMALLEST_MEAN).pow_(scale_p)

    parts = list(pieces(matrix.shape[1], max(8 * len(top.images), BLOCK // CONCEPTS_AT_ONCE)))
    for part, _ in in_threads(fill, parts, device):
        if progress:
            progress(part.stop, matrix.shape[1])
    return mask_dead(scores.neg_(), units)


def _count(images: int, top_fraction: Number) -> int:
    return min(images, max(FEWEST_IMAGES, int(images * top_fraction)))


@dataclass(frozen=True, eq=False)
class Strongest:
    """Every unit's strongest images: `images` are those of all units, `row` says which of them are whose.

    `values` are the activations, descending, scaled to at most 1 in size so that no power of them underflows.
    """

    images: Int64[Tensor, " needed"]
    row: Int64[Tensor, "units top"]
    values: Float[Tensor, "units top"]


def _strongest(units: UnitActivations, count: int, device: Device) -> Strongest:
    values, index = top_images(units, count)
    images, row = torch.unique(index.T, return_inverse=True)
    values = values.T / values.abs().amax(dim=0).clamp_min_(TINY)[:, None]
    return Strongest(images, row.to(device), values.contiguous().to(device))


def _chance(
    values: Float[Tensor, "units top"], p: Number, permutations: int, seed: int
) -> Float[Tensor, "units 1"]:
    """Mean |difference|^p between the activations and themselves in random orders."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(values.shape[1], generator=generator) for _ in range(permutations)]
    errors = [(values - values[:, order.to(values.device)]).abs_().pow_(p).mean(1) for order in orders]
    return torch.stack(errors).mean(0)[:, None]


def _errors(
    block: Float[Tensor, "needed concepts"], top: Strongest, p: Number
) -> Float[Tensor, "units concepts"]:
    """Mean |difference|^p between the activations and themselves in each concept's order."""
    keys = _ordered_as_integers(block)
    ascending = top.values.flip(1)
    payload = top.values.view(torch.int32).long() & 0xFFFFFFFF
    errors = torch.empty(len(top.row), block.shape[1], device=block.device)
    for unit in range(len(top.row)):
        packed = keys.index_select(0, top.row[unit]).T.contiguous().bitwise_or_(payload[unit])
        reordered = _sort(packed).to(torch.int32).view(torch.float32)
        errors[unit] = reordered.sub_(ascending[unit]).abs_().pow_(p).mean(1)
    return errors


def _ordered_as_integers(values: Float[Tensor, "needed concepts"]) -> Int64[Tensor, "needed concepts"]:
    """Turn float32 into integers in the same order, in the upper half of 64 bits."""
    bits = values.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32


def _sort(keys: Int64[Tensor, "concepts top"]) -> Int64[Tensor, "concepts top"]:
    """Sort every row; NumPy's sort of integers is vectorised, 20 times as fast as torch's on a CPU."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)
    return keys


def _remarks(images: int, options: Mapping[str, Any]) -> tuple[str, ...]:
    asked, used = int(images * options["top_fraction"]), _count(images, options["top_fraction"])
    if asked == used:
        return ()
    return (f"top_fraction {options['top_fraction']} of {images} images is {asked}: {used} are used",)


register_similarity("rank_reorder", factored=rank_reorder, version="1", remarks=_remarks)(rank_reorder)
