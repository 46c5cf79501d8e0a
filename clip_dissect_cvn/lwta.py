"""Stochastic Local Winner-Takes-All: the maths of competition, and the module over it.

A layer of K channels is B blocks of U competitors, contiguous along the channel axis (unit = block * U + competitor).
Each block draws one winner, xi ~ Categorical(softmax(h)), which passes its linear response; the others pass 0
(Panousis et al., "Nonparametric Bayesian deep networks with local competition", ICML 2019, equations 3 to 5).

A block with a NaN or +inf among its responses, or with nothing but -inf, comes out as NaN: nobody wins it.
A single -inf is a competitor that cannot win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Competition:
    """Who won, and what came through.

    `response` is h where a competitor won and 0 elsewhere, in h's shape; `winner` is the competitor that won
    each block, -1 where nobody could (the block's response is NaN there).
    """

    response: Float[Tensor, "..."]
    winner: Int64[Tensor, "images *positions blocks"]


class Referee(Protocol):
    """Decides the draws of an LWTA module, and sees what came of them; present only while recording."""

    def uniforms(self, shape: tuple[int, ...]) -> Float[Tensor, "images *positions blocks"]: ...

    def observe(self, h: Tensor, competition: Competition) -> None: ...


class LWTA(nn.Module):
    """Let blocks of `competitors` channels along `dim` compete: training form in training, exact draws in eval.

    No parameters and no buffers, so state dicts do not change.

    >>> LWTA(4)(torch.randn(2, 8)).shape
    torch.Size([2, 8])
    """

    referee: Referee | None = None

    def __init__(self, competitors: int, *, dim: int = -1, temperature: float = 0.67) -> None:
        super().__init__()
        self.competitors = _checked_competitors(competitors)
        self.dim = dim
        self.temperature = _checked_temperature(temperature)

    def forward(self, h: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.referee is not None:
            return self._refereed(h, self.referee)
        if self.training:
            return lwta_straight_through(h, self.competitors, dim=self.dim, temperature=self.temperature)
        return lwta(h, self.competitors, dim=self.dim)

    def _refereed(self, h: Tensor, referee: Referee) -> Tensor:
        shape = _blocks(h, self.competitors, self.dim).shape[:-1]
        competition = compete(h, self.competitors, dim=self.dim, uniform=referee.uniforms(shape))
        referee.observe(h, competition)
        return competition.response

    def extra_repr(self) -> str:
        return f"{self.competitors}, dim={self.dim}, temperature={self.temperature}"


def lwta(
    h: Float[Tensor, "..."], competitors: int, *, dim: int = -1, generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    blocks = _blocks(h, competitors, dim)
    uniform = torch.rand(blocks.shape[:-1], generator=generator, device=h.device)
    return compete(h, competitors, dim=dim, uniform=uniform).response


def compete(
    h: Float[Tensor, "..."],
    competitors: int,
    *,
    dim: int = -1,
    uniform: Float[Tensor, "images *positions blocks"],
) -> Competition:
    blocks = _blocks(h, competitors, dim)
    if uniform.shape != blocks.shape[:-1]:
        raise ArgumentError(
            f"uniform has the shape {tuple(uniform.shape)}, but h has blocks of shape {tuple(blocks.shape[:-1])}. "
            "Pass one number for each block."
        )
    cdf = F.softmax(blocks.detach(), -1, dtype=_accurate(h)).cumsum(-1)
    total = cdf[..., -1:]
    winner = torch.searchsorted(cdf, uniform[..., None].to(cdf.dtype) * total, right=True)
    winner = torch.where(total.isnan(), -1, winner.clamp_(max=competitors - 1))
    return Competition(_only(h, winner, competitors, dim), winner.squeeze(-1))


def lwta_max(h: Float[Tensor, "..."], competitors: int, *, dim: int = -1) -> Float[Tensor, "..."]:
    blocks = _blocks(h.detach(), competitors, dim)
    top, winner = blocks.max(-1, keepdim=True)
    return _only(h, torch.where(top.isfinite(), winner, -1), competitors, dim)


def lwta_straight_through(
    h: Float[Tensor, "..."],
    competitors: int,
    *,
    dim: int = -1,
    temperature: float = 0.67,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    _checked_temperature(temperature)
    blocks = _blocks(h, competitors, dim)
    noise = torch.empty(blocks.shape, dtype=_accurate(h), device=h.device).exponential_(generator=generator)
    soft = F.softmax((blocks - noise.log()) / temperature, -1)
    top, winner = soft.detach().max(-1, keepdim=True)
    hard = torch.zeros_like(soft).scatter_(-1, winner, 1.0) + top * 0
    y = hard * blocks.detach() + blocks * (soft - soft.detach()) + hard * (blocks - blocks.detach())
    return y.flatten(-2).movedim(-1, dim).to(h.dtype)


def lwta_kl(h: Float[Tensor, "..."], competitors: int, *, dim: int = -1) -> Float[Tensor, " examples"]:
    blocks = _blocks(h, competitors, dim)
    log_probability = F.log_softmax(blocks, -1, dtype=_accurate(h))
    log_probability = log_probability.clamp(min=torch.finfo(log_probability.dtype).min)
    divergence = log_probability.exp() * (log_probability + torch.log(log_probability.new_tensor(competitors)))
    return divergence.flatten(1).sum(-1)


def win_probability(h: Float[Tensor, "..."], competitors: int, *, dim: int = -1) -> Float[Tensor, "..."]:
    blocks = _blocks(h, competitors, dim)
    return F.softmax(blocks, -1, dtype=_accurate(h)).flatten(-2).movedim(-1, dim)


def _only(h: Tensor, winner: Tensor, competitors: int, dim: int) -> Tensor:
    blocks = _blocks(h, competitors, dim)
    value = blocks.gather(-1, winner.clamp(min=0)).masked_fill(winner < 0, torch.nan)
    y = torch.zeros_like(h)
    _blocks(y, competitors, dim).copy_(torch.zeros_like(blocks).masked_fill(winner < 0, torch.nan).scatter(-1, winner.clamp(min=0), value))
    return y


def _blocks(h: Tensor, competitors: int, dim: int) -> Tensor:
    """View h as (images, *positions, blocks, competitors)."""
    channels = h.shape[dim]
    if channels % competitors:
        raise ArgumentError(
            f"h has {channels} channels along dim {dim}, which {competitors} competitors do not divide. "
        )
    return h.movedim(dim, -1).unflatten(-1, (-1, competitors))


def _accurate(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _checked_competitors(competitors: int) -> int:
    if competitors < 2:
        raise ArgumentError(f"competitors is {competitors}, but at least 2 have to compete. Use 2 or more.")
    return competitors


def _checked_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ArgumentError(f"temperature is {temperature}, but has to be positive. Use for example 0.67.")
    return temperature
