"""The similarities, slowly: float64, one unit and one concept at a time, straight from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def each_pair(compare: Callable[[Tensor, Tensor], float], clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    """Compare every unit with every concept."""
    columns = clip_feats.double().T
    return torch.tensor([[compare(q, p) for p in columns] for q in unit_acts.double().T], dtype=torch.float64)


def cos_similarity(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    return each_pair(lambda q, p: float(q @ p / (q.norm() * p.norm())), clip_feats, unit_acts)


def cos_similarity_cubed(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    clip_feats, unit_acts = clip_feats.double(), unit_acts.double()
    return cos_similarity((clip_feats - clip_feats.mean(0)) ** 3, (unit_acts - unit_acts.mean(0)) ** 3)


def strongest(activations: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest activations, descending, ties as torch.topk has them."""
    return activations.float().topk(count).indices.tolist()


def pointwise_information(
    clip_feats: Tensor, unit_acts: Tensor, member: list[float], a: float, lam: float, min_prob: float
) -> Tensor:
    """Score every unit and concept, `member` being the probability of the i-th strongest image."""
    probability = [[math.exp(a * value) for value in row] for row in clip_feats.tolist()]
    probability = [[value / math.fsum(row) for value in row] for row in probability]
    units, concepts = unit_acts.shape[1], clip_feats.shape[1]
    likelihood = torch.zeros(units, concepts, dtype=torch.float64)
    for unit in range(units):
        top = strongest(unit_acts[:, unit], len(member))
        for concept in range(concepts):
            likelihood[unit, concept] = math.fsum(
                math.log(1 + p * (probability[image][concept] - 1) + min_prob)
                for p, image in zip(member, top, strict=True)
            )
    marginal = torch.stack([column.logsumexp(0) - math.log(units) for column in likelihood.T])
    return likelihood - lam * marginal


def wpmi(
    clip_feats: Tensor,
    unit_acts: Tensor,
    top_k: int = 28,
    a: float = 2,
    lam: float = 0.6,
    min_prob: float = 1e-7,
) -> Tensor:
    count = min(top_k, len(clip_feats))
    return pointwise_information(clip_feats, unit_acts, [1.0] * count, a, lam, min_prob)


def soft_wpmi(
    clip_feats: Tensor,
    unit_acts: Tensor,
    top_k: int = 100,
    a: float = 10,
    lam: float = 1,
    min_prob: float = 1e-7,
    p_start: float = 0.998,
    p_end: float = 0.97,
) -> Tensor:
    count = min(top_k, len(clip_feats))
    member = [p_start - i / count * (p_start - p_end) for i in range(count)]
    return pointwise_information(clip_feats, unit_acts, member, a, lam, min_prob)


def rank_reorder(
    clip_feats: Tensor,
    unit_acts: Tensor,
    p: float = 3,
    top_fraction: float = 0.05,
    scale_p: float = 0.5,
    permutations: int = 5,
    seed: int = 0,
) -> Tensor:
    """As published, with the package's seeded orders; for data without ties and with positive means."""
    count = int(len(clip_feats) * top_fraction)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(permutations)]

    def compare(q: Tensor, concept: Tensor) -> float:
        top = strongest(q, count)
        descending, values = q[top], concept[top]
        reordered = torch.empty_like(descending)
        reordered[values.argsort(descending=True)] = descending
        chance = torch.stack([(descending - descending[order]).abs() ** p for order in orders]).mean()
        return float(-((descending - reordered).abs() ** p).mean() / chance / values.mean() ** scale_p)

    return each_pair(compare, clip_feats, unit_acts)


def jensen_shannon(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    def distribution(values: Tensor) -> list[float]:
        weights = torch.exp((values - values.mean()) / values.std(correction=0))
        return [float(weight) for weight in weights / weights.sum()]

    def divergence(left: list[float], right: list[float]) -> float:
        return math.fsum(one * math.log(one / other) for one, other in zip(left, right, strict=True))

    def compare(q: Tensor, concept: Tensor) -> float:
        left, right = distribution(q), distribution(concept)
        middle = [(one + other) / 2 for one, other in zip(left, right, strict=True)]
        return -(divergence(left, middle) + divergence(right, middle)) / 2

    return each_pair(compare, clip_feats, unit_acts)
