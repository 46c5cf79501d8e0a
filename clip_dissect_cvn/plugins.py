"""Calling what is registered under a name, which may be somebody else's."""

from __future__ import annotations

from typing import Any

from .errors import CVNError, PluginError
from .registry import Registry


def make_registered(registry: Registry[Any], name: str, **arguments: Any) -> Any:
    """Call the function that is registered under `name`.

    Raises
    ------
    UnknownNameError
        when nothing is.
    PluginError
        when the function fails, unless with an error of this package.
    """
    make = registry[name]
    try:
        return make(**arguments)
    except CVNError:
        raise
    except Exception as error:
        raise PluginError(
            f"The {registry.kind} {name!r} could not be made by {make!r}: {error!r}. Mend that function."
        ) from error
