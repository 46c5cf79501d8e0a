"""Real photographs through real architectures and a CLIP checkpoint in OpenAI's format, end to end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import skimage
import sklearn.datasets
import torch

from clip_dissect_cvn.cli import main
from clip_dissect_cvn.embedded.encoder import load_clip

PHOTOGRAPHS = (  # noqa: SIM905
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg"
).split()
RESNET = ["--model", "torchvision:resnet18", "--competitors", "4", "--no-pretrained"]
WORDS = "cat\ncoffee cup\nrocket\nbrick\ngrass\nface\nmotorcycle\nflower\n"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    for name in ("china.jpg", "flower.jpg"):
        shutil.copy(Path(sklearn.datasets.__file__).parent / "images" / name, folder)
    return folder


@pytest.mark.parametrize(
    ("model", "layers", "units"),
    [
        (["--model", "cvn_deit_t16"], "blocks[11].mlp.act,head", 768 + 1000),
        (
            ["--model", "torchvision:resnet18", "--competitors", "4", "--no-pretrained"],
            "layer4,fc",
            512 + 1000,
        ),
    ],
)
def test_photographs_are_described(
    model: list[str],
    layers: str,
    units: int,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(load_clip().state_dict(), "clip.pt")
    Path("words.txt").write_text(WORDS)
    inputs = ["--d_probe", str(photographs), "--concept_set", "words.txt", "--clip_model", "clip.pt"]
    assert main(["describe", *model, *inputs, "--target_layers", layers, "--device", "cpu"]) == 0
    table = pd.read_csv(next(Path("results").iterdir()) / "descriptions.csv", keep_default_na=False)
    assert len(table) == units
    assert set(table["description"]) <= {*WORDS.split("\n")}
    assert (table["description"] == "").equals(table["dead"])
