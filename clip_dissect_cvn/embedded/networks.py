"""The networks of the embedded world: a tiny CLIP, a tiny CVN and its GELU twin."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Integer
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from ..clip_encoder import clip_preprocess
from ..openai_clip import import_clip
from ..surgery import replace_activations_
from .renderer import SIDE
from .world import CLASSES

COMPETITORS = 8
TOKENS = 49_408
CONTEXT = 77
CLIP_NORM = clip_preprocess(SIDE).transforms[-1]
VIT_NORM = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PATCH = 16
VIT_CONFIGURATION = {
    "input_size": (3, SIDE, SIDE),
    "num_classes": len(CLASSES),
    "mean": VIT_NORM.mean,
    "std": VIT_NORM.std,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


def vit_preprocess() -> Compose:
    """Make what turns an RGB image of any size into a ViT's input; 64 x 64 pixels are left as they are."""
    bicubic = Resize(SIDE, interpolation=InterpolationMode.BICUBIC)
    return Compose([bicubic, CenterCrop(SIDE), ToTensor(), VIT_NORM])


def build_vit(*, num_classes: int = len(CLASSES)) -> VisionTransformer:
    """Build the GELU network: a ViT of width 96 and depth 4 that tells the 80 classes apart."""
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=96,
        depth=4,
        num_heads=3,
        num_classes=num_classes,
    )
    model.pretrained_cfg = model.default_cfg = VIT_CONFIGURATION
    return model


def build_cvn(*, num_classes: int = len(CLASSES)) -> VisionTransformer:
    """Build the same network with LWTA in place of every GELU: same parameters, same names."""
    return replace_activations_(build_vit(num_classes=num_classes), COMPETITORS)


def load_vit(model: VisionTransformer, name: str) -> VisionTransformer:
    """Fill a network of this file with the shipped weights `name` ("cvn" or "gelu")."""
    state = load_file(Path(__file__).with_name(f"{name}.safetensors"))
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.eval()


def build_clip(*, tokens: int = TOKENS, context: int = CONTEXT) -> nn.Module:
    """Build a CLIP of OpenAI's architecture, with `tokens` rows in its vocabulary and `context` positions."""
    network: nn.Module = import_clip().model.CLIP(
        embed_dim=128,
        image_resolution=64,
        vision_layers=4,
        vision_width=128,
        vision_patch_size=8,
        context_length=context,
        vocab_size=tokens,
        transformer_width=128,
        transformer_heads=2,
        transformer_layers=2,
    )
    return network


def expanded(state: dict[str, Tensor], token_ids: Integer[Tensor, " rows"]) -> dict[str, Tensor]:
    """Give the weights of a compact CLIP OpenAI's full vocabulary and context.

    Row r of the compact vocabulary is token `token_ids[r]`. What was not trained, tokens and positions, is 0.
    """
    full = {name: value.float() for name, value in state.items()}
    vocabulary = torch.zeros(TOKENS, full["token_embedding.weight"].shape[1])
    vocabulary[token_ids] = full["token_embedding.weight"]
    positions = torch.zeros(CONTEXT, full["positional_embedding"].shape[1])
    positions[: len(full["positional_embedding"])] = full["positional_embedding"]
    return {**full, "token_embedding.weight": vocabulary, "positional_embedding": positions}
