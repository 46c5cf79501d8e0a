"""A dry run of a model on fake tensors: what it calls, in which order, and where the channels are."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .activations import FUNCTIONS, kind_of
from .channel_axis import Axes, Operation, Origin, Source, output_axes, pools
from .errors import SurgeryError

PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "multiply_"}
BLANK = ("new_", "zeros_", "ones_", "full_", "empty_", "rand")
SIZES = (224, 256, 64, 32, 299, 384, 512)


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass, or of an activation function within its own `forward`.

    `kind` is the class of the module or the name of the `function`; `index` counts its calls.
    `shape` and `axis` are of the output, when it is one tensor; the axis is counted from the end, None where
    what fed it does not tell. `image`: the result depends on the network's input. `gate`: it is computed from
    a pooled tensor and multiplies one that is not pooled. `number` orders calls by their beginning, `within`
    numbers the calls it is part of, outermost first.
    """

    path: str
    index: int
    kind: str
    function: bool
    shape: tuple[int, ...]
    axis: int | None
    image: bool
    gate: bool
    number: int
    within: tuple[int, ...]

    @property
    def channels(self) -> int | None:
        return None if self.axis is None else self.shape[self.axis]


def trace(model: nn.Module, example: Tensor | None = None) -> tuple[Call, ...]:
    """List the calls of a forward pass in eval mode, in the order in which they end.

    The pass runs on a copy that shares weights, on fake tensors where the model lets it; neither weights,
    buffers, training flags nor random state change. `example` is a batch of inputs.

    Raises SurgeryError when the model does not run on `example`, or, without one, on any usual image size.
    """
    if example is not None:
        return _dry_run(model, example)
    return _first_that_runs(model)[1]


def default_example(model: nn.Module) -> Tensor:
    """Make one input that the model runs on: zeros (1, channels, height, width) of the size that it declares.

    Raises SurgeryError when it runs on no usual image size.
    """
    return _first_that_runs(model)[0]


def _first_that_runs(model: nn.Module) -> tuple[Tensor, tuple[Call, ...]]:
    first_error, tried = None, []
    for shape in _likely_shapes(model):
        example = torch.zeros(1, *shape, **_placement(model))
        try:
            return example, _dry_run(model, example)
        except SurgeryError as error:
            first_error = first_error or error
            tried.append(tuple(example.shape))
    raise SurgeryError(
        f"{type(model).__name__} ran on no input of the shapes {', '.join(map(str, tried))}; the first said: "
        f"{first_error.__cause__ if first_error else None!r}. "
        "Pass example, a batch of inputs as the model takes them."
    ) from first_error


def _placement(model: nn.Module) -> dict[str, Any]:
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return {"device": weight.device, "dtype": weight.dtype}


def _likely_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """List shapes of one input, those that the model declares first."""
    first = next((m for m in model.modules() if hasattr(m, "in_channels") or hasattr(m, "in_features")), None)
    vector = [(first.in_features,)] if isinstance(first, nn.Linear) else []
    declared = _config(model).get("input_size", ())
    sizes = [
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
    ]
    pairs = [
        (size, size) if isinstance(size, int) else tuple(size)
        for size in (*sizes, declared[1:], *SIZES)
        if size
    ]
    channels = dict.fromkeys((*declared[:1], getattr(first, "in_channels", 3)))
    images = dict.fromkeys((count, *pair) for count in channels for pair in pairs)
    return [*images, *vector] if declared else [*vector, *images]


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return config if isinstance(config, dict) else vars(config)


def _dry_run(model: nn.Module, example: Tensor) -> tuple[Call, ...]:
    twin = _copy(model)
    if twin is not None:
        with suppress(Exception):  # whatever fake tensors cannot do: the real run tells whose fault it is
            return _run(twin, example, fake=True)
    try:
        return _run(_copy(model) or model, example, fake=False)
    except Exception as error:
        raise SurgeryError(
            f"{type(model).__name__} does not run on an input of shape {tuple(example.shape)}: "
            f"{error!r}. Pass example, a batch of inputs as the model takes them."
        ) from error


@contextmanager
def _no_log() -> Iterator[None]:
    """Keep torch from logging what fake tensors cannot do: it is tried on real ones then."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _run(model: nn.Module, example: Tensor, *, fake: bool) -> tuple[Call, ...]:
    tracer = _Tracer()
    with ExitStack() as stack:
        stack.enter_context(_own_random_state(example.device))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_no_log())
        stack.enter_context(_evaluating(model))
        stack.enter_context(tracer.listening(model))
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            example = mode.from_tensor(example)
        stack.enter_context(tracer)
        model(tracer.image(example))
    return tracer.finished()


def _copy(model: nn.Module) -> nn.Module | None:
    """Copy a model but for its weights, so that a forward pass keeps nothing in it.

    None where that cannot be: an instance's own forward may hold on to the modules that it was made for.
    """
    if any(isinstance(vars(module).get("forward"), FunctionType) for module in model.modules()):
        return None
    try:
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    except Exception:  # deepcopy runs the code of whatever the model holds
        return None
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, then put modes and buffers back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class _Tracer(TorchFunctionMode):
    """Follows origins from operation to operation, and notes calls."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: Any = WeakTensorKeyDictionary()
        self.calls: list[Call] = []
        self.gates: set[int] = set()
        self.stack: list[tuple[str, int]] = []
        self.started = 0
        self.times: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hear of every module call."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                enter, leave = partial(self._enter, path), partial(self._leave, path)
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    def image(self, example: Tensor) -> Tensor:
        self.origins[example] = Origin(frozenset({-3}) if example.ndim == 4 else None, image=True)
        return example

    def finished(self) -> tuple[Call, ...]:
        return tuple(replace(call, gate=call.number in self.gates) for call in self.calls)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(function)
        sources = tuple(Source(tensor, self._origin(tensor)) for tensor in _tensors((args, kwargs)))
        operation = Operation(name, function, args, kwargs, sources)
        output = function(*args, **kwargs)
        if name == "__setitem__":
            self._assigned(sources)
        elif sources:
            for tensor in _tensors(output):
                self._follow(operation, tensor)
            if name in FUNCTIONS and isinstance(output, Tensor):
                self._note_function(FUNCTIONS[name], output)
        return output

    def _follow(self, operation: Operation, output: Tensor) -> None:
        if isinstance(output, nn.Parameter):
            return
        image = [source.origin for source in operation.sources if source.origin.image]
        pooled = bool(image) and all(origin.pooled for origin in image)
        if not pooled and operation.name in PRODUCTS:
            self.gates.update(*(origin.pending for origin in image if origin.pooled))
        pending = frozenset[int]().union(*(origin.pending for origin in image if pooled))
        depends = bool(image) and not operation.name.startswith(BLANK)
        pooled = pooled or pools(operation, output)
        self.origins[output] = Origin(output_axes(operation, output), depends, pooled, pending)

    def _assigned(self, sources: tuple[Source, ...]) -> None:
        """``x[...] = y``: x is made of y from now on."""
        target, value = sources[0], sources[-1]
        if value.origin.image and target.tensor.ndim == value.tensor.ndim:
            self.origins[target.tensor] = value.origin

    def _enter(self, path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.stack.append((path, self.started))
        self.started += 1

    def _leave(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _, number = self.stack.pop()
        self._mend(module, inputs, output)
        self._note(path, number, type(module).__name__, output)

    def _mend(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Give outputs of code that the mode cannot see the origin that the module implies."""
        origins = [self._origin(tensor) for tensor in _tensors(inputs)]
        for tensor in _tensors(output):
            if tensor not in self.origins and not isinstance(tensor, nn.Parameter):
                unseen = Origin(None, any(origin.image for origin in origins))
                self.origins[tensor] = origins[0] if kind_of(module) else unseen

    def _note_function(self, name: str, output: Tensor) -> None:
        path = self.stack[-1][0] if self.stack else ""
        self._note(path, self.started, name, output, function=True)
        self.started += 1

    def _note(self, path: str, number: int, kind: str, output: Any, *, function: bool = False) -> None:
        tensor = output if isinstance(output, Tensor) else torch.empty(())
        origin = self._origin(tensor)
        if origin.pooled and isinstance(output, Tensor):
            self.origins[output] = replace(origin, pending=origin.pending | {number})
        index = self.times[path, kind]
        self.times[path, kind] += 1
        within = tuple(number for _, number in self.stack)
        axis = _single(origin.axes)
        self.calls.append(
            Call(path, index, kind, function, tuple(tensor.shape), axis, origin.image, False, number, within)
        )

    def _origin(self, tensor: Tensor) -> Origin:
        origin: Origin = self.origins.get(tensor, UNKNOWN)
        return origin


UNKNOWN = Origin()


def _single(axes: Axes) -> int | None:
    return next(iter(axes)) if axes and len(axes) == 1 else None


def _name(function: Callable[..., Any]) -> str:
    """Name a torch function or method, and an attribute such as ``Tensor.T`` by the attribute."""
    name = getattr(function, "__name__", "")
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def _tensors(value: Any) -> list[Tensor]:
    """Find the tensors among arguments, in nested sequences and mappings too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]
