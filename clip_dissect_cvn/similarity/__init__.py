"""ClipFeatures and UnitActivations -> Scores: how well each concept describes each unit.

Every built-in is one function with two forms: of two tensors, as CLIP-Dissect calls it, and of `ClipFeatures`
and `UnitActivations`, where P is formed a block at a time or not at all.
"""

from __future__ import annotations

from .cosine import cos_similarity, cos_similarity_cubed
from .entry import SIMILARITIES, Progress, Similarity, register_similarity
from .jensen_shannon import jensen_shannon
from .rank_reorder import rank_reorder
from .scoring import as_similarity, memory, score
from .wpmi import soft_wpmi, wpmi

__all__ = [
    "SIMILARITIES",
    "Progress",
    "Similarity",
    "as_similarity",
    "cos_similarity",
    "cos_similarity_cubed",
    "jensen_shannon",
    "memory",
    "rank_reorder",
    "register_similarity",
    "score",
    "soft_wpmi",
    "wpmi",
]
