"""From scores to names: ties, dead units, files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from clip_dissect_cvn.artifacts import Scores, UnitActivations
from clip_dissect_cvn.descriptions import Descriptions, combine, describe_layer
from clip_dissect_cvn.errors import ArgumentError, StoreError

WORDS = ("cat", "dog", "tree")


def layer(competitors: int | None = None) -> tuple[Scores, UnitActivations]:
    values = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.5, 0.1], [float("nan")] * 3, [-1.0, -2.0, -0.5]])
    dead = torch.tensor([False, False, True, False])
    winner = torch.tensor([[0, 1], [1, 1], [0, 1], [0, 1]]) if competitors else None
    acts = UnitActivations("fc", torch.randn(4, 4), winner=winner, competitors=competitors)
    return Scores("fc", values, dead), acts


def described(competitors: int | None = None) -> Descriptions:
    scores, acts = layer(competitors)
    return combine([describe_layer(scores, acts, WORDS, top=2)], {"model": {"name": "timm:a/b"}})


def test_the_first_columns_are_those_of_clip_dissect() -> None:
    frame = described().to_frame()
    assert list(frame)[:4] == ["layer", "unit", "description", "similarity"]
    assert frame["description"].tolist() == ["dog", "cat", "", "tree"]
    assert frame["similarity"].tolist()[:2] == pytest.approx([0.9, 0.5])


def test_a_dead_unit_is_flagged_and_gets_no_label() -> None:
    row = described().units.iloc[2]
    assert row["dead"] and row["description"] == "" and pd.isna(row["similarity"])
    assert 2 not in described().concepts["unit"].tolist()


def test_equal_scores_keep_the_order_of_the_words() -> None:
    unit = described().concepts.query("unit == 1")
    assert unit["description"].tolist() == ["cat", "dog"] and unit["rank"].tolist() == [1, 2]


def test_units_of_a_competition_have_their_place_and_win_rate() -> None:
    frame = described(competitors=2).units
    assert frame["block"].tolist() == [0, 0, 1, 1] and frame["competitor"].tolist() == [0, 1, 0, 1]
    assert frame["win_rate"].tolist() == [0.75, 0.25, 0.0, 1.0]
    assert described().units["block"].isna().all() and described().units["win_rate"].isna().all()


def test_words_must_fit_the_scores() -> None:
    with pytest.raises(ArgumentError, match="rate 3 concepts, but words has 2. Give the words that"):
        describe_layer(*layer(), WORDS[:2])


def test_results_are_saved_side_by_side(tmp_path: Path) -> None:
    first, second = (described().save(tmp_path / "results") for _ in range(2))
    assert first != second
    assert {path.name for path in first.iterdir()} == {"concepts.csv", "config.json", "descriptions.csv"}
    assert (first / "descriptions.csv").read_bytes() == (second / "descriptions.csv").read_bytes()
    assert first.name.startswith("timm_a_b_")
    assert json.loads((first / "config.json").read_text())["model"]["name"] == "timm:a/b"
    assert sorted(path.parent for path in (tmp_path / "results").iterdir()) == [tmp_path / "results"] * 2


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    result = described()
    monkeypatch.setattr(result.concepts, "to_csv", full)
    with pytest.raises(StoreError, match="No space left on device. Free space or choose another."):
        result.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"result_dir '.*file/results' cannot be written: .* Name a folder"):
        described().save(tmp_path / "file" / "results")
