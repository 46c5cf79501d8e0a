"""One pass over the probe images for both networks, into the store; whatever is there already is used.

Every image is decoded once, and an interrupted pass goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .appender import Appender
from .artifacts import ClipFeatures, UnitActivations
from .clip_features import embed_concepts, embed_images
from .concepts import ConceptSet
from .encoders import Encoder
from .errors import DataError, StoreError
from .models import TargetModel
from .probes import Batch, ProbeSet, stream
from .recording import Recorder
from .store import Artifact, Store, appending

VERSION = 1
INDEX_BYTES = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Observation:
    """What both networks made of the probe images, and which images could not be read."""

    features: ClipFeatures
    activations: tuple[UnitActivations, ...]
    unreadable: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Observer:
    """Show the images of `probe` to CLIP and to the network that `recorder` listens to."""

    probe: ProbeSet
    encoder: Encoder
    target: TargetModel
    recorder: Recorder
    device: torch.device
    batch_size: int = 200
    workers: int = 0
    strict: bool = False
    progress: bool = False

    def observe(self, store: Store, words: ConceptSet, templates: Sequence[str]) -> Observation:
        """Return the features and activations of all images that can be read, computing what is missing.

        Raises DataError when no image can be read, StoreError when the disk cannot hold the result.
        """
        text = self._embed(store, words, templates)
        clip, layers = self._clip_artifact(store), self._layer_artifacts(store)
        if not all(artifact.complete for artifact in (clip, *layers.values())):
            with appending([clip, *layers.values()]) as (clip_rows, *layer_rows):
                store.require_space(self._bytes_missing(text.shape[1], [clip_rows, *layer_rows]))
                self._fill(clip_rows, dict(zip(layers, layer_rows, strict=True)))
        return self._load(clip, layers, text)

    def _embed(self, store: Store, words: ConceptSet, templates: Sequence[str]) -> Tensor:
        parts = {
            "encoder": self.encoder.name, "weights": self.encoder.digest, "concepts": words.name,
            "words": words.words, "templates": templates, "version": VERSION,
        }  # fmt: skip

        def compute() -> dict[str, Tensor]:
            return {"embedding": embed_concepts(self.encoder, words.words, templates=templates).cpu()}

        return store.keep("concepts", parts, compute)["embedding"]

    def _clip_artifact(self, store: Store) -> Artifact:
        made = {"encoder": self.encoder.name, "weights": self.encoder.digest, "version": VERSION}
        return store.artifact("images", {**made, "probe": self.probe.name, "listing": self.probe.digest})

    def _layer_artifacts(self, store: Store) -> dict[str, Artifact]:
        made = {"model": self.target.name, "weights": self.target.digest, "version": VERSION}
        shared = {**made, "probe": self.probe.name, "listing": self.probe.digest, **self.recorder.settings}
        return {name: store.artifact("units", {"layer": name, **shared}) for name in self.recorder.layers}

    def _bytes_missing(self, width: int, appenders: Sequence[Appender]) -> int:
        """Bound what the artifacts will grow by: all of them by the images that the last of them lacks."""
        images = len(self.probe) - min(rows.next_image for rows in appenders)
        return images * (4 * width + self.recorder.bytes_per_image + INDEX_BYTES * len(appenders))

    def _fill(self, clip: Appender, layers: Mapping[str, Appender]) -> None:
        """Show both networks the images that they have not seen."""
        transforms = {}
        if not clip.complete:
            transforms["clip"] = self.encoder.preprocess
        if not all(layer.complete for layer in layers.values()):
            transforms["target"] = self.target.preprocess
        with self.recorder:
            for batch in self._batches(transforms, min(rows.next_image for rows in (clip, *layers.values()))):
                if clip.next_image < batch.stop:
                    self._append(clip, batch, self._show_clip(batch))
                if any(layer.next_image < batch.stop for layer in layers.values()):
                    seen = self._show_target(batch)
                    for name, layer in layers.items():
                        self._append(layer, batch, seen.get(name, {}))
        for rows in (clip, *layers.values()):
            rows.finish()

    def _batches(self, transforms: Mapping[str, Any], start: int) -> Iterator[Batch]:
        batches = stream(
            self.probe, transforms, start=start,
            batch_size=self.batch_size, workers=self.workers, strict=self.strict,
        )  # fmt: skip
        hidden = None if self.progress else True  # None: shown on a terminal
        with tqdm(
            total=len(self.probe), initial=start, unit="image", desc=self.probe.name, disable=hidden
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(batch.stop - bar.n)

    def _show_clip(self, batch: Batch) -> dict[str, Tensor]:
        if not len(batch.indices):
            return {}
        return {"embedding": embed_images(self.encoder, batch.tensors["clip"].to(self.device)).cpu()}

    def _show_target(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        if not len(batch.indices):
            return {}
        recorded = self.recorder.record(batch.tensors["target"], batch.indices)
        return {name: layer.arrays() for name, layer in recorded.items()}

    def _append(self, rows: Appender, batch: Batch, arrays: Mapping[str, Tensor]) -> None:
        """Append a batch's rows; a batch without a readable image has none, only notes."""
        notes = [asdict(image) for image in batch.unreadable]
        indexed = {"index": batch.indices, **arrays} if arrays else {}
        rows.append(indexed, batch.stop, notes, indices=batch.indices)

    def _load(self, clip: Artifact, layers: Mapping[str, Artifact], text: Tensor) -> Observation:
        seen = clip.load()
        if "index" not in seen:
            raise DataError(
                f"None of the {len(self.probe)} images of the probe set {self.probe.name!r} can be read; the "
                f"first: {clip.notes[0]}. Check the files, or name another probe set."
            )
        features = ClipFeatures(seen["embedding"], text, source={"digest": clip.digest})
        activations = (self._activations(name, layer, seen["index"]) for name, layer in layers.items())
        return Observation(features, tuple(activations), tuple(clip.notes))

    def _activations(self, name: str, layer: Artifact, index: Tensor) -> UnitActivations:
        arrays = layer.load()
        if not torch.equal(arrays["index"], index):
            raise StoreError(
                f"{layer.path} and CLIP's features are of other images: a file changed while it was read. "
                "Remove both (clip-dissect-cvn cache prune) and run again."
            )
        return UnitActivations(
            name, arrays["response"], arrays.get("winner"), arrays.get("probability"),
            self.recorder.plans[name].competitors, source={"digest": layer.digest},
        )  # fmt: skip
