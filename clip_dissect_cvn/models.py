"""Names to networks with weights and preprocessing: the published ones, any upstream one, your own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checkpoints import load_state_, read_state_dict
from .digests import digest_of, digest_of_state
from .errors import ArgumentError, PluginError, UnknownNameError
from .recipes import recipe_of, recipe_of_module
from .registry import Registry
from .surgery import find_sites, lwta_layers, replace_activations_, surgery_digest_parts
from .upstream import (
    Blueprint,
    fetching,
    from_timm,
    from_torchvision,
    timm_names,
    timm_preprocess,
    torchvision_names,
)
from .upstream import Preprocess as Preprocess
from .zoo import PARENTS, ZOO

Competitors = int | Mapping[str, int]
Builder = Callable[..., Any]
BuilderT = TypeVar("BuilderT", bound=Builder)


@dataclass(frozen=True, eq=False)
class TargetModel:
    """A network to dissect, with what turns a PIL RGB image into its input.

    From `load_model` it is on the CPU and in eval mode; from `wrap_model` as it was given.
    `source` says where it came from, as plain data: ``name``, ``competitors``, ``checkpoint``, ``pretrained``
    and ``weights`` ("random", "pretrained", "given" or the checkpoint's path).
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Name all that decides the activations: weights, architecture, surgery and preprocessing."""
        return digest_of(
            {
                "weights": digest_of_state(self.module),
                "architecture": recipe_of_module(self.module),
                "surgery": surgery_digest_parts(self.module),
                "preprocess": recipe_of(self.preprocess),
            }
        )


def register_model(name: str) -> Callable[[BuilderT], BuilderT]:
    """Register ``f(*, pretrained=False, **kwargs)`` under a name for `load_model` and the command line.

    It returns a module, a (module, preprocess) pair or a TargetModel; a module alone needs timm's
    ``pretrained_cfg``. The default of its `pretrained` holds where the user does not choose; ``num_classes``
    is passed when a checkpoint has another number of classes than the default.

    Raises
    ------
    ArgumentError
        when the name is taken, or the function does not take `pretrained`.
    """

    def add(build: BuilderT) -> BuilderT:
        MODELS.add(name, _checked_builder(name, build))
        return build

    return add


def _checked_builder(name: str, build: Builder) -> Builder:
    if not callable(build) or _default_of_pretrained(build) is None:
        raise ArgumentError(
            f"The model {name!r} is built by {build!r}, which cannot be told whether to be pretrained. "
            f"Write it as a function f(*, pretrained=False, **kwargs)."
        )
    return build


def _default_of_pretrained(build: Builder) -> bool | None:
    """Tell whether a builder gives weights unless told otherwise, None where it takes no such argument."""
    parameters = inspect.signature(build).parameters
    if "pretrained" in parameters:
        return parameters["pretrained"].default is True
    return False if any(found.kind is found.VAR_KEYWORD for found in parameters.values()) else None


MODELS: Registry[Builder] = Registry("model", "models", _checked_builder)
for _name in ZOO:
    MODELS.add(_name, ZOO[_name])


def list_models() -> list[str]:
    """List the names registered here, every ``cvn_*`` among them; timm's and torchvision's work besides."""
    return list(MODELS)


def load_model(
    name: str,
    *,
    competitors: Competitors | None = None,
    pretrained: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> TargetModel:
    """Load a network by name, with its weights and its preprocessing.

    A name registered here comes first, then torchvision's (as CLIP-Dissect does), then timm's;
    ``torchvision:NAME`` and ``timm:NAME`` choose. `competitors` patches it once the weights are in.
    Weights are those of `checkpoint`; else, unless ``pretrained=False``, the hub's for an upstream name; else
    random, drawn from `seed` with torch's global generator left as it was. A ``cvn_*`` name has no published
    weights and starts random; ``pretrained=True`` gives a ``cvn_deit_*`` its GELU parent's.
    A checkpoint that differs in nothing but its number of classes gets a model with that number.

    Raises
    ------
    UnknownNameError
        for a name that no registry has.
    ArgumentError
        when arguments contradict each other or the name.
    CheckpointError
        when weights cannot be fetched, read or fitted.
    SurgeryError
        when the network cannot be patched.
    """
    if pretrained and checkpoint is not None:
        raise ArgumentError(
            f"pretrained=True and checkpoint={str(checkpoint)!r} both give weights. Leave one of them out."
        )
    plan = _find(name)
    fetch = (plan.pretrained and checkpoint is None) if pretrained is None else pretrained
    with _randomness_of(seed):
        built = _build(plan, fetch)
        if checkpoint is not None:
            built = _with_checkpoint(plan, built, checkpoint)
    _compete_(built.module, competitors, name)
    weights = str(checkpoint) if checkpoint is not None else "pretrained" if fetch else "random"
    source = {
        "name": name,
        "competitors": _competitors(built.module),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "pretrained": fetch,
        "weights": weights,
    }
    return TargetModel(name, built.module.eval(), built.preprocess, {**source, **built.source})


def wrap_model(
    module: nn.Module, *, preprocess: Preprocess | None = None, name: str = "custom"
) -> TargetModel:
    """Take a network of your own, left as it is; timm's bring their preprocessing, others need `preprocess`.

    Raises
    ------
    ArgumentError
        when `preprocess` is needed and not given.
    """
    source = {"name": name, "competitors": _competitors(module), "weights": "given"}
    return TargetModel(name, module, preprocess or timm_preprocess(module), source)


def default_layers(module: nn.Module) -> list[str]:
    """Name the last hidden activation (an LWTA where there is one) and the classifier head.

    For an activation that is a function, the module that calls it.

    Raises
    ------
    ArgumentError
        when the network has neither.
    """
    hidden = list(lwta_layers(module)) or _hidden(module)
    layers = [*hidden[-1:], *_head(module)]
    if not layers:
        raise ArgumentError(
            f"{type(module).__name__} has no hidden activation and no linear head that can be told from its "
            f"modules. Name the layers to dissect."
        )
    return layers


def _hidden(module: nn.Module) -> list[str]:
    sites = [site for site in find_sites(module) if not site.reason]
    return [name for name in (site.owner if site.function else site.name for site in sites) if name]


def _head(module: nn.Module) -> list[str]:
    """Find timm's classifier, or in other networks the last linear layer."""
    classifier: Any = getattr(module, "get_classifier", None)
    if classifier is None:
        return [path for path, part in module.named_modules() if isinstance(part, nn.Linear)][-1:]
    heads = classifier()
    head = heads[0] if isinstance(heads, tuple) else heads
    named = [path for path, part in module.named_modules() if part is head]
    return [] if isinstance(head, nn.Identity) else named


def _build(plan: Blueprint, pretrained: bool, **kwargs: Any) -> TargetModel:
    with fetching(plan.name) if pretrained else nullcontext():
        return _as_target(plan.name, plan.build(pretrained, **kwargs))


def _as_target(name: str, built: Any) -> TargetModel:
    if isinstance(built, TargetModel):
        return built
    module, preprocess = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module):
        raise PluginError(
            f"The model {name!r} was built as {type(built).__name__}. "
            f"Return a module, (module, preprocess) or a TargetModel."
        )
    return TargetModel(name, module, preprocess or timm_preprocess(module))


def _find(name: str) -> Blueprint:
    home, _, bare = name.rpartition(":")
    if not home and name in MODELS:
        return _registered(name)
    if home in ("", "torchvision") and bare in torchvision_names():
        return from_torchvision(bare)
    if home in ("", "timm") and bare in timm_names(bare):
        return from_timm(bare)
    known = {
        "": {*MODELS, *torchvision_names(), *timm_names(bare)},
        "torchvision": {f"torchvision:{known}" for known in torchvision_names()},
        "timm": {f"timm:{known}" for known in timm_names(bare)},
    }
    repair = (
        f"Registered here: {', '.join(MODELS)}; any timm or torchvision classification model works besides, "
        f"with competitors=U for LWTA."
    )
    raise UnknownNameError("model", name, known.get(home, known[""]), repair=repair)


def _registered(name: str) -> Blueprint:
    build = MODELS[name]

    def build_with(pretrained: bool, **kwargs: Any) -> Any:
        return build(pretrained=pretrained, **kwargs)

    return Blueprint(name, build_with, bool(_default_of_pretrained(build)))


@contextmanager
def _randomness_of(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start from `seed`, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _with_checkpoint(plan: Blueprint, built: TargetModel, checkpoint: str | os.PathLike[str]) -> TargetModel:
    state = read_state_dict(checkpoint)
    classes = _other_classes(built.module, state)
    if classes is not None:
        with suppress(TypeError):  # a builder of one number of classes; what does not fit is told below
            built = _build(plan, False, num_classes=classes)
    load_state_(built.module, state, origin=str(checkpoint))
    return built


def _other_classes(module: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Tell the number of classes of a checkpoint that differs from the model in nothing but that."""
    own = module.state_dict()
    if own.keys() != state.keys():
        return None
    pairs = [(own[name].shape, state[name].shape) for name in own if own[name].shape != state[name].shape]
    if any(mine[1:] != theirs[1:] or len(mine) != len(theirs) for mine, theirs in pairs):
        return None
    sizes = {(mine[0], theirs[0]) for mine, theirs in pairs}
    return sizes.pop()[1] if len(sizes) == 1 else None


def _compete_(module: nn.Module, competitors: Competitors | None, name: str) -> None:
    if competitors is None:
        return
    fixed = _competitors(module)
    if fixed is None:
        replace_activations_(module, competitors)
    elif fixed != competitors:
        raise ArgumentError(
            f"competitors={competitors!r} contradicts {name}, which competes with {fixed!r} already. "
            f"Leave competitors out, or give them to {PARENTS.get(name, 'the network it was patched from')}."
        )


def _competitors(module: nn.Module) -> int | dict[str, int] | None:
    """Tell the competitors a block: one number where all layers agree, none where nothing competes."""
    sizes = {path: layer.competitors for path, layer in lwta_layers(module).items()}
    if len(set(sizes.values())) <= 1:
        return next(iter(sizes.values()), None)
    return sizes
