"""Cosine of a unit's and a concept's activations over the images, plain and cubed (CLIP-Dissect)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts import ClipFeatures, UnitActivations
from .entry import Progress, register_similarity
from .inputs import (
    ConceptMatrix,
    Device,
    concept_matrix,
    mask_dead,
    moments,
    pieces,
    unit_activations,
    unit_norms,
)

TINY = torch.finfo(torch.float32).tiny


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
    scores = matrix.weighted(units)
    scores /= unit_norms(units).to(device).clamp_min_(TINY)[:, None]
    scores /= matrix.norms().clamp_min_(TINY)
    return mask_dead(scores, units)


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
    floor of 1e-3 on the norms is not. Source: CLIP-Dissect (Oikarinen and Weng, 2023), its equation of
    "cos similarity cubed".
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
    squares = torch.zeros(concepts, device=device, dtype=torch.float64)
    unit_squares = torch.zeros(units.units, device=device, dtype=torch.float64)
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
        squares += torch.linalg.vector_norm(values, dim=0).double().square_()
        unit_squares += torch.linalg.vector_norm(q, dim=0).double().square_()
        if progress:
            progress(rows.stop, images)
    scores /= unit_squares.sqrt_().float().clamp_min_(TINY)[:, None]
    return scores.div_(squares.sqrt_().float().clamp_min_(TINY))


register_similarity("cos_similarity", factored=cos_similarity, version="1")(cos_similarity)
register_similarity("cos_similarity_cubed", factored=cos_similarity_cubed, version="1")(cos_similarity_cubed)
