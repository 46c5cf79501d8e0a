"""The stage: ClipFeatures and UnitActivations -> Scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts import ClipFeatures, Scores, UnitActivations
from ..errors import ArgumentError, CVNError, PluginError
from .entry import SIMILARITIES, Progress, Similarity
from .inputs import Device, check_same_images, concept_matrix, pieces


def score(
    similarity: str | Similarity | Callable[..., Tensor],
    features: ClipFeatures,
    activations: UnitActivations,
    *,
    device: Device = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Rate how well each concept describes each unit of a layer.

    `similarity` is a registered name, an entry, or a function of (clip_feats, unit_acts, **options); without
    a factored form the function gets P whole (`memory` tells what that takes). Returns scores (units
    concepts) on the CPU, NaN for dead units. `progress` is called with what is done and what there is in all.

    Raises UnknownNameError for an unknown similarity or option, ArgumentError for an option out of range, for
    other images in the two inputs, or for NaN or infinity in them, and PluginError for a function that fails
    or does not return scores of that shape, without NaN for live units.
    """
    entry = as_similarity(similarity)
    resolved = entry.resolve(options)
    images = len(features.images)
    check_same_images(images, activations)
    _check_finite(activations.response, f"The activations of {activations.layer}")
    _check_finite(features.images, "The CLIP embeddings of the images")
    _check_finite(features.concepts, "The CLIP embeddings of the concepts")
    handed = _handed_over(entry, {"device": device, "seed": seed, "progress": progress})
    values = _call(entry, features, activations, device, {**resolved, **handed})
    dead = activations.dead().cpu()
    _check_result(entry, values, dead, (activations.units, len(features.concepts)))
    values = values.detach().to("cpu", torch.float32).contiguous()
    if dead.any():
        values = values.masked_fill(dead[:, None], torch.nan)
    return Scores(activations.layer, values, dead, _source(entry, resolved, handed, features, activations))


def as_similarity(similarity: str | Similarity | Callable[..., Tensor]) -> Similarity:
    """Find a similarity by name, or make one of a function."""
    if isinstance(similarity, str):
        return SIMILARITIES[similarity]
    if isinstance(similarity, Similarity):
        return similarity
    return Similarity(getattr(similarity, "__name__", repr(similarity)), similarity)


def memory(
    similarity: str | Similarity | Callable[..., Tensor], features: ClipFeatures, activations: UnitActivations
) -> int:
    """Tell how many bytes P and the activations take when a similarity without a factored form is called."""
    if as_similarity(similarity).factored is not None:
        return 0
    return 4 * len(features.images) * (len(features.concepts) + activations.units)


def _handed_over(entry: Similarity, context: dict[str, Any]) -> dict[str, Any]:
    """Keep what the function names; one that takes any option gets the device, as from CLIP-Dissect."""
    return {
        name: value
        for name, value in context.items()
        if name in entry.parameters or (name == "device" and entry.takes_any_option)
    }


def _call(
    entry: Similarity,
    features: ClipFeatures,
    activations: UnitActivations,
    device: Device,
    options: dict[str, Any],
) -> Any:
    if entry.factored is not None:
        return _guarded(entry, entry.factored, features, activations, options)
    clip_feats = concept_matrix(features, device).block()
    unit_acts = activations.response.to(device, torch.float32, copy=True)  # the function's own, to change
    return _guarded(entry, entry.function, clip_feats, unit_acts, options)


def _guarded(
    entry: Similarity, function: Callable[..., Any], left: Any, right: Any, options: dict[str, Any]
) -> Any:
    """Call the function; an error that is not this package's says whose it is."""
    try:
        return function(left, right, **options)
    except CVNError:
        raise
    except Exception as error:
        raise PluginError(f"{_named(entry)} failed: {error!r}. Mend that function.") from error


def _check_finite(values: Float[Tensor, "images channels"], what: str) -> None:
    for rows in pieces(*values.shape):
        if values[rows].sum().isfinite():  # then every term is, and this is the cheapest way to know
            continue
        for row, column in (~torch.isfinite(values[rows])).nonzero()[:1].tolist():
            raise ArgumentError(
                f"{what} hold {float(values[rows][row, column])} (row {rows.start + row}, column {column}). "
                "Only finite numbers can be compared: check the network and its precision."
            )


def _check_result(entry: Similarity, values: Any, dead: Tensor, expected: tuple[int, int]) -> None:
    who = _named(entry)
    if not isinstance(values, Tensor):
        raise PluginError(
            f"{who} returned {type(values).__name__}; expected a tensor (units concepts) = {expected}."
        )
    if tuple(values.shape) != expected:
        raise PluginError(
            f"{who} returned a tensor of shape {tuple(values.shape)}; expected (units concepts) = {expected}."
        )
    bad = (values.amax(dim=1).isnan().cpu() & ~dead).nonzero().flatten().tolist()
    if bad:
        raise PluginError(
            f"{who} returned NaN for {len(bad)} units that are not dead, the first of them {bad[0]}; "
            f"expected numbers for all of (units concepts) = {expected}."
        )


def _named(entry: Similarity) -> str:
    function = f"{entry.function.__module__}.{getattr(entry.function, '__qualname__', entry.function)}"
    return f"The similarity {entry.name!r} ({function})"


def _source(
    entry: Similarity,
    options: dict[str, Any],
    handed: dict[str, Any],
    features: ClipFeatures,
    activations: UnitActivations,
) -> dict[str, Any]:
    notes = list(entry.remarks(len(features.images), options))
    if formed := memory(entry, features, activations):
        notes.append(f"P was formed whole, in {formed / 1e6:.0f} MB with the activations")
    return {
        "similarity": entry.name,
        "version": entry.version,
        "options": options,
        **{name: handed[name] for name in ("seed",) if name in handed},
        "notes": notes,
        "features": dict(features.source),
        "activations": dict(activations.source),
    }
