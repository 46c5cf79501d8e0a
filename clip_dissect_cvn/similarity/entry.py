"""What a similarity is, and the registry of their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeVar

from torch import Tensor

from ..errors import ArgumentError, PluginError, UnknownNameError
from ..registry import Registry

Progress = Callable[[int, int], None]
Function = TypeVar("Function", bound=Callable[..., Tensor])

HANDED_OVER = ("device", "seed", "progress")


@dataclass(frozen=True)
class Similarity:
    """A named way to compare units with concepts.

    `function` takes the concept activation matrix P (images concepts) and the unit activations (images
    units), and returns (units concepts). `factored`, where there is one, takes `ClipFeatures` and
    `UnitActivations` instead, so that P need not be formed. Both take the same keyword options. `version`
    goes into the digest of the scores: change it when the function gives other numbers; the default is a
    digest of its source. `remarks` tells, from the number of images and the options, what will differ from
    what was asked.
    """

    name: str
    function: Callable[..., Tensor] = field(repr=False)
    factored: Callable[..., Tensor] | None = field(default=None, repr=False)
    version: str = ""
    remarks: Callable[[int, Mapping[str, Any]], tuple[str, ...]] = field(
        default=lambda images, options: (), repr=False
    )

    def __post_init__(self) -> None:
        if not self.version:
            object.__setattr__(self, "version", _source_digest(self.function, self.factored))

    def __str__(self) -> str:
        return self.name

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters after the two tensors, by name."""
        return dict(list(inspect.signature(self.function).parameters.items())[2:])

    @property
    def takes_any_option(self) -> bool:
        return any(one.kind is one.VAR_KEYWORD for one in self.parameters.values())

    def options(self) -> dict[str, Any]:
        """List the options and their defaults."""
        return {
            name: one.default
            for name, one in self.parameters.items()
            if name not in HANDED_OVER and one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
        }

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the defaults.

        Raises UnknownNameError for an option there is none of, ArgumentError for one left out.
        """
        known = self.options()
        unknown = [name for name in given if name not in known]
        if unknown and not self.takes_any_option:
            if not known:
                raise ArgumentError(
                    f"{self.name} has no options, but was given {unknown[0]!r}. Leave it out."
                )
            raise UnknownNameError(f"option of {self.name}", unknown[0], known)
        resolved = {**known, **given}
        missing = [name for name, value in resolved.items() if value is inspect.Parameter.empty]
        if missing:
            raise ArgumentError(
                f"{self.name} needs the option {missing[0]!r}, which has no default. Give it a value."
            )
        return resolved


def _source_digest(*functions: Callable[..., Tensor] | None) -> str:
    return sha256("".join(map(_source, functions)).encode()).hexdigest()[:16]


def _source(function: Callable[..., Tensor] | None) -> str:
    try:
        return "" if function is None else inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code.hex()}{code.co_consts}{code.co_names}"


def _entry(name: str, value: Any) -> Similarity:
    if isinstance(value, Similarity):
        return value
    if not callable(value):
        raise PluginError(
            f"The similarity {name!r} is {value!r}, which cannot be called. "
            "Register a function of (clip_feats, unit_acts, **options)."
        )
    return Similarity(name, value)


SIMILARITIES: Registry[Similarity] = Registry("similarity", "similarities", _entry)


def register_similarity(
    name: str,
    *,
    factored: Callable[..., Tensor] | None = None,
    version: str = "",
    remarks: Callable[[int, Mapping[str, Any]], tuple[str, ...]] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function of (clip_feats, unit_acts, **options) as the similarity `name`.

    The function gets P (images concepts) and the activations (images units) as float32 tensors and returns
    (units concepts), higher for a better description. `device`, `seed` and `progress` are handed to it if it
    names them. It is returned unchanged, so that CLIP-Dissect can call it too. For the other arguments see
    `Similarity`. Raises ArgumentError when the name is taken.

    >>> @register_similarity("doctest_mean_product")
    ... def mean_product(clip_feats, unit_acts, *, scale=1.0):
    ...     return scale * unit_acts.T @ clip_feats / len(clip_feats)
    >>> SIMILARITIES["doctest_mean_product"].options()
    {'scale': 1.0}
    """

    def register(function: Function) -> Function:
        extra = {} if remarks is None else {"remarks": remarks}
        SIMILARITIES.add(name, Similarity(name, function, factored, version, **extra))
        return function

    return register
