from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from torch import nn

from clip_dissect_cvn.errors import ArgumentError, LayerError, UnknownNameError
from clip_dissect_cvn.layers import find_layers, resolve_layers
from clip_dissect_cvn.pooling import TokenLayout, positions_to_read


@dataclass(frozen=True)
class Call:
    path: str
    index: int = 0
    function: bool = False
    shape: tuple[int, ...] = (1, 8)
    axis: int | None = -1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc": nn.Linear(2, 2), "act": nn.GELU()})
        self.relu = nn.ReLU()
        self.idle = nn.Identity()


MODEL = nn.ModuleDict(
    {"stem": nn.Linear(2, 2), "blocks": nn.ModuleList(Block() for _ in range(12)), "head": nn.Linear(2, 2)}
)


def block_calls(i: int) -> list[Call]:
    path = f"blocks.{i}"
    return [
        Call(f"{path}.mlp.fc"),
        Call(f"{path}.mlp.act"),
        Call(f"{path}.relu", 0),
        Call(f"{path}.relu", 0, function=True),
        Call(f"{path}.relu", 1),
        Call(path),
    ]


CALLS = [Call("stem"), *(call for i in range(12) for call in block_calls(i)), Call("head"), Call("")]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["head", "stem"], ["stem", "head"]),
        (["blocks.11.mlp.act"], ["blocks.11.mlp.act"]),
        (["blocks[11].mlp.act"], ["blocks.11.mlp.act"]),
        ([" blocks[1].mlp.* "], ["blocks.1.mlp.fc", "blocks.1.mlp.act"]),
        (["blocks.1?.mlp.act"], ["blocks.10.mlp.act", "blocks.11.mlp.act"]),
        (["blocks.[2-4].mlp.act"], [f"blocks.{i}.mlp.act" for i in (2, 3, 4)]),
        (["*.act"], [f"blocks.{i}.mlp.act" for i in range(12)]),
        (["blocks.3.relu"], ["blocks.3.relu.0", "blocks.3.relu.1"]),
        (["blocks.3.relu.1"], ["blocks.3.relu.1"]),
        (["blocks.3.rel?"], ["blocks.3.relu.0", "blocks.3.relu.1"]),
        (["head", "he?d", "head"], ["head"]),
        (["blocks.??"], ["blocks.10", "blocks.11"]),
    ],
)
def test_patterns_select_layers_in_order_of_execution(patterns: list[str], names: list[str]) -> None:
    assert resolve_layers(MODEL, patterns, CALLS) == names


def test_every_call_of_a_module_is_a_layer() -> None:
    layers = find_layers(CALLS)
    assert len(layers) == 2 + 12 * 5
    assert "" not in layers and "blocks.0.relu" not in layers
    assert layers["blocks.0.relu.1"].call.index == 1


def test_the_children_of_a_container_stand_for_its_calls() -> None:
    calls: Sequence[Call] = [
        Call("relu.0"), Call("relu", 0), Call("fc"), Call("relu.1"), Call("relu", 1)
    ]  # fmt: skip
    layers = find_layers(calls)
    assert {name: layer.call.path for name, layer in layers.items()} == {
        "relu.0": "relu.0",
        "fc": "fc",
        "relu.1": "relu.1",
    }
    assert resolve_layers(nn.Module(), ["relu"], calls) == ["relu.0", "relu.1"]


def test_an_unknown_layer_is_named_with_the_nearest_one() -> None:
    with pytest.raises(
        UnknownNameError, match="Unknown layer 'blocks.3.mlp.cat'. Did you mean 'blocks.3.mlp.act'"
    ):
        resolve_layers(MODEL, ["head", "blocks.3.mlp.cat"], CALLS)
    with pytest.raises(UnknownNameError, match=r"Unknown layer 'layers\.\*'. .*Known: "):
        resolve_layers(MODEL, ["layers.*"], CALLS)


def test_a_module_that_never_runs_is_refused() -> None:
    message = "'blocks.3.idle' is never called in a forward pass, .*Choose one that is, such as 'head'"
    with pytest.raises(LayerError, match=message):
        resolve_layers(MODEL, ["blocks[3].idle"], CALLS)


def test_no_patterns_are_refused() -> None:
    with pytest.raises(ArgumentError, match="layers is empty. Name at least one layer"):
        resolve_layers(MODEL, [], CALLS)


# class tokens ----------------------------------------------------------------------------------------------

CLASS, PATCHES, ALL = slice(0, 1), slice(3, None), slice(None)
DISTILLED = TokenLayout(prefix=3, class_token=0)
AVERAGING = TokenLayout(prefix=3, class_token=None)


@pytest.mark.parametrize(
    ("layout", "shape", "axis", "tokens", "read"),
    [
        (DISTILLED, (1, 19, 8), -1, "class", CLASS),
        (DISTILLED, (1, 19, 8), -1, "patches", PATCHES),
        (DISTILLED, (1, 52, 8), -1, "class", CLASS),
        (DISTILLED, (1, 16, 8), -1, "class", ALL),
        (DISTILLED, (1, 3, 8), -1, "class", CLASS),
        (DISTILLED, (1, 3, 8), -1, "patches", ALL),
        (DISTILLED, (1, 17, 8), -1, "patches", ALL),
        (DISTILLED, (1, 8, 19), -2, "class", ALL),
        (DISTILLED, (1, 4, 4, 8), -1, "class", ALL),
        (DISTILLED, (1, 8), -1, "class", ALL),
        (AVERAGING, (1, 19, 8), -1, "class", PATCHES),
        (AVERAGING, (1, 16, 8), -1, "class", ALL),
        (TokenLayout(0, None), (1, 17, 8), -1, "class", ALL),
    ],
)
def test_positions_to_read(
    layout: TokenLayout, shape: tuple[int, ...], axis: int, tokens: str, read: slice
) -> None:
    assert positions_to_read("norm", shape, axis, layout=layout, grids={16, 49}, tokens=tokens) == read


def test_a_sequence_of_unknown_tokens_is_refused() -> None:
    message = (
        r"norm has 17 tokens, which is neither a grid of patches \(16, 49\) nor one after 3 class and "
        r"register tokens. Choose another layer, or tokens='patches'."
    )
    with pytest.raises(LayerError, match=message):
        positions_to_read("norm", (1, 17, 8), -1, layout=DISTILLED, grids={16, 49}, tokens="class")
