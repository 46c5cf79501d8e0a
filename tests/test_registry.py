"""Names: duplicates refused, near misses suggested, plug-ins found without being imported."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import clip_dissect_cvn.registry as registry_module
from clip_dissect_cvn.errors import ArgumentError, CVNError, PluginError, UnknownNameError
from clip_dissect_cvn.registry import Registry


@pytest.fixture
def colours() -> Registry[str]:
    made: Registry[str] = Registry("colour", "colours")
    made.add("red", "#f00")
    made.add("green", "#0f0")
    return made


def points(*pairs: tuple[str, str]) -> EntryPoints:
    return EntryPoints(EntryPoint(name, value, "clip_dissect_cvn.colours") for name, value in pairs)


def test_is_a_sorted_read_only_mapping(colours: Registry[str]) -> None:
    assert list(colours) == ["green", "red"]
    assert len(colours) == 2 and colours["red"] == "#f00" and "blue" not in colours
    with pytest.raises(TypeError):
        colours["blue"] = "#00f"  # type: ignore[index]


def test_refuses_a_name_that_is_taken(colours: Registry[str]) -> None:
    with pytest.raises(ArgumentError, match="The colour 'red' is already registered, as '#f00'. Choose"):
        colours.add("red", "#e00")


def test_suggests_the_nearest_name(colours: Registry[str]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        colours["gren"]
    assert str(caught.value) == "Unknown colour 'gren'. Did you mean 'green'? Known: green, red."
    assert isinstance(caught.value, CVNError | LookupError)


def test_a_long_list_of_names_is_cut() -> None:
    message = str(UnknownNameError("number", "x", map(str, range(100, 120))))
    assert message.endswith("111, … (20 in all).")


def test_plugins_are_listed_before_they_are_imported(
    colours: Registry[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cvn_test_plugin.py").write_text("blue = '#00f'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = points(("blue", "cvn_test_plugin:blue"))
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found)
    assert "blue" in colours and list(colours) == ["blue", "green", "red"]
    assert "cvn_test_plugin" not in sys.modules
    assert colours["blue"] == "#00f"


def test_a_plugin_that_does_not_import_is_named(
    colours: Registry[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = points(("blue", "no_such_module:blue"))
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found)
    with pytest.raises(PluginError, match="The colour 'blue' comes from 'no_such_module:blue', which failed"):
        colours["blue"]


def test_two_plugins_of_one_name_are_refused(colours: Registry[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = points(("blue", "one:blue"), ("blue", "two:blue"))
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found)
    with pytest.raises(PluginError, match="Two packages register the colour 'blue': one:blue, two:blue."):
        colours.plugins  # noqa: B018
