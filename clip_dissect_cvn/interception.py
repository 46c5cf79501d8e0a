"""Make the activation functions that a module's own `forward` calls go through submodules instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activations import FUNCTIONS
from .sites import Call, Site


def interceptions(
    model: nn.Module, calls: Sequence[Call], chosen: Collection[Site]
) -> list[InterceptedForward]:
    """Make the forwards that lead the `chosen` functions to their children, and those that pause them."""
    forwards: dict[str, InterceptedForward] = {}
    for site in chosen:
        if site.function:
            owner = model.get_submodule(site.owner)
            forward = forwards.setdefault(site.owner, InterceptedForward(owner))
            forward.children[site.kind] = site.path.rpartition(".")[2]
    replaced = Counter(site.path for site in chosen)
    gone = {site.path for site in chosen if replaced[site.path] == site.calls}
    paths = {call.number: call.path for call in calls if not call.function}
    for call in calls:
        around = {paths[number] for number in call.within} & set(forwards) - {call.path}
        if call.function and around and call.path not in gone:
            inner = InterceptedForward(model.get_submodule(call.path))
            forwards.setdefault(call.path, inner).pauses(forwards[path] for path in around)
    return list(forwards.values())


class InterceptedForward:
    """`run` stands in for the `forward` of `owner`: its calls of functions go to the `children` named there.

    Only the calls that `owner` makes itself count: while a module with an intercepted forward of its own
    runs, those `around` it are paused.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.children: dict[str, str] = {}
        self.around: list[InterceptedForward] = []
        self.paused = 0
        self.inner = owner.__dict__.get("forward")

    def pauses(self, others: Iterable[InterceptedForward]) -> None:
        """Let calls made here not count as calls of the forwards around."""
        self.around += [other for other in others if other not in self.around]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self._alone(), _Substitution(self):
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.owner).forward(self.owner, *args, **kwargs)

    def substitute(self, function: str) -> nn.Module | None:
        """Find what stands for a torch function just now."""
        name = self.children.get(FUNCTIONS.get(function, ""))
        return None if name is None or self.paused else self.owner._modules[name]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        for other in self.around:
            other.paused += 1
        try:
            yield
        finally:
            for other in self.around:
                other.paused -= 1


class _Substitution(TorchFunctionMode):
    def __init__(self, forward: InterceptedForward) -> None:
        super().__init__()
        self.forward = forward

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        module = self.forward.substitute(name)
        if module is None:
            return function(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["input"]
        if name.endswith("_") or kwargs.get("inplace"):
            return x.copy_(module(x.clone()))
        return module(x)
