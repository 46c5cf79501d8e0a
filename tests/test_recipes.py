"""A recipe differs when what a callable or network computes differs, and not otherwise."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from clip_dissect_cvn.digests import digest_of
from clip_dissect_cvn.recipes import recipe_of, recipe_of_module


def digest(value: Any) -> str:
    return digest_of(recipe_of(value))


def scaled(factor: float) -> Any:
    return lambda image: image * factor


def cut(image: Image.Image, *, size: int = 8) -> torch.Tensor:
    return torch.zeros(3, size, size)


class Holder:
    def __init__(self, size: int) -> None:
        self.size = size
        self.me = self

    def prepare(self, image: Image.Image) -> torch.Tensor:
        return cut(image, size=self.size)


def compose(size: int, mean: float) -> Any:
    steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize([mean], [1.0])]
    return transforms.Compose(steps)


def test_equal_for_two_of_a_kind() -> None:
    pairs = [
        (compose(8, 0.5), compose(8, 0.5)),
        (scaled(2.0), scaled(2.0)),
        (functools.partial(cut, size=4), functools.partial(cut, size=4)),
        (Holder(3).prepare, Holder(3).prepare),
        (ResNet18_Weights.IMAGENET1K_V1.transforms(), ResNet18_Weights.IMAGENET1K_V1.transforms()),
    ]
    assert all(digest(one) == digest(other) for one, other in pairs)


def test_different_for_what_computes_differently() -> None:
    all_different = [
        compose(8, 0.5), compose(9, 0.5), compose(8, 0.5000001), scaled(2.0), scaled(3.0), cut,
        functools.partial(cut, size=4), functools.partial(cut, size=5), Holder(3).prepare, Holder(4).prepare,
        len, ResNet18_Weights.IMAGENET1K_V1.transforms(), ResNet50_Weights.IMAGENET1K_V2.transforms(),
    ]  # fmt: skip
    assert len({digest(value) for value in all_different}) == len(all_different)


def test_holds_no_memory_addresses() -> None:
    for value in (compose(8, 0.5), scaled(2.0), Holder(3).prepare, cut):
        assert " at 0x" not in json.dumps(recipe_of(value), default=str)


def test_a_function_without_source_counts_by_its_code() -> None:
    twice, thrice, plus = (eval(f"lambda image: image {does}") for does in ("* 2", "* 3", "+ 2"))
    assert len({digest(twice), digest(thrice), digest(plus)}) == 3
    assert digest(twice) == digest(eval("lambda image: image * 2"))


class Net(nn.Module):
    def __init__(self, heads: int, act: Any, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.act = act
        self.config = config or {}
        self.inner = nn.Conv2d(1, 1, 1)


def test_a_module_by_its_settings_and_parts() -> None:
    strided = Net(1, torch.relu)
    strided.inner.stride = (2, 2)
    nets = [
        Net(1, torch.relu), Net(2, torch.relu), Net(1, torch.tanh), Net(1, nn.GELU()),
        Net(1, nn.GELU("tanh")), Net(1, torch.relu, {"eps": 1.0}), strided,
    ]  # fmt: skip
    digests = [digest_of(recipe_of_module(net)) for net in nets]
    assert len(set(digests)) == len(nets)
    assert digest_of(recipe_of_module(Net(1, torch.relu).eval())) == digests[0]


def test_a_module_of_ones_own_by_its_source() -> None:
    recipe = recipe_of_module(Net(1, torch.relu))
    assert "self.heads = heads" in recipe[""]["pinned by"]
    assert recipe["inner"]["pinned by"] == torch.__version__
