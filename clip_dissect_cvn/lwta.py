"""Stochastic Local Winner-Takes-All: the maths of competition, and the module over it.

A layer of K channels is B blocks of U competitors, contiguous along the channel axis:
unit = block * U + competitor. Each block draws one winner, xi ~ Categorical(Pi) with Pi = softmax(h), which
passes its linear response; the others pass 0 (Panousis, Chatzis and Theodoridis, "Nonparametric Bayesian deep
networks with local competition", ICML 2019).

A block that holds a NaN or +inf, or nothing but -inf, has no probabilities: all of it comes out as NaN.
A single -inf is a competitor that cannot win.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Competition:
    """Who won, and what came through.

    `response` is h where a competitor won and 0 elsewhere, in h's shape. `winner` is the competitor, in
    [0, competitors), that won each block; -1 where nobody could, because its probabilities are NaN.
    """

    response: Float[Tensor, "*shape"]
    winner: Int64[Tensor, "images *positions blocks"]


@runtime_checkable
class Referee(Protocol):
    """Decides the draws of an LWTA module and sees what came of them; there is one only while recording."""

    def uniforms(self, shape: tuple[int, ...]) -> Float[Tensor, "images *positions blocks"]:
        """Return a number in [0, 1) for every block, in this shape."""

    def observe(self, h: Float[Tensor, "*shape"], competition: Competition) -> None:
        """See the linear responses and who won."""


class LWTA(nn.Module):
    """Let blocks of `competitors` channels along `dim` compete: the form for training, exact draws in eval.

    It has no parameters and no buffers, so state dicts do not change. Shapes and errors are those of `lwta`
    and `lwta_straight_through`.

    >>> LWTA(4).eval()(torch.ones(1, 8)).sum()
    tensor(2.)
    """

    referee: Referee | None = None

    def __init__(self, competitors: int, *, dim: int = -1, temperature: float = 0.67) -> None:
        super().__init__()
        self.competitors = _checked_competitors(competitors)
        self.dim = dim
        self.temperature = _checked_temperature(temperature)

    def forward(self, h: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.referee is not None:
            return self._refereed(h, self.referee)
        if self.training:
            return lwta_straight_through(h, self.competitors, dim=self.dim, temperature=self.temperature)
        return lwta(h, self.competitors, dim=self.dim)

    def _refereed(self, h: Tensor, referee: Referee) -> Tensor:
        shape = _blocks(h, self.competitors, self.dim).shape[:-1]
        competition = compete(h, self.competitors, dim=self.dim, uniform=referee.uniforms(tuple(shape)))
        referee.observe(h, competition)
        return competition.response

    def extra_repr(self) -> str:
        return f"{self.competitors}, dim={self.dim}, temperature={self.temperature}"


def lwta(
    h: Float[Tensor, "*shape"], competitors: int, *, dim: int = -1, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Draw every block's winner exactly, with probability Pi: the form for inference.

    h and the result have the channels along `dim`; dtype and memory layout are kept. The gradient reaches the
    winners alone, as if the draw had been given. Draws come from `generator`, by default torch's own.

    Raises ArgumentError when `competitors` is below 2 or does not divide the channels.

    >>> lwta(torch.tensor([[3.0, -torch.inf, -torch.inf, -2.0]]), 2)
    tensor([[ 3.,  0.,  0., -2.]])
    """
    blocks = _blocks(h, competitors, dim)
    uniform = torch.empty(blocks.shape[:-1], device=h.device).uniform_(generator=generator)
    return _unblocked(_response(blocks, *_draw(blocks, uniform)), h, dim)


def compete(
    h: Float[Tensor, "*shape"],
    competitors: int,
    *,
    dim: int = -1,
    uniform: Float[Tensor, "images *positions blocks"],
) -> Competition:
    """Draw every block's winner from the given `uniform` numbers in [0, 1), by the inverse of Pi's CDF.

    Raises ArgumentError as `lwta`, and when `uniform` has not one number for every block.
    """
    blocks = _blocks(h, competitors, dim)
    if uniform.shape != blocks.shape[:-1]:
        raise ArgumentError(
            f"uniform has the shape {tuple(uniform.shape)}, but the blocks of h have the shape "
            f"{tuple(blocks.shape[:-1])}. Pass one number for every block: (images, *positions, blocks)."
        )
    winner, silence = _draw(blocks, uniform)
    nobody = silence[..., :1].isnan()
    response = _unblocked(_response(blocks, winner, silence), h, dim)
    return Competition(response, winner.masked_fill(nobody, -1).squeeze(-1))


def lwta_max(h: Float[Tensor, "*shape"], competitors: int, *, dim: int = -1) -> Float[Tensor, "*shape"]:
    """Let the most probable competitor of every block win, the first of equals: the deterministic form.

    Raises ArgumentError as `lwta`.

    >>> lwta_max(torch.tensor([[1.0, 2.0, -3.0, -4.0]]), 2)
    tensor([[ 0.,  2., -3.,  0.]])
    """
    blocks = _blocks(h, competitors, dim)
    with torch.no_grad():
        top, winner = blocks.max(-1, keepdim=True)
        silence = (top - top).repeat_interleave(competitors, -1)
    return _unblocked(_response(blocks, winner, silence), h, dim)


def lwta_straight_through(
    h: Float[Tensor, "*shape"],
    competitors: int,
    *,
    dim: int = -1,
    temperature: float = 0.67,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Draw every block's winner exactly, with the gradient of a relaxed draw: for training.

    With g ~ Gumbel(0, 1), hard = onehot(argmax(h + g)) and soft = softmax((h + g) / temperature), the result
    is hard * h and its derivative hard + h * d(soft)/dh (Jang, Gu and Poole, "Categorical reparameterization
    with Gumbel-softmax", ICLR 2017, section 2.2). Half-precision h competes in float32. Backward keeps h,
    soft in h's dtype and the winners; its gradient is NaN in a block with a response of -inf.

    Raises ArgumentError as `lwta`, and when `temperature` is not positive.
    """
    _checked_temperature(temperature)
    blocks = _blocks(h, competitors, dim)
    with torch.no_grad():
        soft = F.softmax(_perturbed(blocks, generator).mul_(1 / temperature), -1)
        winner = soft.max(-1, keepdim=True).indices
    return _unblocked(_StraightThrough.apply(blocks, soft.to(h.dtype), winner, temperature), h, dim)


class _StraightThrough(torch.autograd.Function):
    """Pass the winners' responses on, and the gradient as if `soft` had weighed all responses too."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, soft: Tensor, winner: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(blocks, soft, winner.to(torch.int32))
        ctx.temperature = temperature
        return _response(blocks, winner, soft * 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        blocks, soft, winner = ctx.saved_tensors
        winner = winner.long()
        relaxed = torch.ops.aten._softmax_backward_data(gradient * blocks, soft, -1, soft.dtype)
        relaxed.mul_(1 / ctx.temperature)
        hard = relaxed.gather(-1, winner) + gradient.gather(-1, winner)
        return relaxed.scatter_(-1, winner, hard), None, None, None


def lwta_kl(h: Float[Tensor, "*shape"], competitors: int, *, dim: int = -1) -> Float[Tensor, " examples"]:
    """Sum KL(Pi || uniform) = sum_u Pi_u log(U Pi_u) over the blocks and positions of each example, in nats.

    Examples lie along h's first axis. Values are in [0, blocks * positions * log(competitors)], float32 or
    better.

    Raises ArgumentError as `lwta`, and when the channels are h's first axis.

    >>> lwta_kl(torch.zeros(3, 8), 4)
    tensor([0., 0., 0.])
    """
    blocks = _blocks(h, competitors, dim)
    if dim % h.ndim == 0:
        raise ArgumentError(f"dim is {dim}, the first axis of h, which counts examples. Use another axis.")
    log_pi = F.log_softmax(blocks, -1, dtype=_accurate(h))
    log_pi = log_pi.clamp(min=torch.finfo(log_pi.dtype).min)  # 0 log 0 = 0
    return (log_pi.exp() * (log_pi + math.log(competitors))).flatten(1).sum(-1)


def win_probability(
    h: Float[Tensor, "*shape"], competitors: int, *, dim: int = -1
) -> Float[Tensor, "*shape"]:
    """Return every competitor's probability Pi to win its block, in h's shape, in float32 or better.

    Raises ArgumentError as `lwta`.

    >>> win_probability(torch.zeros(1, 4), 2)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    return _unblocked(_probabilities(_blocks(h, competitors, dim)), h, dim)


@torch.no_grad()
def _draw(blocks: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert every block's CDF; return the winners and what the losers are set to, for `_response`."""
    cdf = _probabilities(blocks).cumsum_(-1)
    total = cdf[..., -1:]  # 1 but for rounding: a number below 1 times it stays below it, so somebody wins
    winner = torch.searchsorted(cdf, uniform[..., None].to(cdf.dtype) * total, right=True)
    return winner.clamp_(max=blocks.shape[-1] - 1), cdf.mul_(0)


def _probabilities(blocks: Tensor) -> Tensor:
    return F.softmax(blocks, -1, dtype=_accurate(blocks))


def _perturbed(blocks: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return h + g with g ~ Gumbel(0, 1)."""
    dtype = _accurate(blocks)
    uniform = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
    uniform.uniform_(torch.finfo(dtype).tiny, 1, generator=generator)  # never 0
    exponential = uniform.log_().neg_()
    return torch.sub(blocks, exponential.log_(), out=exponential)


def _response(blocks: Tensor, winner: Tensor, silence: Tensor) -> Tensor:
    """Return the winners' responses amid `silence` (used up): 0, or NaN all over a block that nobody wins."""
    silence = silence.to(blocks.dtype)
    return silence.scatter_(-1, winner, blocks.gather(-1, winner) + silence[..., :1])


def _blocks(h: Tensor, competitors: int, dim: int) -> Tensor:
    """View h as (images, *positions, blocks, competitors)."""
    channels = h.shape[dim]
    if channels % _checked_competitors(competitors):
        divisors = [str(number) for number in range(2, channels + 1) if channels % number == 0]
        shown = ", ".join(divisors[:8]) + (", …" if len(divisors) > 8 else "")
        raise ArgumentError(
            f"h has {channels} channels along dim {dim}, which {competitors} competitors do not divide. "
            f"Use one of {shown}."
        )
    moved = h.movedim(dim, -1)
    return moved.view(*moved.shape[:-1], channels // competitors, competitors)


def _unblocked(blocks: Tensor, h: Tensor, dim: int) -> Tensor:
    """Bring (images, *positions, blocks, competitors) back to h's shape and memory layout."""
    y = blocks.flatten(-2).movedim(-1, dim)
    return y if y.stride() == h.stride() else torch.empty_like(h, dtype=y.dtype).copy_(y)


def _accurate(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _checked_competitors(competitors: int) -> int:
    if competitors < 2:
        raise ArgumentError(f"competitors is {competitors}, but a block needs rivals. Use 2 or more.")
    return competitors


def _checked_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ArgumentError(f"temperature is {temperature}, but has to be positive and finite, such as 0.67.")
    return temperature
