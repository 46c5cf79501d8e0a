"""Scores and words -> one description a unit, as data frames and files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .artifacts import Scores, UnitActivations
from .errors import ArgumentError, StoreError


@dataclass(frozen=True, eq=False)
class Descriptions:
    """The units of one model in words.

    `units` has a row a unit: layer, unit, description, similarity (CLIP-Dissect's columns), block,
    competitor, win_rate (share of the probe images on which an LWTA unit won its block; empty elsewhere),
    dead. A dead unit has an empty description and similarity NaN. `concepts` has the best concepts of every
    unit, by rank from 1. `config` is everything that made them.
    """

    units: pd.DataFrame
    concepts: pd.DataFrame
    config: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table of units."""
        return self.units.copy()

    def layer(self, name: str) -> pd.DataFrame:
        """Return the rows of one layer."""
        return self.units[self.units["layer"] == name].copy()

    def _repr_html_(self) -> str:
        return str(self.units.to_html(max_rows=20, index=False))

    def save(self, result_dir: str | Path) -> Path:
        """Write ``descriptions.csv``, ``concepts.csv`` and ``config.json`` to a new folder, and return it.

        The folder is ``result_dir/MODEL_TIMESTAMP``; it appears whole or not at all. Raises StoreError when
        it cannot be written.
        """
        root = check_writable(result_dir)
        model = str(self.config.get("model", {}).get("name", "model")).replace(os.sep, "_").replace(":", "_")
        scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
        try:
            self.units.to_csv(scratch / "descriptions.csv", index=False, lineterminator="\n")
            self.concepts.to_csv(scratch / "concepts.csv", index=False, lineterminator="\n")
            (scratch / "config.json").write_text(json.dumps(self.config, indent=2, default=str) + "\n")
            scratch.chmod(0o755)
            return _rename_free(scratch, root / f"{model}_{datetime.now():%y_%m_%d_%H_%M_%S}")
        except OSError as error:
            raise StoreError(
                f"result_dir {str(root)!r} cannot be written: {error}. Free space or choose another."
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_writable(result_dir: str | Path) -> Path:
    """Create `result_dir` when it is missing, and raise StoreError when nothing can be written there."""
    root = Path(result_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise StoreError(
            f"result_dir {str(root)!r} cannot be written: {error}. Name a folder that you may write to."
        ) from error
    return root


def describe_layer(
    scores: Scores, activations: UnitActivations, words: Sequence[str], *, top: int = 5
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Name every unit of a layer by its best concept, and list its `top` best.

    Returns the rows of `Descriptions.units` and of `Descriptions.concepts`. Equal scores keep the order of
    `words`. Raises ArgumentError when `scores` and `words` differ in their number of concepts.
    """
    if scores.values.shape[1] != len(words):
        raise ArgumentError(
            f"scores of {scores.layer} rate {scores.values.shape[1]} concepts, but words has {len(words)}. "
            "Give the words that the concepts were embedded from."
        )
    best, order = _ranked(scores.values, min(top, len(words)))
    return _unit_rows(scores, activations, words, best, order), _concept_rows(scores, words, best, order)


def combine(parts: Iterable[tuple[pd.DataFrame, pd.DataFrame]], config: Mapping[str, Any]) -> Descriptions:
    """Join the layers' rows, in the order given."""
    units, concepts = zip(*parts, strict=True)
    return Descriptions(
        pd.concat(units, ignore_index=True), pd.concat(concepts, ignore_index=True), dict(config)
    )


def _ranked(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the `top` best values of each row and their columns, equal ones in the order of the columns."""
    columns = values.nan_to_num(-torch.inf).topk(top, dim=1).indices.sort(dim=1).values
    best, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


def _unit_rows(
    scores: Scores, activations: UnitActivations, words: Sequence[str], best: Tensor, order: Tensor
) -> pd.DataFrame:
    dead = scores.dead.numpy()
    frame = pd.DataFrame({"layer": scores.layer, "unit": range(len(dead))})
    first = order[:, 0].tolist()
    frame["description"] = ["" if gone else words[index] for index, gone in zip(first, dead, strict=True)]
    frame["similarity"] = best[:, 0].float().numpy()
    frame.loc[dead, "similarity"] = float("nan")
    frame["block"], frame["competitor"] = _places(frame["unit"], activations.competitors)
    frame["win_rate"] = _win_rates(activations)
    frame["dead"] = dead
    return frame


def _places(units: pd.Series[int], competitors: int | None) -> tuple[Any, Any]:
    if competitors is None:
        nothing = pd.array([None] * len(units), dtype="Int64")
        return nothing, nothing
    return (units // competitors).astype("Int64"), (units % competitors).astype("Int64")


def _win_rates(activations: UnitActivations) -> Any:
    """Count, block by block, how often each competitor won."""
    if activations.winner is None or activations.competitors is None:
        return float("nan")
    wins = [
        torch.bincount(column.long(), minlength=activations.competitors)
        for column in activations.winner.unbind(dim=1)
    ]
    return (torch.cat(wins).double() / len(activations.winner)).numpy()


def _concept_rows(scores: Scores, words: Sequence[str], best: Tensor, order: Tensor) -> pd.DataFrame:
    live = (~scores.dead).nonzero().flatten()
    top = order.shape[1]
    ids = order[live].flatten().tolist()
    return pd.DataFrame(
        {
            "layer": scores.layer,
            "unit": live.repeat_interleave(top).numpy(),
            "rank": torch.arange(1, top + 1).repeat(len(live)).numpy(),
            "description": [words[index] for index in ids],
            "similarity": best[live].flatten().float().numpy(),
        }
    )


def _rename_free(scratch: Path, wanted: Path) -> Path:
    """Move `scratch` to `wanted`, or to the first of wanted_2, wanted_3, … that is free."""
    for number in range(1, 1000):
        target = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
        try:
            return scratch.rename(target)
        except OSError:
            if not target.exists():
                raise
    raise StoreError(f"{str(wanted)!r} and 998 numbered variants of it exist. Clear old results.")
