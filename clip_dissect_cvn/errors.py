"""Every error this package raises on purpose.

::

    CVNError
    ├── ArgumentError        (ValueError)    a value that cannot be used
    │   └── UnknownNameError (LookupError)   a name that nothing is registered under
    ├── SurgeryError         (ValueError)    a model that cannot be patched as asked
    ├── CheckpointError      (RuntimeError)  a weights file that cannot be used
    ├── DataError            (ValueError)    images or words that cannot be used
    ├── LayerError           (ValueError)    a layer whose units cannot be recorded
    ├── DeviceError          (RuntimeError)  a device that is not there
    ├── StoreError           (OSError)       an artifact that cannot be read or written
    ├── PluginError          (RuntimeError)  somebody's registration that does not work
    └── MissingExtraError    (ImportError)   an optional dependency that is not installed

A message names the argument, its value, what was expected and the repair.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CVNError(Exception):
    """Root of all errors of clip_dissect_cvn."""


class ArgumentError(CVNError, ValueError):
    """A value that cannot be used."""


class UnknownNameError(ArgumentError, LookupError):
    """A name that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, repair: str = "") -> None:
        known = sorted(known)
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        shown = ", ".join(known[:SHOWN]) + (f", … ({len(known)} in all)" if len(known) > SHOWN else "")
        super().__init__(f"Unknown {kind} {name!r}.{hint} Known: {shown}.{' ' + repair if repair else ''}")


class SurgeryError(CVNError, ValueError):
    """A model that cannot be patched as asked."""


class CheckpointError(CVNError, RuntimeError):
    """A weights file that cannot be used."""


class DataError(CVNError, ValueError):
    """Images or words that cannot be used."""


class LayerError(CVNError, ValueError):
    """A layer whose units cannot be recorded."""


class DeviceError(CVNError, RuntimeError):
    """A device that is not there."""


class StoreError(CVNError, OSError):
    """An artifact that cannot be read or written."""


class PluginError(CVNError, RuntimeError):
    """Somebody's registration that does not work."""


class MissingExtraError(CVNError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Add it with: pip install 'clip_dissect_cvn[{extra}]'"
        )


SHOWN = 12
