"""Put the embedded world into the registries."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import Compose

from ..clip_encoder import ClipEncoder
from ..concepts import register_concepts
from ..encoders import register_encoder
from ..models import register_model
from ..probes import register_probe
from .encoder import embedded_encoder
from .networks import build_cvn, build_vit, load_vit, vit_preprocess
from .probe import ShapesProbe
from .world import CLASSES, shapes_concepts


@register_probe("shapes")
def _shapes() -> ShapesProbe:
    return ShapesProbe()


@register_concepts("shapes")
def _words() -> Sequence[str]:
    return shapes_concepts()


@register_encoder("embedded")
def _encoder() -> ClipEncoder:
    return embedded_encoder()


@register_model("cvn_embedded_vit")
def cvn_embedded_vit(
    *, pretrained: bool = True, num_classes: int = len(CLASSES)
) -> tuple[VisionTransformer, Compose]:
    """Build the CVN of the embedded world: 8 competitors a block, in every MLP."""
    model = build_cvn(num_classes=num_classes)
    return load_vit(model, "cvn") if pretrained else model, vit_preprocess()


@register_model("embedded_vit")
def embedded_vit(
    *, pretrained: bool = True, num_classes: int = len(CLASSES)
) -> tuple[VisionTransformer, Compose]:
    """Build the GELU twin of `cvn_embedded_vit`: same recipe, same budget."""
    model = build_vit(num_classes=num_classes)
    return load_vit(model, "gelu") if pretrained else model, vit_preprocess()
