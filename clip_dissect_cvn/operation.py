"""What surgery changes in a model, and how it is undone: entries of dictionaries, nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import SurgeryError
from .lwta import LWTA

RECORD = "_lwta_surgery"
"""The attribute of a patched model that holds its Operation."""


class PerCall(nn.Module):
    """One child for each call that is made of an activation in one forward pass: ``0``, ``1``, …"""

    def __init__(self, children: Iterable[nn.Module]) -> None:
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(str(index), child)
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        if self.calls == len(self._modules):
            raise SurgeryError(
                f"An activation was called more often than the {len(self._modules)} times that the dry run "
                "saw. Restore, and replace again with an example that takes the same way through the model."
            )
        self.calls += 1
        return self.get_submodule(str(self.calls - 1))(x)


@dataclass(eq=False)
class Rewind:
    """Start counting again, before the forward of the module that makes all the calls."""

    sequence: PerCall

    def __call__(self, _module: nn.Module, _inputs: object) -> None:
        self.sequence.calls = 0


@dataclass(eq=False)
class Entry:
    """One entry of one of a module's dictionaries (`table` is their attribute), new, and what was there."""

    holder: nn.Module
    table: str
    key: str
    new: Any
    old: Any = None
    existed: bool = False

    def attach(self) -> None:
        table = getattr(self.holder, self.table)
        self.existed, self.old = self.key in table, table.get(self.key)
        table[self.key] = self.new

    def detach(self) -> None:
        table = getattr(self.holder, self.table)
        if isinstance(self.old, nn.Module):
            self.old.train(self.new.training)
        if self.existed:
            table[self.key] = self.old
        else:
            table.pop(self.key, None)


@dataclass(eq=False)
class Operation:
    """All entries that change, and the competing layers in order of execution."""

    entries: list[Entry]
    layers: list[LWTA]

    def attach(self, model: nn.Module) -> None:
        """Change all entries, or none."""
        done: list[Entry] = []
        try:
            for entry in (*self.entries, Entry(model, "__dict__", RECORD, self)):
                entry.attach()
                done.append(entry)
        except BaseException:
            _undo(done)
            raise

    def detach(self, model: nn.Module) -> None:
        """Put everything back."""
        _undo(self.entries)
        del model.__dict__[RECORD]


def operations_in(model: nn.Module) -> dict[nn.Module, Operation]:
    """Find the patched models within a model, itself included."""
    return {module: module.__dict__[RECORD] for module in model.modules() if RECORD in module.__dict__}


def _undo(entries: list[Entry]) -> None:
    for entry in reversed(entries):
        entry.detach()
