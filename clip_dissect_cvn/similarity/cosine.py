"""Cosine of a unit's and a concept's activations over the images, plain and cubed (CLIP-Dissect)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from .entry import Progress, register_similarity
from .inputs import (
    TINY,
    ConceptMatrix,
    Device,
    as_norms,
    concept_matrix,
    mask_dead,
    moments,
    pieces,
    squares,
    unit_activations,
)


@torch.no_grad()
def cos_similarity(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures,
    unit_acts: Float[Tensor, "images units"] | UnitActivations,
    *,
    device: Device = "cpu",
) -> Float[Tensor, "units concepts"]:
    """Take the cosine of unit and concept over the images.

    Shapes (images concepts), (images units) -> (units concepts), in [-1, 1]; NaN for a dead unit. From
    `ClipFeatures`, P is never formed: q^T P = (q^T I) T^T and |P_m|^2 = t_m^T (I^T I) t_m.
    Source: CLIP-Dissect (Oikarinen and Weng, 2023).

    >>> cos_similarity(torch.eye(2), torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [1.0000, 0.0000]])
    """
    matrix = concept_matrix(clip_feats, device)
    units = unit_activations(unit_acts, matrix)
    sums = torch.zeros(units.units, matrix.basis.shape[1], device=device)
    unit_squares = torch.zeros(units.units, dtype=torch.float64)
    for rows in pieces(matrix.shape[0], sum(sums.shape)):
        q = units.response[rows].to(device, torch.float32)
        sums.addmm_(q.T, matrix.basis[rows].to(device, torch.float32))
        unit_squares += squares(q)
    sums /= as_norms(unit_squares, device)[:, None]
    return mask_dead(matrix.expand(sums).div_(matrix.norms()), units)


@torch.no_grad()
def cos_similarity_cubed(
    clip_feats: Float[Tensor, "images concepts"] | ClipFeatures,
    unit_acts: Float[Tensor, "images units"] | UnitActivations,
    *,
    device: Device = "cpu",
    progress: Progress | None = None,
) -> Float[Tensor, "units concepts"]:
    """Take the cosine of unit and concept, both centred over the images and cubed elementwise.

    Shapes (images concepts), (images units) -> (units concepts), in [-1, 1]; NaN for a dead unit, 0 for a
    concept that never differs between images. Free of the scale of the activations, where CLIP-Dissect's
    floor of 1e-3 on the norms is not. Source: CLIP-Dissect (Oikarinen and Weng, 2023).
    """
    matrix = concept_matrix(clip_feats, device)
    units = unit_activations(unit_acts, matrix)
    return mask_dead(_cubed(matrix, units, device, progress), units)


def _cubed(
    matrix: ConceptMatrix, units: UnitActivations, device: Device, progress: Progress | None
) -> Float[Tensor, "units concepts"]:
    images, concepts = matrix.shape
    unit_mean, unit_scale = (moment.to(device, torch.float32) for moment in moments(units))
    concept_mean = matrix.mean()
    scores = torch.zeros(units.units, concepts, device=device)
    concept_squares = torch.zeros(concepts, dtype=torch.float64)
    unit_squares = torch.zeros(units.units, dtype=torch.float64)
    for rows in pieces(images, 4 * concepts):
        q = (
            units.response[rows]
            .to(device, torch.float32)
            .sub(unit_mean)
            .div_(unit_scale.clamp_min(TINY))
            .pow_(3)
        )
        values = matrix.block(rows).sub_(concept_mean).pow_(3)
        scores.addmm_(q.T, values)
        concept_squares += squares(values)
        unit_squares += squares(q)
        if progress:
            progress(rows.stop, images)
    scores /= as_norms(unit_squares, device)[:, None]
    return scores.div_(as_norms(concept_squares, device))


register_similarity("cos_similarity", factored=cos_similarity, version="1")(cos_similarity)
register_similarity("cos_similarity_cubed", factored=cos_similarity_cubed, version="1")(cos_similarity_cubed)
