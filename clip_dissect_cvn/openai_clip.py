"""OpenAI's CLIP: the package, the published weights by name, and checkpoints in their format."""

from __future__ import annotations

import warnings
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .checkpoints import read_state_dict
from .clip_encoder import ClipEncoder, clip_preprocess
from .errors import CheckpointError, PluginError
from .torchscript import is_torchscript, read_torchscript

NAMES = (
    "RN50",
    "RN101",
    "RN50x4",
    "RN50x16",
    "RN50x64",
    "ViT-B/32",
    "ViT-B/16",
    "ViT-L/14",
    "ViT-L/14@336px",
)
REQUIRED = ("text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight")
TOWERS = ("visual.proj", "visual.attnpool.positional_embedding")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
VOCABULARY = 49408
WEIGHTS_FOLDER = "~/.cache/clip"
"""Where the package keeps what it downloads."""


@cache
def import_clip() -> ModuleType:
    """Import OpenAI's package `clip`, when it is needed, without its warning about pkg_resources.

    Raises
    ------
    PluginError
        when it cannot be imported, or is another project of that name.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        try:
            import clip
            import clip.clip
            import clip.model
        except ImportError as error:
            raise PluginError(f"OpenAI's package clip cannot be imported: {error}. {REINSTALL}") from error
    if not (hasattr(clip, "tokenize") and hasattr(clip.model, "build_model")):
        raise PluginError(f"The package clip at {clip.__file__} is not OpenAI's. {REINSTALL}")
    return clip  # type: ignore[no-any-return]


def load_named(name: str) -> ClipEncoder:
    """Load weights that OpenAI published, downloading them on first use into ~/.cache/clip.

    Raises
    ------
    CheckpointError
        when they cannot be downloaded.
    """
    package = import_clip().clip
    url, folder = package._MODELS[name], Path(WEIGHTS_FOLDER).expanduser()
    try:
        path = package._download(url, str(folder))
    except Exception as error:
        raise CheckpointError(
            f"The weights of CLIP {name} are not in {folder} and could not be downloaded ({error!r}). Put "
            f"{url.rpartition('/')[2]} there, give the path of another CLIP checkpoint, or use the encoder "
            "'embedded'."
        ) from error
    return load_file(Path(path), name=name)


def load_file(path: Path, *, name: str | None = None) -> ClipEncoder:
    """Load a checkpoint in OpenAI's format: a TorchScript archive, or a state dict, of torch or safetensors.

    Of an archive, only the weights are read. They are used in float32.

    Raises
    ------
    CheckpointError
        when the file cannot be read, or is not such a CLIP.
    """
    state = read_torchscript(path) if is_torchscript(path) else read_state_dict(path)
    wanted = [key for key in REQUIRED if key not in state]
    if wanted or not any(key in state for key in TOWERS):
        raise CheckpointError(
            f"{path} is not a CLIP in OpenAI's format: it has {', '.join([*state][:3])}, …, but no "
            f"{', '.join(wanted) or ' or '.join(TOWERS)}. Weights of open_clip load as open_clip:NAME/{path}."
        )
    if len(state["token_embedding.weight"]) < VOCABULARY:
        raise CheckpointError(
            f"{path} embeds {len(state['token_embedding.weight'])} tokens, and OpenAI's tokenizer has "
            f"{VOCABULARY}. Add rows for the tokens that it lacks."
        )
    return as_encoder(name or path.stem, _built(path, state))


def _built(path: Path, state: dict[str, Tensor]) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            model = import_clip().model.build_model(dict(state)).float()
        model.load_state_dict({key: value for key, value in state.items() if key not in NOT_WEIGHTS})
    except (RuntimeError, AssertionError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit the CLIP that its own shapes describe: {error}. "
            "Is it complete, and of OpenAI's architecture?"
        ) from error
    return model


def as_encoder(name: str, model: Any) -> ClipEncoder:
    """Make an encoder of a network of OpenAI's class, with their preprocessing and tokenizer."""
    clip = import_clip()
    return ClipEncoder(
        name,
        model,
        clip_preprocess(model.visual.input_resolution),
        tokenize=partial(clip.tokenize, context_length=model.context_length),
        count_tokens=lambda text: len(clip.clip._tokenizer.encode(text)) + 2,
        context_length=model.context_length,
    )


REINSTALL = "Mend it with: pip uninstall -y clip; pip install --force-reinstall clip-anytorch 'setuptools<81'"
