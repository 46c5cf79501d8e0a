"""Reading one layer: from its output on a batch of images to what is recorded of its units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float16, Float32, Integer
from torch import Tensor

from .errors import LayerError
from .lwta import Competition, win_probability
from .pooling import by_position

Readout = Literal["draw", "mean", "expected"]


@dataclass(frozen=True, eq=False)
class Recorded:
    """One layer's part of an artifact `UnitActivations`, on the CPU: rows are the images recorded."""

    response: Float32[Tensor, "images units"]
    winner: Integer[Tensor, "images blocks"] | None = None
    probability: Float16[Tensor, "images units"] | None = None

    def arrays(self) -> dict[str, Tensor]:
        """Return those that there are, by name."""
        held = {"response": self.response, "winner": self.winner, "probability": self.probability}
        return {name: array for name, array in held.items() if array is not None}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is read: along which axis its units lie, and which positions are pooled."""

    name: str
    path: str
    units: int
    axis: int
    read: slice
    competitors: int | None

    @property
    def bytes_per_image(self) -> int:
        """What `Recorded` holds for one image."""
        if self.competitors is None:
            return 4 * self.units
        return 6 * self.units + self.units // self.competitors * _winner_type(self.competitors).itemsize


@dataclass
class Gauge:
    """Sum up one layer's readings over the draws."""

    plan: LayerPlan
    pool_mode: str
    readout: str
    response: Tensor
    wins: Tensor
    probability: Tensor

    @classmethod
    def zero(cls, plan: LayerPlan, pool_mode: str, readout: str, indices: Tensor) -> Gauge:
        response = torch.zeros(len(indices), plan.units, device=indices.device)
        competitors = plan.competitors or plan.units
        wins = torch.zeros(len(indices), plan.units // competitors, competitors, device=indices.device)
        return cls(plan, pool_mode, readout, response, wins, torch.zeros_like(response))

    def read_output(self, output: object) -> None:
        self.response += self._pool(by_position(self._checked(output), self.plan.axis, self.plan.read))

    def read_competition(self, h: Tensor, competition: Competition) -> None:
        assert self.plan.competitors is not None
        axis, read = self.plan.axis, self.plan.read
        linear = by_position(self._checked(h), axis, read)
        chance = win_probability(linear, self.plan.competitors)
        response = by_position(competition.response, axis, read)
        self.response += self._pool(chance * linear if self.readout == "expected" else response)
        self.probability += chance.mean(1)
        winner = by_position(competition.winner, -1, read)
        self.wins += torch.stack([(winner == u).sum(1) for u in range(self.plan.competitors)], dim=-1)

    def finished(self, indices: Tensor, draws: int) -> Recorded:
        response = (self.response / draws).cpu()
        broken = indices.cpu()[~response.isfinite().all(1)].tolist()
        if broken:
            raise LayerError(
                f"{self.plan.name} gives NaN or infinity for image {broken[0]} of the probe set. "
                "Check the model's weights and that image; with amp='fp16', use 'bf16' or 'off'."
            )
        if self.plan.competitors is None:
            return Recorded(response)
        winner = self.wins.argmax(-1).to(_winner_type(self.plan.competitors)).cpu()
        return Recorded(response, winner, (self.probability / draws).half().cpu())

    def _pool(self, values: Tensor) -> Tensor:
        return values.amax(1).float() if self.pool_mode == "max" else values.mean(1, dtype=torch.float32)

    def _checked(self, output: object) -> Tensor:
        name, images = self.plan.name, len(self.response)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise LayerError(
                f"{name} gives a {type(output).__name__} that is no tensor of numbers. "
                "Choose a layer inside it or after it."
            )
        if output.shape[0] != images:
            raise LayerError(not_images(name, tuple(output.shape), images))
        if output.shape[self.plan.axis] != self.plan.units:
            raise LayerError(
                f"{name} has {output.shape[self.plan.axis]} units, but {self.plan.units} when it was traced. "
                "Trace the model with images of the size that you record."
            )
        return output


def not_images(name: str, shape: tuple[int, ...], images: int) -> str:
    return (
        f"{name} gives {shape} for {images} images: its first axis is not the images, but windows or tokens. "
        "Choose a layer after they are put together again."
    )


def _winner_type(competitors: int) -> torch.dtype:
    return torch.uint8 if competitors <= 256 else torch.int16
