"""The whole job, from images and words to the names of units: read this first.

::

    probes --images--+--> clip_features <--words-- concepts
                     |         | ClipFeatures       (images concepts), factored
                     |         v
                     |    similarity --Scores (units concepts)--> descriptions
                     |         ^
                     v         | UnitActivations    (images units)
         models -> surgery -> recording
                     (lwta)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ._version import __version__
from .concepts import ConceptSet, load_concepts
from .descriptions import Descriptions, combine, describe_layer
from .devices import resolve_device
from .encoders import Encoder, load_encoder
from .models import TargetModel, default_layers, load_model, wrap_model
from .observation import Observer
from .probes import ProbeSet, load_probe
from .recording import Recorder
from .similarity import Progress, Similarity, as_similarity, score
from .stopwatch import Stopwatch
from .store import Store


def describe(
    model: str | nn.Module | TargetModel = "cvn_embedded_vit",
    *,
    probe: str | Path | ProbeSet = "shapes",
    concepts: str | Path | Sequence[str] | ConceptSet = "shapes",
    encoder: str | Path | Encoder = "embedded",
    layers: Sequence[str] | None = None,
    similarity: str | Similarity | Callable[..., Tensor] = "soft_wpmi",
    similarity_options: Mapping[str, Any] | None = None,
    templates: Sequence[str] = ("{}",),
    pool_mode: str = "avg",
    tokens: str = "class",
    seed: int = 0,
    draws: int = 1,
    readout: str | None = None,
    amp: str = "off",
    batch_size: int = 200,
    workers: int = 0,
    device: str = "auto",
    strict: bool = False,
    top: int = 5,
    activation_dir: str | Path | None = None,
    progress: bool = False,
) -> Descriptions:
    """Name the units of `model` by the `concepts` that go with their activations over the `probe` images.

    `layers` are module paths or globs; unless given, the last hidden layer and the classifier head. `seed`
    decides the draws of LWTA layers, whatever the `batch_size`; `draws`, `readout`, `pool_mode`, `tokens` and
    `amp` are `Recorder`'s, `similarity_options` the similarity's, such as ``{"top_k": 50}``.

    What the networks compute is kept in `activation_dir` and used by every later run that would compute the
    same; unless given, that is a temporary folder. With `strict`, an image that cannot be read is an error.

    Raises the errors of `clip_dissect_cvn.errors` for anything it cannot use.
    Source: CLIP-Dissect (Oikarinen and Weng, ICLR 2023) on CVNs (Panousis and Chatzis, NeurIPS 2023).
    """
    clock = Stopwatch()
    entry = as_similarity(similarity)
    options = entry.resolve(similarity_options or {})
    with clock("loading"):
        images = probe if isinstance(probe, ProbeSet) else load_probe(probe)
        words = concepts if isinstance(concepts, ConceptSet) else load_concepts(concepts)
        clip = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
        target, where = _as_target(model), resolve_device(device)
        recorder = Recorder(
            target.module, layers or default_layers(target.module), pool_mode=pool_mode, tokens=tokens,
            seed=seed, draws=draws, readout=readout, amp=amp,
        )  # fmt: skip
        target.module.to(where)
        clip.to_(where)
        observer = Observer(images, clip, target, recorder, where, batch_size, workers, strict, progress)
    with _opened(activation_dir) as store:
        with clock("networks"):
            seen = observer.observe(store, words, templates)
        with clock("similarity"):
            parts = []
            for layer in seen.activations:
                with _progress_bar(f"{entry} of {layer.layer}", progress) as told:
                    scores = score(
                        entry, seen.features, layer, device=where, seed=seed, progress=told, **options
                    )
                parts.append(describe_layer(scores, layer, words.words, top=top))
    return combine(parts, {
        "version": __version__,
        "model": {"name": target.name, **target.source, "digest": target.digest},
        "recording": recorder.settings,
        "probe": {"name": images.name, "images": len(images), "digest": images.digest},
        "unreadable": seen.unreadable,
        "concepts": {**asdict(words), "words": len(words), "templates": templates, "digest": words.digest},
        "encoder": {"name": clip.name, "digest": clip.digest},
        "similarity": {"name": entry.name, **options},
        "device": str(where),
        "seconds": clock.seconds,
    })  # fmt: skip


def _as_target(model: str | nn.Module | TargetModel) -> TargetModel:
    if isinstance(model, TargetModel):
        return model
    return wrap_model(model) if isinstance(model, nn.Module) else load_model(model)


@contextmanager
def _opened(activation_dir: str | Path | None) -> Iterator[Store]:
    if activation_dir is not None:
        yield Store(activation_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Store(folder)


@contextmanager
def _progress_bar(name: str, shown: bool) -> Iterator[Progress]:
    with tqdm(
        desc=name, bar_format="{desc}: {percentage:3.0f}%|{bar}|", disable=None if shown else True
    ) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
