"""The training script runs, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clip_dissect_cvn.embedded.captions import matches
from clip_dissect_cvn.embedded.networks import COMPETITORS, build_clip, build_cvn, build_vit, expanded
from clip_dissect_cvn.embedded.renderer import draw_truth
from clip_dissect_cvn.lwta import LWTA

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_embedded.py"
STEPS = 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_embedded", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_embedded", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    yield module


def run(script: ModuleType, folder: Path, name: str) -> dict[str, torch.Tensor]:
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    script.main(["train", "--only", name, "--steps", str(STEPS), "--images", "24", *places])
    return load_file(folder / "out" / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["clip", "cvn", "gelu"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = run(script, tmp_path / "whole", name)
    update = script.update

    def stopped(*arguments: Any) -> float:
        if arguments[-2] == 2:
            raise KeyboardInterrupt
        return float(update(*arguments))

    monkeypatch.setattr(script, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path / "cut", name)
    assert not (tmp_path / "cut" / "out").exists()
    torch.rand(3)
    steps: list[int] = []
    monkeypatch.setattr(script, "update", lambda *given: (steps.append(given[-2]), update(*given))[1])
    again = run(script, tmp_path / "cut", name)
    assert steps == [2]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not list((tmp_path / "cut").rglob("*.part"))


def test_training_moves_the_weights_and_leaves_global_randomness_alone(
    script: ModuleType, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    trained = run(script, tmp_path, "gelu")
    assert torch.equal(torch.get_rng_state(), state)
    with script.lots_of(-1):
        start = build_vit().state_dict()
    assert not torch.equal(trained["head.weight"].float(), start["head.weight"].half().float())


def test_the_clip_learner_sees_each_word_and_takes_the_real_tokenizer(script: ModuleType) -> None:
    learner = script.ClipLearner()
    compact = learner.network.eval()
    full = build_clip()
    full.load_state_dict(expanded(compact.state_dict(), learner.token_ids))
    texts = ["red circle", "a photo of a small striped red shape on grass at the left"]
    real = script.clip.tokenize(texts)
    cut = real[:, : script.CONTEXT].long().contiguous()
    short = torch.searchsorted(learner.token_ids, cut)
    assert torch.equal(learner.token_ids[short], cut)
    with torch.inference_mode():
        assert torch.allclose(compact.encode_text(short), full.eval().encode_text(real), atol=1e-6)


def test_the_longest_caption_fits(script: ModuleType) -> None:
    longest = "a photo of a large checkered orange triangle on brick at the bottom"
    script.clip.tokenize(longest, context_length=script.CONTEXT)


def test_agreement_is_least_where_logits_say_what_is_true(script: ModuleType) -> None:
    truths = [draw_truth(0, i, shape="star" if i % 2 else "moon") for i in range(6)]
    true = matches(truths, ["star", "moon", "star", "shape star", "moon", "moon"]).float()
    right = script.agreement(20 * true, true)
    share = true / true.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-9).log()).sum(1).mean()
    assert right.item() == pytest.approx(entropy.item(), abs=1e-3)
    assert script.agreement(-20 * true, true) > right


def test_the_pace_warms_up_and_ends_at_nothing(script: ModuleType) -> None:
    paces = np.array([script.pace(step / 500) for step in range(501)])
    assert paces.max() == pytest.approx(1, abs=0.02)
    assert 0 < paces[0] < 0.05
    assert paces[-1] == pytest.approx(0)


def test_every_matrix_of_the_blocks_and_nothing_else_goes_to_muon(script: ModuleType) -> None:
    network = build_cvn()
    muon, adam = script.build_optimisers(script.ClassLearner(network))
    counts = [sum(len(group["params"]) for group in optimiser.param_groups) for optimiser in (muon, adam)]
    assert counts == [4 * 4, len(list(network.parameters())) - 4 * 4]


def test_the_cvn_and_its_twin_have_the_same_parameters() -> None:
    cvn, gelu = build_cvn(), build_vit()
    assert {k: v.shape for k, v in cvn.state_dict().items()} == {
        k: v.shape for k, v in gelu.state_dict().items()
    }
    layers = [part for part in cvn.modules() if isinstance(part, LWTA)]
    assert [layer.competitors for layer in layers] == [COMPETITORS] * 4
    assert not any(isinstance(part, torch.nn.GELU) for part in cvn.modules())
