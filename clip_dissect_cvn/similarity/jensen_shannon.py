"""Minus the Jensen-Shannon divergence between a unit and a concept, as distributions over the images."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from .entry import Progress, register_similarity
from .inputs import TINY, Device, concept_matrix, mask_dead, pieces, unit_activations, unit_columns
from .threads import in_threads

PAIRS_AT_ONCE = 1 << 18


@torch.no_grad()
def jensen_shannon(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures,
    unit_acts: Float[Tensor, "images units"] | UnitActivations,
    *,
    device: Device = "cpu",
    progress: Progress | None = None,
) -> Float[Tensor, "units concepts"]:
    """Take minus the Jensen-Shannon divergence of unit and concept as distributions over the images.

    Each is standardised over the images and then softmaxed over them; with m = (p + r) / 2 the score is
    -(KL(p || m) + KL(r || m)) / 2, in nats.

    Shapes (images concepts), (images units) -> (units concepts), in [-ln 2, 0]; NaN for a dead unit. A
    concept that never differs between images is the uniform distribution. Free of the scale and the offset of
    both inputs.
    Source: announced in DISCOVER (Panousis et al.); the definition is this package's.
    """
    matrix = concept_matrix(clip_feats, device)
    units = unit_activations(unit_acts, matrix)
    images, concepts = matrix.shape
    scores = torch.empty(units.units, concepts, device=device)

    def fill(part: slice) -> None:
        concept = _distributions(matrix.block(slice(None), part).T)
        for some, response in unit_columns(units):
            unit = _distributions(response.T.to(device))
            scores[some, part] = _minus_divergence(unit, concept)

    for part, _ in in_threads(fill, list(pieces(concepts, 4 * images)), device):
        if progress:
            progress(part.stop, concepts)
    return mask_dead(scores, units)


def _distributions(rows: Float[Tensor, "rows images"]) -> Float[Tensor, "rows images"]:
    """Standardise every row and softmax it over the images; none is 0, so that each has a logarithm."""
    rows = rows.contiguous()
    spread, mean = torch.std_mean(rows, dim=1, correction=0, keepdim=True)
    return torch.softmax((rows - mean).div_(spread.clamp_min_(TINY)), dim=1).clamp_min_(TINY)


def _minus_divergence(
    unit: Float[Tensor, "units images"], concept: Float[Tensor, "concepts images"]
) -> Float[Tensor, "units concepts"]:
    """Compute (H(p) + H(r)) / 2 - H((p + r) / 2), the last term from the sum of (p + r) log(p + r)."""
    mixture = torch.empty(len(unit), len(concept), device=unit.device)
    step = max(1, PAIRS_AT_ONCE // unit.shape[1])
    for first in range(0, len(concept), step):
        some = concept[first : first + step]
        for index, one in enumerate(unit):
            total = some + one
            torch.linalg.vecdot(total, total.log(), out=mixture[index, first : first + step])
    own = _negentropy(unit)[:, None] + _negentropy(concept)
    return mixture.sub_(own).div_(2).sub_(math.log(2)).clamp_(-math.log(2), 0)


def _negentropy(rows: Float[Tensor, "rows images"]) -> Float[Tensor, " rows"]:
    return torch.xlogy(rows, rows).sum(1)


register_similarity("jensen_shannon", factored=jensen_shannon, version="1")(jensen_shannon)
