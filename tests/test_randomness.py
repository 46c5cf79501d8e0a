"""The counter-based generator: published vectors, independence of everything irrelevant, statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from clip_dissect_cvn.errors import ArgumentError
from clip_dissect_cvn.randomness import layer_id, philox, uniforms

ALL_ONES = 2**32 - 1
LAYER_IDS = [1873638328, 97504753]
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def draw(
    images: list[int], *, seed: int = 7, layer: str = "a", draw: int = 0, shape: tuple[int, ...]
) -> Tensor:
    return uniforms(seed, images=torch.tensor(images), layer=layer, draw=draw, shape=shape)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    a, b, c, d = (torch.tensor(word) for word in counter)
    assert " ".join(f"{int(word):08x}" for word in philox((a, b, c, d), key)) == words


def philox_slowly(counter: list[int], key: list[int]) -> list[int]:
    """Section 3.3 of the paper in Python's unbounded integers."""
    a, b, c, d = counter
    j, k = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ j, q % 2**32, (p >> 32) ^ d ^ k, p % 2**32
        j, k = (j + 0x9E3779B9) % 2**32, (k + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    image=st.integers(0, ALL_ONES),
    number=st.integers(0, ALL_ONES),
    layer=st.text(max_size=8),
    place=st.integers(0, 20),
)
def test_a_value_is_the_documented_function_of_its_counter(
    seed: int, image: int, number: int, layer: str, place: int
) -> None:
    counter = [place // 4, image, layer_id(layer), number]
    word = philox_slowly(counter, [seed % 2**32, seed >> 32])[place % 4]
    value = draw([image], seed=seed, layer=layer, draw=number, shape=(21,))[0, place]
    assert value.item() == (word >> 8) / 2**24


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, ALL_ONES), min_size=1, max_size=9), st.integers(1, 9))
def test_a_value_does_not_depend_on_its_batch(images: list[int], size: int) -> None:
    whole = draw(images, shape=(3, 5))
    parts = [draw(images[start : start + size], shape=(3, 5)) for start in range(0, len(images), size)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_value_depends_on_its_flat_index_alone() -> None:
    assert torch.equal(draw([3], shape=(4, 6)).flatten(), draw([3], shape=(30,))[0, :24])


def test_image_dtype_does_not_matter() -> None:
    small = uniforms(1, images=torch.tensor([3, 200], dtype=torch.uint8), layer="a", draw=0, shape=(5,))
    assert torch.equal(small, uniforms(1, images=torch.tensor([3, 200]), layer="a", draw=0, shape=(5,)))


def test_layers_have_the_same_id_for_ever() -> None:
    assert [layer_id("blocks.11.mlp.act"), layer_id("layer1.0.relu.1")] == LAYER_IDS
    assert len({layer_id(f"blocks.{i}.mlp.act") for i in range(1000)}) == 1000


def test_values_are_float32_in_the_half_open_unit_interval() -> None:
    value = draw(list(range(100)), shape=(50, 48))
    assert value.dtype == torch.float32
    assert value.shape == (100, 50, 48)
    assert 0 <= value.min() < 1e-4
    assert 1 - 1e-4 < value.max() < 1


def test_values_are_uniform() -> None:
    value = draw(list(range(200)), shape=(5000,)).flatten()
    counts = torch.histc(value, 256, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert stats.chisquare(torch.bincount((value * 2**24).long() % 256, minlength=256).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("neighbour", ["image", "layer", "draw", "seed", "block", "call"])
def test_neighbours_are_independent(neighbour: str) -> None:
    here = draw(list(range(50)), shape=(4000,))
    there = {
        "image": lambda: draw(list(range(1, 51)), shape=(4000,)),
        "layer": lambda: draw(list(range(50)), layer="b", shape=(4000,)),
        "draw": lambda: draw(list(range(50)), draw=1, shape=(4000,)),
        "seed": lambda: draw(list(range(50)), seed=8, shape=(4000,)),
        "block": lambda: here.roll(1, 1),
        "call": lambda: here.roll(4, 1),
    }[neighbour]()
    correlation = torch.corrcoef(torch.stack([here.flatten(), there.flatten()]))[0, 1]
    assert correlation.abs() < 4.5 / here.numel() ** 0.5
    cells = (here * 16).long() * 16 + (there * 16).long()
    assert stats.chisquare(cells.flatten().bincount(minlength=256).numpy()).pvalue > 1e-4


def test_no_global_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    draw([0, 1], shape=(5,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_blocks_and_no_images(shape: tuple[int, ...]) -> None:
    assert draw([1, 2], shape=shape).shape == (2, *shape)
    none = uniforms(0, images=torch.empty(0, dtype=torch.long), layer="a", draw=0, shape=(3,))
    assert none.shape == (0, 3)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_64_bits(seed: int) -> None:
    with pytest.raises(
        ArgumentError, match=r"^seed has the value -?\d+, which is outside \[0, 2\^64\)\. Use"
    ):
        draw([0], seed=seed, shape=(1,))


@pytest.mark.parametrize("image", [-1, 2**32])
def test_image_outside_32_bits(image: int) -> None:
    with pytest.raises(
        ArgumentError, match=r"^images has the value -?\d+, which is outside \[0, 2\^32\)\. Use"
    ):
        draw([0, image], shape=(1,))


def test_draw_outside_32_bits() -> None:
    with pytest.raises(ArgumentError, match=r"^draw has the value -1, which is outside \[0, 2\^32\)\. Use"):
        draw([0], draw=-1, shape=(1,))
