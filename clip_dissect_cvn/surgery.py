"""Replace the hidden non-linearities of a model by LWTA, in place, and put them back exactly.

Find, build everything, then attach: whatever fails before the last step leaves the model untouched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from .activations import kind_of
from .block_sizes import Competitors as Competitors
from .block_sizes import block_sizes
from .errors import SurgeryError
from .interception import interceptions
from .lwta import LWTA
from .operation import Entry, Operation, PerCall, Rewind, operations_in
from .sites import Call, Site, Sites, Where, filtered, place, sites_among, trace
from .sites import find_sites as find_sites

Model = TypeVar("Model", bound=nn.Module)

FAST_PATH = "activation_relu_or_gelu"
"""What lets torch's TransformerEncoderLayer run a fused kernel instead of its activation module."""


def replace_activations_(
    model: Model,
    competitors: Competitors = 16,
    *,
    where: Where | None = None,
    example: Tensor | None = None,
) -> Model:
    """Make the units of every hidden layer compete, in place; weights and state-dict keys stay.

    `competitors` is the size of a block: a number, a mapping from paths or globs to numbers (the first that
    matches counts; other sites are left alone), or a function of the site, None leaving it alone.
    ``where(path, module)`` narrows the choice, `example` is a batch of inputs for the dry run.

    Raises SurgeryError when competitors do not divide the channels, nothing would be replaced, the model is
    patched already or is itself an activation, or one activation is registered at two places.

    >>> replace_activations_(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 4)[1]
    LWTA(4, dim=-1, temperature=0.67)
    """
    _check_model(model)
    calls = trace(model, example)
    sites = filtered(model, sites_among(model, calls), where)
    sizes = block_sizes(sites, competitors)
    _check_sites(model, sites, sizes)
    operation = _build(model, calls, sites, sizes)
    operation.attach(model)
    if any(site.function for site in sizes):
        _check_children(model, operation, example)
    return model


def restore_activations_(model: Model) -> Model:
    """Undo `replace_activations_`, in a model or in parts of it: the very modules that were there return.

    Raises SurgeryError when there is nothing to undo.
    """
    operations = operations_in(model)
    if not operations:
        raise SurgeryError(
            f"{type(model).__name__} has no replaced activations to restore. Call replace_activations_ first."
        )
    for module, operation in operations.items():
        operation.detach(module)
    return model


@contextmanager
def competitive(
    model: Model,
    competitors: Competitors = 16,
    *,
    where: Where | None = None,
    example: Tensor | None = None,
) -> Iterator[Model]:
    """Replace activations within a ``with`` block; takes what `replace_activations_` takes."""
    replace_activations_(model, competitors, where=where, example=example)
    try:
        yield model
    finally:
        restore_activations_(model)


def lwta_layers(model: nn.Module) -> dict[str, LWTA]:
    """Map the names of all competing layers to their modules, in order of execution."""
    layers = [layer for operation in operations_in(model).values() for layer in operation.layers]
    order = {layer: place for place, layer in enumerate(layers)}
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LWTA)]
    return dict(sorted(found, key=lambda item: order.get(item[1], -1)))


def surgery_digest_parts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Tell, as plain data, what the surgery changes in what a model computes."""
    return {
        name: {"competitors": layer.competitors, "dim": layer.dim}
        for name, layer in lwta_layers(model).items()
    }


def _check_model(model: nn.Module) -> None:
    if operations_in(model):
        raise SurgeryError(
            f"{type(model).__name__} has replaced activations already. Call restore_activations_ first."
        )
    if kind_of(model):
        raise SurgeryError(
            f"The model is itself an activation, {type(model).__name__}, which cannot be replaced in place. "
            "Use LWTA(competitors, dim=...) instead of it."
        )


def _check_sites(model: nn.Module, sites: Sites, sizes: Mapping[Site, int]) -> None:
    if not sizes:
        raise SurgeryError(
            f"Nothing to replace in {type(model).__name__}. {_why_none(sites)}. "
            "Write LWTA modules into it by hand."
        )
    for site in sizes:
        places = [] if site.function else _places(model, model.get_submodule(site.path))
        if len(places) > 1:
            raise SurgeryError(
                f"{site.path} is one {site.kind} registered at {len(places)} places, {', '.join(places)}, "
                "so its calls cannot be told apart. Give each place a module of its own, or leave it out "
                "with where=."
            )


def _why_none(sites: Sites) -> str:
    """Name one site for every reason, and how many others there are."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(site.reason or "given no competitors", []).append(site.name)
    told = (
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for reason, names in groups.items()
    )
    return f"Its activations are left alone ({'; '.join(told)})" if groups else "It calls no known activation"


def _check_children(model: nn.Module, operation: Operation, example: Tensor | None) -> None:
    """Undo an operation that adds children to a module which runs all the children that it has."""
    names = lwta_layers(model)
    try:
        runs = Counter(call.path for call in trace(model, example))
        extra = [name for name, layer in names.items() if layer in operation.layers and runs[name] != 1]
    except SurgeryError:
        extra = list(names)
    if extra:
        operation.detach(model)
        raise SurgeryError(
            f"{type(model).__name__} calls activation functions in a module that also runs all its children, "
            f"so {extra[0]} cannot be added. Make the activation a module, or leave it out with where=."
        )


def _places(model: nn.Module, wanted: nn.Module) -> list[str]:
    """List the paths that a module is registered at; another path to its holder does not count."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, holder in model.named_modules()
        for name, child in holder._modules.items()
        if child is wanted
    ]


def _build(model: nn.Module, calls: Sequence[Call], sites: Sites, sizes: Mapping[Site, int]) -> Operation:
    """Make all that is to be attached, without touching the model."""
    layers = {site: _layer(model, site, size) for site, size in sizes.items()}
    entries: list[Entry] = []
    for path in dict.fromkeys(site.path for site in sizes):
        here = [site for site in sites if site.path == path]
        entries += _entries_at(model, calls, here, layers)
    forwards = interceptions(model, calls, layers)
    entries += [Entry(forward.owner, "__dict__", "forward", forward.run) for forward in forwards]
    return Operation(entries, list(layers.values()))


def _layer(model: nn.Module, site: Site, size: int) -> LWTA:
    assert site.axis is not None, site
    return LWTA(size, dim=site.axis).train(model.get_submodule(site.module_path).training)


def _entries_at(
    model: nn.Module, calls: Sequence[Call], here: Sequence[Site], layers: Mapping[Site, LWTA]
) -> list[Entry]:
    """Put one module in the place of an activation: an LWTA, or one module for each of several calls."""
    path, owner = here[0].path, model.get_submodule(here[0].owner)
    modules = [layers.get(site) or model.get_submodule(path) for site in here]
    entries = [Entry(owner, "__dict__", FAST_PATH, 0)] if getattr(owner, FAST_PATH, 0) else []
    new = modules[0]
    if len(modules) > 1:
        new = PerCall(modules)
        new.training = modules[0].training
        caller = model.get_submodule(_common_caller(calls, here))
        entries.append(Entry(caller, "_forward_pre_hooks", f"rewind {path}", Rewind(new)))
    return [Entry(owner, "_modules", path.rpartition(".")[2], new), *entries]


def _common_caller(calls: Sequence[Call], here: Sequence[Site]) -> str:
    """Find the innermost module one call of which makes all the calls of a site."""
    within = [call.within for call in calls if place(call) == here[0].path]
    shared = [numbers[0] for numbers in zip(*within, strict=False) if len(set(numbers)) == 1]
    return next(call.path for call in calls if not call.function and call.number == shared[-1])
