"""Weighted pointwise mutual information of units and concepts, hard and soft (CLIP-Dissect).

Both are one computation. With d_i = (1 - p_i + min_prob) / p_i,

    log(1 + p_i (C_im - 1) + min_prob) = log(C_im + d_i) + log(p_i),

and the hard form is p_i = 1. The logarithm is taken once of a product of several factors, as many as float32
can hold: the sum over the top images then costs a gather, an addition and a multiplication a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from ..errors import ArgumentError
from .entry import Progress, register_similarity
from .inputs import (
    ConceptMatrix,
    Device,
    concept_matrix,
    mask_dead,
    pieces,
    top_images,
    unit_activations,
)
from .options import Number, check_count, check_not_negative, check_positive
from .threads import in_threads

DIGITS = 37
"""Decimal digits that a product of factors may span: float32 is normal from 1.2e-38 to 3.4e38."""
CONCEPTS_AT_ONCE = 128
FACTORS_AT_ONCE = 1 << 14


@torch.no_grad()
def wpmi(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures,
    unit_acts: Float[Tensor, "images units"] | UnitActivations,
    *,
    top_k: int = 28,
    a: Number = 2.0,
    lam: Number = 0.6,
    min_prob: Number = 1e-7,
    device: Device = "cpu",
    progress: Progress | None = None,
) -> Float[Tensor, "units concepts"]:
    """Rate how much likelier a concept is on the unit's `top_k` strongest images than on any unit's.

    With C the softmax of a * P over the concepts: L_km = sum over the top images of log(C_im + min_prob), and
    the score is L_km - lam * (logsumexp_k L_km - log K). The last term runs over all units given, so a subset
    of a layer must be cut out of the whole layer's scores.

    Shapes (images concepts), (images units) -> (units concepts); NaN for a dead unit. Fewer images than
    `top_k`: all are used. Raises ArgumentError for an option out of range.
    Source: CLIP-Dissect (Oikarinen and Weng, 2023), WPMI.
    """
    check_not_negative("lam", lam)
    matrix = concept_matrix(clip_feats, device)
    units = unit_activations(unit_acts, matrix)
    weights = torch.ones(_count(top_k, matrix), dtype=torch.float64)
    likelihood = _log_likelihood(matrix, units, weights, a, min_prob, progress)
    return mask_dead(_mutual_information(likelihood, lam), units)


@torch.no_grad()
def soft_wpmi(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures,
    unit_acts: Float[Tensor, "images units"] | UnitActivations,
    *,
    top_k: int = 100,
    a: Number = 10.0,
    lam: Number = 1.0,
    min_prob: Number = 1e-7,
    p_start: Number = 0.998,
    p_end: Number = 0.97,
    device: Device = "cpu",
    progress: Progress | None = None,
) -> Float[Tensor, "units concepts"]:
    """Rate as `wpmi`, with the i-th strongest image belonging to the unit with probability p_i only.

    L_km = sum over the top images, in descending order of activation, of log(1 + p_i (C_im - 1) + min_prob),
    p_i = p_start - (i / top_k) (p_start - p_end); the score as for `wpmi`.

    Shapes (images concepts), (images units) -> (units concepts); NaN for a dead unit. Fewer images than
    `top_k`: all are used. Raises ArgumentError for an option out of range.
    Source: CLIP-Dissect (Oikarinen and Weng, 2023), SoftWPMI.
    """
    check_not_negative("lam", lam)
    if not 0 < p_end <= p_start <= 1:
        raise ArgumentError(f"p_start is {p_start!r} and p_end {p_end!r}. Use 0 < p_end <= p_start <= 1.")
    matrix = concept_matrix(clip_feats, device)
    units = unit_activations(unit_acts, matrix)
    count = _count(top_k, matrix)
    weights = p_start - torch.arange(count, dtype=torch.float64) / count * (p_start - p_end)
    likelihood = _log_likelihood(matrix, units, weights, a, min_prob, progress)
    return mask_dead(_mutual_information(likelihood, lam), units)


def _count(top_k: int, matrix: ConceptMatrix) -> int:
    check_count("top_k", top_k)
    return min(top_k, matrix.shape[0])


def _mutual_information(
    likelihood: Float[Tensor, "units concepts"], lam: Number
) -> Float[Tensor, "units concepts"]:
    marginal = torch.logsumexp(likelihood, dim=0) - math.log(len(likelihood))
    return likelihood.sub_(marginal, alpha=lam)


def _log_likelihood(
    matrix: ConceptMatrix,
    units: UnitActivations,
    weights: Float64[Tensor, " count"],
    a: Number,
    min_prob: Number,
    progress: Progress | None,
) -> Float[Tensor, "units concepts"]:
    """Sum log(1 + p_i (C_im - 1) + min_prob) over every unit's top images."""
    check_positive("a", a)
    check_positive("min_prob", min_prob)
    _, index = top_images(units, len(weights))
    images, position = torch.unique(index, return_inverse=True)
    offsets = (1 - weights + min_prob) / weights
    result = torch.full((units.units, matrix.shape[1]), float(weights.log().sum()), device=matrix.device)
    for rows in pieces(len(images), matrix.shape[1]):
        probability = _softmax_(matrix.block(images[rows]).mul_(a))
        inside = ((position >= rows.start) & (position < rows.stop)).T
        unit, rank = inside.nonzero(as_tuple=True)
        groups = _grouped(unit, position[rank, unit] - rows.start, offsets[rank], rows.stop - rows.start)
        _add_logs_(result, probability, groups)
        if progress:
            progress(rows.stop, len(images))
    return result


def _softmax_(logits: Float[Tensor, "rows concepts"]) -> Float[Tensor, "rows concepts"]:
    """Softmax over the concepts, in the memory of the logits."""
    logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Groups:
    """Factors of one unit each, as many together as a float32 product can hold.

    `row` is the image's row in a block, one past its end where a group is not full; `offset` is d_i.
    """

    unit: Int64[Tensor, " groups"]
    row: Int64[Tensor, "groups factors"]
    offset: Float[Tensor, "groups factors"]


def _grouped(
    unit: Int64[Tensor, " pairs"], row: Int64[Tensor, " pairs"], offset: Float64[Tensor, " pairs"], rows: int
) -> Groups:
    """Cut each unit's pairs (they come sorted by unit) into groups; an empty one counts as 1."""
    size = _group_size(offset)
    sizes = torch.bincount(unit)
    groups = (sizes + size - 1) // size
    first_pair, first_group = sizes.cumsum(0) - sizes, groups.cumsum(0) - groups
    place = first_group[unit] * size + torch.arange(len(unit)) - first_pair[unit]
    total = int(groups.sum())
    filled_row = torch.full((total * size,), rows).index_copy_(0, place, row)
    filled_offset = torch.ones(total * size).index_copy_(0, place, offset.float())
    owner = torch.repeat_interleave(torch.arange(len(sizes)), groups)
    return Groups(owner, filled_row.view(total, size), filled_offset.view(total, size))


def _group_size(offset: Float64[Tensor, " pairs"]) -> int:
    """Number of factors C + d, with 0 <= C <= 1, whose product is sure to be a normal float32."""
    digits = max(-math.log10(float(offset.min())), math.log10(1 + float(offset.max())))
    return max(1, min(16, math.floor(DIGITS / digits)))


def _add_logs_(
    result: Float[Tensor, "units concepts"], probability: Float[Tensor, "rows concepts"], groups: Groups
) -> None:
    """Add to `result` the sum over each unit's pairs of log(C + d), a cache-sized piece at a time."""
    device = result.device
    unit, row, offset = groups.unit.to(device), groups.row.to(device), groups.offset.to(device)[..., None]

    def add(concepts: slice) -> None:
        part = torch.nn.functional.pad(probability[:, concepts], (0, 0, 0, 1))
        for some in _steps(len(unit), max(1, FACTORS_AT_ONCE // row.shape[1])):
            factors = part.index_select(0, row[some].flatten()).view(*row[some].shape, -1)
            logs = factors.add_(offset[some]).prod(dim=1).log_()
            result[:, concepts].index_add_(0, unit[some], logs)

    for _ in in_threads(add, list(_steps(probability.shape[1], CONCEPTS_AT_ONCE)), device):
        pass


def _steps(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _remarks(images: int, options: Mapping[str, Any]) -> tuple[str, ...]:
    top_k = options["top_k"]
    return (f"top_k is {top_k}, but there are {images} images: all are used",) if top_k > images else ()


register_similarity("wpmi", factored=wpmi, version="1", remarks=_remarks)(wpmi)
register_similarity("soft_wpmi", factored=soft_wpmi, version="1", remarks=_remarks)(soft_wpmi)
