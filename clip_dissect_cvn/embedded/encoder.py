"""The embedded CLIP: OpenAI's architecture and tokenizer, in miniature."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from ..clip_encoder import ClipEncoder, clip_preprocess
from ..openai_clip import import_clip
from .networks import CONTEXT, build_clip, expanded
from .renderer import SIDE

WEIGHTS = Path(__file__).with_name("clip.safetensors")


def embedded_encoder() -> ClipEncoder:
    """Load the CLIP that was trained on the embedded world, as an encoder.

    It knows the words of `shapes_concepts`; any other token of OpenAI's vocabulary has a zero embedding, as
    has any position after the twentieth: a caption of other words can be embedded, but means nothing.
    """
    clip = import_clip()
    return ClipEncoder(
        "embedded",
        load_clip(),
        clip_preprocess(SIDE),
        tokenize=clip.tokenize,
        count_tokens=lambda text: len(clip.clip._tokenizer.encode(text)) + 2,
        context_length=CONTEXT,
    )


def load_clip() -> nn.Module:
    """Load the embedded CLIP with OpenAI's full vocabulary and context, in float32.

    Its state dict is in OpenAI's format, so `clip.model.build_model` takes it too.
    """
    state = load_file(WEIGHTS)
    token_ids = state.pop("token_ids").long()
    model = build_clip()
    model.load_state_dict(expanded(state, token_ids))
    return model.eval()
