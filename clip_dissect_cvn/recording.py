"""What the units of chosen layers do on images: their responses and, under competition, who won.

One forward pass reads all layers and stops after the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from .errors import ArgumentError, LayerError, UnknownNameError
from .gauges import Gauge, LayerPlan, Recorded, not_images
from .gauges import Readout as Readout
from .layers import Call, find_layers, resolve_layers
from .lwta import LWTA, Competition
from .pooling import PoolMode, Tokens, grid_sizes, positions_to_read, token_layout
from .randomness import uniforms
from .tracing import trace

Amp = Literal["off", "bf16", "fp16"]
AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Recorder:
    """Record layers of a model, within a ``with`` block that leaves the model as it was.

    `layers` are paths or globs (see `resolve_layers`); `calls` is the trace of the model's forward pass, made
    unless given. Positions are pooled by `pool_mode`, unless the layer is a sequence of tokens and `tokens`
    is "class": then the class token is read, in networks that classify by one.

    LWTA layers draw from uniforms that are a function of (`seed`, image, layer, position, block, draw): the
    same in every batch. `readout` is what a unit of them gives: "draw", its response in the one draw;
    "mean", the mean of its responses over two or more `draws`; "expected", its win probability times its
    linear response, with the layers before it drawn. Unless given, it is "draw" for one draw, else "mean".
    Layers without competition give their mean over the draws.

    Raises ArgumentError for options that contradict each other, UnknownNameError for a layer there is not,
    LayerError for one that never runs or whose units cannot be told.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        calls: Sequence[Call] | None = None,
        pool_mode: str = "avg",
        tokens: str = "class",
        seed: int = 0,
        draws: int = 1,
        readout: str | None = None,
        amp: str = "off",
    ) -> None:
        _check_choice("pool_mode", pool_mode, get_args(PoolMode))
        _check_choice("tokens", tokens, get_args(Tokens))
        _check_choice("amp", amp, get_args(Amp))
        calls = trace(model) if calls is None else calls
        self.model = model
        self.plans = plan_layers(model, resolve_layers(model, layers, calls), calls, tokens)
        self.pool_mode = pool_mode
        self.tokens = tokens
        self.seed = seed
        self.readout = resolve_readout(readout, draws)
        self.amp = amp
        self._lwtas = {path: module for path, module in model.named_modules() if isinstance(module, LWTA)}
        self.draws = draws if self._lwtas else 1
        self._times = Counter(call.path for call in calls if not call.function)
        self._entered: ExitStack | None = None
        self._pass = _Pass(torch.empty(0, dtype=torch.int64), 0, {})

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in order of execution."""
        return list(self.plans)

    @property
    def settings(self) -> dict[str, Any]:
        """What the recorded numbers depend on beside the model, the layer and the images, as plain data."""
        sampling = {"seed": self.seed, "draws": self.draws, "readout": self.readout} if self._lwtas else {}
        return {"pool_mode": self.pool_mode, "tokens": self.tokens, "amp": self.amp, **sampling}

    @property
    def bytes_per_image(self) -> int:
        """What all layers together need on disk for one image."""
        return sum(plan.bytes_per_image for plan in self.plans.values())

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            for path, module in self._lwtas.items():
                stack.callback(module.__dict__.pop, "referee")
                module.referee = _Referee(self, path)
            for path in {plan.path for plan in self.plans.values() if plan.competitors is None}:
                handle = self.model.get_submodule(path).register_forward_hook(partial(self._on_output, path))
                stack.callback(handle.remove)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._entered is not None:
            self._entered.close()
        self._entered = None

    def record(
        self, images: Float[Tensor, "images ..."], indices: Integer[Tensor, " images"]
    ) -> dict[str, Recorded]:
        """Return what every layer does on `images`, whose places in the probe set are `indices`.

        Raises LayerError when a layer's output is not one row of finite numbers for each image.
        """
        if self._entered is None:
            raise ArgumentError(
                "record was called outside of the recorder's block. Write: with recorder: ..."
            )
        device = next((tensor.device for tensor in self.model.parameters()), images.device)
        rows = indices.to(device)
        gauges = {
            name: Gauge.zero(plan, self.pool_mode, self.readout, rows) for name, plan in self.plans.items()
        }
        for draw in range(self.draws if len(indices) else 0):
            self._forward(images.to(device), _Pass(rows, draw, dict(gauges)))
        return {name: gauge.finished(indices, self.draws) for name, gauge in gauges.items()}

    def _forward(self, images: Tensor, one: _Pass) -> None:
        """Run the model until the last layer has been read."""
        self._pass = one
        precision = torch.autocast(images.device.type, AMP_TYPES[self.amp], enabled=self.amp != "off")
        with suppress(_AllRead), torch.inference_mode(), precision:
            self.model(images)
        if one.waiting:
            raise LayerError(
                f"{next(iter(one.waiting))} was called when the model was traced, but not on these images. "
                "Choose a layer that every image passes."
            )

    def _on_output(self, path: str, _module: nn.Module, _inputs: object, output: object) -> None:
        gauge = self._pass.take(self._name(path))
        if gauge is not None:
            gauge.read_output(output)
            self._pass.stop_if_done()

    def _name(self, path: str) -> str:
        """Name the call of the module at `path` that is under way."""
        index = self._pass.calls[path]
        self._pass.calls[path] += 1
        return path if self._times[path] <= 1 else f"{path}.{index}"


def plan_layers(
    model: nn.Module, names: Sequence[str], calls: Sequence[Call], tokens: str
) -> dict[str, LayerPlan]:
    """Decide how to read each of the named layers; raises LayerError where that cannot be told."""
    layout, grids, layers = token_layout(model), grid_sizes(model, calls), find_layers(calls)
    plans = {}
    for name in names:
        call = layers[name].call
        module = model.get_submodule(call.path)
        axis = _unit_axis(name, call, module)
        if call.shape[0] != _batch(calls):
            raise LayerError(not_images(name, tuple(call.shape), _batch(calls)))
        competitors = module.competitors if isinstance(module, LWTA) else None
        read = positions_to_read(name, call.shape, axis, layout=layout, grids=grids, tokens=tokens)
        plans[name] = LayerPlan(name, call.path, call.shape[axis], axis, read, competitors)
    return plans


def resolve_readout(readout: str | None, draws: int) -> str:
    """Check that a readout fits the number of draws, and choose one if there is none."""
    if draws < 1:
        raise ArgumentError(f"draws is {draws}, but at least one is needed. Use 1 or more.")
    if readout is None:
        return "draw" if draws == 1 else "mean"
    _check_choice("readout", readout, get_args(Readout))
    if readout == "draw" and draws > 1:
        raise ArgumentError(
            f"readout is 'draw', which is one draw, but draws is {draws}. Use readout 'mean'."
        )
    if readout == "mean" and draws == 1:
        raise ArgumentError("readout is 'mean', but draws is 1. Use 2 draws or more, or readout 'draw'.")
    return readout


class _AllRead(Exception):  # noqa: N818 -- not an error
    """Ends a forward pass whose last needed layer has been read."""


@dataclass
class _Pass:
    """One forward pass: which images, which draw, the gauges still to be read, the calls so far."""

    indices: Tensor
    draw: int
    waiting: dict[str, Gauge]
    calls: Counter[str] = field(default_factory=Counter)

    def take(self, name: str) -> Gauge | None:
        return self.waiting.pop(name, None)

    def stop_if_done(self) -> None:
        if not self.waiting:
            raise _AllRead


class _Referee:
    """Give one LWTA module the uniforms of the images under way, and read what comes of them."""

    def __init__(self, recorder: Recorder, path: str) -> None:
        self.recorder = recorder
        self.path = path
        self.name = path

    def uniforms(self, shape: tuple[int, ...]) -> Tensor:
        """Draw for h of shape (images, ...), or with the windows or patches of an image as further rows."""
        one, self.name = self.recorder._pass, self.recorder._name(self.path)
        images = len(one.indices)
        if shape[0] % images:
            raise LayerError(
                f"{self.path} has {shape[0]} rows for {images} images, but a draw belongs to one of them. "
                "Leave it out of the surgery with where=."
            )
        drawn = uniforms(
            self.recorder.seed,
            images=one.indices,
            layer=self.name,
            draw=one.draw,
            shape=(shape[0] // images, *shape[1:]),
        )
        return drawn.reshape(shape)

    def observe(self, h: Tensor, competition: Competition) -> None:
        gauge = self.recorder._pass.take(self.name)
        if gauge is not None:
            gauge.read_competition(h, competition)
            self.recorder._pass.stop_if_done()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batch(calls: Sequence[Call]) -> int:
    """Return how many images were traced: as many as rows that the whole model gives."""
    return next((call.shape[0] for call in calls if not call.path and call.shape), 1)


def _unit_axis(name: str, call: Call, module: nn.Module) -> int:
    """Return the axis of a layer's units, counted from the end."""
    rank = len(call.shape)
    if rank < 2:
        raise LayerError(f"{name} does not give one tensor of units. Choose a layer inside it or after it.")
    if isinstance(module, LWTA):
        return module.dim if module.dim < 0 else module.dim - rank
    if call.axis is None and rank > 2:
        raise LayerError(
            f"{name} gives {tuple(call.shape)}, of which it is not known which axis holds its units. "
            "Choose a layer whose output comes from a linear, convolution or normalisation layer."
        )
    return -1 if call.axis is None else call.axis


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UnknownNameError(name, value, known)
