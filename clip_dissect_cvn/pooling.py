"""Which positions of a layer's output speak for its units: the class token, the patches, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor, nn

from .errors import LayerError
from .layers import Call

PoolMode = Literal["avg", "max"]
Tokens = Literal["class", "patches"]

CLASS_TOKENS = {
    "cls_token": 0,  # timm: ViT, DeiT, EVA, BEiT, CaiT, ConViT, MViTv2, NaFlexViT, PiT, TNT, VOLO, XCiT
    "cls_token1": 0,  # timm: CoaT, one for each stage
    "cls_token_0": 0,  # timm: CrossViT, one for each branch
    "class_token": 0,  # torchvision: VisionTransformer
    "class_embedding": 0,  # CLIP
}
OTHER_TOKENS = ("dist_token", "distillation_token", "reg_token", "register_tokens")
CLASSIFIES_BY_TOKEN = ("token", "tok", "cls", "class", "")


@dataclass(frozen=True)
class TokenLayout:
    """What precedes the patches in a network's token sequences.

    `prefix` tokens are no patches; `class_token` is the place of the one that the network classifies by.
    """

    prefix: int
    class_token: int | None


def token_layout(model: nn.Module) -> TokenLayout:
    """Find a network's class, distillation and register tokens by the names that its family gives them.

    A class token that the network's head does not read, because it averages the patches, does not count.
    """
    for module in model.modules():
        held = {name: token for name, token in module._parameters.items() if token is not None}
        places = [place for name, place in CLASS_TOKENS.items() if name in held]
        tokens = [held[name] for name in (*CLASS_TOKENS, *OTHER_TOKENS) if name in held]
        if tokens:
            prefix = sum(token.numel() // token.shape[-1] for token in tokens)
            return TokenLayout(prefix, places[0] if places and _reads_class_token(model) else None)
    return TokenLayout(0, None)


def _reads_class_token(model: nn.Module) -> bool:
    pools = (getattr(module, "global_pool", None) for module in model.modules())
    return next((pool for pool in pools if isinstance(pool, str)), "") in CLASSIFIES_BY_TOKEN


def grid_sizes(model: nn.Module, calls: Sequence[Call]) -> set[int]:
    """Return how many patches a sequence may have: as an embedding says, or as many as a feature map has."""
    told = {getattr(module, "num_patches", None) for module in model.modules()}
    sized = [(call.shape, call.axis) for call in calls if call.axis is not None and len(call.shape) >= 3]
    seen = {_positions(shape, axis) for shape, axis in sized if len(shape) == 4}
    stem = {_positions(shape, axis) for shape, axis in sized[:1]}
    return seen | stem | {size for size in told if isinstance(size, int)}


def positions_to_read(
    name: str, shape: tuple[int, ...], axis: int, *, layout: TokenLayout, grids: set[int], tokens: str
) -> slice:
    """Choose the positions to pool over in an output of this shape, whose units lie along `axis`.

    Raises LayerError where it cannot be told whether the class token is among them.
    """
    if not layout.prefix or len(shape) != 3 or axis != -1:
        return slice(None)
    count = shape[1]
    has_prefix = count == layout.prefix or count - layout.prefix in grids
    if has_prefix and tokens == "class" and layout.class_token is not None:
        return slice(layout.class_token, layout.class_token + 1)
    if has_prefix:
        return slice(layout.prefix, None) if count > layout.prefix else slice(None)
    if count not in grids and tokens == "class":
        raise LayerError(
            f"{name} has {count} tokens, which is neither a grid of patches ({_shown(grids)}) nor one after "
            f"{layout.prefix} class and register tokens. Choose another layer, or tokens='patches'."
        )
    return slice(None)


def by_position(
    output: Shaped[Tensor, "images ..."], axis: int, read: slice
) -> Shaped[Tensor, "images positions channels"]:
    """View a layer's output with its positions in one axis and channels last; a 2-D one has one position."""
    if output.ndim == 2:
        return output[:, None]
    return output.movedim(axis, -1).flatten(1, -2)[:, read]


def _positions(shape: tuple[int, ...], axis: int) -> int:
    return prod(size for place, size in enumerate(shape) if place not in (0, len(shape) + axis))


def _shown(grids: set[int]) -> str:
    return ", ".join(map(str, sorted(grids)))
