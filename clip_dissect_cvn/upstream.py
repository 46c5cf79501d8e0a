"""timm's and torchvision's classification networks by name, each with its own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torchvision
from PIL.Image import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .errors import ArgumentError, CheckpointError, CVNError

Preprocess = Callable[[Image], Tensor]


@dataclass(frozen=True)
class Blueprint:
    """How to build a network: ``build(pretrained, **kwargs)``, and whether it is pretrained by default."""

    name: str
    build: Callable[..., Any]
    pretrained: bool


def torchvision_names() -> list[str]:
    """List torchvision's classification networks."""
    return torchvision.models.list_models(module=torchvision.models)  # type: ignore[no-any-return]


def from_torchvision(name: str) -> Blueprint:
    """Plan a torchvision network, with the ImageNet weights that CLIP-Dissect takes (the first version)."""
    enum = torchvision.models.get_model_weights(name)
    weights = getattr(enum, "IMAGENET1K_V1", enum.DEFAULT)

    def build(pretrained: bool, **kwargs: Any) -> tuple[nn.Module, Preprocess]:
        if name in ("googlenet", "inception_v3") and not pretrained:
            kwargs["init_weights"] = True  # silences their warning that this will be chosen
        module = torchvision.models.get_model(name, weights=weights if pretrained else None, **kwargs)
        return module, weights.transforms()

    return Blueprint(name, build, True)


def timm_names(name: str) -> list[str]:
    """List timm's architectures, with the tags of weights where `name` has one."""
    names = timm.list_models()
    return [*names, *timm.list_models(pretrained=True)] if "." in name else names


def from_timm(name: str) -> Blueprint:
    """Plan a timm network, ``architecture`` or ``architecture.tag``."""

    def build(pretrained: bool, **kwargs: Any) -> Any:
        return timm.create_model(name, pretrained=pretrained, **kwargs)

    return Blueprint(name, build, timm.models.is_model_pretrained(name))


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Say what to do when the weights of `name` cannot be downloaded."""
    try:
        yield
    except (CVNError, NameError, TypeError, AttributeError):  # mistakes, not the network's doing
        raise
    except Exception as error:
        raise CheckpointError(
            f"The pretrained weights of {name} cannot be had ({type(error).__name__}: {error}). "
            f"Give a file with checkpoint=FILE (--checkpoint FILE), or take random weights with "
            f"pretrained=False (--no-pretrained)."
        ) from error


def timm_preprocess(module: nn.Module) -> Preprocess:
    """Make the evaluation transform of timm's ``pretrained_cfg``, at the size the network was built for."""
    if not getattr(module, "pretrained_cfg", None):
        raise ArgumentError(
            f"{type(module).__name__} does not say how its images are prepared. Pass preprocess, a function "
            f"from a PIL image to a (channels, height, width) tensor."
        )
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    config = resolve_model_data_config(module)
    if isinstance(size, tuple):
        config["input_size"] = (config["input_size"][0], *size)
    transform: Preprocess = create_transform(**config, is_training=False)
    return transform
