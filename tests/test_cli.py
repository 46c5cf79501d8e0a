"""The command line: CLIP-Dissect's own flags, clear errors, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import clip_dissect_cvn as cvn
from clip_dissect_cvn.cli import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["describe", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_describe_writes_the_results_and_says_where(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--d_probe", str(pictures), "--target-layers", "head,blocks[3].mlp.act"]
    assert main(["describe", "--device=cpu", "--similarity_option", "top_k=10", *flags]) == 0
    (folder,) = Path("results").iterdir()
    table = pd.read_csv(folder / "descriptions.csv")
    assert list(table)[:4] == ["layer", "unit", "description", "similarity"]
    assert list(table["layer"].unique()) == ["blocks.3.mlp.act", "head"]
    assert json.loads((folder / "config.json").read_text())["similarity"]["top_k"] == 10
    out = capsys.readouterr().out
    assert str(folder) in out and "384" in out and "Time: loading" in out


def test_quiet_prints_the_folder_alone(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--quiet", "--d_probe", str(pictures), "--target_layers", "head"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()


def test_model_is_an_alias_and_random_weights_are_said(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "torchvision:resnet18", "--competitors", "4", "--no-pretrained"]
    layers = ["--target_layers", "layer1.0.relu.1", "--d_probe", str(pictures), "--quiet"]
    assert main(["describe", *flags, *layers]) == 0
    assert "RANDOM weights" in capsys.readouterr().err
    table = pd.read_csv(next(Path("results").iterdir()) / "descriptions.csv")
    assert set(table["layer"]) == {"layer1.0.relu.1"} and set(table["competitor"]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "cvn_deit_t17"], "Unknown model 'cvn_deit_t17'. Did you mean 'cvn_deit_t1"),
        (["--similarity_fn", "soft_wpni"], "Unknown similarity 'soft_wpni'. Did you mean 'soft_wpmi'?"),
        (["--d_probe", "shape"], "Unknown probe set 'shape'. Did you mean 'shapes'?"),
        (["--concept_set", "shape"], "Unknown concept set 'shape'. Did you mean 'shapes'?"),
        (["--clip_model", "embeded"], "Unknown encoder 'embeded'. Did you mean 'embedded'?"),
        (["--target_layers", "blocks.9.mlp.act"], "Unknown layer 'blocks.9.mlp.act'. Did you mean 'blocks."),
        (["--competitors", "4"], "contradicts"),
        (
            ["--model", "embedded_vit", "--competitors", "7"],
            "which 7 competitors do not divide. Use one of 2, 3, 4",
        ),
        (
            ["--similarity_option", "top_k"],
            "--similarity_option is 'top_k', which is not of the form KEY=VALUE.",
        ),
        (["--similarity_option", "topk=3"], "Unknown option of soft_wpmi 'topk'. Did you mean 'top_k'?"),
        (["--probe_root", "broden"], "--probe_root is 'broden', which is not of the form NAME=DIR."),
        (["--d_probe", "broden"], "--probe_root broden=DIR"),
        (["--draws", "0"], "draws is 0, but at least one is needed."),
        (["--draws", "2", "--readout", "draw"], "readout is 'draw', which is one draw, but draws is 2."),
        (["--batch_size", "0"], "batch_size is 0. Use 1 or more."),
        (["--device", "gpu"], "device is 'gpu', which is none of auto, cpu, cuda, cuda:N, mps."),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--concept_set", "nowhere.txt"], "The concept file nowhere.txt does not exist."),
        (["--template", "a photo"], "template is 'a photo', without a place for the concept."),
    ],
)
def test_bad_input_is_named_with_its_repair(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failing(capsys, *flags)
    assert not list(Path("results").glob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants absent")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "device is 'cuda', but torch sees 0 CUDA devices here. Use" in failing(capsys, "--device", "cuda")


def test_a_result_folder_that_cannot_be_written_is_found_before_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file").write_text("")
    assert "result_dir 'file' cannot be written" in failing(capsys, "--result_dir", "file")
    assert not Path("saved_activations").exists()


def test_an_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "none" in failing(capsys, "--d_probe", "./none")


def test_wrong_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["describe", "--modle", "x"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --modle x. Try: clip-dissect-cvn --help" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cvn, "describe", interrupted)
    assert main(["describe"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_list_names_everything_registered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("cvn_deit_t16", "shapes", "embedded", "ViT-B/16", "jensen_shannon"))


def test_sites_shows_what_would_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "mobilenet_v3_small"]) == 0
    out = capsys.readouterr().out
    assert "Hardswish" in out and "squeeze" in out.lower()


def test_cache_lists_and_prunes(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--quiet", "--d_probe", str(pictures), "--target_layers", "head"]) == 0
    capsys.readouterr()
    assert main(["cache", "list"]) == 0
    assert "3 artifacts" in capsys.readouterr().out  # concepts, images, head
    assert main(["cache", "prune", "--dry-run"]) == 0
    assert "3 artifacts" in (shown := capsys.readouterr().out) and "would be removed" in shown
    assert main(["cache", "prune", "--older-than", "1"]) == 0
    assert "0 artifacts" in capsys.readouterr().out
    assert main(["cache", "prune"]) == 0
    assert main(["cache", "list"]) == 0
    assert "0 artifacts" in capsys.readouterr().out
