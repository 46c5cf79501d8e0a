"""The ten published Competitive Vision Networks, in timm's and in torchvision's registries.

DeiT (Touvron et al. 2021) with LWTA for the GELU of every MLP, ResNet-18 with LWTA for every ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import timm
import torch
import torchvision
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, get_pretrained_cfg
from timm.models import register_model as register_with_timm
from torch import nn
from torchvision.models._api import register_model as register_with_torchvision

from .errors import CheckpointError
from .surgery import replace_activations_

DEIT = {"t": ("deit_tiny_patch16_224", (2, 8, 16, 24)), "s": ("deit_small_patch16_224", (2, 12, 16))}
PLACES_COMPETITORS = (2, 4, 8)
PLACES_CLASSES = 365
PLACES_CFG = {
    "input_size": (3, 224, 224),
    "num_classes": PLACES_CLASSES,
    "crop_pct": 224 / 256,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "fc",
}

Builder = Callable[..., nn.Module]
ZOO: dict[str, Builder] = {}
"""Every published network's builder: ``pretrained`` and the parent's own keyword arguments."""
PARENTS: dict[str, str] = {}
"""The network that each was patched from."""
default_cfgs: dict[str, Any] = {}
"""Where timm looks for them."""


def _deit(name: str, parent: str, competitors: int) -> Builder:
    def build(pretrained: bool = False, pretrained_cfg_overlay: Any = None, **kwargs: Any) -> nn.Module:
        overlay = {**(pretrained_cfg_overlay or {}), "architecture": name}
        entry = timm.models.model_entrypoint(parent)
        module: nn.Module = entry(pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)
        replace_activations_(module, competitors, example=_example(module))
        return module

    build.__doc__ = (
        f"Build {parent} with {competitors} competitors a block; `pretrained` converts its hub weights."
    )
    return build


def _example(module: nn.Module) -> torch.Tensor:
    """Make one input of the size and on the device that this vision transformer was built for."""
    embed: Any = next(part for part in module.modules() if isinstance(part, PatchEmbed))
    weight: torch.Tensor = embed.proj.weight
    return weight.new_zeros(1, embed.proj.in_channels, *embed.img_size)


def _resnet18_places(name: str, competitors: int | None) -> Builder:
    def build(pretrained: bool = False, num_classes: int = PLACES_CLASSES, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise CheckpointError(
                f"{name} has no weights on a hub. Give a file as checkpoint (--checkpoint FILE): "
                f"CLIP-Dissect's resnet18_places365.pth.tar, or your own."
            )
        for used_by_timm_alone in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(used_by_timm_alone, None)
        module: Any = torchvision.models.resnet18(num_classes=num_classes, **kwargs)
        module.num_classes = num_classes
        cfg = {**PLACES_CFG, "architecture": name, "num_classes": num_classes}
        module.pretrained_cfg = module.default_cfg = cfg
        if competitors is not None:
            replace_activations_(module, competitors, example=torch.zeros(1, 3, 64, 64))
        return cast(nn.Module, module)

    build.__doc__ = (
        f"Build torchvision's ResNet-18 for Places365 with {competitors or 'ReLU, not'} competitors."
    )
    return build


def _for_torchvision(name: str, build: Builder) -> Builder:
    def build_with_weights(*, weights: str | None = None, **kwargs: Any) -> nn.Module:
        kwargs.pop("progress", None)
        return build(pretrained=weights is not None, **kwargs)

    build_with_weights.__doc__ = build.__doc__
    build_with_weights.__name__ = name
    return build_with_weights


def _without_weights(parent: str) -> Any:
    """Describe the parent's input and head alone: what its hub holds are not a CVN's weights."""
    return replace(get_pretrained_cfg(parent), url="", hf_hub_id=None, tag=None)


def _register(name: str, parent: str, build: Builder, cfg: Any) -> None:
    PARENTS[name] = parent
    build.__name__ = build.__qualname__ = name
    globals()[name] = ZOO[name] = build
    default_cfgs.update(generate_default_cfgs({name: cfg}))
    register_with_timm(build)
    register_with_torchvision(name)(_for_torchvision(name, build))


for _size, (_parent, _choices) in DEIT.items():
    for _competitors in _choices:
        _name = f"cvn_deit_{_size}{_competitors}"
        _register(_name, _parent, _deit(_name, _parent, _competitors), _without_weights(_parent))
for _competitors in PLACES_COMPETITORS:
    _name = f"cvn_resnet18_places_{_competitors}"
    _register(_name, "resnet18_places", _resnet18_places(_name, _competitors), PLACES_CFG)

resnet18_places = ZOO["resnet18_places"] = _resnet18_places("resnet18_places", None)
