"""Competitive Vision Networks for CLIP-Dissect: put LWTA into vision models, name their units in words."""

from ._version import __version__
from .artifacts import ClipFeatures, Scores, UnitActivations
from .clip_features import embed_concepts, embed_images
from .concepts import CONCEPTS, ConceptSet, load_concepts, register_concepts
from .descriptions import Descriptions
from .embedded import register as register
from .encoders import ENCODERS, Encoder, load_encoder, register_encoder
from .errors import (
    ArgumentError,
    CheckpointError,
    CVNError,
    DataError,
    DeviceError,
    LayerError,
    MissingExtraError,
    PluginError,
    StoreError,
    SurgeryError,
    UnknownNameError,
)
from .lwta import LWTA, lwta, lwta_kl, lwta_max, lwta_straight_through
from .models import MODELS, TargetModel, list_models, load_model, register_model, wrap_model
from .pipeline import describe
from .probes import PROBES, ProbeSet, load_probe, register_probe
from .similarity import SIMILARITIES, register_similarity, score
from .surgery import competitive, find_sites, lwta_layers, replace_activations_, restore_activations_

__all__ = [
    "CONCEPTS",
    "ENCODERS",
    "LWTA",
    "MODELS",
    "PROBES",
    "SIMILARITIES",
    "ArgumentError",
    "CVNError",
    "CheckpointError",
    "ClipFeatures",
    "ConceptSet",
    "DataError",
    "Descriptions",
    "DeviceError",
    "Encoder",
    "LayerError",
    "MissingExtraError",
    "PluginError",
    "ProbeSet",
    "Scores",
    "StoreError",
    "SurgeryError",
    "TargetModel",
    "UnitActivations",
    "UnknownNameError",
    "__version__",
    "competitive",
    "describe",
    "embed_concepts",
    "embed_images",
    "find_sites",
    "list_models",
    "load_concepts",
    "load_encoder",
    "load_model",
    "load_probe",
    "lwta",
    "lwta_kl",
    "lwta_layers",
    "lwta_max",
    "lwta_straight_through",
    "register_concepts",
    "register_encoder",
    "register_model",
    "register_probe",
    "register_similarity",
    "replace_activations_",
    "restore_activations_",
    "score",
    "wrap_model",
]
