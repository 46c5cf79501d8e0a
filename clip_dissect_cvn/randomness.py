"""Random numbers that are a pure function of what they are for: a counter-based generator.

Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in torch's integer
operations: a draw is the same on any device, whatever the batch size, worker count or resume point.
"""

from __future__ import annotations

import math
from hashlib import blake2s

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .errors import ArgumentError

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions
ROUNDS = 10
WORD = 0xFFFFFFFF
WORDS_PER_CALL = 4


def uniforms(
    seed: int, *, images: Integer[Tensor, " images"], layer: str, draw: int, shape: tuple[int, ...]
) -> Float[Tensor, "images *positions blocks"]:
    """Return the uniform numbers that belong to these images, this layer and this draw.

    `shape` is one image's: ``(*positions, blocks)``. The result is float32 in [0, 1), multiples of 2^-24, on
    the device of `images`. A value depends on the seed, the image's index, the layer, the draw and its flat
    index in `shape`, and on nothing else: neither on the other images nor on the extent of `shape`.

    Raises ArgumentError for a `seed` outside [0, 2^64), an image index or `draw` outside [0, 2^32).

    >>> uniforms(0, images=torch.tensor([5, 9]), layer="head", draw=0, shape=(3,))[1]
    tensor([0.4193, 0.0625, 0.8014])
    """
    _check_range("seed", seed, 64)
    _check_range("draw", draw, 32)
    for extreme in images.aminmax() if images.numel() else ():
        _check_range("images", int(extreme), 32)
    size = math.prod(shape)
    calls = torch.arange(-(-size // WORDS_PER_CALL), device=images.device)
    counter = (calls, images.long()[:, None], calls.new_tensor(layer_id(layer)), calls.new_tensor(draw))
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32)), dim=-1)
    return (
        words.flatten(1)[:, :size].bitwise_right_shift_(8).float().mul_(2**-24).reshape(len(images), *shape)
    )


def layer_id(layer: str) -> int:
    """Hash a layer's name to 32 bits, the same in every process and version."""
    return int.from_bytes(blake2s(layer.encode(), digest_size=4).digest(), "little")


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt a counter of four 32-bit words with a key of two, elementwise: Philox-4x32-10 (section 3.3).

    Words are int64 tensors in [0, 2^32), which broadcast against each other.
    """
    a, b, c, d = counter
    for turn in range(ROUNDS):
        first, second = ((word + turn * step) & WORD for word, step in zip(key, KEY_STEPS, strict=True))
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return a, b, c, d


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low half of a 32 x 32 bit product; int64 wraps around, which loses no bit."""
    product = word * factor
    return (product >> 32) & WORD, product & WORD


def _check_range(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 2**bits:
        raise ArgumentError(f"{name} has the value {value}, which is outside [0, 2^{bits}). Use one inside.")
