"""Which calls of a model are its hidden non-linearities, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .activations import GATES, PARAMETRIC, kind_of
from .lwta import LWTA
from .tracing import Call as Call
from .tracing import default_example as default_example
from .tracing import trace as trace

ATTENTION_GATES = {
    *("SEModule", "SqueezeExcite", "SqueezeExcitation", "SqueezeExciteCl", "EffectiveSEModule"),
    *("GlobalContext", "GatherExcite", "ChannelAttn", "LightChannelAttn", "SpatialAttn", "CbamModule"),
    *("LightCbamModule", "EcaModule", "CecaModule", "CoordAttn", "SimpleCoordAttn", "EfficientLocalAttn"),
    *("StripAttn", "SelectiveKernelAttn"),
}
FAMILIES = {
    **dict.fromkeys(ATTENTION_GATES, "an attention gate"),
    **dict.fromkeys(PARAMETRIC, "an activation with parameters"),
    "LiteMLA": "the kernel of a linear attention",
}
"""Classes in which no activation is a hidden layer's, and what they are."""

Where = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Site:
    """One call of an activation.

    `path` is the module's, or for a function ``owner.functional_relu``, where its competition will be found;
    `index` is the call among its `calls` in one forward pass. `axis` holds the `channels`, counted from the
    end; None where that is unknown. `hidden`: it is a hidden layer's; `reason` says why it is left alone.
    """

    path: str
    kind: str
    channels: int | None
    axis: int | None
    index: int = 0
    calls: int = 1
    function: bool = False
    hidden: bool = True
    reason: str = ""

    @property
    def name(self) -> str:
        """The path, with the index of the call where there are several."""
        return self.path if self.calls == 1 else f"{self.path}.{self.index}"

    @property
    def owner(self) -> str:
        """The path of the module that holds the activation, or whose forward calls the function."""
        return self.path.rpartition(".")[0]

    @property
    def module_path(self) -> str:
        """The path of the activation module, or of the module whose forward calls the function."""
        return self.owner if self.function else self.path


class Sites(tuple[Site, ...]):
    """Activation sites in order of execution; printed as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("site", "kind", "channels", "axis", "")]
        rows += [(s.name, s.kind, _shown(s.channels), _shown(s.axis), s.reason or "competes") for s in self]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ("  ".join((*map(str.ljust, row, widths), row[4])) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def find_sites(model: nn.Module, example: Tensor | None = None) -> Sites:
    """List every activation of a model: what would be replaced, and what is left alone and why.

    A dry run on fake tensors, of `example` or of the size that the model declares, tells which axis holds the
    channels from what feeds each activation. Activations that never run come last.

    Raises SurgeryError when the model does not run.

    >>> print(find_sites(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2), nn.Sigmoid())))
    site  kind     channels  axis
    1     GELU     8         -1    competes
    3     Sigmoid  2         -1    a gate, not a hidden layer
    """
    return sites_among(model, trace(model, example))


def sites_among(model: nn.Module, calls: tuple[Call, ...]) -> Sites:
    """Pick the activations out of the calls of a model."""
    modules = dict(model.named_modules())
    active = [call for call in calls if _is_site(modules, call)]
    times = Counter(place(call) for call in active)
    called = [_site(modules, call, times[place(call)]) for call in active]
    return Sites((*_all_calls_or_none(called), *_never_called(modules, {call.path for call in calls})))


def filtered(model: nn.Module, sites: Sites, where: Where | None) -> Sites:
    """Leave alone the sites for which ``where(path, module)`` is false; a function's module is its owner."""
    if where is None:
        return sites

    return Sites(
        replace(site, reason="filtered out by where")
        if not site.reason and not where(site.path, model.get_submodule(site.module_path))
        else site
        for site in sites
    )


def _is_site(modules: dict[str, nn.Module], call: Call) -> bool:
    """A function within an activation module is that module's own doing."""
    module = modules[call.path]
    return not kind_of(module) if call.function else bool(kind_of(module))


def place(call: Call) -> str:
    """Tell at which path an activation's competition is found."""
    return f"{call.path}.functional_{call.kind}".lstrip(".") if call.function else call.path


def _site(modules: dict[str, nn.Module], call: Call, calls: int) -> Site:
    kind = call.kind if call.function else kind_of(modules[call.path])
    site = Site(place(call), kind, call.channels, call.axis, call.index, calls, call.function)
    aside = _not_hidden(modules, call, kind)
    return replace(site, hidden=not aside, reason=aside or _hindrance(modules[call.path], call, kind))


def _not_hidden(modules: dict[str, nn.Module], call: Call, kind: str) -> str:
    """Say why an activation is not a hidden layer's, if it is not."""
    if kind in GATES:
        return "a gate, not a hidden layer"
    if call.gate:
        return "part of a squeeze-excite gate, pooled and multiplied"
    for around in (type(modules[path]).__name__ for path in _ancestors(place(call))):
        if around in FAMILIES:
            return f"part of {around}, {FAMILIES[around]}"
    return "" if call.image else "not computed from the image, such as a position embedding"


def _hindrance(module: nn.Module, call: Call, kind: str) -> str:
    """Say why a hidden layer's activation cannot be replaced, if it cannot."""
    if isinstance(module, LWTA):
        return f"competes already, {module.competitors} to a block"
    if not call.function and (kind in PARAMETRIC or module.state_dict()):
        return "has parameters, which the state dict would lose"
    if call.axis is None:
        return "which axis holds the channels is not known from what feeds it"
    return ""


def _all_calls_or_none(sites: list[Site]) -> Iterator[Site]:
    """Leave alone all calls of a function in one forward if one is: only their order tells them apart."""
    held = {site.path: site for site in sites if site.function and site.reason}
    for site in sites:
        other = held.get(site.path)
        if other is None or site.reason:
            yield site
        else:
            yield replace(site, reason=f"as {other.name}: {other.reason}")


def _ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def _never_called(modules: dict[str, nn.Module], called: set[str]) -> Iterator[Site]:
    for path, module in modules.items():
        if path not in called and kind_of(module):
            yield Site(path, kind_of(module), None, None, hidden=False, reason="never called in eval mode")


def _shown(number: int | None) -> str:
    return "?" if number is None else str(number)
